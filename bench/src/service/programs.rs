//! What each program costs per packet, run by the kernel alone (`BPF_PROG_TEST_RUN`): no device, no wake-up, no noise of theirs.

use anyhow::{Context as _, Result};
use keelway_agent::dataplane::{
    Config, Dataplane, Frontend, Lead, LocalPod, Op, PacketProgram, Protocol, ServiceBackends,
    ServiceId, ServiceVeth, Vip,
};
use keelway_tests::packets::{tcp, tcp_flag::ACK, udp};
use keelway_tests::sandbox::{Sandbox, ifindex, ip};

use crate::report::{Better, Figure};
use crate::stats::Spread;
use crate::yardstick::{self, Yardstick};

const ROUNDS: usize = 7;
/// Runs of a round when the packet leaves as it came.
const REPEATS: u32 = 100_000;
/// Calls of a round when it does not: the kernel keeps what a run made of the packet, so each call is one run.
const CALLS: usize = 2_000;

/// The interface that packets come by: the loopback, the one that every namespace has.
const LOOPBACK: u32 = 1;
const POD: &str = "10.0.0.11:4000";
const OTHER_POD: &str = "10.0.0.12:8080";
const FAR_POD: &str = "10.0.1.13:8080";
const SERVICE: &str = "10.96.0.1:80";
const NODE: &str = "198.18.0.1:4000";
const OUTSIDE: &str = "203.0.113.9:5000";
const NODE_PORT: &str = "198.18.0.1:30080";

/// Hardware addresses of the uplink, and of the router behind it.
const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const ROUTER: &str = "02:00:00:00:00:09";

/// Which program a packet is run through.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Program {
    AtTc(PacketProgram),
    /// The uplink driver's.
    Early,
}

impl Program {
    const fn name(self) -> &'static str {
        match self {
            Self::AtTc(program) => program.name(),
            Self::Early => "uplink_early",
        }
    }
}

struct Row {
    program: Program,
    what: &'static str,
    packet: Vec<u8>,
    /// It comes by the uplink rather than by the loopback.
    by_uplink: bool,
    translated: bool,
}

const IN_A_ROW: &str = "in a row";

impl Row {
    const fn runs(&self) -> &'static str {
        if self.translated {
            "one by one"
        } else {
            IN_A_ROW
        }
    }
}

/// The programs, loaded over a small cluster, with the packets that they are run on, and the yardstick.
struct Loaded {
    dataplane: Dataplane,
    yardstick: Yardstick,
    uplink: u32,
    rows: Vec<Row>,
}

