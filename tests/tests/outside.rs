//! What leads out of a cluster: images that no node has are fetched through its forwarder, and `--egress` gives pods a way out.
//! The outside is a network namespace of the test, with a name server, a stand-in for a registry and small servers in it.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use keelway_tests::cluster::{Cluster, images};
use keelway_tests::machine;
use keelway_tests::process::{eventually, run};
use keelway_tests::sandbox::ip;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::Value;
use tempfile::TempDir;

/// Addresses of documentation; the outside has nothing else.
const SERVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
const SERVER_V6: &str = "2001:db8:5::10";
const NAME_SERVER: &str = "192.0.2.53";
const REGISTRY: &str = "registry.example:5000";

/// The namespaces of the calling thread, and of what it starts: a network without any way to the machine's own, and files in which
/// the name server is the test's.
struct Outside {
    folder: TempDir,
    asked: Arc<Mutex<BTreeSet<String>>>,
}

impl Outside {
    fn enter() -> Outside {
        let folder = tempfile::tempdir().expect("a folder");
        let resolv_conf = folder.path().join("resolv.conf");
        let text = format!("nameserver {NAME_SERVER}\n");
        std::fs::write(&resolv_conf, text).expect("written");
        let apart = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_FS;
        unshare(apart).expect("namespaces");
        let none = None::<&str>;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(none, "/", none, private, none).expect("mounts are private");
        mount(
            Some(&resolv_conf),
            "/etc/resolv.conf",
            none,
            MsFlags::MS_BIND,
            none,
        )
        .expect("mounted");
        ip("link set lo up").expect("up");
        for address in [
            format!("{SERVER}/32"),
            format!("{NAME_SERVER}/32"),
            format!("{SERVER_V6}/128 nodad"),
        ] {
            ip(&format!("address add {address} dev lo")).expect("an address");
        }
        let asked = Arc::default();
        answer_names();
        serve_registry(folder.path(), &asked);
        Outside { folder, asked }
    }

    /// A cluster that knows the registry as one without TLS, with the example in it.
    fn cluster(&self, name: &str, flags: &[&str]) -> Option<Cluster> {
        let registries = self.folder.path().join("registries");
        let hosts = registries.join(REGISTRY);
        std::fs::create_dir_all(&hosts).expect("made");
        let text = format!(
            "server = \"http://{REGISTRY}\"\n[host.\"http://{REGISTRY}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
        );
        std::fs::write(hosts.join("hosts.toml"), text).expect("written");
        let config = self.folder.path().join("config.yaml");
        let text = format!("registries: {}\n", registries.display());
        std::fs::write(&config, text).expect("written");
        let config = config.display().to_string();
        let name = format!("{name}-{}", std::process::id());
        let mut arguments = vec!["--nodes", "1", "--config", config.as_str()];
        arguments.extend(flags);
        let cluster = Cluster::reaching_out(&name, &arguments)?;
        cluster.run_example();
        Some(cluster)
    }
}

/// Runs a test with an outside of its own; both end with the thread.
fn with_outside(test: impl FnOnce(&Outside) + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    let run = thread::spawn(|| test(&Outside::enter()));
    if let Err(panic) = run.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A name server for which every name is the server's. Like the other servers it ends with the test's process.
fn answer_names() {
    let socket = UdpSocket::bind((NAME_SERVER, 53)).expect("a name server's port");
    thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut query) {
            if let Some(answer) = address_of(&query[..length]) {
                let _ = socket.send_to(&answer, from);
            }
        }
    });
}

/// The answer to a question (RFC 1035, 4.1): the server's address, or that there is none of this type.
fn address_of(query: &[u8]) -> Option<Vec<u8>> {
    const HEADER: usize = 12;
    const A: [u8; 2] = [0, 1];
    let name = query.get(HEADER..)?.iter().position(|byte| *byte == 0)?;
    let question = query.get(HEADER..HEADER + name + 5)?;
    let is_a = question.get(name + 1..name + 3)? == A;
    let mut answer = query.get(..2)?.to_vec();
    // A response without error, by a server that recurses; one question, one answer or none.
    answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]);
    answer.extend(question);
    if is_a {
        // The question's name, A, IN, 60 seconds, 4 bytes.
        answer.extend([0xc0, HEADER as u8, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(SERVER.octets());
    }
    Some(answer)
}

/// A registry that has one image, by any name and tag: what the distribution API needs for a pull.
fn serve_registry(folder: &Path, asked: &Arc<Mutex<BTreeSet<String>>>) {
    let layout = folder.join("layout");
    std::fs::create_dir(&layout).expect("made");
    let archive = images().join("echo.tar").display().to_string();
    let into = layout.display().to_string();
    run(&["tar", "-xf", &archive, "-C", &into], &[], 30).ok();
    let listener = TcpListener::bind((SERVER, 5000)).expect("a port");
    let asked = asked.clone();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (layout, asked) = (layout.clone(), asked.clone());
            thread::spawn(move || answer(stream, &layout, &asked));
        }
    });
}

