//! The uplink's driver (XDP): packets through the program as the kernel loaded it, in both families, and real sockets between nodes
//! whose uplinks have it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    process::Command,
};

use dataplane_abi::Reason;
use keelway_agent::dataplane::{
    Config, Dataplane, EarlyUplink, Frontend, Lead, Op, Protocol, ServiceBackends, ServiceId, Xdp,
    XdpMode,
};
use keelway_tests::{
    nodes::{self, Nodes, PER_PACKET, ask, frontend},
    packets::{
        checksums_are_right, tcp,
        tcp_flag::{ACK, SYN},
        udp,
    },
    requests,
    sandbox::{Network, Sandbox, ifindex, ip, is_root},
};

/// Not a test of its own: the process that others start as a client.
#[test]
fn client() {
    nodes::client(requests::carry_out);
}

/// Verdicts of a driver's program.
const LEFT: i32 = 2;
const SENT: i32 = 3;

const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// Addresses of one family: the node's, a client's, a backend's here and two elsewhere.
struct Family {
    node: &'static str,
    client: &'static str,
    here: &'static str,
    far: [&'static str; 2],
}

const FAMILIES: [Family; 2] = [
    Family {
        node: "198.18.0.1",
        client: "203.0.113.9",
        here: "10.0.0.12",
        far: ["10.0.1.13", "10.0.1.14"],
    },
    Family {
        node: "fd00:18::1",
        client: "2001:db8::9",
        here: "fd00:244::12",
        far: ["fd00:244:1::13", "fd00:244:1::14"],
    },
];

impl Family {
    fn at(&self, ip: &str, port: u16) -> String {
        SocketAddr::new(ip.parse().unwrap(), port).to_string()
    }

    /// Where the transport header lies.
    fn l4(&self) -> usize {
        if self.node.contains(':') { 54 } else { 34 }
    }
}

/// A frame to, or by, the uplink.
fn framed(mut packet: Vec<u8>, to: [u8; 6], from: [u8; 6]) -> Vec<u8> {
    packet[..6].copy_from_slice(&to);
    packet[6..12].copy_from_slice(&from);
    packet
}

fn arriving(packet: Vec<u8>) -> Vec<u8> {
    framed(packet, UPLINK_MAC, ROUTER_MAC)
}

fn leaving(packet: Vec<u8>) -> Vec<u8> {
    framed(packet, ROUTER_MAC, UPLINK_MAC)
}

/// A node with an uplink, behind which a router knows the way to everybody.
fn opened(sandbox: &Sandbox) -> (Dataplane, u32) {
    let mac = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
    let (own, router) = (mac(UPLINK_MAC), mac(ROUTER_MAC));
    for command in [
        format!("link add up0 address {own} type veth peer name up1"),
        "link set up0 up".into(),
        "link set up1 up".into(),
        "addr add 198.18.0.1/24 dev up0".into(),
        "-6 addr add fd00:18::1/64 dev up0 nodad".into(),
        format!("neigh replace 198.18.0.9 lladdr {router} dev up0 nud permanent"),
        format!("-6 neigh replace fd00:18::9 lladdr {router} dev up0 nud permanent"),
        "route add default via 198.18.0.9".into(),
        "-6 route add default via fd00:18::9".into(),
    ] {
        ip(&command).unwrap();
    }
    for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        std::fs::write(format!("/proc/sys/net/{key}"), "1").unwrap();
    }
    let dataplane = Dataplane::open(&Config {
        node_v4: Some([198, 18, 0, 1].into()),
        node_v6: Some("fd00:18::1".parse().unwrap()),
        uplink_mac: Some(UPLINK_MAC),
        ..Config::new(sandbox.pin_root())
    })
    .unwrap();
    (dataplane, ifindex("up0").unwrap())
}

/// Port 30080 of the node leads to these backends.
fn state(family: &Family, backends: &[SocketAddr], maglev: u32) -> Vec<Op> {
    let service = ServiceBackends {
        active: backends.to_vec(),
        maglev,
        ..ServiceBackends::default()
    };
    let node: IpAddr = family.node.parse().unwrap();
    let every = match node {
        IpAddr::V4(_) => IpAddr::from([0; 4]),
        IpAddr::V6(_) => IpAddr::from([0; 16]),
    };
    let id = ServiceId(1);
    let mut ops = vec![
        Op::SetHostAddress { addr: node },
        Op::SetPod {
            addr: family.here.parse().unwrap(),
            pod: keelway_agent::dataplane::LocalPod {
                ifindex: 12,
                mac: [2; 6],
                queued: false,
            },
        },
        Op::SetService {
            id,
            backends: service,
        },
    ];
    ops.extend(
        [Protocol::Tcp, Protocol::Udp].map(|protocol| Op::SetFrontend {
            frontend: Frontend {
                addr: every,
                port: 30080,
                protocol,
            },
            lead: Lead::to(id),
        }),
    );
    ops
}

