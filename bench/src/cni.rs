//! `keelway-bench cni`: how long a runtime waits for a pod's network, beside ptp and bridge with host-local.
//!
//! Every figure is the time from starting the plugin's process to its end, as a runtime sees it. Contenders take turns, round by round,
//! so that what disturbs the machine disturbs all of them.

use std::fmt;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use keelway_tests::sandbox::{Network, Sandbox, ip};
use serde::Serialize;
use serde_json::{Value, json};

use crate::report::Held;

#[derive(Debug, clap::Args)]
pub struct Flags {
    /// Pods that are made one after the other.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(10..=1000))]
    alone: u32,
    /// Pods that are made at once.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=200))]
    at_once: u32,
    /// Folder with ptp, bridge and host-local, as Debian's containernetworking-plugins has them.
    #[arg(long, default_value = "/usr/lib/cni")]
    reference_dir: PathBuf,
    /// Print JSON instead of the table.
    #[arg(long)]
    json: bool,
    /// Folder with keelway-agent and keelway-cni; where this program is by default.
    #[arg(long, env = "KEELWAY_BIN_DIR")]
    bin_dir: Option<PathBuf>,
}

/// Sizes of the crowds of which pods per second are counted; of the last one, which is ours to hold, nobody may fail.
const CROWDS: [usize; 4] = [10, 50, 100, BURST];
const BURST: usize = 200;
const KEELWAY: &str = "keelway";
const PATIENCE: Duration = Duration::from_secs(60);

/// A plugin that is measured.
struct Contender {
    name: &'static str,
    program: PathBuf,
    path: PathBuf,
    conf: Value,
    host: Network,
    version_ms: Vec<f64>,
    add_ms: Vec<f64>,
    del_ms: Vec<f64>,
    burst_add_ms: Vec<f64>,
    burst_del_ms: Vec<f64>,
}

/// One row of the table; times in milliseconds.
#[derive(Debug, Serialize)]
struct Row {
    plugin: &'static str,
    what: &'static str,
    p50: f64,
    p99: f64,
}

/// What became of many pods at once.
#[derive(Debug, Serialize)]
struct Crowd {
    plugin: &'static str,
    pods: usize,
    added_per_second: f64,
    deleted_per_second: f64,
    /// Until their interfaces are gone too, which is behind the answers for a plugin that does not keep its callers waiting for it.
    gone_per_second: f64,
    failures: usize,
}

#[derive(Debug, Serialize)]
struct Report {
    rows: Vec<Row>,
    crowds: Vec<Crowd>,
    held: Vec<Held>,
}

/// Measures and prints.
pub fn run(flags: &Flags) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "this needs root: it makes namespaces and loads eBPF programs"
    );
    let bin_dir = match &flags.bin_dir {
        Some(folder) => folder.clone(),
        None => std::env::current_exe()?
            .parent()
            .context("this program is in no folder")?
            .to_owned(),
    };
    let sandbox = Sandbox::enter()?;
    let folder = tempfile::tempdir().context("a folder for the agent's files")?;
    let mut agent = Agent::start(&sandbox, folder.path(), &bin_dir)?;
    let mut contenders = vec![agent.contender(&bin_dir)?];
    for name in ["ptp", "bridge"] {
        if flags.reference_dir.join(name).exists() {
            contenders.push(reference(name, &flags.reference_dir, folder.path())?);
        } else {
            eprintln!(
                "{name} is not in {}: install containernetworking-plugins, or use --reference-dir",
                flags.reference_dir.display()
            );
        }
    }

    let pods = |count: usize| {
        (0..count)
            .map(|_| Network::new())
            .collect::<Result<Vec<_>>>()
    };
    // The first of each is not measured: it makes the bridge, and has programs read from disk.
    for contender in &mut contenders {
        let pod = Network::new()?;
        contender.call("ADD", "warm", &pod)?;
        contender.call("DEL", "warm", &pod)?;
    }
    agent.rest()?;
    for (number, pod) in pods(flags.alone as usize)?.iter().enumerate() {
        for contender in &mut contenders {
            let id = format!("alone-{number}");
            // A process that starts, reads its configuration and ends: what no ADD can be faster than.
            let took = contender.call("VERSION", &id, pod)?;
            contender.version_ms.push(took);
            let took = contender.call("ADD", &id, pod)?;
            contender.add_ms.push(took);
            let took = contender.call("DEL", &id, pod)?;
            contender.del_ms.push(took);
            // What one does behind its answer is not to hold up the next: the kernel has one lock for all interfaces.
            agent.rest()?;
        }
    }
    for contender in &mut contenders {
        let crowd = pods(flags.at_once as usize)?;
        agent.rest()?;
        let (added, _, failed) = contender.at_once("ADD", "crowd", &crowd)?;
        ensure!(
            failed == 0,
            "{}: {failed} of {} failed",
            contender.name,
            crowd.len()
        );
        let (deleted, _, _) = contender.at_once("DEL", "crowd", &crowd)?;
        (contender.burst_add_ms, contender.burst_del_ms) = (added, deleted);
    }
    let everybody = pods(BURST)?;
    let mut crowds = Vec::new();
    for size in CROWDS {
        for contender in &contenders {
            agent.rest()?;
            crowds.push(contender.crowd(&everybody[..size], &agent)?);
        }
    }
    agent.rest()?;

    let report = Report::new(&contenders, crowds);
    if flags.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(())
}

