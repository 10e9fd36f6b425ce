//! What an agent leaves on a node, installed and taken away again.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use keelway_agent::dataplane::{Config, Dataplane};
use keelway_agent::net::{Direction, Kernel, Netlink};
use keelway_tests::agents::{AgentNode, program, two_dual_stack_nodes};
use keelway_tests::sandbox::{Network, Sandbox, ip, is_root};
use nix::mount::{MsFlags, mount, umount};
use nix::net::if_::if_nametoindex;

fn uninstall(node: &AgentNode, bin_dir: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(program("keelway-agent").expect("the agent"));
    command
        .arg("uninstall")
        .args(more)
        .arg("--bin-dir")
        .arg(bin_dir)
        .arg("--cni-conf-dir")
        .arg(node.conf_list().parent().expect("its folder"))
        .arg("--pin-root")
        .arg(node.pin_root())
        .arg("--state-dir")
        .arg(node.state_dir())
        .arg("--socket")
        .arg(node.socket());
    node.host.run(|| command.output()).expect("it runs")
}

fn install(bin_dir: &Path) -> Output {
    Command::new(program("keelway-agent").expect("the agent"))
        .args(["install", "--bin-dir"])
        .arg(bin_dir)
        .output()
        .expect("it runs")
}

fn said(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// What `ip` prints in a namespace.
fn shown(network: &Network, words: &str) -> String {
    let output = network.run(|| Command::new("ip").args(words.split_whitespace()).output());
    String::from_utf8_lossy(&output.expect("ip").stdout).into_owned()
}

#[test]
fn a_node_is_clean_afterwards_and_can_be_used_again() {
    if !is_root("a_node_is_clean_afterwards_and_can_be_used_again") {
        return;
    }
    let sandbox = Sandbox::enter().expect("a sandbox");
    let dir = tempfile::tempdir().expect("a folder");
    let (cluster, [mut node, other]) =
        two_dual_stack_nodes(&sandbox, dir.path(), &[]).expect("two nodes");
    cluster.write(&[]).expect("the cluster's file");
    // Of somebody else, and stays when we go.
    let add = "link add theirs type veth peer name behind";
    node.host.run(|| ip(add)).expect("an interface");
    let before = ["-o link", "-o -4 addr", "route", "-6 route"].map(|what| shown(&node.host, what));
    let bin_dir = dir.path().join("bin");
    assert!(install(&bin_dir).status.success());
    assert!(bin_dir.join("keelway-cni").exists() && bin_dir.join("loopback").exists());
    node.start().expect("an agent");
    let pod = node.wire("a").expect("a pod");

    let refused = uninstall(&node, &bin_dir, &["--with-pods"]);
    assert!(
        !refused.status.success() && said(&refused).contains("an agent of this node runs"),
        "{refused:?}"
    );
    node.stop().expect("a good end");
    let theirs = node.host.run(|| {
        let index = if_nametoindex("theirs").expect("the interface");
        let mut dataplane = Dataplane::open(&Config::new(node.pin_root())).expect("what is pinned");
        dataplane.attach_pod(index).expect("programs by filters");
        index
    });
    let hangs = || {
        let names = |direction| {
            let mut kernel = Kernel::new(Netlink::open()?);
            kernel.filter_names(theirs, direction)
        };
        let all = [Direction::Ingress, Direction::Egress].map(|way| node.host.run(|| names(way)));
        all.map(|names| names.expect("filters")).concat()
    };
    assert_eq!(hangs(), ["pod_ingress", "pod_egress"]);
    let refused = uninstall(&node, &bin_dir, &[]);
    assert!(
        !refused.status.success() && said(&refused).contains("network from Keelway (1)"),
        "{refused:?}"
    );
    assert!(
        node.pin_root().exists() && shown(&pod.network, "link").contains("eth0"),
        "nothing was touched"
    );

    let done = uninstall(&node, &bin_dir, &["--with-pods"]);
    assert!(done.status.success(), "{done:?}");
    for trace in [
        "05-keelway.conflist",
        "keelway-cni",
        "loopback",
        "routes",
        "keelway-svc",
        "keelway-vx",
        "programs on theirs",
    ] {
        assert!(said(&done).contains(trace), "{trace}: {}", said(&done));
    }
    let after = ["-o link", "-o -4 addr", "route", "-6 route"].map(|what| shown(&node.host, what));
    assert_eq!(after, before);
    assert_eq!(hangs(), [""; 0]);
    assert!(!shown(&pod.network, "link").contains("eth0"));
    for path in [
        node.pin_root(),
        node.state_dir(),
        node.socket(),
        node.conf_list(),
        bin_dir.join("keelway-cni"),
        bin_dir.join("loopback"),
    ] {
        assert!(!path.exists(), "{}", path.display());
    }
    let again = uninstall(&node, &bin_dir, &[]);
    assert!(
        again.status.success() && again.stdout.is_empty(),
        "{again:?}"
    );

    node.start().expect("an agent again");
    node.wire("b").expect("a pod again");
    drop(other);
}

#[test]
fn plugins_of_others_stay_and_a_folder_that_cannot_be_written_is_said_clearly() {
    if !is_root("plugins_of_others_stay_and_a_folder_that_cannot_be_written") {
        return;
    }
    let _sandbox = Sandbox::enter().expect("a sandbox");
    let dir = tempfile::tempdir().expect("a folder");
    let bin_dir = dir.path().join("bin");
    fs::create_dir(&bin_dir).expect("a folder");
    fs::write(bin_dir.join("loopback"), "somebody's").expect("a file");
    assert!(install(&bin_dir).status.success());
    assert_eq!(
        fs::read(bin_dir.join("loopback")).expect("there"),
        b"somebody's"
    );
    // Again, over what runtimes may be executing; a loopback of ours is renewed with it.
    fs::write(bin_dir.join("keelway-cni"), "an old one").expect("a file");
    fs::write(bin_dir.join("loopback"), "an old one").expect("a file");
    assert!(install(&bin_dir).status.success());
    let plugin = fs::read(bin_dir.join("keelway-cni")).expect("there");
    assert_eq!(fs::read(bin_dir.join("loopback")).expect("there"), plugin);

    let none = None::<&str>;
    mount(
        Some("tmpfs"),
        &bin_dir,
        Some("tmpfs"),
        MsFlags::MS_RDONLY,
        none,
    )
    .expect("a mount");
    let refused = install(&bin_dir);
    let words = said(&refused);
    assert!(
        !refused.status.success()
            && words.contains("bin is on a read-only file system")
            && words.contains("--bin-dir")
            && words.contains("cni.bin_dir"),
        "{words}"
    );
    assert_eq!(words.lines().count(), 1, "{words}");
    umount(&bin_dir).expect("or the folder could not go");
}