fn backend(ip: &str) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), 8080)
}

fn source_port(family: &Family, packet: &[u8]) -> u16 {
    u16::from_be_bytes([packet[family.l4()], packet[family.l4() + 1]])
}

#[test]
fn flows_of_clients_outside_to_backends_elsewhere_leave_by_the_driver() {
    if !is_root("uplink's driver") {
        return;
    }
    for family in FAMILIES {
        let sandbox = Sandbox::enter().unwrap();
        let (mut dataplane, uplink) = opened(&sandbox);
        let far = backend(family.far[0]).to_string();
        dataplane
            .apply(&state(&family, &[backend(family.far[0])], 0))
            .unwrap();
        let run = |packet: &[u8]| {
            let run = dataplane.run_early(packet, uplink, 1).unwrap();
            (run.verdict, run.packet)
        };
        let (client, asked) = (
            family.at(family.client, 5000),
            family.at(family.node, 30080),
        );
        let tcp_of = |src: &str, dst: &str, flags| tcp(src, dst, flags, b"odd");
        let udp_of = |src: &str, dst: &str, _flags| udp(src, dst, b"odd");
        for build in [&tcp_of as &dyn Fn(&str, &str, u8) -> Vec<u8>, &udp_of] {
            let (verdict, out) = run(&arriving(build(&client, &asked, SYN)));
            assert_eq!(verdict, SENT, "{}", family.node);
            assert!(checksums_are_right(&out));
            let own = family.at(family.node, source_port(&family, &out));
            assert_eq!(out, leaving(build(&own, &far, SYN)));
            let (verdict, back) = run(&arriving(build(&far, &own, SYN | ACK)));
            assert_eq!(verdict, SENT);
            assert_eq!(back, leaving(build(&asked, &client, SYN | ACK)));
            let (verdict, again) = run(&arriving(build(&client, &asked, ACK)));
            assert_eq!((verdict, again), (SENT, leaving(build(&own, &far, ACK))));
        }
        let counted: BTreeMap<Reason, u64> = dataplane.counters().unwrap().into_iter().collect();
        use Reason::*;
        for (reason, count) in [
            (SentEarly, 6),
            (ServiceTranslated, 4),
            (ReplyTranslated, 2),
            (SourceNat, 2),
            (FlowCreated, 2),
            (FlowReplied, 2),
        ] {
            assert_eq!(counted[&reason], count, "{}", reason.name());
        }
    }
}

#[test]
fn what_the_driver_does_not_do_goes_up_as_it_came() {
    if !is_root("what the driver leaves") {
        return;
    }
    for family in FAMILIES {
        let sandbox = Sandbox::enter().unwrap();
        let (mut dataplane, uplink) = opened(&sandbox);
        let (client, asked) = (
            family.at(family.client, 5000),
            family.at(family.node, 30080),
        );
        let syn = |asked: &str| arriving(tcp(&client, asked, SYN, b""));
        let leaves = |dataplane: &Dataplane, packet: &[u8]| {
            let run = dataplane.run_early(packet, uplink, 1).unwrap();
            assert_eq!(run.verdict, LEFT, "{packet:02x?}");
            assert_eq!(run.packet, packet);
        };
        // A backend here: chosen, and left to the hook at tc.
        dataplane
            .apply(&state(&family, &[backend(family.here)], 0))
            .unwrap();
        leaves(&dataplane, &syn(&asked));
        // No frontend, a frame for another machine, one for a group, and none at all.
        leaves(&dataplane, &syn(&family.at(family.node, 22)));
        dataplane
            .apply(&state(&family, &[backend(family.far[0])], 0))
            .unwrap();
        let other = tcp(&family.at(family.client, 5001), &asked, SYN, b"");
        leaves(&dataplane, &framed(other.clone(), ROUTER_MAC, UPLINK_MAC));
        leaves(
            &dataplane,
            &framed(other.clone(), [1, 0, 0x5e, 0, 0, 1], ROUTER_MAC),
        );
        leaves(&dataplane, &arriving(other.clone())[..20]);
        // Options, or something between the headers, and a fragment.
        let mut wrong = arriving(other.clone());
        let is_v6 = family.l4() == 54;
        wrong[if is_v6 { 20 } else { 14 }] = if is_v6 { 60 } else { 0x46 };
        leaves(&dataplane, &wrong);
        if !is_v6 {
            let mut fragment = arriving(other.clone());
            fragment[20] = 0x20;
            leaves(&dataplane, &fragment);
        }
        // No neighbour known: the hook at tc finds it.
        ip(match is_v6 {
            true => "-6 neigh del fd00:18::9 dev up0",
            false => "neigh del 198.18.0.9 dev up0",
        })
        .unwrap();
        leaves(&dataplane, &arriving(other));
    }
}