fn reference(name: &'static str, dir: &Path, folder: &Path) -> Result<Contender> {
    let host = Network::new()?;
    host.run(|| -> Result<()> {
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("ip_forward")
    })?;
    let mut conf = json!({
        "cniVersion": "1.0.0", "name": name, "type": name,
        "ipam": {
            "type": "host-local", "dataDir": folder.join(name),
            "ranges": [[{"subnet": "10.245.0.0/22"}]], "routes": [{"dst": "0.0.0.0/0"}],
        },
    });
    if name == "bridge" {
        conf["bridge"] = json!("cni0");
        conf["isGateway"] = json!(true);
    }
    Ok(Contender::new(name, dir.join(name), dir, conf, host))
}

impl Contender {
    fn new(name: &'static str, program: PathBuf, path: &Path, conf: Value, host: Network) -> Self {
        Self {
            name,
            program,
            path: path.into(),
            conf,
            host,
            version_ms: Vec::new(),
            add_ms: Vec::new(),
            del_ms: Vec::new(),
            burst_add_ms: Vec::new(),
            burst_del_ms: Vec::new(),
        }
    }

    /// Calls the plugin on the node's host, and says how many milliseconds it took.
    fn call(&self, command: &str, id: &str, pod: &Network) -> Result<f64> {
        self.host.run(|| self.call_here(command, id, pod))
    }