/// One request of one connection.
fn answer(mut stream: TcpStream, layout: &Path, asked: &Mutex<BTreeSet<String>>) {
    let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
    let request = lines.next().unwrap_or_default();
    // The head has to be read, or the answer might be lost with a reset.
    let _ = lines.take_while(|line| !line.is_empty()).count();
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let path = path.split('?').next().unwrap_or("");
    asked.lock().expect("no panic").insert(path.to_owned());
    let (status, kind, body) = match found(layout, path) {
        Some((kind, body)) => ("200 OK", kind, body),
        None => ("404 Not Found", "application/json".to_owned(), Vec::new()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let body = if method == "HEAD" { Vec::new() } else { body };
    let _ = stream.write_all(&[head.into_bytes(), body].concat());
}

fn found(layout: &Path, path: &str) -> Option<(String, Vec<u8>)> {
    if path == "/v2/" {
        return Some(("application/json".to_owned(), b"{}".to_vec()));
    }
    let blob = |digest: &str| {
        let file: PathBuf = layout.join("blobs").join(digest.replace(':', "/"));
        std::fs::read(file).ok()
    };
    let (place, reference) = path.rsplit_once('/')?;
    if place.ends_with("/manifests") {
        let index = std::fs::read(layout.join("index.json")).ok()?;
        let index: Value = serde_json::from_slice(&index).ok()?;
        let manifest = &index["manifests"][0];
        let digest = match reference.strip_prefix("sha256:") {
            Some(_) => reference,
            None => manifest["digest"].as_str()?,
        };
        let kind = manifest["mediaType"].as_str()?;
        return Some((kind.to_owned(), blob(digest)?));
    }
    let data = blob(reference).filter(|_| place.ends_with("/blobs"))?;
    Some(("application/octet-stream".to_owned(), data))
}

fn run_image(cluster: &Cluster, image: &str) {
    let image = format!("--image={image}");
    let command = ["run", "fetched", &image, "--restart=Never", "--", "--help"];
    cluster.kubectl(&command).ok();
}

fn state(cluster: &Cluster) -> Value {
    let pod = cluster.get(&["pod", "fetched"]);
    pod["status"]["containerStatuses"][0]["state"].clone()
}

/// Bytes that a pod is sent: enough that windows fill.
const BYTES: usize = 8 << 20;

/// A server that tells each client its address, sends it [`BYTES`] and closes, and one that sends datagrams back: their ports.
fn servers(address: IpAddr) -> (u16, u16) {
    let listener = TcpListener::bind((address, 0)).expect("a port");
    let socket = UdpSocket::bind((address, 0)).expect("a port");
    let port = |address: std::io::Result<SocketAddr>| address.expect("an address").port();
    let ports = (port(listener.local_addr()), port(socket.local_addr()));
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let from = stream.peer_addr().map(|peer| peer.ip().to_string());
            let from = from.unwrap_or_default();
            let _ = stream.write_all(format!("{from}\n").as_bytes());
            let _ = stream.write_all(&vec![b'x'; BYTES]);
        }
    });
    thread::spawn(move || {
        let mut datagram = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut datagram) {
            let _ = socket.send_to(&datagram[..length], from);
        }
    });
    ports
}

#[test]
fn a_cluster_with_a_way_out_fetches_images_and_lets_pods_out() {
    with_outside(|outside| {
        let flags = ["--egress", "--ip-family", "dual"];
        let Some(cluster) = outside.cluster("outside", &flags) else {
            return;
        };
        run_image(&cluster, &format!("{REGISTRY}/some/echo:1"));
        eventually("the image has run", Duration::from_secs(60), || {
            let state = state(&cluster);
            match state["terminated"]["exitCode"].as_i64() {
                Some(0) => Ok(()),
                _ => Err(state.to_string()),
            }
        });
        let asked = outside.asked.lock().expect("no panic").clone();
        assert!(asked.contains("/v2/some/echo/manifests/1"), "{asked:?}");
        check_proxy_is_for_nodes(&cluster);

        check_dns_manifest(&cluster);

        // What is outside sees an address of its own, whole streams and datagrams come back, in both families, and by name.
        let name = "www.outside.example";
        let answer = cluster.in_client(&format!("dig +short {name} A")).ok();
        assert_eq!(answer, format!("{SERVER}\n"));
        let v6: IpAddr = SERVER_V6.parse().expect("an address");
        let (tcp, udp) = servers(SERVER.into());
        check_streams(&cluster, name, tcp, SERVER.into());
        check_datagrams(&cluster, &SERVER.to_string(), udp);
        let (tcp_v6, udp_v6) = servers(v6);
        check_streams(&cluster, SERVER_V6, tcp_v6, v6);
        check_datagrams(&cluster, SERVER_V6, udp_v6);
        // What nobody answers to is no connection that ends well; what is never outside goes nowhere.
        for address in [
            "192.0.2.10",
            "127.0.0.1",
            "169.254.169.254",
            "198.18.255.254",
        ] {
            let answer = cluster.in_client(&format!("nc -w 2 {address} 9 < /dev/null"));
            assert!(!answer.success && answer.stdout.is_empty(), "{answer}");
        }
        check_restart(&cluster, udp);
    });
}