#[test]
fn two_nodes_choose_the_same_backend_for_a_flow_by_their_tables() {
    if !is_root("Maglev at the uplink") {
        return;
    }
    for family in FAMILIES {
        let backends: Vec<SocketAddr> = family.far.into_iter().map(backend).collect();
        let turned: Vec<SocketAddr> = backends.iter().rev().copied().collect();
        let chosen = |list: &[SocketAddr]| -> Vec<Vec<u8>> {
            let sandbox = Sandbox::enter().unwrap();
            let (mut dataplane, uplink) = opened(&sandbox);
            dataplane.apply(&state(&family, list, 1021)).unwrap();
            let ask = |port: u16| {
                let client = family.at(family.client, 4000 + port);
                let packet = arriving(tcp(&client, &family.at(family.node, 30080), SYN, b""));
                let run = dataplane.run_early(&packet, uplink, 1).unwrap();
                assert_eq!(run.verdict, SENT);
                let len = (family.l4() - 14) / 5 * if family.l4() == 54 { 2 } else { 1 };
                run.packet[family.l4() - len..family.l4()].to_vec()
            };
            (0..60).map(ask).collect()
        };
        let (first, second) = (chosen(&backends), chosen(&turned));
        assert_eq!(first, second, "{}", family.node);
        let different: BTreeSet<&Vec<u8>> = first.iter().collect();
        assert_eq!(different.len(), 2);
    }
}

