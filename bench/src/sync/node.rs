//! The node that subjects run on, and how long one of them takes to learn something.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use keelway_tests::sandbox::{Network, Sandbox, ip};

use super::api::NODE;
use super::nodes::Way;
use super::process::{Cost, Metrics, children, cost, map_bytes};

/// Longest wait for a cluster to be learnt.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long a change may take to be seen.
const CHANGE_PATIENCE: Duration = Duration::from_secs(60);

/// Makes the namespace of the node: an uplink that leads nowhere, and the loopback.
pub fn make() -> Result<Network> {
    let node = Network::new()?;
    node.run(|| -> Result<()> {
        ip("link add eth0 type veth peer name nowhere")?;
        // Other nodes are on the link, all of them.
        ip(&format!("addr add {}/15 dev eth0", super::NODE_ADDRESS))?;
        ip("link set eth0 up")?;
        ip("link set nowhere up")
    })?;
    Ok(node)
}

/// The real ones, by their names, the faster first.
pub const KUBE_PROXIES: [&str; 2] = ["kube-proxy-nftables", "kube-proxy-iptables"];

/// Who learns the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    Keelway {
        program: PathBuf,
        way: Way,
    },
    KubeProxy {
        program: PathBuf,
        mode: &'static str,
    },
}

impl Who {
    pub fn name(&self) -> String {
        match self {
            Who::Keelway { .. } => "keelway".into(),
            Who::KubeProxy { mode, .. } => format!("kube-proxy-{mode}"),
        }
    }
}

/// A subject that runs. It ends with this value.
pub struct Subject {
    who: Who,
    node: Network,
    child: Child,
    started: SystemTime,
    folder: tempfile::TempDir,
    pin_root: PathBuf,
}

/// Where subjects serve their metrics.
const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10_249);

impl Subject {
    /// Starts it over maps or rules that are not there.
    pub fn start(
        who: &Who,
        node: &Network,
        sandbox: &Sandbox,
        kubeconfig: &Path,
        cgroup: &Path,
    ) -> Result<Self> {
        let folder = tempfile::tempdir().context("a folder for the subject")?;
        let pin_root = sandbox.pin_root();
        let log = fs::File::create(folder.path().join("log"))?;
        let mut command = match who {
            Who::Keelway { program, way } => {
                let mut command = Command::new(program);
                command.args(["run", "--node-name", NODE]).args(way.flags());
                command.args(["--service-cidr", super::SERVICE_RANGE, "--metrics"]);
                command.arg(METRICS.to_string());
                for (flag, path) in [
                    ("--kubeconfig", kubeconfig.to_owned()),
                    ("--cgroup", cgroup.to_owned()),
                    ("--socket", folder.path().join("agent.sock")),
                    ("--state-dir", folder.path().join("state")),
                    ("--pin-root", pin_root.clone()),
                    ("--cni-conf-dir", folder.path().join("net.d")),
                ] {
                    command.arg(flag).arg(path);
                }
                command
            }
            Who::KubeProxy { program, mode } => {
                let mut command = Command::new(program);
                command
                    .arg("--kubeconfig")
                    .arg(kubeconfig)
                    .arg(format!("--proxy-mode={mode}"))
                    .arg(format!("--hostname-override={NODE}"))
                    .arg(format!("--metrics-bind-address={METRICS}"))
                    .arg("--cluster-cidr=10.128.0.0/9")
                    // Both are the machine's, not the namespace's.
                    .args(["--conntrack-max-per-core=0", "--conntrack-min=0"]);
                command
            }
        };
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let started = SystemTime::now();
        let child = node
            .run(|| command.spawn())
            .with_context(|| format!("starting {command:?}"))?;
        Ok(Self {
            who: who.clone(),
            node: node.try_clone()?,
            child,
            started,
            folder,
            pin_root,
        })
    }

