//! Pods that ask: a real agent, a real server in a pod, and clients in another one.

use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use keelway_tests::agents::{AgentNode, ClusterFile, Pod, two_dual_stack_nodes};
use keelway_tests::cluster::program;
use keelway_tests::lists::ListServer;
use keelway_tests::process::eventually;
use keelway_tests::sandbox::{Sandbox, is_root};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(20);
const DNS: [&str; 2] = ["10.96.0.10:53", "[fd00:96::a]:53"];

const A: u16 = 1;
const TXT: u16 = 16;
const AAAA: u16 = 28;

/// The cluster DNS at a pod's address, and Services with these names and addresses.
fn write(cluster: &ClusterFile, server: IpAddr, services: &[(&str, &str)]) {
    let mut items: Vec<Value> = cluster.nodes.clone();
    let dns = json!([{"name": "dns", "port": 53, "protocol": "UDP"}]);
    items.push(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "kube-system", "name": "kube-dns"},
        "spec": {"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10", "fd00:96::a"], "ports": dns},
    }));
    items.push(json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"namespace": "kube-system", "name": "kube-dns-1", "labels": {"kubernetes.io/service-name": "kube-dns"}},
        "ports": dns, "endpoints": [{"addresses": [server], "nodeName": "node-1", "conditions": {"ready": true}}],
    }));
    for (name, address) in services {
        items.push(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": name},
            "spec": {"clusterIP": address, "clusterIPs": [address], "ports": [{"port": 80}]},
        }));
    }
    let partial = cluster.path.with_extension("new");
    fs::write(
        &partial,
        json!({"kind": "List", "apiVersion": "v1", "items": items}).to_string(),
    )
    .expect("written");
    fs::rename(&partial, &cluster.path).expect("renamed");
}

struct Server(Child);

impl Server {
    /// One that learns of the cluster from the node's agent, and from nobody else.
    fn start(pod: &Pod, node: &AgentNode, nowhere: &Path) -> Self {
        let mut command = Command::new(program("keelway-dns"));
        command
            .args([
                "serve",
                "--listen",
                "0.0.0.0:53",
                "--health",
                "127.0.0.1:8181",
                "--threads",
                "1",
                "--agent",
            ])
            .arg(node.socket().with_file_name("cluster").join("watch.sock"))
            .arg("--kubeconfig")
            .arg(nowhere)
            .env("RUST_LOG", "error")
            .stdin(Stdio::null());
        Self(pod.network.run(|| {
            pin();
            command.spawn().expect("keelway-dns starts")
        }))
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id() as i32), signal).expect("it can be signalled");
    }

    /// Has it stand still, all of it: its threads stop one by one, those that answer maybe last.
    fn stop(&self) {
        self.signal(Signal::SIGSTOP);
        let pid = Pid::from_raw(self.0.id() as i32);
        let stopped = waitpid(pid, Some(WaitPidFlag::WUNTRACED)).expect("it is our child");
        assert_eq!(stopped, WaitStatus::Stopped(pid, Signal::SIGSTOP));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Both ends on one CPU: a round trip between two says more of the machine than of the path.
fn pin() {
    let mut set = CpuSet::new();
    set.set(0).expect("a CPU");
    let _ = sched_setaffinity(Pid::from_raw(0), &set);
}

fn question(id: u16, name: &str, rtype: u16) -> Vec<u8> {
    let mut wire = id.to_be_bytes().to_vec();
    wire.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        wire.push(label.len() as u8);
        wire.extend(label.bytes());
    }
    wire.push(0);
    wire.extend(rtype.to_be_bytes());
    wire.extend([0, 1]);
    wire
}

fn client(server: &str, patience: Duration) -> UdpSocket {
    let server: SocketAddr = server.parse().expect("an address");
    let any = if server.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    };
    let socket = UdpSocket::bind(any).expect("a socket");
    socket.connect(server).expect("connected");
    socket.set_read_timeout(Some(patience)).expect("a timeout");
    socket
}

/// The code and the last bytes of what a client is told; `None` when it is told nothing in time.
fn ask(socket: &UdpSocket, name: &str, rtype: u16) -> Option<(u8, u8, Vec<u8>)> {
    let query = question(7, name, rtype);
    socket.send(&query).ok()?;
    let mut reply = [0; 1500];
    let bytes = socket.recv(&mut reply).ok()?;
    assert_eq!(reply[..2], [0, 7]);
    let data = reply[query.len()..bytes].to_vec();
    Some((reply[3] & 15, reply[7], data))
}

