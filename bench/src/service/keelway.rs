//! Keelway itself: two nodes as network namespaces, each with a real agent, and pods that the real CNI plugin wired.
//!
//! Whether the socket hooks see a client is decided by the control group it is in, so that both ways through a Service are
//! measured on one set-up, round by round.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use keelway_agent::report::Report;
use keelway_tests::sandbox::{Network, Sandbox, ip};
use serde_json::{Value, json};

use crate::control_groups::ControlGroups;

use super::bare;
use super::cluster::{MEASURED, Pod, SERVICE_RANGE, Service, node_address, services};
use crate::load::Metric;

/// Longest wait for an agent to have done what it was given.
const PATIENCE: Duration = Duration::from_secs(60);

/// The file that agents read the cluster from.
const SNAPSHOT: &str = "snapshot.json";

/// How nodes deal with what comes by their uplinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uplinks {
    /// At tc; the ends of the wire leave each other checksums to complete, as veths do.
    AsMade,
    /// At tc, with whole checksums.
    Complete,
    /// So, and every frame passes a program at the driver that does nothing.
    Passed,
    /// In the driver, which needs whole checksums.
    InDriver,
}

impl Uplinks {
    const ETHTOOL: &str = "ethtool";

    /// Whether this machine has what completes checksums.
    pub fn can_complete() -> bool {
        Command::new(Self::ETHTOOL)
            .arg("--version")
            .output()
            .is_ok()
    }

    /// Sets the uplink of the calling thread's namespace up.
    fn prepare(self) -> Result<()> {
        if self == Uplinks::AsMade {
            return Ok(());
        }
        let mut command = Command::new(Self::ETHTOOL);
        command.args(["-K", "eth0", "tx", "off"]);
        let output = command.output().context("running ethtool")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{command:?}: {said}");
        Ok(())
    }

    const fn flag(self) -> &'static str {
        match self {
            Uplinks::AsMade | Uplinks::Complete | Uplinks::Passed => "off",
            Uplinks::InDriver => "native",
        }
    }

    /// What the agent says of it.
    const fn reported(self) -> &'static str {
        match self {
            Uplinks::AsMade | Uplinks::Complete | Uplinks::Passed => "tc",
            Uplinks::InDriver => "native",
        }
    }
}

/// What is between nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Between {
    /// A wire: the host of one is a client outside of the other. Pods' addresses are routed by it.
    Wire(Uplinks),
    /// A switch with a third machine at it, whose connections are answered by the node that has the server, where they may be. Pods'
    /// addresses are in the overlay, by which nodes send on what is to be answered so.
    Switch { answered_directly: bool },
}

impl Between {
    /// Makes it, and gives the namespaces at its ends: nodes, then who else is there.
    fn lay(self) -> Result<Vec<(u8, Network)>> {
        let (ends, uplinks) = match self {
            Self::Wire(uplinks) => {
                ip("link add up1 type veth peer name up2")?;
                (2, uplinks)
            }
            Self::Switch { answered_directly } => {
                let bridge = format!("switch{}", u8::from(answered_directly));
                ip(&format!("link add {bridge} type bridge"))?;
                ip(&format!("link set {bridge} up"))?;
                for number in 1..=3 {
                    let port = format!("{bridge}-{number}");
                    ip(&format!("link add {port} type veth peer name up{number}"))?;
                    ip(&format!("link set {port} master {bridge} up"))?;
                }
                (3, Uplinks::AsMade)
            }
        };
        let mut networks = Vec::new();
        for number in 1..=ends {
            let network = Network::new()?;
            network.take(&format!("up{number}"))?;
            network.run(|| {
                ip(&format!("link set up{number} name eth0"))?;
                ip(&format!("addr add {}/24 dev eth0", node_address(number)))?;
                ip("link set eth0 up")?;
                uplinks.prepare()
            })?;
            networks.push((number, network));
        }
        Ok(networks)
    }

    const fn uplinks(self) -> Uplinks {
        match self {
            Self::Wire(uplinks) => uplinks,
            Self::Switch { .. } => Uplinks::AsMade,
        }
    }

    const fn routing(self) -> &'static str {
        match self {
            Self::Wire(_) => "direct",
            Self::Switch { .. } => "vxlan",
        }
    }

    const fn dsr(self) -> &'static str {
        match self {
            Self::Switch {
                answered_directly: true,
            } => "on",
            _ => "off",
        }
    }

    /// No other's of a run.
    fn name(self) -> String {
        format!("{:?}-{}-{}", self.uplinks(), self.routing(), self.dsr())
    }
}