/// That names are asked for outside is the manifest's own doing: it has the servers ask whom their node asks.
fn check_dns_manifest(cluster: &Cluster) {
    let set = cluster.get(&["daemonset", "keelway-dns", "--namespace=kube-system"]);
    let arguments = set["spec"]["template"]["spec"]["containers"][0]["args"].as_array();
    let upstreams: Vec<&str> = arguments
        .into_iter()
        .flatten()
        .filter_map(|argument| argument.as_str()?.strip_prefix("--upstream="))
        .collect();
    assert_eq!(upstreams, ["/etc/resolv.conf"]);
}

/// From a pod's address the proxy says that it is not for pods.
fn check_proxy_is_for_nodes(cluster: &Cluster) {
    let status = cluster.status();
    let proxy = status["nodes"][0]["address"].as_str();
    let proxy = proxy.expect("the control plane has an address");
    let script = format!(
        "printf 'CONNECT {REGISTRY} HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n' | nc -w 5 {proxy} 3128"
    );
    let answer = cluster.in_client(&script);
    assert!(answer.stdout.contains("403 Forbidden"), "{answer}");
}

/// A client that has said all it has to say at once is still sent all, and twice at a time.
fn check_streams(cluster: &Cluster, server: &str, port: u16, seen_as: IpAddr) {
    let client =
        format!("nc -w 20 {server} {port} < /dev/null | (read -r first; echo $first; wc -c)");
    let answer = cluster
        .in_client(&format!("({client}) & {client}; wait"))
        .ok();
    let lines: Vec<&str> = answer.lines().map(str::trim).collect();
    let (seen_as, bytes) = (seen_as.to_string(), BYTES.to_string());
    assert_eq!(lines.len(), 4, "{lines:?}");
    for expected in [&seen_as, &bytes] {
        let found = lines.iter().filter(|line| **line == expected).count();
        assert_eq!(found, 2, "{lines:?}");
    }
}

fn check_datagrams(cluster: &Cluster, server: &str, port: u16) {
    // Three of one flow, the later two when the kernel knows the flow already.
    let script = format!(
        "(echo over; sleep 0.2; echo and; sleep 0.2; echo back) | nc -u -w 5 -W 3 {server} {port}"
    );
    assert_eq!(cluster.in_client(&script).ok(), "over\nand\nback\n");
}

/// A forwarder that dies is started again, and finds its way.
fn check_restart(cluster: &Cluster, udp: u16) {
    let forwarder = || {
        let status = cluster.status();
        let services = status["nodes"][0]["services"].as_array().cloned();
        let mut services = services.unwrap_or_default().into_iter();
        services.find(|service| service["name"] == "forwarder")
    };
    assert_eq!(forwarder().expect("it runs")["restarts"], 0);
    let within = format!("{}/control-plane", cluster.name);
    let is_forwarder = |process: &machine::Process| {
        let line = std::fs::read(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
        String::from_utf8_lossy(&line).contains("\0forward\0")
    };
    let processes = machine::processes(&within, "keelway");
    let found: Vec<_> = processes.into_iter().filter(is_forwarder).collect();
    let [process] = &found[..] else {
        panic!("one forwarder: {found:?}");
    };
    let pid = nix::unistd::Pid::from_raw(process.pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("killed");
    eventually("a new forwarder", Duration::from_secs(20), || {
        let script = format!("echo again | nc -u -w 2 -W 1 {SERVER} {udp}");
        let answer = cluster.in_client(&script);
        let known = forwarder().unwrap_or_default();
        let again = known["restarts"] == 1 && answer.stdout == "again\n";
        again
            .then_some(())
            .ok_or_else(|| format!("{known} {answer}"))
    });
}

#[test]
fn a_cluster_without_one_leads_nowhere() {
    with_outside(|outside| {
        let Some(cluster) = outside.cluster("inside", &["--no-pull"]) else {
            return;
        };
        run_image(&cluster, &format!("{REGISTRY}/some/echo:1"));
        eventually("the pull has failed", Duration::from_secs(60), || {
            let waiting = state(&cluster)["waiting"].clone();
            let reason = waiting["reason"].as_str().unwrap_or_default();
            let failed = ["ErrImagePull", "ImagePullBackOff"].contains(&reason);
            failed.then_some(()).ok_or_else(|| waiting.to_string())
        });
        let services = cluster.status()["nodes"][0]["services"].to_string();
        assert!(!services.contains("forwarder"), "{services}");
        let asked = outside.asked.lock().expect("no panic").clone();
        assert_eq!(asked, BTreeSet::new());
        let (tcp, _) = servers(SERVER.into());
        let out = cluster.in_client(&format!("nc -w 2 {SERVER} {tcp} < /dev/null"));
        assert!(!out.success && out.stdout.is_empty(), "{out}");
    });
}
