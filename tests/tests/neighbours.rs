//! What else may be on a node: packet filters that drop what is forwarded, programs that keep the network, strict reverse path filters,
//! what others left behind. Pods are reached all the same, or `status` says what to do.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use keelway_tests::agents::{AgentNode, Pod, program, two_dual_stack_nodes, until};
use keelway_tests::sandbox::{Network, Sandbox, ip, is_root};

/// Two nodes, their agents not started yet.
fn nodes(test: &str) -> Option<([AgentNode; 2], tempfile::TempDir, Sandbox)> {
    if !is_root(test) {
        return None;
    }
    let sandbox = Sandbox::enter().expect("a sandbox");
    let dir = tempfile::tempdir().expect("a folder");
    // Through the overlay and directly alike; here it is the way that the stack forwards.
    let (cluster, nodes) =
        two_dual_stack_nodes(&sandbox, dir.path(), &["--routing", "direct"]).expect("two nodes");
    cluster.write(&[]).expect("the cluster's file");
    Some((nodes, dir, sandbox))
}

/// Two nodes with agents, and a pod on each.
struct Wired {
    first: AgentNode,
    /// Its agent ends with it.
    _second: AgentNode,
    a: Pod,
    b: Pod,
    /// Last, so that it is there until the agents have ended.
    _dir: tempfile::TempDir,
    _sandbox: Sandbox,
}

fn wired(test: &str) -> Option<Wired> {
    let ([mut first, mut second], dir, sandbox) = nodes(test)?;
    for node in [&mut first, &mut second] {
        node.start().expect("an agent");
    }
    let (a, b) = (
        first.wire("a").expect("a pod"),
        second.wire("b").expect("a pod"),
    );
    Some(Wired {
        first,
        _second: second,
        a,
        b,
        _dir: dir,
        _sandbox: sandbox,
    })
}

fn on(node: &AgentNode, words: &[&str]) -> Result<String> {
    let output = node
        .host
        .run(|| Command::new(words[0]).args(&words[1..]).output())
        .with_context(|| words.join(" "))?;
    ensure!(
        output.status.success(),
        "{}: {}",
        words.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A message from one pod to another and back, at each of its addresses.
fn reach(server: &Pod, client: &Network) -> Result<()> {
    for address in &server.addresses {
        round_trip(&server.network, *address, client)
            .with_context(|| format!("{} at {address}", server.container))?;
    }
    Ok(())
}

fn round_trip(server: &Network, address: IpAddr, client: &Network) -> Result<()> {
    let listener = server.run(|| TcpListener::bind((address, 7000)))?;
    listener.set_nonblocking(false)?;
    let serving = thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut bytes = [0; 5];
        stream.read_exact(&mut bytes)?;
        stream.write_all(&bytes)
    });
    let asked = client.run(|| -> Result<[u8; 5]> {
        let at = SocketAddr::new(address, 7000);
        let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"hello")?;
        let mut bytes = [0; 5];
        stream.read_exact(&mut bytes)?;
        Ok(bytes)
    });
    if asked.is_err() {
        // The server has nobody to wait for any more.
        server.run(|| TcpStream::connect((address, 7000)).map(drop))?;
        let _ = serving.join();
        return asked.map(drop);
    }
    serving.join().expect("no panic")?;
    Ok(())
}

fn notes(node: &AgentNode) -> Result<String> {
    Ok(node.report()?["notes"].to_string())
}

