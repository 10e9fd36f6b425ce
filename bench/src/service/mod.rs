//! `keelway-bench service`: what it costs to reach a server through a Service, beside reaching it directly and beside what does the
//! same elsewhere.

mod bare;
mod cluster;
mod findings;
mod keelway;
mod plain;
mod programs;
mod proxied;
mod route;
mod rules;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use keelway_tests::sandbox::{Network, Sandbox};

use self::cluster::{node_address, service_address, services};
use self::findings::Findings;
use self::keelway::{Between, Keelway, Uplinks};
use self::plain::Plain;
use self::proxied::Proxied;
use self::route::{
    Cpus, DIRECT, EMPTY_HOOKS, Ends, NODE_PORT, NODE_PORT_DSR, NODE_PORT_PASSED, NODE_PORT_XDP,
    OWN_HOOKS, ROUTED, Route, Task, VETH, tasks,
};
use self::rules::Rules;
use crate::control_groups::ControlGroups;
use crate::load::Order;
use crate::machine::Machine;
use crate::peer::{Peer, Place, Role};
use crate::report::{Output, Report};
use crate::sync::node::Who;

#[derive(Debug, clap::Args)]
pub struct Flags {
    /// Three short rounds and fewer sizes: under three minutes.
    #[arg(long)]
    quick: bool,
    /// Services in the cluster; may be repeated, in rising order. Everything is measured at the first, what may depend on it at
    /// the others. [default: 10, 1000, 10000, 100000; without the last by --quick]
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..=100_000))]
    services: Vec<u32>,
    /// Rounds, in place of nine, or of three by --quick.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: Option<u32>,
    /// Milliseconds of each measurement, in place of 500, or of 130 by --quick.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(20..=10_000))]
    duration_ms: Option<u64>,
    /// CPUs of client and server where they have two; where they have one it is the server's. [default: the last but one, the last]
    #[arg(long, num_args = 2, value_names = ["CLIENT", "SERVER"])]
    cpus: Option<Vec<usize>>,
    /// Most Services that iptables and nftables are given: loading more takes them minutes.
    #[arg(long, default_value_t = 10_000)]
    rules_max: u32,
    /// The real kube-proxy, measured beside ours in iptables and nftables mode, as far as the machine has what they need.
    #[arg(long, value_name = "PATH")]
    kube_proxy: Option<PathBuf>,
    /// Most Services that kube-proxy is given.
    #[arg(long, default_value_t = 10_000)]
    kube_proxy_max: u32,
    #[command(flatten)]
    output: Output,
    /// Folder with keelway-agent and keelway-cni; where this program is by default.
    #[arg(long, env = "KEELWAY_BIN_DIR")]
    bin_dir: Option<PathBuf>,
}

/// Flags, validated.
struct Settings {
    services: Vec<usize>,
    rules_max: usize,
    kube_proxy_max: usize,
    rounds: u32,
    duration: Duration,
    client_cpu: usize,
    server_cpu: usize,
    bin_dir: PathBuf,
}

impl Settings {
    fn of(flags: &Flags) -> Result<Self> {
        let cpus = std::thread::available_parallelism()?.get();
        let (rounds, duration_ms, sizes): (u32, u64, &[u32]) = if flags.quick {
            (3, 130, &[10, 1000, 10_000])
        } else {
            (9, 500, &[10, 1000, 10_000, 100_000])
        };
        let sizes = if flags.services.is_empty() {
            sizes
        } else {
            &flags.services
        };
        ensure!(
            sizes.is_sorted_by(|a, b| a < b),
            "--services are to rise: {sizes:?}"
        );
        let (client_cpu, server_cpu) = match flags.cpus.as_deref() {
            Some(&[client, server]) => (client, server),
            _ => (cpus.saturating_sub(2), cpus - 1),
        };
        ensure!(
            client_cpu < cpus && server_cpu < cpus,
            "--cpus {client_cpu} {server_cpu}: this machine has CPUs 0 to {}",
            cpus - 1
        );
        Ok(Self {
            services: sizes.iter().map(|size| *size as usize).collect(),
            rules_max: flags.rules_max as usize,
            kube_proxy_max: flags.kube_proxy_max as usize,
            rounds: flags.rounds.unwrap_or(rounds),
            duration: Duration::from_millis(flags.duration_ms.unwrap_or(duration_ms)),
            client_cpu,
            server_cpu,
            bin_dir: match &flags.bin_dir {
                Some(folder) => folder.clone(),
                None => crate::beside_this_program()?,
            },
        })
    }
}

