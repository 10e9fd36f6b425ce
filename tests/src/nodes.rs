//! Two nodes of network namespaces, wired as the agent wires them, with echo servers in their pods and on their hosts. All have
//! addresses of both families.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::{
        IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket,
    },
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use keelway_agent::{
    dataplane::{
        Config, Dataplane, EarlyUplink, Frontend, Lead, LocalPod, Op, Protocol, ServiceBackends,
        ServiceId, ServiceVeth, Vip, Xdp, XdpMode,
    },
    net::{Kernel, Limits, Link, Netlink, PodWire, make_service_veth, pod_mac, wire_pod},
};

use crate::sandbox::{Network, Sandbox, ifindex, ip};

/// Port of every echo server, TCP and UDP.
pub const ECHO_PORT: u16 = 8080;

/// A node: its host's network, its pods', and its data plane.
pub struct Node {
    pub host: Network,
    pub address: Ipv4Addr,
    pub address_v6: Ipv6Addr,
    pub pods: BTreeMap<&'static str, Pod>,
    pub config: Config,
    pub dataplane: Option<Dataplane>,
}

/// A pod: a network, with an echo server that answers with the pod's name.
pub struct Pod {
    pub network: Network,
    pub address: Ipv4Addr,
    pub address_v6: Ipv6Addr,
    pub ifindex: u32,
}

/// What of the data plane is on.
#[derive(Clone, Copy, Debug)]
pub struct Hooks {
    pub socket_lb: bool,
    pub packet_lb: bool,
}

pub const PER_PACKET: Hooks = Hooks {
    socket_lb: false,
    packet_lb: true,
};
pub const AT_SOCKET: Hooks = Hooks {
    socket_lb: true,
    packet_lb: false,
};
pub const BOTH: Hooks = Hooks {
    socket_lb: true,
    packet_lb: true,
};

/// What a client of [`ask`] says when nobody listens.
pub const REFUSED: &str = "error: connection refused";

/// Lets an address and port lead to a service, by every protocol.
pub fn frontend(address: &str, lead: Lead) -> [Op; 3] {
    frontends(address.parse().expect("an address and a port"), lead)
}

fn frontends(at: SocketAddr, lead: Lead) -> [Op; 3] {
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].map(|protocol| Op::SetFrontend {
        frontend: Frontend {
            addr: at.ip(),
            port: at.port(),
            protocol,
        },
        lead,
    })
}

/// Node 1 at 198.18.0.1 and fd00:18::1 with pods a and b, node 2 at 198.18.0.2 and fd00:18::2 with pod c; each pod knows the way to
/// every other.
pub struct Nodes {
    pub nodes: [Node; 2],
}