#[test]
fn pods_pass_filters_that_drop_what_is_forwarded() {
    let Some(lab) = wired("pods_pass_filters_that_drop_what_is_forwarded") else {
        return;
    };
    let Wired {
        mut first, a, b, ..
    } = lab;
    reach(&b, &a.network).expect("before");
    // As Docker and ufw have it, and as nft's own users do, in tables of their own.
    for words in [
        "add table ip filter",
        "add chain ip filter FORWARD { type filter hook forward priority filter; policy drop; }",
        "add table ip6 filter",
        "add chain ip6 filter FORWARD { type filter hook forward priority filter; policy drop; }",
        "add table inet mine",
        "add chain inet mine closed { type filter hook forward priority 0; policy drop; }",
    ] {
        on(&first, &["nft", words]).expect("nft");
    }
    let opened = |what: &str| {
        until(what, || {
            Ok(reach(&b, &a.network)
                .and_then(|()| reach(&a, &b.network))
                .ok())
        })
        .expect("pods pass")
    };
    opened("pods pass the closed filters");
    let said = notes(&first).expect("a report");
    for chain in [
        "FORWARD (table ip filter)",
        "FORWARD (table ip6 filter)",
        "closed (table inet mine)",
    ] {
        assert!(said.contains(chain), "{chain}: {said}");
    }
    let listed = on(&first, &["nft", "list chain ip filter FORWARD"]).expect("nft");
    assert!(
        listed.contains("policy drop")
            && listed.contains("iifname \"kw*\"")
            && listed.contains("oifname \"kw*\""),
        "{listed}"
    );
    // Once is enough, also for the next agent.
    first.kill_worker().expect("another worker");
    first
        .wait("looked around", |report| {
            report["notes"]
                .as_array()
                .is_some_and(|notes| notes.len() >= 3)
        })
        .expect("a report");
    let rules = on(&first, &["nft", "list", "ruleset"]).expect("nft");
    assert_eq!(rules.matches("keelway: from pods").count(), 3, "{rules}");
    assert_eq!(rules.matches("keelway: to pods").count(), 3, "{rules}");
    // Somebody loads the filter anew, and ours are gone.
    on(&first, &["nft", "flush chain inet mine closed"]).expect("nft");
    opened("pods pass again");

    // With the agent, they go.
    first.stop().expect("a good end");
    let mut uninstall = Command::new(program("keelway-agent").expect("the agent"));
    uninstall.args(["uninstall", "--with-pods", "--bin-dir", "/nonexistent"]);
    for (flag, path) in [
        ("--cni-conf-dir", first.state_dir()),
        ("--pin-root", first.pin_root()),
        ("--state-dir", first.state_dir()),
        ("--socket", first.socket()),
    ] {
        uninstall.arg(flag).arg(path);
    }
    let done = first.host.run(|| uninstall.output()).expect("it runs");
    assert!(done.status.success(), "{done:?}");
    let rules = on(&first, &["nft", "list", "ruleset"]).expect("nft");
    assert!(
        !rules.contains("keelway") && rules.contains("policy drop"),
        "{rules}"
    );
}

/// A program that does nothing, under another's name.
struct Impostor(Child);

