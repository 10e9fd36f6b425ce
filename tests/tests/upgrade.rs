//! An upgrade to other map layouts, and the way back, with traffic running: what one agent pinned counts as another version's for
//! the next one.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream, UdpSocket},
    ops::RangeInclusive,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::Duration,
};

use dataplane_abi::{ABI_VERSION, Reason};
use keelway_agent::dataplane::{HandedOver, Lead, Op, ServiceBackends, ServiceId, State};
use keelway_tests::{
    nodes::{self, Cgroup, Node, Nodes, PER_PACKET, ask, frontend},
    requests::{self, TIMEOUT, tcp},
    sandbox::{Network, Sandbox, is_root},
};

/// Not a test of its own: the process that others start as a client.
#[test]
fn client() {
    nodes::client(requests::carry_out);
}

/// What an agent would plan again: under the same ids, as its ledger has them from the other's frontends.
fn planned(state: State) -> Vec<Op> {
    let mut ops = Vec::new();
    for (id, backends) in state.services {
        ops.push(Op::SetService { id, backends });
    }
    for (frontend, lead) in state.frontends {
        ops.push(Op::SetFrontend { frontend, lead });
    }
    for (addr, kind) in state.vips {
        ops.push(Op::SetVip { addr, kind });
    }
    for (addr, pod) in state.pods {
        ops.push(Op::SetPod { addr, pod });
    }
    for addr in state.host_addresses {
        ops.push(Op::SetHostAddress { addr });
    }
    ops
}

/// Versions that others take over from.
const HANDOVERS: RangeInclusive<u32> = 9990..=9999;

/// Services of which a client keeps its backend. Several, since each might lead it to the same one by chance.
const AFFINE: [&str; 4] = [
    "10.96.0.11:80",
    "10.96.0.12:80",
    "10.96.0.13:80",
    "10.96.0.14:80",
];

fn with_affinity(backends: &[SocketAddr]) -> Vec<Op> {
    let mut ops = Vec::new();
    for (id, at) in (11..).map(ServiceId).zip(AFFINE) {
        ops.push(Op::SetService {
            id,
            backends: ServiceBackends {
                active: backends.to_vec(),
                affinity_timeout_s: 3600,
                ..ServiceBackends::default()
            },
        });
        ops.extend(frontend(at, Lead::to(id)));
    }
    ops
}

/// Who answers a connection.
fn server(from: &Network, at: &str) -> String {
    let answer = from.run(|| tcp(at.parse().unwrap()).unwrap());
    answer.split(' ').next().unwrap_or_default().to_owned()
}

/// Ends the agent, has what it left count as version `number`'s, and starts another one that finds nothing of its own.
fn replace_agent(node: &mut Node, cgroup: &Cgroup, number: u32) {
    let state = node.dataplane().state().unwrap();
    node.close();
    let root = node.config.pin_root.clone();
    let own = root.join(format!("v{ABI_VERSION}"));
    fs::rename(&own, root.join(format!("v{number}"))).unwrap();
    node.open().unwrap();
    node.dataplane().attach_cgroup(cgroup.path()).unwrap();
    // It hangs its programs on some of the pods by itself.
    let (host, pod) = (node.host.try_clone().unwrap(), node.pods["a"].ifindex);
    host.run(|| node.dataplane().attach_pod(pod)).unwrap();
    assert_eq!(*node.dataplane().inherited(), state.frontends);
    node.dataplane().apply(&planned(state)).unwrap();
}

/// New connections one after the other, until told to stop: how many, and those that failed.
fn connect_on(network: &Network, stop: &AtomicBool, made: &AtomicU32) -> Vec<String> {
    let mut failed = Vec::new();
    network.run(|| {
        while !stop.load(Ordering::Relaxed) {
            for at in ["10.96.0.2:80", "10.96.0.3:80", "[fd00:96::2]:80"] {
                if let Err(error) = tcp(at.parse().unwrap()) {
                    failed.push(format!("{at}: {error}"));
                }
            }
            made.fetch_add(1, Ordering::Relaxed);
        }
    });
    failed
}

