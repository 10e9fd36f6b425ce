//! The plugin as a runtime calls it, against an agent that the test plays.

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use keelway_cni::protocol::{Request, Response, answer, receive};
use keelway_cni::{AddResult, Attachment, Interface, IpConfig, Route, spool};
use serde_json::{Value, json};

type Env<'a> = Vec<(&'a str, &'a str)>;

fn plugin(env: &[(&str, &str)], stdin: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_keelway-cni"))
        .env_clear()
        .envs(env.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start the plugin");
    // A plugin that has already refused its environment closes its end; that is no fault of the test.
    let _ = child
        .stdin
        .take()
        .expect("stdin")
        .write_all(stdin.as_bytes());
    child.wait_with_output().expect("output")
}

fn conf(dir: &Path, version: &str) -> String {
    json!({
        "cniVersion": version, "name": "keelway", "type": "keelway-cni",
        "socket": dir.join("agent.sock"), "spool": dir.join("deleted"),
    })
    .to_string()
}

fn error_of(output: &Output) -> (u64, String) {
    assert!(!output.status.success(), "{output:?}");
    let value: Value =
        serde_json::from_slice(&output.stdout).expect("an error as JSON on standard output");
    (
        value["code"].as_u64().expect("code"),
        value["msg"].as_str().expect("msg").to_owned(),
    )
}

const POD: [(&str, &str); 3] = [
    ("CNI_CONTAINERID", "c1"),
    ("CNI_IFNAME", "eth0"),
    ("CNI_ARGS", "K8S_POD_NAME=web"),
];

fn with<'a>(more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    POD.iter().copied().chain(more.iter().copied()).collect()
}