    fn call_here(&self, command: &str, id: &str, pod: &Network) -> Result<f64> {
        let conf = self.conf.to_string();
        let mut plugin = Command::new(&self.program);
        plugin
            .env_clear()
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", id)
            .env("CNI_NETNS", pod.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", &self.path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let began = Instant::now();
        let mut child = plugin
            .spawn()
            .with_context(|| format!("starting {}", self.program.display()))?;
        let mut input = child.stdin.take().context("no standard input")?;
        input.write_all(conf.as_bytes())?;
        drop(input);
        let output = child.wait_with_output()?;
        let took = began.elapsed().as_secs_f64() * 1e3;
        ensure!(
            output.status.success(),
            "{} {command} {id}: {}",
            self.name,
            String::from_utf8_lossy(&output.stdout)
        );
        Ok(took)
    }

    /// Adds and deletes all pods at once.
    fn crowd(&self, pods: &[Network], agent: &Agent) -> Result<Crowd> {
        let id = format!("crowd-{}", pods.len());
        let (added, adding_s, failed) = self.at_once("ADD", &id, pods)?;
        let (deleted, deleting_s, stuck) = self.at_once("DEL", &id, pods)?;
        let answered = Instant::now();
        let mut gone_s = deleting_s;
        if self.name == KEELWAY {
            agent.rest()?;
            gone_s += answered.elapsed().as_secs_f64();
        }
        Ok(Crowd {
            plugin: self.name,
            pods: pods.len(),
            added_per_second: added.len() as f64 / adding_s,
            deleted_per_second: deleted.len() as f64 / deleting_s,
            gone_per_second: deleted.len() as f64 / gone_s,
            failures: failed + stuck,
        })
    }

    /// Calls it for all pods at once: each one's milliseconds, seconds for all, and how many failed.
    fn at_once(&self, command: &str, id: &str, pods: &[Network]) -> Result<(Vec<f64>, f64, usize)> {
        let start = Barrier::new(pods.len() + 1);
        thread::scope(|scope| {
            let calls: Vec<_> = pods
                .iter()
                .enumerate()
                .map(|(number, pod)| {
                    let start = &start;
                    scope.spawn(move || {
                        self.host.run(|| {
                            start.wait();
                            self.call_here(command, &format!("{id}-{number}"), pod)
                        })
                    })
                })
                .collect();
            start.wait();
            let began = Instant::now();
            let (mut took, mut failures) = (Vec::new(), 0);
            for call in calls {
                match call.join() {
                    Ok(Ok(one)) => took.push(one),
                    Ok(Err(error)) => {
                        eprintln!("{error:#}");
                        failures += 1;
                    }
                    Err(_) => bail!("a thread panicked"),
                }
            }
            Ok((took, began.elapsed().as_secs_f64(), failures))
        })
    }
}

/// A node's agent. Goes with the value.
struct Agent {
    child: Child,
    network: Option<Network>,
    socket: PathBuf,
    bin_dir: PathBuf,
    log: PathBuf,
}

impl Agent {
    fn start(sandbox: &Sandbox, folder: &Path, bin_dir: &Path) -> Result<Self> {
        let network = Network::new()?;
        ip("link add up1 type veth peer name up2")?;
        network.take("up1")?;
        ip("link set up2 up")?;
        network.run(|| -> Result<()> {
            ip("link set up1 name eth0")?;
            ip("addr add 198.18.0.11/24 dev eth0")?;
            ip("link set eth0 up")
        })?;
        let snapshot = folder.join("snapshot.json");
        let node = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"},
            "spec": {"podCIDRs": ["10.244.0.0/22"]},
            "status": {"addresses": [{"type": "InternalIP", "address": "198.18.0.11"}]},
        });
        fs::write(
            &snapshot,
            json!({"apiVersion": "v1", "kind": "List", "items": [node]}).to_string(),
        )?;
        let (socket, log) = (folder.join("agent.sock"), folder.join("agent.log"));
        let stderr = fs::File::create(&log)?;
        let mut command = Command::new(bin_dir.join("keelway-agent"));
        command
            .args([
                "run",
                "--node-name",
                "node-1",
                "--socket-lb",
                "off",
                "--snapshot",
            ])
            .arg(&snapshot)
            .arg("--socket")
            .arg(&socket)
            .arg("--state-dir")
            .arg(folder.join("state"))
            .arg("--pin-root")
            .arg(sandbox.pin_root())
            .arg("--cni-conf-dir")
            .arg(folder.join("net.d"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr);
        let child = network
            .run(|| command.spawn())
            .context("starting keelway-agent")?;
        let agent = Self {
            child,
            network: Some(network),
            socket,
            bin_dir: bin_dir.into(),
            log,
        };
        agent.wait("to be ready", |report| report["ready"] == true)?;
        Ok(agent)
    }

    fn contender(&mut self, bin_dir: &Path) -> Result<Contender> {
        let conf = json!({
            "cniVersion": "1.0.0", "name": "keelway", "type": "keelway-cni", "socket": self.socket,
            "spool": self.socket.with_file_name("deleted"),
        });
        let host = self.network.take().context("the node's network")?;
        Ok(Contender::new(
            KEELWAY,
            bin_dir.join("keelway-cni"),
            bin_dir,
            conf,
            host,
        ))
    }

    /// Waits until what was deleted is gone, as on a node between two bursts.
    fn rest(&self) -> Result<()> {
        self.wait("to rest", |report| report["interfacesToRemove"] == 0)
    }