/// Two nodes, ready to be measured on.
pub struct Keelway {
    nodes: Vec<Node>,
    /// The third machine, where there is one.
    third: Option<Network>,
    pub client: Pod,
    /// A server beside the client, and one on the other node.
    pub servers: [Pod; 2],
    bin_dir: PathBuf,
    snapshot: PathBuf,
    _folder: tempfile::TempDir,
}

struct Node {
    name: String,
    network: Network,
    agent: Child,
    socket: PathBuf,
}

impl Keelway {
    /// Builds the nodes, without any Service.
    pub fn build(
        sandbox: &Sandbox,
        groups: &ControlGroups,
        bin_dir: &Path,
        between: Between,
    ) -> Result<Self> {
        let folder = tempfile::tempdir().context("making a folder for the agents' files")?;
        let mut networks = between.lay()?;
        let third = networks.drain(2..).map(|(_, network)| network).next();
        let uplinks = between.uplinks();
        let snapshot = folder.path().join(SNAPSHOT);
        write_snapshot(&snapshot, &[])?;
        let nodes = networks
            .into_iter()
            .map(|(number, network)| {
                // Two nodes' hooks on one group would both be in the figure.
                let is_clients = number == 1 && between == Between::Wire(Uplinks::AsMade);
                let cgroup = match is_clients {
                    true => groups.hooked(),
                    false => groups.elsewhere(),
                };
                Node::start(
                    number,
                    network,
                    bin_dir,
                    folder.path(),
                    &cgroup,
                    &sandbox.pin_root(),
                    between,
                )
            })
            .collect::<Result<Vec<_>>>()?;
        for node in &nodes {
            node.wait(bin_dir, "to be ready, with its uplink as asked", |report| {
                report.ready && report.xdp == uplinks.reported()
            })?;
        }
        if uplinks == Uplinks::Passed {
            for node in &nodes {
                let pins = sandbox
                    .pin_root()
                    .with_file_name(format!("{}-bare", node.name));
                node.network.run(|| bare::hook_driver(pins))?;
            }
        }
        let client = nodes[0].add_pod(bin_dir, "client")?;
        let servers = [
            nodes[0].add_pod(bin_dir, "near")?,
            nodes[1].add_pod(bin_dir, "far")?,
        ];
        Ok(Self {
            nodes,
            third,
            client,
            servers,
            bin_dir: bin_dir.into(),
            snapshot,
            _folder: folder,
        })
    }

    /// Replaces all Services by so many, of which the first lead to the servers.
    pub fn load(&self, count: usize) -> Result<()> {
        let servers = self.servers.each_ref().map(|server| server.address);
        let mut objects = Vec::new();
        for (index, service) in services(count, servers).iter().enumerate() {
            objects.extend(manifests(index, service));
        }
        write_snapshot(&self.snapshot, &objects)?;
        let ports = MEASURED * Metric::ALL.len() + count - MEASURED;
        for node in &self.nodes {
            node.wait(&self.bin_dir, "to have every Service", |report| {
                report.services == count && report.service_ports == ports
            })?;
        }
        Ok(())
    }

    /// A client outside, for the first node: the third machine, or the host of the node that the client is not on.
    pub fn outside(&self) -> &Network {
        self.third.as_ref().unwrap_or(&self.nodes[1].network)
    }
}

impl Node {
    fn start(
        number: u8,
        network: Network,
        bin_dir: &Path,
        folder: &Path,
        cgroup: &Path,
        pin_root: &Path,
        between: Between,
    ) -> Result<Self> {
        let name = format!("node-{number}");
        let own = folder.join(&name);
        let pins = format!("{name}-{}", between.name());
        fs::create_dir_all(&own)?;
        let socket = own.join("agent.sock");
        let log = fs::File::create(own.join("agent.log"))?;
        let mut command = Command::new(bin_dir.join("keelway-agent"));
        command
            .arg("run")
            .args(["--node-name", &name])
            .arg("--snapshot")
            .arg(folder.join(SNAPSHOT))
            .arg("--cgroup")
            .arg(cgroup)
            .arg("--socket")
            .arg(&socket)
            .arg("--state-dir")
            .arg(own.join("state"))
            .arg("--pin-root")
            .arg(pin_root.with_file_name(&pins))
            .arg("--cni-conf-dir")
            .arg(own.join("net.d"))
            .args(["--service-cidr", SERVICE_RANGE])
            // What a probe finds, and when, must not be in the figures.
            .args(["--routing", between.routing()])
            .args(["--dsr", between.dsr()])
            // Many nodes of this machine would want the port.
            .args(["--healthz-bind-address", "127.0.0.1:10256"])
            .args(["--xdp", between.uplinks().flag()])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        // A child is born into the namespaces of the thread that starts it.
        let agent = network
            .run(|| command.spawn())
            .with_context(|| format!("starting {}", bin_dir.join("keelway-agent").display()))?;
        Ok(Self {
            name,
            network,
            agent,
            socket,
        })
    }