impl Nodes {
    pub fn start(sandbox: &Sandbox, hooks: Hooks) -> Result<Self> {
        let networks = [Network::host()?, Network::host()?];
        ip("link add kw-u1 type veth peer name kw-u2")?;
        networks[0].take("kw-u1")?;
        networks[1].take("kw-u2")?;
        let mut nodes = Vec::new();
        for (index, host) in networks.into_iter().enumerate() {
            let pods: &[&'static str] = if index == 0 { &["a", "b"] } else { &["c"] };
            let pin_root = sandbox.pin_root().join(format!("node-{}", index + 1));
            nodes.push(Node::start(host, index as u8 + 1, pods, hooks, pin_root)?);
        }
        let nodes = nodes
            .try_into()
            .map_err(|_count| anyhow::anyhow!("two nodes"))?;
        let nodes = Self { nodes };
        nodes.meet()?;
        Ok(nodes)
    }

    /// Lets the nodes find each other over IPv6, where a first question may be lost while the link comes up, and the next one is asked a
    /// second later.
    fn meet(&self) -> Result<()> {
        const ATTEMPTS: u32 = 10;
        let [first, second] = &self.nodes;
        for (from, to) in [(first, second), (second, first)] {
            let at = SocketAddr::new(to.address_v6.into(), ECHO_PORT);
            let meets = |_: &u32| TcpStream::connect_timeout(&at, Duration::from_secs(1)).is_ok();
            let met = from.host.run(|| (0..ATTEMPTS).find(meets));
            ensure!(met.is_some(), "{at} is not reached by the other node");
        }
        Ok(())
    }

    /// Leads a Service address and port, by every protocol, to these backends, on both nodes.
    pub fn serve(&mut self, id: u32, at: &str, backends: &[&str]) -> Result<()> {
        let at: SocketAddr = at.parse()?;
        let active = backends
            .iter()
            .map(|name| self.backend(name, at.is_ipv4()))
            .collect::<Result<Vec<_>>>()?;
        let mut ops = vec![
            Op::SetVip {
                addr: at.ip(),
                kind: Vip::Cluster,
            },
            Op::SetService {
                id: ServiceId(id),
                backends: ServiceBackends {
                    active,
                    ..ServiceBackends::default()
                },
            },
        ];
        ops.extend(frontends(at, Lead::to(ServiceId(id))));
        for node in &mut self.nodes {
            node.dataplane().apply(&ops)?;
        }
        Ok(())
    }

    /// The echo server of a pod, or of a host (`node-1`, `node-2`).
    pub fn backend(&self, name: &str, ipv4: bool) -> Result<SocketAddr> {
        let either = |v4: Ipv4Addr, v6: Ipv6Addr| if ipv4 { IpAddr::V4(v4) } else { v6.into() };
        let found =
            self.nodes
                .iter()
                .enumerate()
                .find_map(|(index, node)| match node.pods.get(name) {
                    Some(pod) => Some(either(pod.address, pod.address_v6)),
                    None => (name == format!("node-{}", index + 1))
                        .then(|| either(node.address, node.address_v6)),
                });
        Ok(SocketAddr::new(
            found.with_context(|| format!("no backend {name}"))?,
            ECHO_PORT,
        ))
    }
}

impl Node {
    fn start(
        host: Network,
        number: u8,
        pods: &[&'static str],
        hooks: Hooks,
        pin_root: PathBuf,
    ) -> Result<Self> {
        let own = |number: u8| {
            (
                Ipv4Addr::new(198, 18, 0, number),
                Ipv6Addr::new(0xfd00, 0x18, 0, 0, 0, 0, 0, number.into()),
            )
        };
        let (address, address_v6) = own(number);
        let service_veth = host.run(|| -> Result<ServiceVeth> {
            // The strictest that hosts have; forwarding as on every node.
            for (key, value) in [
                ("ipv4/conf/all/rp_filter", "1"),
                ("ipv4/conf/default/rp_filter", "1"),
                ("ipv4/ip_forward", "1"),
                ("ipv6/conf/all/forwarding", "1"),
            ] {
                fs::write(format!("/proc/sys/net/{key}"), value)
                    .with_context(|| format!("cannot set {key}"))?;
            }
            ip(&format!("link set kw-u{number} name eth0"))?;
            ip(&format!("addr add {address}/24 dev eth0"))?;
            ip(&format!("-6 addr add {address_v6}/64 dev eth0 nodad"))?;
            ip("link set eth0 up")?;
            let mut kernel = Kernel::new(Netlink::open()?);
            Ok(make_service_veth(
                &mut kernel,
                &["10.96.0.0/16".parse()?, "fd00:96::/112".parse()?],
                &[address.into(), address_v6.into()],
                1500,
            )?)
        })?;
        let config = Config {
            socket_lb: hooks.socket_lb,
            packet_lb: hooks.packet_lb,
            service_veth: Some(service_veth),
            node_v4: Some(address),
            node_v6: Some(address_v6),
            ..Config::new(pin_root)
        };
        let mut node = Self {
            host,
            address,
            address_v6,
            pods: BTreeMap::new(),
            config,
            dataplane: None,
        };
        node.open()?;
        let mut ops: Vec<Op> = [IpAddr::V4(address), address_v6.into()]
            .map(|addr| Op::SetHostAddress { addr })
            .into();
        for (index, name) in pods.iter().enumerate() {
            let last = 11 + index as u8;
            let pod = node.add_pod(name, number, last)?;
            for addr in [IpAddr::V4(pod.address), pod.address_v6.into()] {
                ops.push(Op::SetPod {
                    addr,
                    pod: LocalPod {
                        ifindex: pod.ifindex,
                        mac: pod_mac(pod.address.into()),
                        queued: false,
                    },
                });
            }
            echo(&pod.network, name)?;
            node.pods.insert(name, pod);
        }
        node.dataplane().apply(&ops)?;
        // By name, for the answers of servers that run on the host.
        echo(&node.host, &format!("node-{number}"))?;
        let other = 3 - number;
        let (peer, peer_v6) = own(other);
        node.host.run(|| -> Result<()> {
            // The peer may not be up yet, which this does not need.
            ip(&format!(
                "route add 10.244.{other}.0/24 via {peer} dev eth0 onlink src {address}"
            ))?;
            ip(&format!(
                "-6 route add fd00:244:{other}::/64 via {peer_v6} dev eth0 onlink src {address_v6}"
            ))
        })?;
        Ok(node)
    }

    fn add_pod(&mut self, name: &str, node: u8, last: u8) -> Result<Pod> {
        let network = Network::new()?;
        let address = Ipv4Addr::new(10, 244, node, last);
        let address_v6 = Ipv6Addr::new(0xfd00, 0x244, node.into(), 0, 0, 0, 0, last.into());
        let wire = PodWire {
            host_interface: format!("kw-{name}"),
            interface: "eth0".to_owned(),
            addresses: vec![address.into(), address_v6.into()],
            mac: pod_mac(address.into()),
            mtu: 1500,
            node_addresses: vec![self.address.into(), self.address_v6.into()],
            limits: Limits::default(),
        };
        let dataplane = self.dataplane.as_mut().context("the data plane is open")?;
        let ifindex = self.host.run(|| -> Result<u32> {
            let mut kernel = Kernel::new(Netlink::open()?);
            let hooks = dataplane.pod_hooks()?;
            Ok(wire_pod(&mut kernel, network.fd(), &wire, &hooks.filters())?.index)
        })?;
        Ok(Pod {
            network,
            address,
            address_v6,
            ifindex,
        })
    }

    /// Opens the data plane, as an agent that starts, and attaches it.
    pub fn open(&mut self) -> Result<()> {
        let config = &self.config;
        let dataplane = self.host.run(|| -> Result<Dataplane> {
            let mut dataplane = Dataplane::open(config)?;
            dataplane.attach_uplink(ifindex("eth0")?)?;
            dataplane.attach_service_veth()?;
            for pod in dataplane.attached_pods()? {
                dataplane.attach_pod(pod)?;
            }
            Ok(dataplane)
        })?;
        self.dataplane = Some(dataplane);
        Ok(())
    }

    /// Hangs the program on the uplink's driver, for frames that name it.
    pub fn with_early(&mut self, mode: XdpMode) -> Result<()> {
        let uplink = self.host.run(|| -> Result<Link> {
            let mut kernel = Kernel::new(Netlink::open()?);
            kernel.link("eth0")?.context("an uplink")
        })?;
        self.config.uplink_mac = uplink.mac;
        self.open()?;
        let early = EarlyUplink {
            ifindex: uplink.index,
            is_veth: true,
        };
        let host = self.host.try_clone()?;
        let xdp = host.run(|| self.dataplane().attach_early(&early, mode))?;
        ensure!(!matches!(xdp, Xdp::AtTc(_)), "{xdp:?}");
        Ok(())
    }

    /// Starts anew with masquerade, for all but these ranges.
    pub fn masquerade(&mut self, but: &[&str]) -> Result<()> {
        self.close();
        self.config.masquerade = true;
        self.open()?;
        let ranges = but.iter().map(|range| range.parse());
        let ranges = ranges.collect::<Result<_, _>>()?;
        self.dataplane().apply(&[Op::SetUnmasqueraded { ranges }])?;
        Ok(())
    }

    /// Ends the agent, so to speak: what it pinned stays.
    pub fn close(&mut self) {
        self.dataplane = None;
    }

    pub fn dataplane(&mut self) -> &mut Dataplane {
        self.dataplane.as_mut().expect("the data plane is open")
    }
}

/// Starts an echo server, TCP and UDP, that answers with its name and the client's address. It ends with the process.
pub fn echo(network: &Network, name: &str) -> Result<()> {
    // Of both families: where a client is one of IPv4, that is what is told.
    let at = SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, ECHO_PORT, 0, 0);
    let (listener, socket) = network.run(|| (TcpListener::bind(at), UdpSocket::bind(at)));
    let (listener, socket) = (listener?, socket?);
    let tcp_name = name.to_owned();
    thread::spawn(move || {
        while let Ok((mut stream, client)) = listener.accept() {
            let answer = format!("{tcp_name} {}", client.ip().to_canonical());
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(1..) = stream.read(&mut buffer) {
                    if stream.write_all(answer.as_bytes()).is_err() {
                        return;
                    }
                }
            });
        }
    });
    let udp_name = name.to_owned();
    thread::spawn(move || {
        let mut buffer = [0; 65536];
        while let Ok((_len, client)) = socket.recv_from(&mut buffer) {
            let answer = format!("{udp_name} {}", client.ip().to_canonical());
            // A client that is gone is none of the server's business.
            let _unsent = socket.send_to(answer.as_bytes(), client);
        }
    });
    Ok(())
}