/// What `ethtool -K` is told: a frame that a driver sends on has whole checksums then.
fn complete_checksums(network: &Network) {
    let set = || {
        let mut command = Command::new("ethtool");
        command.args(["-K", "eth0", "tx", "off"]).output()
    };
    let output = network.run(set).expect("ethtool");
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn clients_outside_are_served_through_drivers_as_by_the_hooks_at_tc() {
    if !is_root("XDP between nodes") {
        return;
    }
    let sandbox = Sandbox::enter().unwrap();
    let mut nodes = Nodes::start(&sandbox, PER_PACKET).unwrap();
    let mut ops = Vec::new();
    let targets = [
        (30001u16, "a"),
        (30003, "c"),
        (30004, "node-1"),
        (30005, "node-2"),
    ];
    for ipv4 in [true, false] {
        for (port, name) in targets {
            let id = ServiceId(u32::from(port) + if ipv4 { 0 } else { 1000 });
            let every = if ipv4 { "0.0.0.0" } else { "[::]" };
            ops.push(Op::SetService {
                id,
                backends: ServiceBackends {
                    active: vec![nodes.backend(name, ipv4).unwrap()],
                    ..ServiceBackends::default()
                },
            });
            ops.extend(frontend(&format!("{every}:{port}"), Lead::to(id)));
        }
    }
    nodes.nodes[0].dataplane().apply(&ops).unwrap();
    for node in &mut nodes.nodes {
        complete_checksums(&node.host);
        node.with_early(XdpMode::Native).unwrap();
    }
    for hop in [1, 2] {
        for (port, backend) in targets {
            for (address, bracketed) in
                [("198.18.0.1", "198.18.0.1"), ("fd00:18::1", "[fd00:18::1]")]
            {
                let hairpin = if address.contains(':') {
                    "fd6b:7700::77:77"
                } else {
                    "169.254.77.77"
                };
                let client = if address.contains(':') {
                    "fd00:18::2"
                } else {
                    "198.18.0.2"
                };
                let seen = match backend {
                    "a" => client,
                    "node-1" => hairpin,
                    _ => address,
                };
                let wanted = format!("{backend} {seen} from {bracketed}:{port}");
                for protocol in ["tcp", "udp", "udp-connected"] {
                    let request = format!("{protocol} {bracketed}:{port}");
                    let answer = ask(&nodes.nodes[1].host, None, &request).unwrap();
                    assert_eq!(answer, wanted, "{protocol}, round {hop}");
                }
            }
        }
    }
    let counted: BTreeMap<Reason, u64> = {
        let counters = nodes.nodes[0].dataplane().counters().unwrap();
        counters.into_iter().collect()
    };
    let sent = counted[&Reason::SentEarly];
    assert!(sent >= 2 * 2 * 3 * 4, "only {sent} packets by the driver");
    let drops = counted
        .iter()
        .filter(|(reason, count)| reason.class() != dataplane_abi::Class::Event && **count > 0);
    assert_eq!(drops.count(), 0, "{counted:?}");
}

#[test]
fn the_program_hangs_as_asked_stays_over_a_restart_and_falls_back() {
    if !is_root("hanging at the driver") {
        return;
    }
    let sandbox = Sandbox::enter().unwrap();
    let (mut dataplane, ifindex) = opened(&sandbox);
    let veth = EarlyUplink {
        ifindex,
        is_veth: true,
    };
    let Xdp::AtTc(why) = dataplane.attach_early(&veth, XdpMode::Auto).unwrap() else {
        panic!("used on a veth unasked");
    };
    assert!(why.contains("--xdp native"), "{why}");
    assert_eq!(
        dataplane.attach_early(&veth, XdpMode::Native).unwrap(),
        Xdp::Native
    );
    let hung = || {
        let output = Command::new("ip")
            .args(["-d", "link", "show", "up0"])
            .output();
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        let id = text
            .split("prog/xdp id ")
            .nth(1)
            .map(|rest| rest.split_whitespace().next().unwrap().to_owned());
        (text.contains("xdpgeneric"), id)
    };
    let (is_generic, first) = hung();
    assert!(!is_generic && first.is_some());
    // Another agent: in place, a new program.
    drop(dataplane);
    assert_eq!(hung().1, first);
    let mut dataplane = Dataplane::open(&Config {
        uplink_mac: Some(UPLINK_MAC),
        ..Config::new(sandbox.pin_root())
    })
    .unwrap();
    let (_, second) = hung();
    assert!(second.is_some() && second != first);
    assert_eq!(
        dataplane.attach_early(&veth, XdpMode::Native).unwrap(),
        Xdp::Native
    );
    assert_eq!(hung().1, second);
    // An agent that asks no driver does without the program, and takes it off.
    drop(dataplane);
    let config = Config {
        uplink_mac: Some(UPLINK_MAC),
        ..Config::new(sandbox.pin_root())
    };
    let mut without = Dataplane::open(&Config {
        early: false,
        ..config.clone()
    })
    .unwrap();
    assert_eq!(hung(), (false, None));
    assert_eq!(without.attach_early(&veth, XdpMode::Off).unwrap(), Xdp::Off);
    assert!(!veth.is_asked(XdpMode::Auto) && veth.is_asked(XdpMode::Native));
    drop(without);
    let mut dataplane = Dataplane::open(&config).unwrap();
    assert_eq!(hung(), (false, None));
    // Another way, and none.
    assert_eq!(
        dataplane.attach_early(&veth, XdpMode::Generic).unwrap(),
        Xdp::Generic
    );
    assert!(hung().0);
    assert_eq!(
        dataplane.attach_early(&veth, XdpMode::Off).unwrap(),
        Xdp::Off
    );
    assert_eq!(hung(), (false, None));
    // The loopback's driver cannot; said, not done generically.
    let loopback = EarlyUplink {
        ifindex: 1,
        is_veth: false,
    };
    let Xdp::AtTc(why) = dataplane.attach_early(&loopback, XdpMode::Auto).unwrap() else {
        panic!("the loopback has no driver for it");
    };
    assert!(why.contains("driver"), "{why}");
    // Somebody else's program is not pushed aside.
    let other = Dataplane::open(&Config {
        uplink_mac: Some(UPLINK_MAC),
        ..Config::new(sandbox.pin_root().join("other"))
    });
    let mut other = other.unwrap();
    assert_eq!(
        other.attach_early(&veth, XdpMode::Native).unwrap(),
        Xdp::Native
    );
    let Xdp::AtTc(why) = dataplane.attach_early(&veth, XdpMode::Auto).unwrap() else {
        panic!("auto on a veth");
    };
    assert!(!why.is_empty());
    let held = EarlyUplink {
        is_veth: false,
        ..veth
    };
    assert_eq!(
        dataplane.attach_early(&held, XdpMode::Auto).unwrap(),
        Xdp::AtTc("another program is there".into())
    );
}
