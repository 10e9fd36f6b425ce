//! Two nodes of network namespaces with real agents, and pods that the real CNI plugin wires.
//!
//! The cluster is a file: the agents follow it as they would follow an API server.

use std::fs::{self, File};
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use keelway_agent::addresses::is_host_interface;
use keelway_agent::net::{Direction, Kernel, Netlink};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::nodes::{Cgroup, ECHO_PORT, echo};
use crate::process::{Finished, Running};
use crate::sandbox::{Network, Sandbox, ip};

/// How long anything may take that an agent does by itself. Debug builds load their programs slowly.
const PATIENCE: Duration = Duration::from_secs(20);

/// A Service of the file.
#[derive(Clone, Debug)]
pub struct Service {
    pub name: &'static str,
    pub address: Ipv4Addr,
    /// Addresses of its endpoints, with the node that each is on.
    pub endpoints: Vec<(Ipv4Addr, &'static str)>,
    /// More fields of its spec. With `trafficDistribution: PreferSameNode` its endpoints have the hints that a controller would give them.
    pub spec: Value,
    /// Its address of a load balancer, as its status has it.
    pub balanced: Option<Ipv4Addr>,
}

/// The file that the agents follow.
pub struct ClusterFile {
    pub path: PathBuf,
    /// The Node objects in it.
    pub nodes: Vec<Value>,
}

/// A node: its host's network and its agent.
pub struct AgentNode {
    pub name: &'static str,
    pub host: Network,
    pub address: Ipv4Addr,
    pub cgroup: Cgroup,
    dir: PathBuf,
    pins: PathBuf,
    /// Where the cluster is learnt of: the flag that says so, and its value.
    source: (&'static str, PathBuf),
    flags: Vec<String>,
    agent: Option<Child>,
}

/// A pod that the plugin has wired.
pub struct Pod {
    pub network: Network,
    pub container: String,
    pub address: Ipv4Addr,
    /// All that it has, the IPv4 one first.
    pub addresses: Vec<IpAddr>,
}

impl ClusterFile {
    /// Writes the cluster: its nodes, and these Services. TCP and UDP port 80 of each lead to the echo servers.
    pub fn write(&self, services: &[Service]) -> Result<()> {
        self.write_with(services, &[])
    }

    /// The same, and more objects.
    pub fn write_with(&self, services: &[Service], more: &[Value]) -> Result<()> {
        let mut items = self.nodes.clone();
        items.extend_from_slice(more);
        for service in services {
            let mut spec = json!({
                "clusterIP": service.address, "clusterIPs": [service.address],
                "ports": [
                    {"name": "tcp", "port": 80, "protocol": "TCP"}, {"name": "udp", "port": 80, "protocol": "UDP"},
                ],
            });
            if let (Value::Object(spec), Value::Object(more)) = (&mut spec, service.spec.clone()) {
                spec.extend(more);
            }
            let by_node = service.spec["trafficDistribution"] == "PreferSameNode";
            let endpoint = |(address, node): &(Ipv4Addr, &str)| {
                let hints = by_node.then(|| json!({"forNodes": [{"name": node}]}));
                json!({"addresses": [address], "nodeName": node, "conditions": {"ready": true}, "hints": hints})
            };
            let endpoints: Vec<Value> = service.endpoints.iter().map(endpoint).collect();
            let ingress: Vec<Value> = service
                .balanced
                .iter()
                .map(|ip| json!({"ip": ip}))
                .collect();
            items.push(json!({
                "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": service.name}, "spec": spec,
                "status": {"loadBalancer": {"ingress": ingress}},
            }));
            items.push(json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                "metadata": {
                    "namespace": "default", "name": format!("{}-1", service.name),
                    "labels": {"kubernetes.io/service-name": service.name},
                },
                "ports": [
                    {"name": "tcp", "port": ECHO_PORT, "protocol": "TCP"}, {"name": "udp", "port": ECHO_PORT, "protocol": "UDP"},
                    {"name": "sctp", "port": ECHO_PORT, "protocol": "SCTP"},
                ],
                "endpoints": endpoints,
            }));
        }
        let partial = self.path.with_extension("new");
        fs::write(
            &partial,
            json!({"kind": "List", "apiVersion": "v1", "items": items}).to_string(),
        )?;
        Ok(fs::rename(&partial, &self.path)?)
    }
}

