//! The plugin as cnitool, the CNI project's own runtime, calls it: every command and version, alone and in chains with other plugins. Set-up
//! builds cnitool; `KEELWAY_CNITOOL` names another one, and where there is none these tests are skipped.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use keelway_tests::agents::{AgentNode, addresses_of, program, two_dual_stack_nodes, until};
use keelway_tests::sandbox::{Network, Sandbox, is_root};
use serde_json::{Value, json};

/// Where Debian has the plugins of the CNI project.
const REFERENCE_PLUGINS: &str = "/usr/lib/cni";

fn cnitool() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let built = variable("KEELWAY_CLIENTS_DIR").map(|folder| folder.join("cnitool"));
    let in_path = std::env::var_os("PATH")
        .into_iter()
        .flat_map(|path| std::env::split_paths(&path).collect::<Vec<_>>())
        .map(|folder| folder.join("cnitool"));
    let named = variable("KEELWAY_CNITOOL").into_iter();
    named.chain(built).chain(in_path).find(|path| path.exists())
}

/// A node with its agent, and cnitool.
struct Lab {
    node: AgentNode,
    tool: PathBuf,
    /// Where network configurations are.
    confs: PathBuf,
    _other: AgentNode,
    _dir: tempfile::TempDir,
    _sandbox: Sandbox,
}

impl Lab {
    fn start(test: &str) -> Option<Self> {
        let Some(tool) = cnitool() else {
            println!("{test}: skipped: needs cnitool");
            return None;
        };
        if !is_root(test) {
            return None;
        }
        let sandbox = Sandbox::enter().expect("a sandbox");
        let dir = tempfile::tempdir().expect("a folder");
        let (cluster, [mut node, other]) =
            two_dual_stack_nodes(&sandbox, dir.path(), &[]).expect("two nodes");
        cluster.write(&[]).expect("the cluster's file");
        node.start().expect("an agent");
        let confs = dir.path().join("cnitool");
        fs::create_dir(&confs).expect("a folder");
        Some(Self {
            node,
            tool,
            confs,
            _other: other,
            _dir: dir,
            _sandbox: sandbox,
        })
    }

    fn plugin(&self) -> Value {
        let mut plugin = self.node.plugin_conf();
        plugin["capabilities"] = json!({"ips": true, "mac": true, "dns": true});
        plugin
    }

    fn write(&self, version: &str, plugins: &[Value]) {
        let list = json!({"cniVersion": version, "name": "keelway", "plugins": plugins});
        fs::write(self.confs.join("10.conflist"), list.to_string()).expect("the list");
    }

    /// Whether cnitool was content, and what it said.
    fn call(&self, command: &str, network: &Network) -> (bool, String) {
        let ours = program("keelway-cni").expect("the plugin");
        let ours = ours.parent().expect("its folder").display().to_string();
        let mut tool = Command::new(&self.tool);
        tool.args([command, "keelway"])
            .arg(network.path())
            .env("NETCONFPATH", &self.confs)
            .env(
                "CNI_PATH",
                format!("{ours}:{REFERENCE_PLUGINS}:{}", self.confs.display()),
            )
            .env("CAP_ARGS", json!({"mac": "02:00:00:00:00:77"}).to_string());
        let output = self.node.host.run(|| tool.output()).expect("cnitool");
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        (output.status.success(), said)
    }

    fn nothing_is_left(&self) {
        until("no pod", || {
            let report = self.node.report()?;
            let none = report["allocations"] == json!([]) && report["interfacesToRemove"] == 0;
            // The list of interfaces may change as it is read.
            let gone = self.node.pod_interfaces().is_ok_and(|all| all.is_empty());
            Ok((none && gone).then_some(()))
        })
        .expect("in time");
    }
}

/// What a program prints in a namespace.
fn inside(network: &Network, words: &[&str]) -> String {
    let output = network.run(|| Command::new(words[0]).args(&words[1..]).output());
    String::from_utf8_lossy(&output.expect("it runs").stdout).into_owned()
}

#[test]
fn cnitool_runs_every_command() {
    let Some(lab) = Lab::start("cnitool_runs_every_command") else {
        return;
    };
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        lab.write(version, &[lab.plugin()]);
        let network = Network::new().expect("a network");
        let (ok, said) = lab.call("add", &network);
        assert!(ok, "{version} add: {said}");
        let result: Value = serde_json::from_str(&said).expect("a result");
        assert_eq!(addresses_of(&result).expect("addresses").len(), 2);
        assert!(inside(&network, &["ip", "link", "show", "eth0"]).contains("02:00:00:00:00:77"));
        let (ok, said) = lab.call("check", &network);
        assert_eq!(ok, version != "0.3.1", "{version} check: {said}");
        for command in ["del", "del"] {
            let (ok, said) = lab.call(command, &network);
            assert!(ok, "{version} {command}: {said}");
        }
        if version == "1.1.0" {
            let (ok, said) = lab.call("status", &network);
            assert!(ok, "{version} status: {said}");
            // cnitool deletes what it has added. Then it has every plugin collect, and names no list of what is to stay, which the
            // specification asks for: taking that for an empty list would remove every pod of the node.
            let pod = lab.node.wire("of-a-runtime").expect("a pod");
            let (ok, said) = lab.call("add", &network);
            assert!(ok, "{version} add: {said}");
            let (ok, said) = lab.call("gc", &network);
            assert!(
                !ok && said.contains("valid-attachments"),
                "{version} gc: {said}"
            );
            until("one pod", || {
                let report = lab.node.report()?;
                let left = report["allocations"].as_array().map(Vec::len);
                Ok((left == Some(1)).then_some(()))
            })
            .expect("what cnitool has added goes, and nothing else");
            let deleted = lab.node.cni("DEL", &pod.container, None, json!({}));
            assert!(deleted.expect("the plugin").status.success());
        }
        lab.nothing_is_left();
    }
}