/// Measures and prints.
pub fn run(flags: &Flags) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "this needs root: it makes namespaces and loads eBPF programs"
    );
    flags.output.check()?;
    let settings = Settings::of(flags)?;
    let machine = Machine::describe()?;
    let began = Instant::now();
    let progress = ProgressBar::new(1);
    progress.set_style(ProgressStyle::with_template(
        "{msg:44} {bar:30} {pos}/{len} {eta}",
    )?);
    let mut findings = Findings::default();
    let mut notes = Vec::new();
    let proxies = match &flags.kube_proxy {
        Some(program) => crate::sync::rivals(Some(program), &mut notes)?,
        None => Vec::new(),
    };
    let mut arena = Arena::build(&settings, proxies, &progress, &mut notes)?;
    for (number, size) in settings.services.iter().enumerate() {
        arena.load(*size, &settings, &progress, &mut notes)?;
        arena.measure(*size, number == 0, &settings, &progress, &mut findings)?;
    }
    crate::say(&progress, "programs by themselves".into());
    let programs = programs::measure()?;
    progress.finish_and_clear();

    let mut report = Report::new("service", machine);
    report.set("services", format!("{:?}", settings.services));
    report.set("rounds", settings.rounds);
    report.set("durationMs", settings.duration.as_millis());
    report.set("clientCpu", settings.client_cpu);
    report.set("serverCpu", settings.server_cpu);
    report.set("tookSeconds", began.elapsed().as_secs());
    findings.fill(&mut report);
    report.figures.extend(programs);
    report.notes = notes;
    flags.output.show(&report)
}

/// All subjects with their clients and servers, side by side.
struct Arena {
    keelway: Keelway,
    /// Nodes that send on what comes for others, by each way of doing so.
    forwarders: Vec<Keelway>,
    /// Nothing has been loaded yet.
    is_empty: bool,
    ruled: Vec<(Rules, Plain)>,
    proxied: Vec<Proxied>,
    /// Paths that the last number of Services was too large for, or that failed.
    not_loaded: BTreeSet<String>,
    /// Nobody is in the hosts' namespaces, which would end.
    _routed: Plain,
    routes: Vec<Route>,
    clients: Vec<Peer>,
    _servers: Vec<Peer>,
    /// Last: peers leave their groups before these go.
    groups: ControlGroups,
    sandbox: Sandbox,
}

impl Arena {
    fn build(
        settings: &Settings,
        proxies: Vec<Who>,
        progress: &ProgressBar,
        notes: &mut Vec<String>,
    ) -> Result<Self> {
        let sandbox = Sandbox::enter()?;
        let groups = ControlGroups::make()?;
        let mut crew = Crew {
            settings,
            groups: &groups,
            clients: Vec::new(),
            servers: Vec::new(),
            routes: Vec::new(),
        };
        crate::say(progress, "building Keelway's nodes".into());
        let build = |between| Keelway::build(&sandbox, &groups, &settings.bin_dir, between);
        let keelway = build(Between::Wire(Uplinks::AsMade))?;
        bare::hook_sockets(
            sandbox.pin_root().with_file_name("empty-hooks"),
            &groups.empty_hooks(),
        )?;
        crew.keelway(&keelway)?;
        let mut forwarders = Vec::new();
        if Uplinks::can_complete() {
            for (uplinks, path) in [
                (Uplinks::Complete, NODE_PORT),
                (Uplinks::Passed, NODE_PORT_PASSED),
                (Uplinks::InDriver, NODE_PORT_XDP),
            ] {
                let lab = build(Between::Wire(uplinks))?;
                crew.forwarder(&lab, path, Ends::Forwarded)?;
                forwarders.push(lab);
            }
        } else {
            notes.push("forwarded: this machine has no ethtool, without which veths send on frames whose checksums are not complete".into());
        }
        for (answered_directly, path) in [(false, NODE_PORT), (true, NODE_PORT_DSR)] {
            let lab = build(Between::Switch { answered_directly })?;
            crew.forwarder(&lab, path, Ends::Switched)?;
            forwarders.push(lab);
        }
        crate::say(progress, "building the others' nodes".into());
        let [client, server] = plain::bare_pair()?;
        crew.server(&server.network)?;
        let at = crew.client(&client.network)?;
        crew.route(VETH, Ends::SameNode, at, server.address);
        let routed = Plain::build()?;
        crew.plain(ROUTED, &routed, false)?;
        let mut ruled = Vec::new();
        for rules in Rules::ALL {
            if rules.loader().is_none() {
                notes.push(format!(
                    "{}: this machine has no program to load its rules with (Debian's package {0})",
                    rules.name()
                ));
                continue;
            }
            let plain = Plain::build()?;
            crew.plain(rules.name(), &plain, true)?;
            ruled.push((rules, plain));
        }
        let mut proxied = Vec::new();
        for who in proxies {
            let node = Proxied::build(who, &settings.bin_dir)?;
            crew.plain(&node.name(), &node.plain, true)?;
            proxied.push(node);
        }
        let Crew {
            clients,
            servers,
            routes,
            ..
        } = crew;
        Ok(Self {
            keelway,
            forwarders,
            is_empty: true,
            ruled,
            proxied,
            not_loaded: BTreeSet::new(),
            _routed: routed,
            routes,
            clients,
            _servers: servers,
            groups,
            sandbox,
        })
    }