    /// Waits until everything is learnt and applied, and says how long after its start that was.
    pub fn learnt(&mut self) -> Result<Duration> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended: {status}\n{}", self.who.name(), self.log());
            }
            if let Some(at) = self.last_full_sync() {
                return Ok(at.duration_since(self.started).unwrap_or_default());
            }
            // Asking costs the subject a little, too.
            thread::sleep(Duration::from_millis(20));
        }
        bail!(
            "{} has not learnt the cluster within {PATIENCE:?}\n{}",
            self.who.name(),
            self.log()
        )
    }

    fn log(&self) -> String {
        let log = fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        log.lines().rev().take(5).collect::<Vec<_>>().join("\n")
    }

    /// When a sync of everything ended, if one has and nothing waits.
    fn last_full_sync(&self) -> Option<SystemTime> {
        let metrics = Metrics::ask(&self.node, METRICS).ok()?;
        let full = "kubeproxy_sync_full_proxy_rules_duration_seconds_count";
        let rules = "kubeproxy_sync_proxy_rules";
        let waiting = ["service", "endpoint"]
            .iter()
            .filter_map(|kind| metrics.value(&format!("{rules}_{kind}_changes_pending")))
            .sum::<f64>();
        let last = metrics.latest(&format!("{rules}_last_timestamp_seconds"))?;
        let done = metrics.value(full)? >= 1.0 && waiting == 0.0 && last > 0.0;
        done.then(|| UNIX_EPOCH + Duration::from_secs_f64(last))
    }

    /// Waits until a change that was begun at a time is applied: how long that took.
    pub fn applied(&self, begun: SystemTime) -> Result<Duration> {
        let deadline = Instant::now() + CHANGE_PATIENCE;
        while Instant::now() < deadline {
            let metrics = Metrics::ask(&self.node, METRICS)?;
            let rules = "kubeproxy_sync_proxy_rules";
            let time = |name: &str| {
                let seconds = metrics.latest(&format!("{rules}_{name}_timestamp_seconds"))?;
                Some(UNIX_EPOCH + Duration::from_secs_f64(seconds))
            };
            let (queued, synced) = (time("last_queued"), time("last"));
            if let (Some(queued), Some(synced)) = (queued, synced)
                && queued >= begun
                && synced >= queued
            {
                return Ok(synced.duration_since(begun).unwrap_or_default());
            }
            thread::sleep(Duration::from_millis(2));
        }
        bail!(
            "{} has not applied a change within {CHANGE_PATIENCE:?}",
            self.who.name()
        )
    }

    /// What the process that does the work has cost; of the agent that is the worker.
    pub fn cost(&self) -> Result<Cost> {
        cost(self.worker()?)
    }

    /// Bytes of the maps in the kernel.
    pub fn map_bytes(&self) -> Result<f64> {
        map_bytes(self.worker()?)
    }

    /// The process that does the work.
    pub fn worker(&self) -> Result<u32> {
        match self.who {
            Who::Keelway { .. } => children(self.child.id())?
                .first()
                .copied()
                .context("the agent has no worker"),
            Who::KubeProxy { .. } => Ok(self.child.id()),
        }
    }

    /// Seconds from the arrival of changes to the maps, all so far together, and how many they were; of the agent alone.
    pub fn programming(&self) -> Result<(f64, f64)> {
        let metrics = Metrics::ask(&self.node, METRICS)?;
        let name = "keelway_programming_duration_seconds";
        let value = |what: &str| metrics.value(&format!("{name}_{what}"));
        let (sum, count) = (value("sum"), value("count"));
        Ok((sum.context(name)?, count.context(name)?))
    }

    /// Batches that failed so far, of the agent alone.
    pub fn failed_batches(&self) -> Result<f64> {
        let name = "keelway_batches_failed_total";
        let metrics = Metrics::ask(&self.node, METRICS)?;
        metrics.value(name).context(name)
    }

    pub const fn started(&self) -> SystemTime {
        self.started
    }

    pub fn pin_root(&self) -> &Path {
        &self.pin_root
    }

    /// Ends the worker as `kill -9` does, and waits for the next one to have learnt everything.
    pub fn restart_worker(&mut self) -> Result<Duration> {
        let worker = i32::try_from(self.worker()?)?;
        let before = SystemTime::now();
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(worker),
            nix::sys::signal::Signal::SIGKILL,
        )?;
        self.started = before;
        loop {
            let took = self.learnt()?;
            // The old worker's answer to the last question may still have been on its way.
            if self.worker()? != worker.unsigned_abs() {
                return Ok(took);
            }
            ensure!(
                before.elapsed().unwrap_or_default() < PATIENCE,
                "the worker lives on"
            );
        }
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        // The agent's worker goes with its supervisor.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
