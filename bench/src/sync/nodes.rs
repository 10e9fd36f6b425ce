//! A cluster of thousands of nodes, as one of them learns it: routes, and the overlay's entries where there is one.
//!
//! The kernel itself says when a route comes and goes. It is the last that the agent writes of a node: what leads by the overlay has its
//! entries before.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result};
use keelway_tests::sandbox::{Network, ip};
use serde_json::{Value, json};

use super::Bench;
use super::api::{ApiServer, Cluster};
use super::node::{Subject, Who};
use super::process::Cost;
use crate::report::{Better, Figure, Held};
use crate::stats::Spread;

/// How long all routes may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// The first other node's address, and its pods'.
const FIRST_ADDRESS: u32 = u32::from_be_bytes([198, 19, 0, 1]);
const FIRST_RANGE: u32 = u32::from_be_bytes([100, 64, 0, 0]);
/// A route to nobody, by which one learns that the kernel is heard.
const CALL: &str = "192.0.2.1";

/// How the nodes reach each other's pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Direct,
    /// With what DSR needs: each node's ranges in the maps, too.
    Overlay,
}

impl Way {
    pub const ALL: [Self; 2] = [Self::Direct, Self::Overlay];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Overlay => "vxlan",
        }
    }

    /// Flags of the agent.
    pub const fn flags(self) -> [&'static str; 4] {
        match self {
            Self::Direct => ["--routing", "direct", "--dsr", "off"],
            Self::Overlay => ["--routing", "vxlan", "--dsr", "on"],
        }
    }
}

/// Another node, by its number.
pub fn name(number: usize) -> String {
    format!("other-{number}")
}

/// The same as an object of the API.
pub fn object(number: usize) -> Value {
    let address = Ipv4Addr::from_bits(FIRST_ADDRESS + number as u32);
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": name(number)},
        "spec": {"podCIDR": range(number), "podCIDRs": [range(number)]},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]},
    })
}

fn range(number: usize) -> String {
    format!(
        "{}/24",
        Ipv4Addr::from_bits(FIRST_RANGE + 256 * number as u32)
    )
}

/// Changes of a namespace's routes, as they happen.
pub struct RouteWatch {
    program: Child,
    heard: Receiver<Heard>,
}

struct Heard {
    at: Instant,
    is_there: bool,
    range: String,
}

impl RouteWatch {
    /// Begins to listen; whatever happens from then on is heard.
    pub fn start(node: &Network) -> Result<Self> {
        let mut command = Command::new("ip");
        // Thousands of routes come at once.
        command.args(["-rcvbuf", "33554432", "-o", "monitor", "route"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut program = node
            .run(|| command.spawn())
            .context("starting ip monitor")?;
        let lines = program.stdout.take().context("what ip monitor says")?;
        let (say, heard) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(lines).lines().map_while(Result::ok) {
                let at = Instant::now();
                if let Some((is_there, range)) = read(&line) {
                    let range = range.to_owned();
                    // Nobody hears any more: then nobody wants to know.
                    let _ = say.send(Heard {
                        at,
                        is_there,
                        range,
                    });
                }
            }
        });
        let watch = Self { program, heard };
        let deadline = Instant::now() + PATIENCE;
        // Until it listens, calls are lost.
        while Instant::now() < deadline {
            node.run(|| ip(&format!("route replace blackhole {CALL}")))?;
            let answer = watch.heard.recv_timeout(Duration::from_millis(50));
            node.run(|| ip(&format!("route del blackhole {CALL}")))?;
            if answer.is_ok() {
                return Ok(watch);
            }
        }
        anyhow::bail!("ip monitor says nothing")
    }

    /// Waits until the routes to so many other nodes have come, and says when the last one did.
    pub fn all(&self, nodes: usize) -> Result<Instant> {
        let mut missing: BTreeSet<String> = (0..nodes).map(range).collect();
        let deadline = Instant::now() + PATIENCE;
        while let Ok(heard) = self.next(deadline) {
            if heard.is_there && missing.remove(&heard.range) && missing.is_empty() {
                return Ok(heard.at);
            }
        }
        anyhow::bail!(
            "{} of {nodes} routes have not come within {PATIENCE:?}",
            missing.len()
        )
    }