    /// Gives every subject so many Services.
    fn load(
        &mut self,
        size: usize,
        settings: &Settings,
        progress: &ProgressBar,
        notes: &mut Vec<String>,
    ) -> Result<()> {
        crate::say(progress, format!("loading {size} Services: keelway"));
        self.keelway.load(size)?;
        // They are measured at the first size only.
        if self.is_empty {
            for forwarder in &self.forwarders {
                forwarder.load(size)?;
            }
            self.is_empty = false;
        }
        for (rules, plain) in &self.ruled {
            if size > settings.rules_max {
                self.not_loaded.insert(rules.name().into());
                notes.push(format!(
                    "{} at {size} Services: more than --rules-max",
                    rules.name()
                ));
                continue;
            }
            crate::say(
                progress,
                format!("loading {size} Services: {}", rules.name()),
            );
            let servers = plain.servers.each_ref().map(|server| server.address);
            rules.load(&plain.hosts[0], &services(size, servers))?;
        }
        for node in &mut self.proxied {
            let name = node.name();
            if self.not_loaded.contains(&name) {
                continue;
            }
            crate::say(progress, format!("loading {size} Services: {name}"));
            let loaded = match size <= settings.kube_proxy_max {
                true => node.load(size, &self.sandbox, &self.groups.elsewhere()),
                false => Err(anyhow::anyhow!("more than --kube-proxy-max")),
            };
            // What is measured of the others is not to be lost for that.
            if let Err(error) = loaded {
                let why = format!("{error:#}");
                let why = why.lines().next().unwrap_or_default();
                notes.push(format!("{name} at {size} Services and more: {why}"));
                self.not_loaded.insert(name);
            }
        }
        Ok(())
    }

    /// All rounds of everything at the number of Services that is loaded.
    fn measure(
        &mut self,
        size: usize,
        is_first: bool,
        settings: &Settings,
        progress: &ProgressBar,
        findings: &mut Findings,
    ) -> Result<()> {
        let cpus = std::thread::available_parallelism()?.get();
        let mut work: Vec<(usize, Task)> = Vec::new();
        for (index, route) in self.routes.iter().enumerate() {
            if !self.not_loaded.contains(&route.path) {
                let tasks = tasks(route, is_first, cpus);
                work.extend(tasks.into_iter().map(|task| (index, task)));
            }
        }
        // Paths that are compared follow each other within milliseconds.
        work.sort_by_key(|(index, task)| {
            let route = &self.routes[*index];
            (task.metric, task.cpus, route.ends, task.open.is_some())
        });
        crate::say(progress, format!("measuring with {size} Services"));
        progress.set_length(work.len() as u64 * u64::from(settings.rounds));
        progress.set_position(0);
        for round in 0..settings.rounds {
            // Back and forth, so that nobody is always first after somebody else.
            let in_order: Box<dyn Iterator<Item = &(usize, Task)>> = if round % 2 == 0 {
                Box::new(work.iter())
            } else {
                Box::new(work.iter().rev())
            };
            for (index, task) in in_order {
                let route = &self.routes[*index];
                progress.set_message(format!(
                    "{size} Services: {} {} {}",
                    task.metric.name(),
                    route.path,
                    route.ends.name()
                ));
                let sample = self.clients[route.client]
                    .measure(&order(settings, route, *task, findings, size)?)?;
                findings.push(size, route, *task, sample);
                progress.inc(1);
            }
        }
        Ok(())
    }
}