fn p50_us(socket: &UdpSocket, name: &str, rtype: u16) -> f64 {
    let mut times: Vec<Duration> = (0..3000)
        .map(|_| {
            let begun = Instant::now();
            ask(socket, name, rtype).expect("an answer");
            begun.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e6
}

#[test]
fn pods_are_answered_while_the_server_stands_still_and_by_the_server_for_the_rest() {
    if !is_root("kernel_dns") {
        return;
    }
    let sandbox = Sandbox::enter().expect("namespaces");
    let dir = tempfile::tempdir().expect("a temporary folder");
    let flags = ["--healthz-bind-address", ""];
    let (cluster, [mut node, _other]) =
        two_dual_stack_nodes(&sandbox, dir.path(), &flags).expect("two nodes");
    write(&cluster, [192, 0, 2, 1].into(), &[("web", "10.96.0.1")]);
    node.start().expect("an agent");
    let [server_pod, client_pod] = ["server", "client"].map(|name| node.wire(name).expect("a pod"));
    write(&cluster, server_pod.address.into(), &[("web", "10.96.0.1")]);
    // The loopback of the pod is another one: nobody is there.
    let nowhere = ListServer::start().expect("a free port");
    let nowhere = nowhere.kubeconfig(dir.path()).expect("a kubeconfig");
    let server = Server::start(&server_pod, &node, &nowhere);
    let (web, news) = (
        "Web.default.svc.cluster.local",
        "news.default.svc.cluster.local",
    );
    client_pod.network.run(|| {
        eventually("the server", PATIENCE, || {
            match ask(
                &client(DNS[0], Duration::from_millis(500)),
                "absent.default.svc.cluster.local",
                A,
            ) {
                Some((3, 0, _)) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
    });
    node.wait("the server's word", |report| {
        report["dnsNames"].as_u64() == Some(2)
    })
    .expect("the server says how it answers");
    client_pod.network.run(|| {
        server.stop();
        let direct = format!("{}:53", server_pod.address);
        for at in [DNS[0], DNS[1], direct.as_str()] {
            let socket = client(at, PATIENCE);
            let (code, answers, data) = ask(&socket, web, A).expect("nobody else could answer");
            assert_eq!(
                (code, answers, &data[12..]),
                (0, 1, &[10, 96, 0, 1][..]),
                "{at}"
            );
            let (code, answers, _) = ask(&socket, web, AAAA).expect("nobody else could answer");
            assert_eq!((code, answers), (0, 0), "{at}");
        }
        let waiting = client(DNS[0], Duration::from_millis(300));
        assert_eq!(
            ask(&waiting, "absent.default.svc.cluster.local", A),
            None,
            "that is the server's to say"
        );
        server.signal(Signal::SIGCONT);
        pin();
        let socket = client(DNS[0], PATIENCE);
        let kernel = p50_us(&socket, web, A);
        let served = p50_us(&socket, "dns-version.cluster.local", TXT);
        println!("p50: {kernel:.1} us at the interface, {served:.1} us by the server");
    });
    // What changes in the cluster changes here.
    write(
        &cluster,
        server_pod.address.into(),
        &[("news", "10.96.0.2")],
    );
    client_pod.network.run(|| {
        let socket = client(DNS[0], Duration::from_millis(500));
        eventually("the news", PATIENCE, || {
            match [ask(&socket, web, A), ask(&socket, news, A)] {
                [Some((3, 0, _)), Some((0, 1, data))] if data[12..] == [10, 96, 0, 2] => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
    });
    let report = node.report().expect("a report");
    let count = |what: &str| report["dns"][what].as_u64().unwrap_or_default();
    assert!(
        count("a") > 3000 && count("nodata") >= 3 && count("left") > 3000,
        "{}",
        report["dns"]
    );
    // With the agent goes what it knew, and the server answers all.
    node.kill().expect("it can be killed");
    server.stop();
    client_pod.network.run(|| {
        // The kernel empties the array a moment later.
        eventually("nobody who knows", PATIENCE, || {
            let socket = client(DNS[0], Duration::from_millis(300));
            match ask(&socket, news, A) {
                None => Ok(()),
                answer => Err(format!("{answer:?}")),
            }
        });
    });
    server.signal(Signal::SIGCONT);
    client_pod.network.run(|| {
        let answer = ask(&client(DNS[0], PATIENCE), news, A).expect("the server answers");
        assert_eq!((answer.0, answer.1), (0, 1));
    });
    // Another agent is told by the server again.
    node.start().expect("an agent");
    node.wait("the server's word", |report| {
        report["dnsNames"].as_u64() == Some(2)
    })
    .expect("the server says how it answers");
    server.stop();
    client_pod.network.run(|| {
        let answer = ask(&client(DNS[0], PATIENCE), news, A).expect("nobody else could answer");
        assert_eq!((answer.0, answer.1), (0, 1));
    });
}