    /// Waits until the route to another node has come, or gone.
    pub fn one(&self, number: usize, is_there: bool) -> Result<Instant> {
        let wanted = range(number);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let heard = self.next(deadline).with_context(|| {
                let what = if is_there { "come" } else { "gone" };
                format!("the route to {wanted} has not {what} within {PATIENCE:?}")
            })?;
            if heard.range == wanted && heard.is_there == is_there {
                return Ok(heard.at);
            }
        }
    }

    fn next(&self, deadline: Instant) -> Result<Heard> {
        let left = deadline.saturating_duration_since(Instant::now());
        Ok(self.heard.recv_timeout(left)?)
    }
}

impl Drop for RouteWatch {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

/// Whether a route is there, and where it leads, of a line of `ip -o monitor route`.
fn read(line: &str) -> Option<(bool, &str)> {
    let (is_there, rest) = match line.strip_prefix("Deleted ") {
        Some(rest) => (false, rest),
        None => (true, line),
    };
    let mut words = rest.split_whitespace();
    let first = words.next()?;
    // The type of a route that leads to nobody comes first.
    let range = match first {
        "blackhole" | "unreachable" | "local" | "broadcast" | "multicast" => words.next()?,
        range => range,
    };
    Some((is_there, range))
}

/// Nodes that come and go in a round, one after the other.
const NODE_CHANGES: u32 = 10;

impl Bench {
    /// A cluster of many nodes, and one more that comes and goes.
    pub(super) fn nodes(&self, bin_dir: &Path, count: usize) -> Result<(Vec<Figure>, Vec<Held>)> {
        const NONE: Cluster = Cluster {
            services: 0,
            endpoints: 0,
        };
        let server = ApiServer::start(bin_dir, &self.node)?;
        crate::say(&self.progress, format!("making {count} nodes"));
        self.progress.set_length(count as u64);
        self.progress.set_position(0);
        let progress = &self.progress;
        server.with_writer(NONE, async move |writer| {
            writer.make(|| ()).await?;
            writer.make_nodes(count, || progress.inc(1)).await
        })?;
        let (mut figures, mut held) = (Vec::new(), Vec::new());
        for way in Way::ALL {
            crate::say(&self.progress, format!("{count} nodes, {}", way.name()));
            let who = Who::Keelway {
                program: bin_dir.join("keelway-agent"),
                way,
            };
            let (kubeconfig, cgroup) = (server.kubeconfig(), self.groups.hooked());
            let mut findings = Findings::default();
            for _ in 0..self.extent.rounds {
                self.clean()?;
                let watch = RouteWatch::start(&self.node)?;
                let mut subject =
                    Subject::start(&who, &self.node, &self.sandbox, &kubeconfig, &cgroup)?;
                let last = watch.all(count)?;
                subject.learnt()?;
                findings.cold_start(subject.started(), last, subject.cost()?);
                let took = server.with_writer(NONE, async move |writer| {
                    let mut took = Vec::new();
                    // The first one opens the connection, and is not counted.
                    for _ in 0..=NODE_CHANGES {
                        let begun = Instant::now();
                        writer.add_node(&object(count)).await?;
                        let comes = watch.one(count, true)? - begun;
                        let begun = Instant::now();
                        writer.remove_node(&name(count)).await?;
                        let goes = watch.one(count, false)? - begun;
                        took.push([comes, goes].map(|took| took.as_secs_f64()));
                    }
                    Ok(took.split_off(1))
                })?;
                let middle = |which: usize| {
                    let all = took.iter().map(|both| both[which]);
                    Spread::of(all).map(|spread| spread.median)
                };
                findings.comes_s.extend(middle(0));
                findings.goes_s.extend(middle(1));
            }
            let (told, judged) = findings.tell(count, way);
            figures.extend(told);
            held.extend(judged);
        }
        self.clean()?;
        Ok((figures, held))
    }
}

/// What was measured of one way, at one number of nodes.
#[derive(Debug, Default)]
pub struct Findings {
    pub cold_start_s: Vec<f64>,
    pub comes_s: Vec<f64>,
    pub goes_s: Vec<f64>,
    pub memory_bytes: Vec<f64>,
    pub cpu_s: Vec<f64>,
}

/// How long a node that comes or goes may take: as one endpoint.
const ONE_MS: f64 = 5.0;

impl Findings {
    /// A start, from exec to the last route.
    pub fn cold_start(&mut self, started: SystemTime, last: Instant, cost: Cost) {
        // The clock that says when it was started is another.
        let ago = last.elapsed();
        let took = started.elapsed().unwrap_or_default().saturating_sub(ago);
        self.cold_start_s.push(took.as_secs_f64());
        self.memory_bytes.push(cost.resident_bytes);
        self.cpu_s.push(cost.cpu_seconds);
    }