impl Loaded {
    /// Does something with them; they go again.
    fn with<T: Send>(work: impl FnOnce(&Self) -> Result<T> + Send) -> Result<T> {
        // On a thread of its own: the sandbox changes the namespaces of the thread that enters it.
        std::thread::scope(|scope| {
            let done = scope.spawn(|| {
                let sandbox = Sandbox::enter()?;
                let uplink = uplink()?;
                let mut dataplane = Dataplane::open(&Config {
                    service_veth: Some(ServiceVeth {
                        outer: LOOPBACK,
                        inner: LOOPBACK,
                    }),
                    node_v4: Some([198, 18, 0, 1].into()),
                    uplink_mac: Some(UPLINK_MAC),
                    ..Config::new(sandbox.pin_root())
                })?;
                dataplane.apply(&state()?)?;
                work(&Self {
                    dataplane,
                    yardstick: Yardstick::load()?,
                    uplink,
                    rows: rows(),
                })
            });
            done.join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Nanoseconds of a run of a row's program, the mean of so many.
    fn run(&self, row: &Row, repeat: u32) -> Result<f64> {
        let ifindex = if row.by_uplink { self.uplink } else { LOOPBACK };
        let dataplane = &self.dataplane;
        let run = match row.program {
            Program::AtTc(program) => dataplane.run(program, &row.packet, ifindex, repeat),
            Program::Early => dataplane.run_early(&row.packet, ifindex, repeat),
        };
        Ok(f64::from(run?.nanoseconds))
    }

    /// Of each round, the nanoseconds of a row's program, and of the yardstick right before it.
    fn rounds(&self, row: &Row) -> Result<(Vec<f64>, Vec<f64>)> {
        // Opens the flow, and warms what there is to warm.
        self.run(row, 1)?;
        let mut rounds = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            rounds.1.push(self.yardstick.run(REPEATS)?);
            rounds.0.push(if row.translated {
                let calls = (0..CALLS)
                    .map(|_| self.run(row, 1))
                    .collect::<Result<Vec<_>>>()?;
                Spread::of(calls).context("no call was made")?.median
            } else {
                self.run(row, REPEATS)?
            });
        }
        Ok(rounds)
    }
}

/// Costs of every program on its usual packets.
pub fn measure() -> Result<Vec<Figure>> {
    Loaded::with(|loaded| {
        let (mut figures, mut lengths) = (Vec::new(), Vec::new());
        for row in &loaded.rows {
            let (costs, beside) = loaded.rounds(row)?;
            let figure = figure(row.program.name(), row.what, row.runs(), costs)?;
            figures.push(figure.beside(yardstick::NAME, &beside));
            lengths.extend(beside);
        }
        let own = figure(yardstick::NAME, "any", IN_A_ROW, lengths)?;
        figures.push(own.of_others(true));
        Ok(figures)
    })
}

/// An uplink with a router behind it that leads everywhere: packets that leave need a way, though none is sent.
fn uplink() -> Result<u32> {
    for command in [
        "link add up0 address 02:00:00:00:00:01 type veth peer name up1",
        "link set up0 up",
        "link set up1 up",
        "addr add 198.18.0.1/24 dev up0",
        &format!("neigh replace 198.18.0.9 lladdr {ROUTER} dev up0 nud permanent"),
        "route add default via 198.18.0.9",
    ] {
        ip(command)?;
    }
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("switching forwarding on")?;
    ifindex("up0")
}

/// Two pods of this node, the node itself, a Service whose one backend is the second pod, and a NodePort whose backend is elsewhere.
fn state() -> Result<Vec<Op>> {
    let frontend = Frontend {
        addr: "10.96.0.1".parse()?,
        port: 80,
        protocol: Protocol::Tcp,
    };
    let pod = |last: u8, ifindex| Op::SetPod {
        addr: [10, 0, 0, last].into(),
        pod: LocalPod {
            ifindex,
            mac: [2, 0, 0, 0, 0, last],
            queued: false,
        },
    };
    let backends = ServiceBackends {
        active: vec![OTHER_POD.parse()?],
        ..ServiceBackends::default()
    };
    Ok(vec![
        pod(11, LOOPBACK),
        pod(12, LOOPBACK + 1),
        Op::SetHostAddress {
            addr: [198, 18, 0, 1].into(),
        },
        Op::SetVip {
            addr: frontend.addr,
            kind: Vip::Cluster,
        },
        Op::SetService {
            id: ServiceId(1),
            backends,
        },
        Op::SetFrontend {
            frontend,
            lead: Lead::to(ServiceId(1)),
        },
        Op::SetService {
            id: ServiceId(2),
            backends: ServiceBackends {
                active: vec![FAR_POD.parse()?],
                ..ServiceBackends::default()
            },
        },
        Op::SetFrontend {
            frontend: Frontend {
                addr: [0, 0, 0, 0].into(),
                port: 30080,
                protocol: Protocol::Udp,
            },
            lead: Lead::to(ServiceId(2)),
        },
    ])
}

fn rows() -> Vec<Row> {
    let row = |program, what, src, dst, translated| Row {
        program: Program::AtTc(program),
        what,
        packet: tcp(src, dst, ACK, b"x"),
        by_uplink: false,
        translated,
    };
    // A datagram, whose first opens the flow.
    let node_port = |program| {
        let mut packet = udp(OUTSIDE, NODE_PORT, b"x");
        packet[..6].copy_from_slice(&UPLINK_MAC);
        Row {
            program,
            what: "client outside to NodePort, backend elsewhere",
            packet,
            by_uplink: true,
            translated: true,
        }
    };
    // Which leaves a trace, and asks whether a Service's flow left one.
    let datagram = |what, dst| Row {
        packet: udp(POD, dst, b"x"),
        ..row(PacketProgram::PodIngress, what, POD, dst, false)
    };
    vec![
        datagram("datagram, pod to pod of this node", OTHER_POD),
        datagram("datagram, pod to pod of another node", FAR_POD),
        row(
            PacketProgram::PodIngress,
            "pod to pod of this node",
            POD,
            OTHER_POD,
            false,
        ),
        row(
            PacketProgram::PodIngress,
            "pod to pod of another node",
            POD,
            FAR_POD,
            false,
        ),
        row(
            PacketProgram::PodIngress,
            "pod to Service",
            POD,
            SERVICE,
            true,
        ),
        row(
            PacketProgram::UplinkIngress,
            "other node's pod to pod",
            FAR_POD,
            POD,
            false,
        ),
        row(PacketProgram::PodEgress, "host to pod", NODE, POD, false),
        row(
            PacketProgram::ServiceIngress,
            "host to Service",
            NODE,
            SERVICE,
            true,
        ),
        node_port(Program::AtTc(PacketProgram::UplinkIngress)),
        node_port(Program::Early),
    ]
}

fn figure(program: &str, packet: &str, runs: &str, rounds: Vec<f64>) -> Result<Figure> {
    let labels = [
        ("program", program.to_owned()),
        ("packet", packet.to_owned()),
        ("runs", runs.to_owned()),
    ];
    Figure::new("programs", &labels, ("time", "ns", Better::Lower), rounds)
        .context("no round was run")
}