impl Impostor {
    fn start(node: &AgentNode, dir: &tempfile::TempDir, name: &str) -> Result<Self> {
        let path = dir.path().join(name);
        // One that runs already cannot be written to.
        if !path.exists() {
            fs::copy("/bin/sleep", &path)?;
        }
        let mut command = Command::new(path);
        command.arg("600").stdin(Stdio::null());
        Ok(Self(node.host.run(|| command.spawn())?))
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn what_cannot_be_worked_with_is_named_with_what_to_do() {
    let Some(([mut first, second], dir, _sandbox)) =
        nodes("what_cannot_be_worked_with_is_named_with_what_to_do")
    else {
        return;
    };
    // Left by others.
    for words in [
        "add table ip nat",
        "add chain ip nat KUBE-SERVICES",
        "add table inet firewalld",
        "add chain inet firewalld filter_FORWARD { type filter hook forward priority 10; }",
    ] {
        on(&first, &["nft", words]).expect("nft");
    }
    first
        .host
        .run(|| ip("link add cni0 type bridge"))
        .expect("a bridge");
    let conf_dir = first.conf_list().parent().expect("its folder").to_owned();
    fs::create_dir_all(&conf_dir).expect("a folder");
    fs::write(conf_dir.join("00-other.conflist"), "{}").expect("a file");
    let _programs = [
        Impostor::start(&first, &dir, "NetworkManager").expect("a program"),
        Impostor::start(&first, &dir, "systemd-networkd").expect("a program"),
    ];
    // One of another node is none of this one's business.
    let _elsewhere = Impostor::start(&second, &dir, "NetworkManager").expect("a program");
    first.start().expect("an agent");
    let report = first
        .wait("looked around", |report| {
            report["notes"]
                .as_array()
                .is_some_and(|notes| notes.len() >= 6)
        })
        .expect("a report");
    let said = report["notes"].to_string();
    for (what, advice) in [
        ("interface cni0 is of the bridge plugin", "astray"),
        ("00-other.conflist comes before", "instead"),
        ("rules of kube-proxy", "kube-proxy --cleanup"),
        ("firewalld filters", "--zone=trusted"),
        ("NetworkManager runs here", "unmanaged-devices"),
        ("systemd-networkd runs here", "ManageForeignRoutes=no"),
    ] {
        assert!(
            said.contains(what) && said.contains(advice),
            "{what}: {said}"
        );
    }
    let shown = first.command(&["status"]).expect("status").stdout;
    assert!(shown.contains("NetworkManager runs here"), "{shown}");
}

#[test]
fn what_programs_that_keep_the_network_take_away_comes_back() {
    let Some(lab) = wired("what_programs_that_keep_the_network_take_away_comes_back") else {
        return;
    };
    let Wired { first, a, b, .. } = lab;
    reach(&a, &b.network).expect("before");
    let state = || {
        let mut lines: Vec<String> = ["-4 route", "-6 route", "-o addr show keelway-svc"]
            .map(|what| {
                let words: Vec<&str> = ["ip"].into_iter().chain(what.split(' ')).collect();
                on(&first, &words).expect("ip")
            })
            .join("\n")
            .lines()
            .map(|line| line.trim_end().to_owned())
            .collect();
        lines.sort();
        lines
    };
    let whole = state();
    // As systemd-networkd does when it restarts.
    for family in ["-4", "-6"] {
        on(&first, &["ip", family, "route", "flush", "proto", "107"]).expect("ip");
    }
    on(
        &first,
        &[
            "ip",
            "addr",
            "flush",
            "dev",
            "keelway-svc",
            "scope",
            "global",
        ],
    )
    .expect("ip");
    reach(&a, &first.host).expect_err("the host's way to the pod is gone");
    until(
        "everything is back",
        || Ok((state() == whole).then_some(())),
    )
    .expect("in time");
    reach(&a, &b.network).expect("after");
    reach(&a, &first.host).expect("after");

    // A strict reverse path filter, set behind the agent's back; and the pair removed.
    first
        .host
        .run(|| ip("link del keelway-svc"))
        .expect("it goes");
    first
        .wait("another worker", |report| {
            report["ready"] == true
                && on(&first, &["ip", "-o", "link", "show", "keelway-svc"]).is_ok()
        })
        .expect("in time");
    reach(&a, &b.network).expect("at last");
}

#[test]
fn a_closed_filter_of_the_old_iptables_is_named_until_pods_may_pass() {
    let Some(lab) = wired("a_closed_filter_of_the_old_iptables") else {
        return;
    };
    let Wired { first, a, b, .. } = lab;
    let programs = ["iptables-legacy", "ip6tables-legacy"];
    if on(&first, &["sh", "-c", "command -v iptables-legacy"]).is_err() {
        println!("skipped: needs iptables-legacy");
        return;
    }
    let closed = |said: &str, program: &str| {
        let policy = format!("the policy of FORWARD is DROP in {program}");
        said.contains(&policy) && said.contains(&format!("{program} -I FORWARD -i kw+"))
    };
    // A table that lets everything pass is in nobody's way.
    for (program, source) in programs.into_iter().zip(["192.0.2.1", "2001:db8::1"]) {
        let words = [program, "-A", "FORWARD", "-s", source, "-j", "DROP"];
        on(&first, &words).expect("a rule");
    }
    reach(&b, &a.network).expect("open filters");
    for program in programs {
        on(&first, &[program, "-P", "FORWARD", "DROP"]).expect("a policy");
    }
    reach(&b, &a.network).expect_err("closed filters");
    let told = until("both are named", || {
        let said = notes(&first)?;
        Ok(programs
            .iter()
            .all(|program| closed(&said, program))
            .then_some(said))
    });
    told.expect("in time");
    // As it says.
    for program in programs {
        for side in ["-i", "-o"] {
            on(
                &first,
                &[program, "-I", "FORWARD", side, "kw+", "-j", "ACCEPT"],
            )
            .expect("a rule");
        }
    }
    reach(&b, &a.network).expect("pods may pass");
    until("nothing is named", || {
        Ok((!notes(&first)?.contains("-legacy")).then_some(()))
    })
    .expect("in time");
}
