//! What changes while clients ask.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use keelway_agent::dataplane::held;
use keelway_tests::agents::{AgentNode, Pod, Segment, Service, program, until};
use keelway_tests::dice::Dice;
use keelway_tests::nodes::ECHO_PORT;
use keelway_tests::sandbox::ip;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::asking::{Failure, get, open};
use crate::explain::Record;

pub const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 7);
pub const WEB_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 7);
pub const NODE_PORT: u16 = 30_080;
/// How long a server serves on after it was told to end: as pods do that end well, and longer than a worker is away.
const DRAIN: Duration = Duration::from_secs(8);
/// How long nobody knows of a death: as long as clients of all kinds need to meet it.
const UNNOTICED: Duration = Duration::from_millis(300);
/// Backends of the Service that is asked: so many at least, so many at most.
pub const BACKENDS: std::ops::Range<usize> = 3..8;

/// An endpoint that went without notice: when, and when it was out of every node's maps. Since the beginning.
#[derive(Clone, Debug)]
pub struct Death {
    addresses: Vec<IpAddr>,
    died: Duration,
    gone: Duration,
}

impl Death {
    /// Whether a request may have been on its way to the endpoint, by the time and, where it is known which endpoint it was sent
    /// to, by that.
    pub fn explains(&self, failure: &Failure, record: &Record) -> bool {
        let backend = failure.way.map(|way| way.to.ip());
        let mut backend = backend.filter(|ip| record.is_pod(ip)).into_iter();
        failure.when <= self.gone
            && failure.when + failure.took >= self.died
            && backend.all(|ip| self.addresses.contains(&ip))
    }
}

/// A pod with a server that ends well.
pub struct Backend {
    pod: Pod,
    node: usize,
    server: Child,
}