/// A control group of the v2 hierarchy of its own, removed in the end.
pub struct Cgroup(PathBuf);

impl Cgroup {
    pub fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let root = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
        let root = root.iter().find(|root| {
            root.join("cgroup.procs").exists() && root.join("cgroup.controllers").exists()
        });
        let name = format!(
            "kw-dataplane-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = root
            .context("no cgroup v2 hierarchy is mounted")?
            .join(name);
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

const CLIENT: &str = "KEELWAY_TEST_CLIENT";
const CLIENT_CGROUP: &str = "KEELWAY_TEST_CLIENT_CGROUP";

/// Runs a client in a process of its own, which a control group needs: this test program again, told to run the test `client`
/// alone, which is to call [`client`]. Gives what it printed.
pub fn ask(network: &Network, cgroup: Option<&Cgroup>, request: &str) -> Result<String> {
    let mut command = asking(cgroup, request)?;
    let output = network.run(|| command.output())?;
    let text = String::from_utf8_lossy(&output.stdout);
    let answer = text.lines().find_map(|line| {
        line.split_once("ANSWER ")
            .map(|(_, answer)| answer.to_owned())
    });
    ensure!(
        answer.is_some(),
        "the client did not answer: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    answer.context("an answer")
}

/// The process that [`ask`] starts, for those who want to hear what it says meanwhile.
pub fn asking(cgroup: Option<&Cgroup>, request: &str) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["--exact", "client", "--nocapture", "--quiet"])
        .env(CLIENT, request);
    if let Some(cgroup) = cgroup {
        command.env(CLIENT_CGROUP, cgroup.path());
    }
    Ok(command)
}

/// What such a process does: carries out the request and prints what came of it. Returns at once in any other process.
pub fn client(carry_out: impl FnOnce(&str) -> std::io::Result<String>) {
    let Ok(request) = std::env::var(CLIENT) else {
        return;
    };
    if let Ok(cgroup) = std::env::var(CLIENT_CGROUP) {
        fs::write(
            Path::new(&cgroup).join("cgroup.procs"),
            std::process::id().to_string(),
        )
        .expect("enter the control group");
    }
    match carry_out(&request) {
        Ok(answer) => println!("ANSWER {answer}"),
        Err(error) => println!("ANSWER error: {}", error.kind()),
    }
}