    fn wait(&self, what: &str, done: impl Fn(&Value) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            // Each question is a process of its own, which paces them.
            let output = Command::new(self.bin_dir.join("keelway-agent"))
                .args(["status", "--output", "json", "--socket"])
                .arg(&self.socket)
                .output()
                .context("running keelway-agent status")?;
            if serde_json::from_slice(&output.stdout).is_ok_and(|report| done(&report)) {
                return Ok(());
            }
        }
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        bail!("the agent did not come {what} within {PATIENCE:?}:\n{log}")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // The worker goes with its supervisor.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The value below which this share of them is.
fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len() as f64 * share).ceil() as usize;
    sorted
        .get(at.saturating_sub(1))
        .copied()
        .unwrap_or(f64::NAN)
}

impl Report {
    fn new(contenders: &[Contender], crowds: Vec<Crowd>) -> Self {
        let mut rows = Vec::new();
        for one in contenders {
            for (what, values) in [
                ("VERSION", &one.version_ms),
                ("ADD", &one.add_ms),
                ("DEL", &one.del_ms),
                ("ADD, at once", &one.burst_add_ms),
                ("DEL, at once", &one.burst_del_ms),
            ] {
                rows.push(Row {
                    plugin: one.name,
                    what,
                    p50: quantile(values, 0.5),
                    p99: quantile(values, 0.99),
                });
            }
        }
        let figure = |plugin: &str, what: &str, p99: bool| {
            rows.iter()
                .find(|row| row.plugin == plugin && row.what == what)
                .map_or(f64::NAN, |row| if p99 { row.p99 } else { row.p50 })
        };
        let mut held: Vec<Held> = [
            ("cni.add.p50", 3.6, figure(KEELWAY, "ADD", false)),
            ("cni.add.p99", 8.0, figure(KEELWAY, "ADD", true)),
            ("cni.del.p50", 5.0, figure(KEELWAY, "DEL", false)),
        ]
        .into_iter()
        .map(|(name, limit, figure)| Held {
            name: name.into(),
            target: format!("<{limit}ms"),
            figure,
            spread: None,
            ok: figure < limit,
        })
        .collect();
        let ratio = figure("ptp", "ADD", false) / figure(KEELWAY, "ADD", false);
        // Without ptp there is nothing to compare with.
        if ratio.is_finite() {
            held.push(Held {
                name: "cni.add.p50.ptp".into(),
                target: ">=3".into(),
                figure: ratio,
                spread: None,
                ok: ratio >= 3.0,
            });
        }
        let burst = crowds
            .iter()
            .filter(|crowd| crowd.plugin == KEELWAY && crowd.pods == BURST);
        let burst_failures: usize = burst.map(|crowd| crowd.failures).sum();
        held.push(Held {
            name: "cni.burst-200.failures".into(),
            target: "=0".into(),
            figure: burst_failures as f64,
            spread: None,
            ok: burst_failures == 0,
        });
        Self { rows, crowds, held }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<10} {:<14} {:>9} {:>9}",
            "plugin", "call", "p50 ms", "p99 ms"
        )?;
        for row in &self.rows {
            writeln!(
                f,
                "{:<10} {:<14} {:>9.2} {:>9.2}",
                row.plugin, row.what, row.p50, row.p99
            )?;
        }
        writeln!(
            f,
            "\n{:<10} {:>12} {:>10} {:>10} {:>10} {:>9}",
            "plugin", "pods at once", "added/s", "deleted/s", "gone/s", "failures"
        )?;
        for one in &self.crowds {
            writeln!(
                f,
                "{:<10} {:>12} {:>10.0} {:>10.0} {:>10.0} {:>9}",
                one.plugin,
                one.pods,
                one.added_per_second,
                one.deleted_per_second,
                one.gone_per_second,
                one.failures
            )?;
        }
        writeln!(f)?;
        self.held.iter().try_for_each(|held| writeln!(f, "{held}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_sorted_values() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(
            (quantile(&values, 0.5), quantile(&values, 0.99)),
            (50.0, 99.0)
        );
        assert_eq!(quantile(&[7.0], 0.99), 7.0);
    }
}