    pub fn tell(&self, nodes: usize, way: Way) -> (Vec<Figure>, Vec<Held>) {
        let rows = [
            ("cold start", "s", &self.cold_start_s),
            ("a node comes", "s", &self.comes_s),
            ("a node goes", "s", &self.goes_s),
            ("memory after", "B", &self.memory_bytes),
            ("CPU time of the start", "s", &self.cpu_s),
        ];
        let figures = rows.into_iter().filter_map(|(what, unit, rounds)| {
            let labels = [
                ("nodes", nodes.to_string()),
                ("way", way.name().to_owned()),
                ("what", what.to_owned()),
                ("subject", "keelway".to_owned()),
            ];
            let kind = ("value", unit, Better::Lower);
            Figure::new(
                "from the nodes to the routes",
                &labels,
                kind,
                rounds.clone(),
            )
        });
        let figures: Vec<Figure> = figures.collect();
        let held = [("a node comes", "node-comes"), ("a node goes", "node-goes")];
        let held = held.into_iter().filter_map(|(what, name)| {
            let figure = figures.iter().find(|one| one.label("what") == Some(what))?;
            let name = format!("sync.{name}.{}.{nodes}-nodes", way.name());
            Some(Held::below(name, ONE_MS, "ms", figure.spread.times(1e3)))
        });
        let held = held.collect();
        (figures, held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_monitor_are_read() {
        for (line, read_as) in [
            (
                "100.64.1.0/24 via 198.19.0.2 dev eth0 proto 75 ",
                (true, "100.64.1.0/24"),
            ),
            (
                "Deleted 100.64.1.0/24 via 198.19.0.2 dev eth0 ",
                (false, "100.64.1.0/24"),
            ),
            ("blackhole 192.0.2.1 ", (true, "192.0.2.1")),
            (
                "Deleted unreachable 10.244.1.0/24 dev lo ",
                (false, "10.244.1.0/24"),
            ),
        ] {
            assert_eq!(read(line), Some(read_as), "{line}");
        }
        assert_eq!(read(""), None);
    }

    #[test]
    fn nodes_have_ranges_and_addresses_of_their_own() {
        let all: BTreeSet<String> = (0..5000)
            .flat_map(|number| {
                let node = object(number);
                [
                    &node["spec"]["podCIDR"],
                    &node["status"]["addresses"][0]["address"],
                ]
                .map(ToString::to_string)
            })
            .collect();
        assert_eq!(all.len(), 10_000);
        assert!(all.contains("\"100.64.255.0/24\"") && all.contains("\"198.19.1.0\""));
    }

    #[test]
    fn a_node_that_takes_too_long_is_a_miss() {
        let findings = Findings {
            comes_s: vec![0.004; 5],
            goes_s: vec![0.006; 5],
            ..Findings::default()
        };
        let (figures, held) = findings.tell(5000, Way::Direct);
        assert_eq!(figures.len(), 2);
        let held: Vec<(&str, bool)> = held.iter().map(|one| (one.name.as_str(), one.ok)).collect();
        assert_eq!(
            held,
            [
                ("sync.node-comes.direct.5000-nodes", true),
                ("sync.node-goes.direct.5000-nodes", false),
            ]
        );
    }

    #[test]
    fn a_route_is_heard_when_it_comes_and_when_it_goes() {
        if !keelway_tests::sandbox::is_root("a_route_is_heard_when_it_comes_and_when_it_goes") {
            return;
        }
        let node = Network::new().expect("a namespace");
        let watch = RouteWatch::start(&node).expect("a monitor");
        for number in [1, 0] {
            let route = format!("route add blackhole {}", range(number));
            node.run(|| ip(&route)).expect("a route");
        }
        watch.all(2).expect("both come");
        let gone = format!("route del blackhole {}", range(1));
        node.run(|| ip(&gone)).expect("a route less");
        watch.one(1, false).expect("it goes");
    }
}