fn order(
    settings: &Settings,
    route: &Route,
    task: Task,
    findings: &Findings,
    size: usize,
) -> Result<Order> {
    let rate = match task.open {
        None => None,
        Some(share) => {
            let direct = findings.rate(size, DIRECT, route.ends, Task { open: None, ..task });
            Some(share * direct.context("an open load comes before the closed one")?)
        }
    };
    Ok(Order {
        metric: task.metric,
        target: route.target(task.metric),
        duration: settings.duration,
        cpu: match task.cpus {
            Cpus::One => settings.server_cpu,
            Cpus::Two => settings.client_cpu,
        },
        rate,
    })
}

/// Starts clients and servers, and says what they are there for.
struct Crew<'a> {
    settings: &'a Settings,
    groups: &'a ControlGroups,
    clients: Vec<Peer>,
    servers: Vec<Peer>,
    routes: Vec<Route>,
}

impl Crew<'_> {
    fn place(&self, network: &Network, cgroup: PathBuf) -> Place {
        Place {
            netns: network.path(),
            cgroup,
            cpu: self.settings.server_cpu,
        }
    }

    fn server(&mut self, network: &Network) -> Result<()> {
        let peer = Peer::start(&self.place(network, self.groups.plain()), Role::Server)?;
        self.servers.push(peer);
        Ok(())
    }

    /// One whose calls pass no hooks.
    fn client(&mut self, network: &Network) -> Result<usize> {
        self.client_in(network, self.groups.plain())
    }

    fn client_in(&mut self, network: &Network, cgroup: PathBuf) -> Result<usize> {
        let peer = Peer::start(&self.place(network, cgroup), Role::Client)?;
        self.clients.push(peer);
        Ok(self.clients.len() - 1)
    }

    /// A path that does not depend on Services.
    fn route(&mut self, path: &str, ends: Ends, client: usize, address: std::net::Ipv4Addr) {
        self.routes.push(Route {
            path: path.into(),
            ends,
            client,
            address,
            by_node_port: false,
            is_constant: true,
        });
    }

    /// A path by a Service.
    fn service(&mut self, path: &str, ends: Ends, client: usize) {
        let by_node_port = matches!(ends, Ends::Outside | Ends::Forwarded | Ends::Switched);
        self.routes.push(Route {
            path: path.into(),
            ends,
            client,
            address: if by_node_port {
                node_address(1)
            } else {
                service_address(usize::from(ends == Ends::AcrossNodes))
            },
            by_node_port,
            is_constant: false,
        });
    }

    fn keelway(&mut self, lab: &Keelway) -> Result<()> {
        for server in &lab.servers {
            self.server(&server.network)?;
        }
        let plain = self.client(&lab.client.network)?;
        let hooked = self.client_in(&lab.client.network, self.groups.hooked())?;
        let bare = self.client_in(&lab.client.network, self.groups.empty_hooks())?;
        let outside = self.client(lab.outside())?;
        for (ends, server) in [Ends::SameNode, Ends::AcrossNodes]
            .into_iter()
            .zip(&lab.servers)
        {
            self.route(DIRECT, ends, plain, server.address);
            self.service("socket", ends, hooked);
            self.service("packet", ends, plain);
        }
        for (path, client) in [(EMPTY_HOOKS, bare), (OWN_HOOKS, hooked)] {
            self.route(path, Ends::SameNode, client, lab.servers[0].address);
        }
        self.route(DIRECT, Ends::Outside, outside, lab.servers[0].address);
        self.service(NODE_PORT, Ends::Outside, outside);
        Ok(())
    }

    /// A client outside, which asks the first node for the server on the second.
    fn forwarder(&mut self, lab: &Keelway, path: &str, ends: Ends) -> Result<()> {
        self.server(&lab.servers[1].network)?;
        let client = self.client(lab.outside())?;
        self.service(path, ends, client);
        Ok(())
    }

    /// The kernel's own routing, or a Service of rules on top of it.
    fn plain(&mut self, path: &str, lab: &Plain, with_rules: bool) -> Result<()> {
        for server in &lab.servers {
            self.server(&server.network)?;
        }
        let inside = self.client(&lab.client.network)?;
        let outside = self.client(&lab.hosts[1])?;
        let all = [
            (Ends::SameNode, inside, &lab.servers[0]),
            (Ends::AcrossNodes, inside, &lab.servers[1]),
            (Ends::Outside, outside, &lab.servers[0]),
        ];
        for (ends, client, server) in all {
            if with_rules {
                self.service(path, ends, client);
            } else {
                self.route(path, ends, client, server.address);
            }
        }
        Ok(())
    }
}