    /// Waits until the agent's own report satisfies `done`.
    fn wait(&self, bin_dir: &Path, what: &str, done: impl Fn(&Report) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let mut last = String::new();
        while Instant::now() < deadline {
            // Each question is a process of its own, which paces them.
            let output = Command::new(bin_dir.join("keelway-agent"))
                .arg("status")
                .arg("--socket")
                .arg(&self.socket)
                .args(["--output", "json"])
                .output()
                .context("running keelway-agent status")?;
            if let Ok(report) = serde_json::from_slice::<Report>(&output.stdout) {
                if done(&report) {
                    return Ok(());
                }
                last = report.to_string();
            } else {
                last = String::from_utf8_lossy(&output.stderr).into_owned();
            }
        }
        let log = fs::read_to_string(self.socket.with_file_name("agent.log")).unwrap_or_default();
        let tail = log.lines().rev().take(5).collect::<Vec<_>>().join("\n");
        bail!(
            "{}: the agent did not come {what} within {PATIENCE:?}:\n{last}{tail}",
            self.name
        )
    }

    fn add_pod(&self, bin_dir: &Path, id: &str) -> Result<Pod> {
        let pod = Network::new()?;
        let conf = json!({"cniVersion": "1.0.0", "name": "keelway", "type": "keelway-cni", "socket": self.socket});
        let mut plugin = Command::new(bin_dir.join("keelway-cni"));
        plugin
            .env("CNI_COMMAND", "ADD")
            .env("CNI_CONTAINERID", id)
            .env("CNI_NETNS", pod.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", bin_dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = plugin.spawn().context("starting keelway-cni")?;
        let mut input = child
            .stdin
            .take()
            .context("keelway-cni has no standard input")?;
        input.write_all(conf.to_string().as_bytes())?;
        drop(input);
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success(),
            "keelway-cni ADD {id} on {}: {said}",
            self.name
        );
        let result: Value = serde_json::from_str(&said).context("the result of keelway-cni")?;
        let address = result["ips"][0]["address"]
            .as_str()
            .and_then(|cidr| cidr.split('/').next());
        let address = address.and_then(|text| text.parse().ok());
        let address =
            address.with_context(|| format!("keelway-cni gave no IPv4 address: {said}"))?;
        Ok(Pod {
            network: pod,
            address,
        })
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // The worker goes with its supervisor.
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

fn write_snapshot(path: &Path, objects: &[Value]) -> Result<()> {
    let nodes = [1_u8, 2].map(|number| {
        json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": format!("node-{number}")},
            "spec": {"podCIDRs": [format!("10.244.{number}.0/24")]},
            "status": {"addresses": [{"type": "InternalIP", "address": node_address(number)}]},
        })
    });
    let items: Vec<&Value> = nodes.iter().chain(objects).collect();
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
    // Replaced whole, so that an agent never reads half of it.
    let partial = path.with_extension("partial");
    fs::write(&partial, list.to_string())?;
    fs::rename(&partial, path).with_context(|| format!("writing {}", path.display()))
}

/// A Service, and the slice that leads it to its server.
pub fn manifests(index: usize, service: &Service) -> [Value; 2] {
    let name = format!("bench-{index}");
    let ports: Vec<Value> = service
        .ports
        .iter()
        .map(|port| {
            json!({
                "name": format!("p{}", port.number), "port": port.number, "targetPort": port.number,
                "protocol": port.protocol, "nodePort": port.node_port,
            })
        })
        .collect();
    let endpoint_ports: Vec<Value> = service
        .ports
        .iter()
        .map(|port| {
            json!({"name": format!("p{}", port.number), "port": port.number, "protocol": port.protocol})
        })
        .collect();
    [
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "bench"},
            "spec": {
                "type": if service.ports.iter().any(|port| port.node_port.is_some()) { "NodePort" } else { "ClusterIP" },
                "clusterIP": service.address, "clusterIPs": [service.address], "ports": ports,
            },
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("{name}-1"), "namespace": "bench", "labels": {"kubernetes.io/service-name": name}},
            "ports": endpoint_ports,
            "endpoints": [{"addresses": [service.endpoint], "conditions": {"ready": true}, "nodeName": service.node}],
        }),
    ]
}