/// The Node object of a node.
pub fn node_object(name: &str, addresses: &[IpAddr], ranges: &[String]) -> Value {
    let addresses: Vec<Value> = addresses
        .iter()
        .map(|address| json!({"type": "InternalIP", "address": address}))
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
        "spec": {"podCIDRs": ranges},
        "status": {"addresses": addresses},
    })
}

/// The name and the Node object of a node by its number: its pods have addresses of the families that it has.
pub fn numbered_node(
    number: u8,
    address: Ipv4Addr,
    second: Option<Ipv6Addr>,
) -> (&'static str, Value) {
    let name = ["node-1", "node-2", "node-3"][usize::from(number) - 1];
    let (mut addresses, mut ranges) = (
        vec![IpAddr::V4(address)],
        vec![format!("10.244.{number}.0/24")],
    );
    if let Some(second) = second {
        addresses.push(second.into());
        ranges.push(format!("fd00:10:244:{number}::/64"));
    }
    (name, node_object(name, &addresses, &ranges))
}

/// Two nodes on one link, with nothing running on them but an echo server each. `flags` are more flags for the agents.
pub fn two_nodes(
    sandbox: &Sandbox,
    dir: &Path,
    flags: &[&str],
) -> Result<(ClusterFile, [AgentNode; 2])> {
    lay(sandbox, dir, flags, false)
}

/// The ranges of Service addresses of a cluster of both families, as flags.
pub const DUAL_STACK_RANGES: [&str; 4] = [
    "--service-cidr",
    "10.96.0.0/16",
    "--service-cidr",
    "fd00:10:96::/112",
];

/// Two nodes with addresses and pods of both families.
pub fn two_dual_stack_nodes(
    sandbox: &Sandbox,
    dir: &Path,
    flags: &[&str],
) -> Result<(ClusterFile, [AgentNode; 2])> {
    lay(sandbox, dir, flags, true)
}

fn lay(
    sandbox: &Sandbox,
    dir: &Path,
    flags: &[&str],
    dual: bool,
) -> Result<(ClusterFile, [AgentNode; 2])> {
    let mut cluster = ClusterFile {
        path: dir.join("cluster.json"),
        nodes: Vec::new(),
    };
    let hosts = [Network::host()?, Network::host()?];
    ip("link add kw-u1 type veth peer name kw-u2")?;
    let mut nodes = Vec::new();
    for (index, host) in hosts.into_iter().enumerate() {
        let number = index as u8 + 1;
        host.take(&format!("kw-u{number}"))?;
        let address = Ipv4Addr::new(198, 18, 0, number);
        host.run(|| -> Result<()> {
            ip(&format!("link set kw-u{number} name eth0"))?;
            ip(&format!("addr add {address}/24 dev eth0"))?;
            if dual {
                ip(&format!("addr add fd00:198:18::{number}/64 dev eth0 nodad"))?;
            }
            ip("link set eth0 up")
        })?;
        let second = dual.then(|| format!("fd00:198:18::{number}").parse());
        let (name, object) = numbered_node(number, address, second.transpose()?);
        cluster.nodes.push(object);
        nodes.push(AgentNode::new(
            sandbox, dir, &cluster, name, host, address, flags,
        )?);
    }
    let nodes = nodes
        .try_into()
        .map_err(|_count| anyhow::anyhow!("two nodes"))?;
    Ok((cluster, nodes))
}

/// Two nodes and a client on one switch. The switch's ports are `p1`, `p2` and `p3`, in this order.
pub struct Segment {
    pub cluster: ClusterFile,
    pub nodes: [AgentNode; 2],
    pub client: Network,
    pub switch: Network,
}

/// As [`two_nodes`], with a client beside them, at 198.18.0.9.
pub fn segment(sandbox: &Sandbox, dir: &Path, flags: &[&str]) -> Result<Segment> {
    lay_segment(sandbox, dir, flags, false)
}

/// As [`two_dual_stack_nodes`], with a client beside them, at 198.18.0.9 and fd00:198:18::9.
pub fn dual_stack_segment(sandbox: &Sandbox, dir: &Path, flags: &[&str]) -> Result<Segment> {
    lay_segment(sandbox, dir, flags, true)
}