#[test]
fn another_version_hands_over_while_traffic_goes_on_and_takes_back() {
    if !is_root("upgrade") {
        return;
    }
    let sandbox = Sandbox::enter().unwrap();
    let mut nodes = Nodes::start(&sandbox, PER_PACKET).unwrap();
    let cgroup = Cgroup::new().unwrap();
    nodes.serve(1, "10.96.0.2:80", &["b"]).unwrap();
    nodes.serve(2, "10.96.0.3:80", &["c"]).unwrap();
    nodes.serve(3, "[fd00:96::2]:80", &["b"]).unwrap();
    nodes
        .serve(4, "10.96.0.4:80", &["b", "c", "node-1", "node-2"])
        .unwrap();
    let everybody = ["b", "c", "node-1", "node-2"];
    let everybody: Vec<SocketAddr> = everybody
        .map(|name| nodes.backend(name, true).unwrap())
        .into();
    let Nodes { nodes: [first, _] } = &mut nodes;
    first.dataplane().apply(&with_affinity(&everybody)).unwrap();
    first.dataplane().attach_cgroup(cgroup.path()).unwrap();
    let host = first.host.try_clone().unwrap();
    let pod = first.pods["a"].network.try_clone().unwrap();
    let mut streams = ["10.96.0.2:80", "10.96.0.3:80", "[fd00:96::2]:80"].map(|at| {
        let stream = pod.run(|| TcpStream::connect(at).unwrap());
        // A lost packet would come again after 200 ms at the earliest.
        let patience = Some(Duration::from_millis(190));
        stream.set_read_timeout(patience).unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    });
    // A datagram socket that has one of several backends, and keeps it.
    let datagrams = pod.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
    datagrams.set_read_timeout(Some(TIMEOUT)).unwrap();
    let several: SocketAddr = "10.96.0.4:80".parse().unwrap();
    let mut chosen = String::new();
    let mut go_on = |when: &str| {
        for stream in &mut streams {
            stream.write_all(b"x").unwrap();
            let len = stream.read(&mut [0; 256]).expect(when);
            assert!(len > 0, "{when}: closed");
        }
        let mut buffer = [0; 256];
        datagrams.send_to(b"x", several).unwrap();
        let (len, from) = datagrams.recv_from(&mut buffer).expect(when);
        let answer = String::from_utf8_lossy(&buffer[..len]).into_owned();
        assert_eq!(from, several, "{when}");
        if chosen.is_empty() {
            chosen.clone_from(&answer);
        }
        assert_eq!(answer, chosen, "{when}");
    };
    go_on("before");
    let kept = AFFINE.map(|at| server(&pod, at));
    let (stop, made) = (AtomicBool::new(false), AtomicU32::new(0));
    thread::scope(|scope| {
        let connecting = scope.spawn(|| connect_on(&pod, &stop, &made));
        let more = || {
            let before = made.load(Ordering::Relaxed);
            while made.load(Ordering::Relaxed) < before + 3 && !connecting.is_finished() {
                thread::yield_now();
            }
        };
        // There and back, and so on: a connection that is opened at the wrong moment is rare.
        for number in HANDOVERS {
            more();
            replace_agent(first, &cgroup, number);
            let other = first.config.pin_root.join(format!("v{number}"));
            assert!(other.exists());
            go_on("with the other's programs at work");
            let untouched = first.dataplane().counters().unwrap();
            assert!(
                untouched.contains(&(Reason::FlowReplied, 0)),
                "{untouched:?}"
            );
            let taken = host.run(|| first.dataplane().take_over()).unwrap();
            assert_eq!(taken.versions, 1, "{taken:?}");
            // Two pods with two hooks each, the uplink, the service veth, and the sockets' nine.
            assert_eq!(taken.links, 15, "{taken:?}");
            assert!(!other.exists());
            go_on("after the other's programs are gone");
            assert_eq!(AFFINE.map(|at| server(&pod, at)), kept);
            more();
            let now = first.dataplane().counters().unwrap();
            assert!(!now.contains(&(Reason::FlowReplied, 0)), "{now:?}");
            let again = host.run(|| first.dataplane().take_over()).unwrap();
            assert_eq!(again, HandedOver::default());
        }
        stop.store(true, Ordering::Relaxed);
        let failed = connecting.join().unwrap();
        assert!(failed.is_empty(), "{failed:?}");
    });
    assert_eq!(
        ask(&pod, None, "tcp 10.96.0.2:80").unwrap(),
        "b 10.244.1.11 from 10.96.0.2:80"
    );
}
