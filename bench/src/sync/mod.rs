//! `keelway-bench sync`: how long the maps lag behind the cluster, and what keeping them costs; beside the real kube-proxy.
//!
//! The cluster is in an API server of ours, in the same namespace as the node that learns it: lists and watches are in the figures.

pub mod api;
mod churn;
mod findings;
mod map;
pub mod node;
mod nodes;
mod process;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use keelway_agent::net::OVERLAY;
use keelway_tests::sandbox::{Network, Sandbox};

use self::api::{ApiServer, Cluster, Writer};
use self::findings::Findings;
use self::map::ServiceWord;
use self::node::{Subject, Who};
use self::nodes::Way;
use crate::control_groups::ControlGroups;
use crate::machine::Machine;
use crate::report::{Output, Report};

const SERVICE_RANGE: &str = "10.96.0.0/12";
/// The protocol that the agent's routes are marked with.
const AGENTS_ROUTES: &str = "107";
const NODE_ADDRESS: &str = "198.18.0.11";

#[derive(Debug, clap::Args)]
pub struct Flags {
    /// Up to 10,000 Services and fewer rounds: under three minutes.
    #[arg(long)]
    quick: bool,
    /// Sizes of the cluster, as SERVICES:ENDPOINTS; may be repeated, in rising order. [default: 1:10000, 10:50, 1000:5000, 10000:50000,
    /// 44000:250000; without the last by --quick]
    #[arg(long, value_parser = size)]
    size: Vec<Cluster>,
    /// Rounds of each measurement, in place of five, or of three by --quick; changes are twenty per round.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=50))]
    rounds: Option<u32>,
    /// The real kube-proxy, measured beside ours in iptables and nftables mode, as far as the machine has what they need.
    #[arg(long, value_name = "PATH")]
    kube_proxy: Option<PathBuf>,
    /// Nodes of a cluster of their own, in place of 5,000, or of 1,000 by --quick; 0 leaves it out.
    #[arg(long, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    nodes: Option<u32>,
    /// Most Services that kube-proxy is given: more take it minutes.
    #[arg(long, default_value_t = 10_000)]
    kube_proxy_max: usize,
    #[command(flatten)]
    output: Output,
    /// Folder with keelway-agent and keelway-controlplane; where this program is by default.
    #[arg(long, env = "KEELWAY_BIN_DIR")]
    bin_dir: Option<PathBuf>,
}

fn size(text: &str) -> Result<Cluster, String> {
    let parts = text
        .split_once(':')
        .and_then(|(services, endpoints)| Some((services.parse().ok()?, endpoints.parse().ok()?)));
    match parts {
        Some((services @ 1..=100_000, endpoints))
            if (services..=1_000_000).contains(&endpoints) =>
        {
            Ok(Cluster {
                services,
                endpoints,
            })
        }
        _ => Err(
            "SERVICES:ENDPOINTS, up to 100000:1000000, with an endpoint for each Service at least"
                .into(),
        ),
    }
}

/// One Service with very many endpoints, and more and more with five.
const SIZES: [(usize, usize); 5] = [
    (1, 10_000),
    (10, 50),
    (1000, 5000),
    (10_000, 50_000),
    (44_000, 250_000),
];

/// How much is measured.
struct Extent {
    rounds: u32,
    changes_per_round: u32,
    churn: Duration,
    /// Of the cluster of [`CHURNED`] Services, whose memory is judged by it.
    long_churn: Duration,
    kube_proxy_max: usize,
}

/// More Services take kube-proxy half a minute per start: then there is one.
const KUBE_PROXY_ROUNDS_MAX: usize = 1000;