fn lay_segment(sandbox: &Sandbox, dir: &Path, flags: &[&str], dual: bool) -> Result<Segment> {
    let (cluster, nodes) = lay(sandbox, dir, flags, dual)?;
    let (client, switch) = (Network::host()?, Network::new()?);
    switch.run(|| -> Result<()> {
        ip("link add switch type bridge")?;
        ip("link set switch up")
    })?;
    let hosts = [&nodes[0].host, &nodes[1].host, &client];
    for (index, host) in hosts.into_iter().enumerate() {
        let (number, port) = (index + 1, format!("p{}", index + 1));
        ip(&format!("link add kw-s{number} type veth peer name {port}"))?;
        host.take(&format!("kw-s{number}"))?;
        switch.take(&port)?;
        switch.run(|| -> Result<()> {
            ip(&format!("link set {port} master switch"))?;
            ip(&format!("link set {port} up"))
        })?;
        let last = if index == 2 { 9 } else { number };
        host.run(|| -> Result<()> {
            if index == 0 {
                // In place of the wire between the two nodes.
                ip("link del eth0")?;
            }
            ip(&format!("link set kw-s{number} name eth0"))?;
            ip(&format!("addr add 198.18.0.{last}/24 dev eth0"))?;
            if dual {
                ip(&format!("addr add fd00:198:18::{last}/64 dev eth0 nodad"))?;
            }
            ip("link set eth0 up")
        })?;
    }
    Ok(Segment {
        cluster,
        nodes,
        client,
        switch,
    })
}

impl AgentNode {
    /// A node whose host's network is there, with an echo server on it and no agent yet.
    pub fn new(
        sandbox: &Sandbox,
        dir: &Path,
        cluster: &ClusterFile,
        name: &'static str,
        host: Network,
        address: Ipv4Addr,
        flags: &[&str],
    ) -> Result<Self> {
        echo(&host, name)?;
        Ok(Self {
            name,
            host,
            address,
            cgroup: Cgroup::new()?,
            dir: dir.join(name),
            pins: sandbox.pin_root().join(name),
            source: ("--snapshot", cluster.path.clone()),
            flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
            agent: None,
        })
    }

    /// Has the agent follow the API server of a kubeconfig in place of a file.
    pub fn ask_by(&mut self, kubeconfig: PathBuf) {
        self.source = ("--kubeconfig", kubeconfig);
    }

    /// Starts the agent, and waits until it is ready.
    pub fn start(&mut self) -> Result<()> {
        let agent = self.spawn()?;
        self.adopt(agent);
        self.wait("ready", |report| report["ready"] == true)
            .map(drop)
    }

    /// Takes an agent as this node's.
    pub fn adopt(&mut self, agent: Child) {
        self.agent = Some(agent);
    }

    /// Begins an agent of this node.
    pub fn spawn(&self) -> Result<Child> {
        fs::create_dir_all(&self.dir)?;
        let log = File::options().create(true).append(true).open(self.log())?;
        let mut command = Command::new(program("keelway-agent")?);
        command.arg("run").arg("--node-name").arg(self.name);
        for (flag, path) in [
            (self.source.0, &self.source.1),
            ("--cgroup", &self.cgroup.path().to_owned()),
            ("--socket", &self.socket()),
            ("--state-dir", &self.state_dir()),
            ("--pin-root", &self.pins),
            ("--cni-conf-dir", &self.dir.join("net.d")),
        ] {
            command.arg(flag).arg(path);
        }
        command
            .args(&self.flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        self.host.run(|| command.spawn()).context("start the agent")
    }

    /// Asks the agent to stop, and waits for its end.
    pub fn stop(&mut self) -> Result<()> {
        let Some(mut agent) = self.agent.take() else {
            return Ok(());
        };
        kill(Pid::from_raw(agent.id() as i32), Signal::SIGTERM)?;
        ensure!(
            agent.wait()?.success(),
            "the agent did not end well: {}",
            self.read_log()
        );
        Ok(())
    }

    /// The process id of the worker.
    pub fn worker(&self) -> Result<i32> {
        let supervisor = self.agent.as_ref().context("the agent runs")?.id();
        let children =
            fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children"))?;
        children
            .split_whitespace()
            .next()
            .context("no worker")?
            .parse()
            .context("a process id")
    }

    /// Kills supervisor and worker, as `kill -9` does, and waits for their end.
    pub fn kill(&mut self) -> Result<()> {
        let mut agent = self.agent.take().context("the agent runs")?;
        agent.kill()?;
        agent.wait()?;
        Ok(())
    }

    /// What kills workers of this node beside everything else.
    pub fn killable(&self) -> Result<Killable> {
        let supervisor = self.agent.as_ref().context("the agent runs")?.id();
        Ok(Killable { supervisor })
    }

    /// Kills the worker, and says after how long there is another one.
    pub fn kill_worker(&self) -> Result<Duration> {
        let old = self.worker()?;
        let began = Instant::now();
        kill(Pid::from_raw(old), Signal::SIGKILL)?;
        until("another worker", || {
            Ok(self.worker().ok().filter(|now| *now != old))
        })
        .map(|_| began.elapsed())
    }

    /// What the agent says of itself.
    pub fn report(&self) -> Result<Value> {
        let output = Command::new(program("keelway-agent")?)
            .args(["status", "--output", "json", "--socket"])
            .arg(self.socket())
            .output()?;
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("status: {}", String::from_utf8_lossy(&output.stderr)))
    }