impl Backend {
    fn start(node: &AgentNode, index: usize, name: &str) -> Result<Self> {
        let mut attempt = 0;
        // An agent that has just begun refuses; runtimes delete what could not be added, and try again under another name.
        let pod = until("a pod", || {
            attempt += 1;
            let container = format!("{name}-{attempt}");
            match node.wire(&container) {
                Ok(pod) => Ok(Some(pod)),
                Err(_) => {
                    node.cni("DEL", &format!("container-{container}"), None, json!({}))?;
                    Ok(None)
                }
            }
        })?;
        let at = format!("[::]:{ECHO_PORT}");
        let mut command = Command::new(program("echo")?);
        command
            .args(["--http", &at, "--udp", &at, "--pod", name, "--drain-ms"])
            .arg(DRAIN.as_millis().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let server = pod.network.run(|| command.spawn()).context("echo")?;
        let backend = Self {
            pod,
            node: index,
            server,
        };
        // As a readiness probe asks, from the pod's own node.
        let at = SocketAddr::from((backend.pod.address, ECHO_PORT));
        node.host.run(|| {
            until("a server", || {
                Ok(open(at).and_then(|mut stream| get(&mut stream, true)).ok())
            })
        })?;
        Ok(backend)
    }

    /// The server is told to end; it serves on for a while.
    fn end(&self) -> Result<()> {
        Ok(kill(
            Pid::from_raw(self.server.id() as i32),
            Signal::SIGTERM,
        )?)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // It may have ended; then there is nothing to kill.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Everything that changes while clients ask.
pub struct Churn {
    pub segment: Segment,
    pub dice: Dice,
    pub began: Instant,
    pub backends: Vec<Backend>,
    /// Those that were told to end.
    pub ending: Vec<(Instant, Backend)>,
    /// Services that nobody asks.
    pub others: BTreeMap<u8, Vec<(Ipv4Addr, &'static str)>>,
    pub pods: u32,
    pub writes: u32,
    pub deaths: Vec<Death>,
    pub record: Record,
}

const NAMES: [&str; 2] = ["node-1", "node-2"];

impl Churn {
    fn say(&mut self, what: String) {
        self.record.say(self.began.elapsed(), &what);
    }

    pub fn add(&mut self) -> Result<()> {
        let node = self.dice.below(2) as usize;
        self.pods += 1;
        let name = format!("p{}", self.pods);
        let backend = Backend::start(&self.segment.nodes[node], node, &name)?;
        let address = backend.pod.address;
        self.record.name(&backend.pod.addresses, address);
        self.say(format!("{name} serves at {address} on {}", NAMES[node]));
        self.backends.push(backend);
        self.write()
    }

    fn remove(&mut self) -> Result<()> {
        let which = self.dice.below(self.backends.len() as u64) as usize;
        let backend = self.backends.swap_remove(which);
        self.say(format!("{} ends", backend.pod.address));
        backend.end()?;
        self.write()?;
        self.ending.push((Instant::now(), backend));
        Ok(())
    }

    /// A backend goes without notice: its process dies, or its network does. Later that is known.
    pub fn lose(&mut self) -> Result<()> {
        let which = self.dice.below(self.backends.len() as u64) as usize;
        let mut backend = self.backends.swap_remove(which);
        let died = self.began.elapsed();
        let address = backend.pod.address;
        if self.dice.below(2) == 0 {
            self.say(format!("the server of {address} is killed"));
            backend.server.kill()?;
        } else {
            self.say(format!("the link of {address} goes down"));
            backend.pod.network.run(|| ip("link set eth0 down"))?;
        }
        thread::sleep(UNNOTICED);
        for endpoints in self.others.values_mut() {
            endpoints.retain(|(one, _)| *one != address);
        }
        self.write()?;
        for node in &self.segment.nodes {
            until("no trace of what died", || {
                let state = held(&node.pin_root())?;
                let all = state.services.values();
                let mut backends = all.flat_map(|one| one.active.iter().chain(&one.terminating));
                let addresses = &backend.pod.addresses;
                Ok((!backends.any(|at| addresses.contains(&at.ip()))).then_some(()))
            })?;
        }
        let gone = self.began.elapsed();
        self.say(format!("{address} is out of the maps"));
        let addresses = backend.pod.addresses.clone();
        self.deaths.push(Death {
            addresses,
            died,
            gone,
        });
        self.ending.push((Instant::now(), backend));
        Ok(())
    }

    /// Takes away what has ended.
    fn bury(&mut self) -> Result<()> {
        let ended = |(since, _): &mut (Instant, Backend)| since.elapsed() > DRAIN;
        let gone: Vec<_> = self.ending.extract_if(.., ended).collect();
        for (_, backend) in gone {
            let node = &self.segment.nodes[backend.node];
            let output = node.cni("DEL", &backend.pod.container, None, json!({}))?;
            ensure!(output.status.success(), "{output:?}");
            self.say(format!("{} is gone", backend.pod.address));
        }
        Ok(())
    }

    /// Services that nobody asks come, change their endpoints, and go.
    fn stir(&mut self) -> Result<()> {
        for _ in 0..10 {
            let key = self.dice.below(200) as u8;
            // With all of them, or none.
            let some = self.dice.below(2) == 0;
            let backends = self.backends.iter().filter(|_| some);
            let endpoints = backends
                .map(|backend| (backend.pod.address, NAMES[backend.node]))
                .collect();
            match self.dice.below(3) {
                0 => drop(self.others.remove(&key)),
                _ => drop(self.others.insert(key, endpoints)),
            }
        }
        self.write()
    }

    fn write(&mut self) -> Result<()> {
        self.writes += 1;
        let endpoints = |of: &[Backend]| {
            let address = |one: &Backend| (one.pod.address, NAMES[one.node]);
            of.iter().map(address).collect()
        };
        let ports = json!([
            {"name": "tcp", "port": 80, "protocol": "TCP", "nodePort": NODE_PORT},
            {"name": "udp", "port": 80, "protocol": "UDP", "nodePort": NODE_PORT},
        ]);
        let spec = json!({
            "type": "NodePort", "ports": ports, "clusterIPs": [WEB, WEB_V6],
            "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
        });
        let mut services = vec![Service {
            name: "web",
            address: WEB,
            endpoints: endpoints(&self.backends),
            spec,
            balanced: None,
        }];
        let second = |one: &Backend| {
            let address = one.pod.addresses.iter().find(|address| address.is_ipv6());
            json!({"addresses": [address], "nodeName": NAMES[one.node], "conditions": {"ready": true}})
        };
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv6",
            "metadata": {"namespace": "default", "name": "web-2", "labels": {"kubernetes.io/service-name": "web"}},
            "ports": [
                {"name": "tcp", "port": ECHO_PORT, "protocol": "TCP"}, {"name": "udp", "port": ECHO_PORT, "protocol": "UDP"},
            ],
            "endpoints": self.backends.iter().map(second).collect::<Vec<_>>(),
        });
        services.extend(self.others.iter().map(|(key, endpoints)| Service {
            name: OTHERS[usize::from(*key)],
            address: Ipv4Addr::new(10, 96, 1, *key),
            endpoints: endpoints.clone(),
            spec: json!({}),
            balanced: None,
        }));
        self.segment.cluster.write_with(&services, &[slice])
    }

    pub fn kill_worker(&mut self, node: usize) -> Result<()> {
        self.say(format!("the worker of {} is killed", NAMES[node]));
        self.segment.nodes[node].kill_worker()?;
        Ok(())
    }

    pub fn kill_supervisor(&mut self, node: usize) -> Result<()> {
        self.say(format!("the supervisor of {} is killed", NAMES[node]));
        self.segment.nodes[node].kill()?;
        self.segment.nodes[node].start()?;
        self.say(format!("{} is ready again", NAMES[node]));
        Ok(())
    }

    /// One change.
    pub fn step(&mut self) -> Result<()> {
        self.record.hear(&self.segment.nodes, self.began);
        self.bury()?;
        match self.dice.below(24) {
            0 if self.backends.len() > BACKENDS.start => self.lose(),
            1..=8 if self.backends.len() + 1 < BACKENDS.end => self.add(),
            9..=15 if self.backends.len() > BACKENDS.start => self.remove(),
            _ => self.stir(),
        }
    }
}

/// Names of the Services that nobody asks.
static OTHERS: std::sync::LazyLock<Vec<&'static str>> = std::sync::LazyLock::new(|| {
    (0..200)
        .map(|number| &*format!("other-{number}").leak())
        .collect()
});