/// Measures and prints.
pub fn run(flags: &Flags) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "this needs root: it makes namespaces and loads eBPF programs"
    );
    flags.output.check()?;
    let sizes = match (flags.size.as_slice(), flags.quick) {
        ([], quick) => SIZES
            .into_iter()
            .map(|(services, endpoints)| Cluster {
                services,
                endpoints,
            })
            .take(SIZES.len() - usize::from(quick))
            .collect(),
        (sizes, _) => sizes.to_vec(),
    };
    ensure!(
        sizes.is_sorted_by(|a, b| a.services < b.services),
        "--size is to rise"
    );
    let extent = Extent {
        rounds: flags.rounds.unwrap_or(if flags.quick { 3 } else { 5 }),
        changes_per_round: 20,
        churn: Duration::from_secs(if flags.quick { 4 } else { 20 }),
        long_churn: Duration::from_secs(if flags.quick { 10 } else { 120 }),
        kube_proxy_max: flags.kube_proxy_max,
    };
    let bin_dir = match &flags.bin_dir {
        Some(folder) => folder.clone(),
        None => crate::beside_this_program()?,
    };
    let machine = Machine::describe()?;
    let began = Instant::now();
    let progress = ProgressBar::new(1);
    progress.set_style(ProgressStyle::with_template(
        "{msg:50} {bar:30} {pos}/{len} {eta}",
    )?);
    let mut bench = Bench {
        sandbox: Sandbox::enter()?,
        groups: ControlGroups::make()?,
        node: node::make()?,
        extent,
        findings: Findings::default(),
        progress,
    };
    let keelway = Who::Keelway {
        program: bin_dir.join("keelway-agent"),
        way: Way::Direct,
    };
    let nodes = flags.nodes.unwrap_or(if flags.quick { 1000 } else { 5000 });
    let mut notes = Vec::new();
    let others = rivals(flags.kube_proxy.as_ref(), &mut notes)?;
    for cluster in &sizes {
        // A cluster of another size has other endpoints for each Service: it is made anew, in a store of its own.
        let mut server = ApiServer::start(&bin_dir, &bench.node)?;
        bench.fill(&server, *cluster)?;
        bench.measure(&keelway, &mut server, *cluster)?;
        for who in &others {
            if cluster.services > bench.extent.kube_proxy_max {
                notes.push(format!(
                    "{} at {} Services: more than --kube-proxy-max",
                    who.name(),
                    cluster.services
                ));
                continue;
            }
            match bench.measure(who, &mut server, *cluster) {
                // What we measured of ourselves is not to be lost for that.
                Err(error) if matches!(who, Who::KubeProxy { .. }) => {
                    let error = error.to_string();
                    let why = error.lines().next().unwrap_or_default();
                    notes.push(format!("at {} Services: {why}", cluster.services));
                }
                measured => measured?,
            }
        }
    }
    let of_nodes = match nodes {
        0 => Ok(Default::default()),
        nodes => bench.nodes(&bin_dir, nodes as usize),
    };
    bench.progress.finish_and_clear();
    let mut report = Report::new("sync", machine);
    report.set("rounds", bench.extent.rounds);
    report.set("changesPerRound", bench.extent.changes_per_round);
    report.set("churnSeconds", bench.extent.churn.as_secs());
    report.set("longChurnSeconds", bench.extent.long_churn.as_secs());
    report.set("tookSeconds", began.elapsed().as_secs());
    report.set("nodes", nodes);
    bench.findings.fill(&mut report);
    report.notes = notes;
    // What was measured of Services is not to be lost where nodes fail.
    let failed = match of_nodes {
        Ok((figures, held)) => {
            report.figures.extend(figures);
            report.held.extend(held);
            Ok(())
        }
        Err(error) => {
            report.notes.push(format!("{nodes} nodes: {error:#}"));
            Err(error.context(format!("{nodes} nodes")))
        }
    };
    flags.output.show(&report)?;
    failed
}

/// The modes of kube-proxy that this machine has tools for.
pub fn rivals(kube_proxy: Option<&PathBuf>, notes: &mut Vec<String>) -> Result<Vec<Who>> {
    let Some(program) = kube_proxy else {
        notes.push("kube-proxy: its program is not given (--kube-proxy PATH)".into());
        return Ok(Vec::new());
    };
    ensure!(
        program.exists(),
        "--kube-proxy {}: there is no such file",
        program.display()
    );
    let mut found = Vec::new();
    for (mode, tool) in [("iptables", "iptables-restore"), ("nftables", "nft")] {
        let mut probe = std::process::Command::new(tool);
        probe.arg("--version");
        if probe.output().is_ok() {
            found.push(Who::KubeProxy {
                program: program.clone(),
                mode,
            });
        } else {
            notes.push(format!(
                "kube-proxy in {mode} mode: this machine has no {tool}"
            ));
        }
    }
    Ok(found)
}

struct Bench {
    sandbox: Sandbox,
    groups: ControlGroups,
    node: Network,
    extent: Extent,
    findings: Findings,
    progress: ProgressBar,
}

impl Bench {
    fn fill(&self, server: &ApiServer, cluster: Cluster) -> Result<()> {
        let stage = format!("making {} Services", cluster.services);
        crate::say(&self.progress, stage);
        self.progress.set_length(cluster.services as u64);
        self.progress.set_position(0);
        let progress = &self.progress;
        server.with_writer(cluster, async move |writer| {
            writer.make(|| progress.inc(1)).await
        })
    }