#[test]
fn cnitool_runs_chains_with_other_plugins() {
    let Some(lab) = Lab::start("cnitool_runs_chains_with_other_plugins") else {
        return;
    };
    if !Path::new(REFERENCE_PLUGINS).join("tuning").exists() {
        println!("skipped: needs the Debian package containernetworking-plugins");
        return;
    }
    let tuning = json!({"type": "tuning", "sysctl": {"net.core.somaxconn": "512"}, "mtu": 1400});
    for version in ["0.3.1", "0.4.0", "1.0.0"] {
        lab.write(version, &[lab.plugin(), tuning.clone()]);
        let network = Network::new().expect("a network");
        let (ok, said) = lab.call("add", &network);
        assert!(ok, "{version} add: {said}");
        let result: Value = serde_json::from_str(&said).expect("a result");
        assert_eq!(addresses_of(&result).expect("addresses").len(), 2);
        let changed = inside(&network, &["cat", "/proc/sys/net/core/somaxconn"]);
        assert_eq!(changed, "512\n");
        assert!(inside(&network, &["ip", "link", "show", "eth0"]).contains("mtu 1400"));
        // What others changed behind us is no fault of ours.
        if version != "0.3.1" {
            let (ok, said) = lab.call("check", &network);
            assert!(ok, "{version} check: {said}");
        }
        for command in ["del", "del"] {
            let (ok, said) = lab.call(command, &network);
            assert!(ok, "{version} {command}: {said}");
        }
        lab.nothing_is_left();
    }

    // A plugin of the chain that fails: what ours has made goes by the runtime's DEL, however often.
    let broken = json!({"type": "tuning", "sysctl": {"net.no.such": "1"}});
    lab.write("1.0.0", &[lab.plugin(), broken]);
    let network = Network::new().expect("a network");
    let (ok, said) = lab.call("add", &network);
    assert!(!ok, "{said}");
    let (ok, said) = lab.call("del", &network);
    assert!(ok, "{said}");
    lab.nothing_is_left();
    // One that is not there at all: the runtime gets as far as that, and says so.
    lab.write("1.0.0", &[lab.plugin(), json!({"type": "no-such-plugin"})]);
    let (ok, said) = lab.call("add", &network);
    assert!(!ok && said.contains("no-such-plugin"), "{said}");
    lab.write("1.0.0", &[lab.plugin()]);
    let (ok, said) = lab.call("del", &network);
    assert!(ok, "{said}");
    lab.nothing_is_left();
}

/// A plugin that gives a pod an interface of its own, and knows nothing of any other.
const BEFORE: &str = r#"#!/bin/sh
inside() { nsenter --net="$CNI_NETNS" ip "$@"; }
case $CNI_COMMAND in
ADD)
    inside link add net1 type veth peer name net2 || exit 1
    echo '{"cniVersion": "1.0.0", "interfaces": [{"name": "net1", "sandbox": "'"$CNI_NETNS"'"}],
        "ips": [{"address": "192.0.2.7/24", "interface": 0}], "dns": {"domain": "before.example"}}' ;;
CHECK) inside link show net1 >&2 ;;
DEL) inside link del net1 2> /dev/null || true ;;
VERSION) echo '{"cniVersion": "1.0.0", "supportedVersions": ["0.4.0", "1.0.0", "1.1.0"]}' ;;
esac
"#;

#[test]
fn cnitool_runs_it_behind_another_plugin() {
    let Some(lab) = Lab::start("cnitool_runs_it_behind_another_plugin") else {
        return;
    };
    let script = lab.confs.join("before");
    fs::write(&script, BEFORE).expect("written");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("executable");
    let before = json!({"type": "before"});
    let tuning = json!({"type": "tuning", "sysctl": {"net.core.somaxconn": "512"}});
    // Debian's plugins do not speak 1.1.0 yet.
    let mut chains = vec![("1.1.0", vec![before.clone(), lab.plugin()])];
    if Path::new(REFERENCE_PLUGINS).join("tuning").exists() {
        chains.push(("1.0.0", vec![before, lab.plugin(), tuning]));
    }
    for (version, plugins) in chains {
        lab.write(version, &plugins);
        let network = Network::new().expect("a network");
        let (ok, said) = lab.call("add", &network);
        assert!(ok, "{version} add: {said}");
        let result: Value = serde_json::from_str(&said).expect("a result");
        let interfaces = result["interfaces"].as_array().expect("interfaces");
        let names: Vec<&str> = interfaces
            .iter()
            .filter_map(|interface| interface["name"].as_str())
            .collect();
        assert!(
            matches!(names[..], ["net1", host, "eth0"] if host.starts_with("kw")),
            "{version}: {result}"
        );
        assert_eq!(
            result["ips"][0],
            json!({"address": "192.0.2.7/24", "interface": 0})
        );
        let owners: Vec<&Value> = result["ips"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|ip| &ip["interface"])
            .collect();
        assert_eq!(owners, [0, 2, 2], "{result}");
        let there = inside(&network, &["ip", "link"]);
        assert!(
            there.contains("net1") && there.contains("eth0"),
            "{version}: {there}"
        );
        for command in ["check", "del", "del"] {
            let (ok, said) = lab.call(command, &network);
            assert!(ok, "{version} {command}: {said}");
        }
        let there = inside(&network, &["ip", "link"]);
        assert!(!there.contains("net1"), "{version}: {there}");
        lab.nothing_is_left();
    }
}
