//! What each program costs per packet, run by the kernel alone (`BPF_PROG_TEST_RUN`): no device, no wake-up, no noise of theirs.

use anyhow::{Context as _, Result};
use keelway_agent::dataplane::{
    Config, Dataplane, Frontend, Lead, LocalPod, Op, PacketProgram, Protocol, ServiceBackends,
    ServiceId, ServiceVeth, Vip,
};
use keelway_tests::packets::{tcp, tcp_flag::ACK};
use keelway_tests::sandbox::Sandbox;

use crate::report::{Better, Figure};
use crate::stats::Spread;

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

struct Row {
    program: PacketProgram,
    what: &'static str,
    packet: Vec<u8>,
    translated: bool,
}

/// Costs of every program on its usual packets. Loads a data plane of its own, which goes again.
pub fn measure() -> Result<Vec<Figure>> {
    // On a thread of its own: the sandbox changes the namespaces of the thread that enters it.
    std::thread::scope(|scope| {
        let measured = scope.spawn(|| {
            let sandbox = Sandbox::enter()?;
            let mut dataplane = Dataplane::open(&Config {
                service_veth: Some(ServiceVeth {
                    outer: LOOPBACK,
                    inner: LOOPBACK,
                }),
                node_v4: Some([198, 18, 0, 1].into()),
                ..Config::new(sandbox.pin_root())
            })?;
            dataplane.apply(&state()?)?;
            rows().iter().map(|row| cost(&dataplane, row)).collect()
        });
        measured
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Two pods of this node, the node itself, and a Service whose one backend is the second pod.
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
    ])
}

fn rows() -> Vec<Row> {
    let row = |program, what, src, dst, translated| Row {
        program,
        what,
        packet: tcp(src, dst, ACK, b"x"),
        translated,
    };
    vec![
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
    ]
}

fn cost(dataplane: &Dataplane, row: &Row) -> Result<Figure> {
    let run = |repeat| {
        dataplane
            .run(row.program, &row.packet, LOOPBACK, repeat)
            .map(|run| f64::from(run.nanoseconds))
    };
    // Opens the flow, and warms what there is to warm.
    run(1)?;
    let rounds = (0..ROUNDS)
        .map(|_| {
            if !row.translated {
                return Ok(run(REPEATS)?);
            }
            let calls = (0..CALLS).map(|_| run(1)).collect::<Result<Vec<_>, _>>()?;
            Ok(Spread::of(calls).context("no call was made")?.median)
        })
        .collect::<Result<Vec<_>>>()?;
    let runs = if row.translated {
        "one by one"
    } else {
        "in a row"
    };
    let labels = [
        ("program", row.program.name().to_owned()),
        ("packet", row.what.to_owned()),
        ("runs", runs.to_owned()),
    ];
    Figure::new("programs", &labels, ("time", "ns", Better::Lower), rounds)
        .context("no round was run")
}
