//! Whatever the interfaces on the way leave to others (sums, cutting and joining of segments), what is sent through a Service arrives as
//! it was sent: per packet, to a pod of the node and to one elsewhere, in both families.

use std::{
    hash::{DefaultHasher, Hasher as _},
    io::{Read as _, Write as _},
    net::{Ipv6Addr, Shutdown, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket},
    process::Command,
    thread,
};

use keelway_agent::dataplane::{Lead, Op, ServiceBackends, ServiceId, Vip};
use keelway_tests::{
    nodes::{Nodes, PER_PACKET, frontend},
    requests::TIMEOUT,
    sandbox::{Network, Sandbox, is_root},
};

/// Port of the servers that tell what they have heard.
const PORT: u16 = 9_090;
/// Longer than any window at the beginning: segments get as long as the stack makes them.
const BYTES: usize = 2 << 20;
/// Longer than a packet: it is cut, and put together again.
const DATAGRAM: usize = 6_000;

/// What `ethtool -K` is told on every interface on the way.
const SETTINGS: [&str; 5] = [
    "tx on rx on tso on gso on gro on",
    "tx off rx off tso off gso off gro off",
    "tx on rx on tso off gso off gro off",
    "tx off rx off tso off gso on gro on",
    "tx on rx on tso on gso on gro off",
];

fn digest(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

fn content(len: usize) -> Vec<u8> {
    // No two blocks alike, so that none can take another's place.
    (0..len).map(|at| (at * 31 + at / 251) as u8).collect()
}

/// Servers of TCP and UDP that answer with a digest of what they heard.
fn listen(network: &Network) {
    let at = SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, PORT, 0, 0);
    let (listener, socket) = network.run(|| (TcpListener::bind(at), UdpSocket::bind(at)));
    let (listener, socket) = (listener.unwrap(), socket.unwrap());
    thread::spawn(move || {
        while let Ok((mut stream, _client)) = listener.accept() {
            let mut heard = Vec::new();
            if stream.read_to_end(&mut heard).is_ok() {
                // A client that is gone is none of the server's business.
                let _unsent = stream.write_all(&digest(&heard).to_ne_bytes());
            }
        }
    });
    thread::spawn(move || {
        let mut buffer = vec![0; 2 * DATAGRAM];
        while let Ok((len, client)) = socket.recv_from(&mut buffer) {
            let _unsent = socket.send_to(&digest(&buffer[..len]).to_ne_bytes(), client);
        }
    });
}

fn by_stream(at: SocketAddr) -> std::io::Result<u64> {
    let mut stream = TcpStream::connect_timeout(&at, TIMEOUT)?;
    stream.set_read_timeout(Some(5 * TIMEOUT))?;
    stream.set_write_timeout(Some(5 * TIMEOUT))?;
    stream.write_all(&content(BYTES))?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = [0; 8];
    stream.read_exact(&mut answer)?;
    Ok(u64::from_ne_bytes(answer))
}

fn by_datagram(at: SocketAddr) -> std::io::Result<u64> {
    let any = if at.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.send_to(&content(DATAGRAM), at)?;
    let mut answer = [0; 8];
    socket.recv(&mut answer)?;
    Ok(u64::from_ne_bytes(answer))
}

/// Sets an interface; what the kind of it cannot have is left as it is.
fn set(network: &Network, interface: &str, setting: &str) {
    let mut words = vec!["-K", interface];
    words.extend(setting.split(' '));
    let output = network.run(|| {
        Command::new("ethtool")
            .args(words)
            .output()
            .expect("ethtool")
    });
    assert!(output.status.success(), "{interface}: {output:?}");
}

#[test]
fn what_is_sent_arrives_with_offloads_on_and_off() {
    if !is_root("offloads") {
        return;
    }
    let sandbox = Sandbox::enter().unwrap();
    let mut nodes = Nodes::start(&sandbox, PER_PACKET).unwrap();
    let services = [
        (1, "10.96.0.1:80", "b"),
        (2, "10.96.0.2:80", "c"),
        (3, "[fd00:96::1]:80", "b"),
        (4, "[fd00:96::2]:80", "c"),
    ];
    for (id, at, backend) in services {
        let at_text = at;
        let at: SocketAddr = at.parse().unwrap();
        let mut backend = nodes.backend(backend, at.is_ipv4()).unwrap();
        backend.set_port(PORT);
        let mut ops = vec![
            Op::SetVip {
                addr: at.ip(),
                kind: Vip::Cluster,
            },
            Op::SetService {
                id: ServiceId(id),
                backends: ServiceBackends {
                    active: vec![backend],
                    ..ServiceBackends::default()
                },
            },
        ];
        ops.extend(frontend(at_text, Lead::to(ServiceId(id))));
        nodes.nodes[0].dataplane().apply(&ops).unwrap();
    }
    for (node, pod) in [(0, "b"), (1, "c")] {
        listen(&nodes.nodes[node].pods[pod].network);
    }
    let client = nodes.nodes[0].pods["a"].network.try_clone().unwrap();
    for setting in SETTINGS {
        for node in &nodes.nodes {
            set(&node.host, "eth0", setting);
            for (name, pod) in &node.pods {
                set(&node.host, &format!("kw-{name}"), setting);
                set(&pod.network, "eth0", setting);
            }
        }
        for (_, at, backend) in services {
            let at: SocketAddr = at.parse().unwrap();
            let place = format!("{at} to {backend} with {setting}");
            let heard = client.run(|| by_stream(at));
            assert_eq!(heard.expect(&place), digest(&content(BYTES)), "{place}");
            let heard = client.run(|| by_datagram(at));
            assert_eq!(heard.expect(&place), digest(&content(DATAGRAM)), "{place}");
        }
    }
}