#[test]
fn version_lists_what_is_supported() {
    let output = plugin(&[("CNI_COMMAND", "VERSION")], r#"{"cniVersion": "1.0.0"}"#);
    assert!(output.status.success());
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        value,
        json!({"cniVersion": "1.0.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]})
    );
}

#[test]
fn wrong_input_is_refused_with_the_code_of_the_specification() {
    let dir = tempfile::tempdir().unwrap();
    let good = conf(dir.path(), "1.0.0");
    let add = [("CNI_COMMAND", "ADD"), ("CNI_NETNS", "/proc/1/ns/nothing")];
    let cases: Vec<(Env<'_>, &str, u64, &str)> = vec![
        (vec![], &good, 4, "CNI_COMMAND is not set"),
        (
            with(&[("CNI_COMMAND", "FROB")]),
            &good,
            4,
            "CNI_COMMAND \"FROB\"",
        ),
        (
            vec![("CNI_COMMAND", "ADD"), ("CNI_IFNAME", "eth0")],
            &good,
            4,
            "CNI_CONTAINERID is not set",
        ),
        (
            vec![("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "c1")],
            &good,
            4,
            "CNI_IFNAME is not set",
        ),
        (
            with(&[("CNI_COMMAND", "ADD")]),
            &good,
            4,
            "CNI_NETNS is not set",
        ),
        (with(&add), &good, 4, "cannot be opened"),
        (
            with(&[("CNI_COMMAND", "ADD"), ("CNI_NETNS", "/etc/passwd")]),
            &good,
            4,
            "is not a namespace",
        ),
        (
            with(&[("CNI_COMMAND", "ADD"), ("CNI_NETNS", "/proc/self/ns/net")]),
            &good,
            4,
            "not a container's",
        ),
        (with(&add), "{\"cniVersion\": ", 6, "cannot be read"),
        (with(&add), "", 6, "no network configuration"),
        (with(&add), "[]", 6, "cannot be read"),
        (
            with(&add),
            r#"{"cniVersion": "0.2.0", "name": "x"}"#,
            1,
            "0.2.0",
        ),
        (with(&add), r#"{"name": "x"}"#, 7, "no cniVersion"),
        (
            with(&add),
            r#"{"cniVersion": "1.0.0", "name": "a/b"}"#,
            7,
            "not a network name",
        ),
        (
            with(&add),
            r#"{"cniVersion": "1.0.0", "name": "x", "socket": "agent"}"#,
            7,
            "not an absolute path",
        ),
        (
            vec![("CNI_COMMAND", "STATUS")],
            &good,
            1,
            "STATUS needs cniVersion 1.1.0",
        ),
        (
            vec![("CNI_COMMAND", "GC")],
            &good,
            1,
            "GC needs cniVersion 1.1.0",
        ),
        (
            vec![("CNI_COMMAND", "GC")],
            r#"{"cniVersion": "1.1.0", "name": "x"}"#,
            7,
            "valid-attachments",
        ),
        (
            with(&[("CNI_COMMAND", "CHECK"), ("CNI_NETNS", "/proc/1/ns/net")]),
            &good,
            7,
            "prevResult",
        ),
        (
            with(&[("CNI_COMMAND", "CHECK"), ("CNI_NETNS", "/proc/1/ns/net")]),
            r#"{"cniVersion": "0.3.1", "name": "x", "prevResult": {}}"#,
            1,
            "CHECK needs cniVersion 0.4.0",
        ),
        (
            with(&add),
            r#"{"cniVersion": "1.0.0", "name": "x", "prevResult": {"ips": {}}}"#,
            7,
            "ips is not a list",
        ),
        (
            with(&add),
            r#"{"cniVersion": "1.0.0", "name": "x", "runtimeConfig": {"mac": "x"}}"#,
            7,
            "mac",
        ),
        (
            with(&[
                ("CNI_COMMAND", "ADD"),
                ("CNI_NETNS", "/x"),
                ("CNI_ARGS", "A"),
            ]),
            &good,
            4,
            "KEY=VALUE",
        ),
    ];
    for (env, stdin, code, message) in cases {
        let (got, text) = error_of(&plugin(&env, stdin));
        assert!(
            got == code && text.contains(message),
            "{env:?} {stdin:?}: code {got}, {text:?}"
        );
    }
    assert!(!dir.path().join("deleted").exists(), "nothing half made");
}

#[test]
fn del_succeeds_without_an_agent_and_is_written_down_once() {
    let dir = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        let output = plugin(&with(&[("CNI_COMMAND", "DEL")]), &conf(dir.path(), "1.0.0"));
        assert!(
            output.status.success() && output.stdout.is_empty(),
            "{output:?}"
        );
    }
    let attachment = Attachment {
        container_id: "c1".into(),
        ifname: "eth0".into(),
    };
    let spooled = dir.path().join("deleted");
    assert_eq!(
        spool::list(&spooled).unwrap(),
        std::slice::from_ref(&attachment)
    );
    std::fs::write(spooled.join("c2:eth0"), "{").unwrap();
    spool::remove(&spooled, &attachment).unwrap();
    assert_eq!(spool::list(&spooled).unwrap(), []);
}

#[test]
fn errors_are_told_in_the_version_of_the_configuration() {
    for (config, version) in [
        (r#"{"cniVersion": "0.4.0", "name": "a/b"}"#, "0.4.0"),
        (r#"{"cniVersion": "9.9.9", "name": "x"}"#, "9.9.9"),
        ("{", "1.0.0"),
    ] {
        let output = plugin(&with(&[("CNI_COMMAND", "DEL")]), config);
        assert!(!output.status.success());
        let error: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(error["cniVersion"], version);
    }
}

#[test]
fn a_spool_that_is_full_takes_no_more_and_del_succeeds_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let spooled = dir.path().join("deleted");
    std::fs::create_dir(&spooled).unwrap();
    for n in 0..spool::WAITING_MAX {
        std::fs::write(spooled.join(format!("old{n}:eth0")), "{}").unwrap();
    }
    let output = plugin(&with(&[("CNI_COMMAND", "DEL")]), &conf(dir.path(), "1.0.0"));
    assert!(output.status.success() && output.stdout.is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).contains("wait already"));
    assert_eq!(
        std::fs::read_dir(&spooled).unwrap().count(),
        spool::WAITING_MAX
    );
}

/// Plays an agent that gives each of these answers once, and returns what it was asked.
fn agent(dir: &Path, answers: Vec<Response>) -> std::thread::JoinHandle<Vec<Request>> {
    let listener = UnixListener::bind(dir.join("agent.sock")).unwrap();
    std::thread::spawn(move || {
        let serve = |response| {
            let (mut stream, _) = listener.accept().unwrap();
            let (request, _) = receive(&mut stream).unwrap();
            answer(stream, &response).unwrap();
            request
        };
        answers.into_iter().map(serve).collect()
    })
}

#[test]
fn status_and_gc_reach_the_agent_and_its_codes_reach_the_runtime() {
    let dir = tempfile::tempdir().unwrap();
    let refuse = |code: u32| {
        Response::Error(keelway_cni::CniError::new(
            code.into(),
            "no address is left",
        ))
    };
    let playing = agent(
        dir.path(),
        vec![
            Response::Done,
            refuse(50),
            refuse(51),
            refuse(11),
            Response::Done,
        ],
    );
    let status = || plugin(&[("CNI_COMMAND", "STATUS")], &conf(dir.path(), "1.1.0"));
    let first = status();
    assert!(first.status.success() && first.stdout.is_empty());
    for code in [50, 51, 50] {
        assert_eq!(error_of(&status()).0, code);
    }
    let mut config: Value = serde_json::from_str(&conf(dir.path(), "1.1.0")).unwrap();
    config["cni.dev/valid-attachments"] = json!([{"containerID": "c1", "ifname": "eth0"}]);
    assert!(
        plugin(&[("CNI_COMMAND", "GC")], &config.to_string())
            .status
            .success()
    );
    let asked = playing.join().unwrap();
    let Some(Request::Gc { network, valid }) = asked.last() else {
        panic!("{asked:?}")
    };
    assert_eq!(
        (network.as_str(), valid[0].container_id.as_str()),
        ("keelway", "c1")
    );
}

#[test]
fn in_a_chain_the_results_of_others_are_kept() {
    let netns = another_netns();
    if netns.is_empty() {
        println!("skipped: needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let made = AddResult {
        interfaces: vec![Interface {
            name: "eth0".into(),
            mac: "0a:00:00:00:00:02".into(),
            mtu: 1450,
            sandbox: Some(netns.clone()),
        }],
        ips: vec![IpConfig {
            address: "fd00::2/128".parse().unwrap(),
            gateway: "fe80::1".parse().unwrap(),
            interface: 0,
        }],
        ..AddResult::default()
    };
    let playing = agent(dir.path(), vec![Response::Added(made)]);
    let mut config: Value = serde_json::from_str(&conf(dir.path(), "0.4.0")).unwrap();
    config["prevResult"] = json!({
        "cniVersion": "0.4.0",
        "interfaces": [{"name": "net1", "sandbox": netns}],
        "ips": [{"version": "4", "address": "192.0.2.7/24", "interface": 0}],
        "dns": {"nameservers": ["192.0.2.53"]},
        "theirs": true,
    });
    config["runtimeConfig"] = json!({"ips": ["fd00::2/64"], "mac": "0a:00:00:00:00:02"});
    let add = with(&[("CNI_COMMAND", "ADD"), ("CNI_NETNS", &netns)]);
    let output = plugin(&add, &config.to_string());
    assert!(output.status.success(), "{output:?}");
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(result["interfaces"][0]["name"], "net1");
    assert_eq!(result["ips"][0]["address"], "192.0.2.7/24");
    assert_eq!(
        result["ips"][1],
        json!({"address": "fd00::2/128", "gateway": "fe80::1", "interface": 1, "version": "6"})
    );
    assert_eq!(result["dns"]["nameservers"][0], "192.0.2.53");
    assert_eq!(result["theirs"], true);
    let asked = playing.join().unwrap();
    let Some(Request::Add(wish)) = asked.first() else {
        panic!("{asked:?}")
    };
    assert_eq!(wish.network, "keelway");
    assert_eq!(
        wish.capabilities.ips,
        ["fd00::2".parse::<std::net::IpAddr>().unwrap()]
    );
    assert!(wish.capabilities.mac.is_some());
}

#[test]
fn add_and_status_without_an_agent_say_try_again() {
    let dir = tempfile::tempdir().unwrap();
    let netns = another_netns();
    let add = with(&[("CNI_COMMAND", "ADD"), ("CNI_NETNS", &netns)]);
    if !netns.is_empty() {
        assert_eq!(error_of(&plugin(&add, &conf(dir.path(), "1.0.0"))).0, 11);
    }
    assert_eq!(
        error_of(&plugin(
            &[("CNI_COMMAND", "STATUS")],
            &conf(dir.path(), "1.1.0")
        ))
        .0,
        50
    );
}

/// A network namespace that is not this process's, or "" when none can be made without privileges.
fn another_netns() -> String {
    use std::sync::mpsc::channel;
    let (tell, told) = channel();
    std::thread::spawn(move || {
        let made = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET);
        let path = format!(
            "/proc/{}/task/{}/ns/net",
            std::process::id(),
            nix::unistd::gettid()
        );
        tell.send(made.map(|()| path)).unwrap();
        // The namespace lives as long as this thread, which lives as long as the test process.
        loop {
            std::thread::park();
        }
    });
    told.recv().unwrap().unwrap_or_else(|error| {
        println!("skipped in part: needs root to make a network namespace ({error})");
        String::new()
    })
}

#[test]
fn add_passes_the_namespace_and_prints_the_result_of_each_version() {
    let netns = another_netns();
    if netns.is_empty() {
        println!("skipped: needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("agent.sock")).unwrap();
    let expected = std::fs::metadata(&netns).unwrap();
    let agent = std::thread::spawn(move || {
        for _ in 0..4 {
            let (mut stream, _) = listener.accept().unwrap();
            let (request, fd) = receive(&mut stream).unwrap();
            let Request::Add(wish) = request else {
                panic!("{request:?}")
            };
            assert_eq!(wish.args["K8S_POD_NAME"], "web");
            let got = std::fs::File::from(fd.expect("the namespace"))
                .metadata()
                .unwrap();
            use std::os::unix::fs::MetadataExt;
            assert_eq!((got.dev(), got.ino()), (expected.dev(), expected.ino()));
            let result = AddResult {
                interfaces: vec![Interface {
                    name: wish.attachment.ifname,
                    mac: "0a:00:00:00:00:02".into(),
                    mtu: 1500,
                    sandbox: Some(wish.netns),
                }],
                ips: vec![IpConfig {
                    address: "10.244.1.2/32".parse().unwrap(),
                    gateway: [169, 254, 1, 1].into(),
                    interface: 0,
                }],
                routes: vec![Route {
                    dst: "0.0.0.0/0".parse().unwrap(),
                    gw: Some([169, 254, 1, 1].into()),
                }],
                ..AddResult::default()
            };
            answer(stream, &Response::Added(result)).unwrap();
        }
    });
    for (version, ip_version, mtu) in [
        ("0.3.1", json!("4"), Value::Null),
        ("0.4.0", json!("4"), Value::Null),
        ("1.0.0", Value::Null, Value::Null),
        ("1.1.0", Value::Null, json!(1500)),
    ] {
        let add = with(&[("CNI_COMMAND", "ADD"), ("CNI_NETNS", &netns)]);
        let output = plugin(&add, &conf(dir.path(), version));
        assert!(output.status.success(), "{output:?}");
        let value: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(value["cniVersion"], version);
        assert_eq!(value["ips"][0]["address"], "10.244.1.2/32");
        assert_eq!(
            value["ips"][0].get("version").cloned().unwrap_or_default(),
            ip_version
        );
        assert_eq!(
            value["interfaces"][0]
                .get("mtu")
                .cloned()
                .unwrap_or_default(),
            mtu
        );
        assert_eq!(value["interfaces"][0]["sandbox"], json!(netns));
        assert_eq!(
            value["routes"][0],
            json!({"dst": "0.0.0.0/0", "gw": "169.254.1.1"})
        );
    }
    agent.join().unwrap();
}