    /// Runs one of the agent's own commands to its end.
    pub fn command(&self, arguments: &[&str]) -> Result<Finished> {
        let output = Command::new(program("keelway-agent")?)
            .args(arguments)
            .arg("--socket")
            .arg(self.socket())
            .stdin(Stdio::null())
            .output()?;
        Ok(Finished {
            command: format!("keelway-agent {}", arguments.join(" ")),
            success: output.status.success(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Starts one of the agent's own commands that goes on until it is dropped.
    pub fn watch(&self, arguments: &[&str]) -> Result<Running> {
        let (agent, socket) = (program("keelway-agent")?, self.socket());
        let mut command = vec![agent.to_str().context("a path")?];
        command.extend(arguments);
        command.extend(["--socket", socket.to_str().context("a path")?]);
        Ok(Running::start(&command, &[]))
    }

    /// Waits until the agent's report is as wished.
    pub fn wait(&self, what: &str, wished: impl Fn(&Value) -> bool) -> Result<Value> {
        until(what, || {
            Ok(self.report().ok().filter(|report| wished(report)))
        })
        .with_context(|| format!("{}: {}", self.name, self.read_log()))
    }

    /// Makes a pod with an echo server that answers with its name.
    pub fn add_pod(&self, name: &str) -> Result<Pod> {
        let pod = self.wire(name)?;
        echo(&pod.network, name)?;
        Ok(pod)
    }

    /// Makes a pod in which nothing runs: its network goes with the value.
    pub fn wire(&self, name: &str) -> Result<Pod> {
        let network = Network::new()?;
        let container = format!("container-{name}");
        let output = self.cni("ADD", &container, Some(&network), json!({}))?;
        let result = cni_result(&output)?;
        let addresses = addresses_of(&result)?;
        let Some(IpAddr::V4(address)) = addresses.first().copied() else {
            bail!("no IPv4 address: {result}");
        };
        Ok(Pod {
            network,
            container,
            address,
            addresses,
        })
    }

    /// Calls the plugin as a runtime does.
    pub fn cni(
        &self,
        command: &str,
        container: &str,
        netns: Option<&Network>,
        more: Value,
    ) -> Result<Output> {
        Ok(self
            .begin_cni(command, container, netns, more)?
            .wait_with_output()?)
    }

    fn begin_cni(
        &self,
        command: &str,
        container: &str,
        netns: Option<&Network>,
        more: Value,
    ) -> Result<Child> {
        let mut conf = self.plugin_conf();
        if let (Value::Object(conf), Value::Object(more)) = (&mut conf, more) {
            conf.extend(more);
        }
        let mut plugin = Command::new(program("keelway-cni")?);
        plugin
            .env_clear()
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", container)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/opt/cni/bin")
            .env(
                "CNI_ARGS",
                format!("K8S_POD_NAMESPACE=default;K8S_POD_NAME={container}"),
            );
        if let Some(netns) = netns {
            plugin.env(
                "CNI_NETNS",
                format!("/proc/{}/fd/{}", std::process::id(), netns.fd().as_raw_fd()),
            );
        }
        let mut plugin = plugin
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("the plugin")?;
        plugin
            .stdin
            .take()
            .context("stdin")?
            .write_all(conf.to_string().as_bytes())?;
        Ok(plugin)
    }

    /// The plugin's configuration for this node.
    pub fn plugin_conf(&self) -> Value {
        json!({
            "cniVersion": "1.0.0", "name": "keelway", "type": "keelway-cni",
            "socket": self.socket(), "spool": self.state_dir().join("deleted"),
        })
    }

    /// Calls the plugin, and kills it when it lives longer than `life`: then there is no output.
    pub fn cni_killed(
        &self,
        command: &str,
        container: &str,
        netns: Option<&Network>,
        life: Duration,
    ) -> Result<Option<Output>> {
        let mut plugin = self.begin_cni(command, container, netns, json!({}))?;
        // How far it gets by then is what differs from call to call; there is nothing to await.
        std::thread::sleep(life);
        let alive = plugin.try_wait()?.is_none();
        if alive {
            plugin.kill()?;
        }
        let output = plugin.wait_with_output()?;
        Ok(Some(output).filter(|output| output.status.code().is_some()))
    }

    /// Where the node's pins are.
    pub fn pin_root(&self) -> PathBuf {
        self.pins.clone()
    }

    /// Names of the host's interfaces that belong to pods.
    pub fn pod_interfaces(&self) -> Result<Vec<String>> {
        let links = self.links()?.into_iter();
        Ok(links
            .map(|(_, name)| name)
            .filter(|name| is_host_interface(name))
            .collect())
    }

    /// Hooks on pods' interfaces, each with its interface's index.
    pub fn pod_hooks(&self) -> Result<Vec<String>> {
        self.host.run(|| -> Result<_> {
            let mut kernel = Kernel::new(Netlink::open()?);
            let mut found = Vec::new();
            for index in kernel.with_clsact()? {
                for direction in [Direction::Ingress, Direction::Egress] {
                    let names = kernel.filter_names(index, direction)?;
                    found.extend(names.into_iter().map(|name| format!("{name}-{index}")));
                }
            }
            found.sort();
            Ok(found)
        })
    }

    /// The host's interfaces, with their indexes.
    pub fn links(&self) -> Result<Vec<(u32, String)>> {
        self.host.run(|| -> Result<_> {
            let links = Kernel::new(Netlink::open()?).links()?;
            Ok(links
                .into_iter()
                .map(|link| (link.index, link.name))
                .collect())
        })
    }

    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    pub fn conf_list(&self) -> PathBuf {
        self.dir.join("net.d/05-keelway.conflist")
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("agent.sock")
    }

    fn log(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// What the agent has logged.
    pub fn read_log(&self) -> String {
        fs::read_to_string(self.log()).unwrap_or_default()
    }
}

/// The worker of a node's agent, whichever it is now.
#[derive(Clone, Copy, Debug)]
pub struct Killable {
    supervisor: u32,
}

impl Killable {
    /// Kills it; `false` when there was none at this moment.
    pub fn kill_worker(self) -> bool {
        let supervisor = self.supervisor;
        fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children"))
            .ok()
            .and_then(|children| children.split_whitespace().next()?.parse().ok())
            .is_some_and(|worker| kill(Pid::from_raw(worker), Signal::SIGKILL).is_ok())
    }
}

impl Drop for AgentNode {
    fn drop(&mut self) {
        if let Some(agent) = &mut self.agent {
            // The worker goes with its supervisor.
            let _ = agent.kill();
            let _ = agent.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- log of {}\n{}", self.name, self.read_log());
        }
    }
}

/// Runs an agent that ends by itself, since its flags are wrong.
pub fn agent_run(flags: &[&str]) -> Result<Output> {
    Ok(Command::new(program("keelway-agent")?)
        .args(["run", "--node-name", "node-1"])
        .args(flags)
        .output()?)
}

/// The result of an ADD that must have succeeded.
pub fn cni_result(output: &Output) -> Result<Value> {
    ensure!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The single addresses of a result of ADD, in its order.
pub fn addresses_of(result: &Value) -> Result<Vec<IpAddr>> {
    let ips = result["ips"].as_array().context("addresses")?;
    ips.iter()
        .map(|ip| {
            let text = ip["address"].as_str().context("an address")?;
            let (address, length) = text.split_once('/').context("a prefix length")?;
            let address: IpAddr = address.parse()?;
            ensure!(
                length == if address.is_ipv4() { "32" } else { "128" },
                "{text} is more than an address"
            );
            Ok(address)
        })
        .collect()
}

/// Waits for something that another process does, and gives it.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() > deadline {
            bail!("not in {PATIENCE:?}: {what}");
        }
        // Nothing tells of it; what is waited for lasts.
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A program of this build.
pub fn program(name: &str) -> Result<PathBuf> {
    let folder = match std::env::var_os("KEELWAY_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        // target/<triple>/<profile>/deps/<this test>
        None => std::env::current_exe()?
            .ancestors()
            .nth(2)
            .context("the folder of programs")?
            .to_owned(),
    };
    let path = folder.join(name);
    ensure!(
        path.exists(),
        "{} is missing: build it first (cargo build -p {name})",
        path.display()
    );
    Ok(path)
}