    fn measure(&mut self, who: &Who, server: &mut ApiServer, cluster: Cluster) -> Result<()> {
        let name = who.name();
        let say = |what: &str| format!("{} Services, {name}: {what}", cluster.services);
        let kubeconfig = server.kubeconfig();
        let cgroup = self.groups.hooked();
        let rounds = match who {
            Who::KubeProxy { .. } if cluster.services > KUBE_PROXY_ROUNDS_MAX => 1,
            Who::Keelway { .. } | Who::KubeProxy { .. } => self.extent.rounds,
        };
        self.progress.set_length(u64::from(rounds));
        self.progress.set_position(0);
        let mut subject = None;
        for _ in 0..rounds {
            crate::say(&self.progress, say("cold start"));
            drop(subject.take());
            self.clean()?;
            let mut begun = Subject::start(who, &self.node, &self.sandbox, &kubeconfig, &cgroup)?;
            let took = begun.learnt()?;
            let cost = begun.cost()?;
            self.findings
                .cold_start(cluster, &name, took, cost, begun.map_bytes()?);
            subject = Some(begun);
            self.progress.inc(1);
        }
        let mut subject = subject.context("no round was run")?;
        match who {
            Who::Keelway { .. } => {
                crate::say(&self.progress, say("one change at a time"));
                self.changes(&subject, server, cluster, &name)?;
                crate::say(&self.progress, say("churn"));
                self.churn(&subject, server, cluster, &name)?;
                crate::say(&self.progress, say("worker killed"));
                let took = subject.restart_worker()?;
                self.findings.restart(cluster, &name, took);
                crate::say(&self.progress, say("API server restarted"));
                self.outage(&subject, server, cluster, &name)
            }
            Who::KubeProxy { .. } => {
                crate::say(&self.progress, say("one change at a time"));
                self.slow_changes(&subject, server, cluster, &name)
            }
        }
    }

    /// Takes away what an earlier subject left in the node: pinned maps and links, rules, the service veth.
    fn clean(&self) -> Result<()> {
        let pins = self.sandbox.pin_root();
        if pins.exists() {
            std::fs::remove_dir_all(&pins).with_context(|| pins.display().to_string())?;
        }
        self.node.run(|| {
            for words in [
                &["ip", "link", "del", "keelway-svc"][..],
                &["ip", "link", "del", OVERLAY],
                &["ip", "route", "flush", "proto", AGENTS_ROUTES],
                &["nft", "flush", "ruleset"],
            ] {
                // What is not there need not go.
                let _ = std::process::Command::new(words[0])
                    .args(&words[1..])
                    .output();
            }
        });
        Ok(())
    }

    /// One change after the other, each until it is in the kernel's map.
    fn changes(
        &mut self,
        subject: &Subject,
        server: &ApiServer,
        cluster: Cluster,
        name: &str,
    ) -> Result<()> {
        let index = cluster.services / 2;
        let word = Arc::new(ServiceWord::of(subject.pin_root(), index)?);
        for round in 0..self.extent.rounds {
            let count = self.extent.changes_per_round;
            let word = word.clone();
            let before = subject.programming()?;
            let took = server.with_writer(cluster, async move |writer| {
                let mut took = Vec::new();
                // The first one opens the connection, and is not counted.
                for turn in 0..=count {
                    took.push(change(&writer, &word, index, round * 1000 + turn).await?);
                }
                Ok(took.split_off(1))
            })?;
            let after = subject.programming()?;
            let own = (after.0 - before.0) / (after.1 - before.1).max(1.0);
            self.findings.changes(cluster, name, &took, Some(own));
        }
        Ok(())
    }

    /// The same of a subject whose syncs take a second, by what it says itself.
    fn slow_changes(
        &mut self,
        subject: &Subject,
        server: &ApiServer,
        cluster: Cluster,
        name: &str,
    ) -> Result<()> {
        let index = cluster.services / 2;
        for round in 0..self.extent.rounds {
            let begun = SystemTime::now();
            server.with_writer(cluster, async move |writer| {
                writer.change(index, round).await
            })?;
            let took = subject.applied(begun)?.as_secs_f64();
            self.findings.changes(cluster, name, &[took], None);
        }
        Ok(())
    }

    /// From the API server's return to the first change in the maps.
    fn outage(
        &mut self,
        subject: &Subject,
        server: &mut ApiServer,
        cluster: Cluster,
        name: &str,
    ) -> Result<()> {
        let index = cluster.services / 2;
        let word = Arc::new(ServiceWord::of(subject.pin_root(), index)?);
        server.restart()?;
        let took = server.with_writer(cluster, async move |writer| {
            change(&writer, &word, index, 910_000).await
        })?;
        self.findings.outage(cluster, name, took);
        Ok(())
    }
}

/// Seconds from before a change is asked for to when it is in the map.
async fn change(writer: &Writer, word: &Arc<ServiceWord>, index: usize, turn: u32) -> Result<f64> {
    let from = word.value()?;
    let watching = word.clone();
    let seen = tokio::task::spawn_blocking(move || watching.changed(from));
    let begun = Instant::now();
    writer.change(index, turn).await?;
    let seen = seen.await.context("the thread that looks at the map")??;
    Ok((seen - begun).as_secs_f64())
}
