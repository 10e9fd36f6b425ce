//! The services of a node: when each starts, how long a dead one rests, what each writes.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use super::{BIN_DIR, Event, ServiceSpec, ServiceStatus};

/// Where services send `READY=1` to (sd_notify).
pub const NOTIFY_SOCKET: &str = "/run/keelway-notify.sock";
/// Where services' output goes.
const LOG_DIR: &str = "/var/log/keelway";
/// A service that ran this long starts anew with the shortest rest.
const HEALTHY: Duration = Duration::from_secs(10);
const SHORTEST_REST: Duration = Duration::from_millis(50);
/// What services have to end in when the node is told to stop.
const STOP_GRACE: Duration = Duration::from_secs(8);
const LONGEST_REST: Duration = Duration::from_secs(5);
/// A log larger than this is put aside at its service's next start.
const LOG_BYTES_MAX: u64 = 16 << 20;

/// How long a service rests that has failed `failures` times in a row.
pub fn rest(failures: u32) -> Duration {
    SHORTEST_REST
        .saturating_mul(1 << failures.min(16))
        .min(LONGEST_REST)
}

#[derive(Debug)]
enum State {
    /// Has not been started yet.
    Waiting,
    Running {
        pid: u32,
        since: Instant,
    },
    Resting {
        until: Instant,
    },
}

#[derive(Debug)]
struct Service {
    spec: ServiceSpec,
    state: State,
    restarts: u32,
    failures: u32,
    /// It was asked to end, as the node is to.
    told: bool,
    /// The process that runs has said that it is ready.
    ready: bool,
}

/// The services of a node, and what has happened so far.
#[derive(Debug)]
pub struct Services {
    services: Vec<Service>,
    happened: BTreeSet<String>,
    path: String,
    handed: Handed,
    /// When the node ends, whoever still runs; None while nobody has told it to.
    stopping: Option<Instant>,
}

/// What `up` has handed over for some of the services.
#[derive(Debug, Default)]
pub struct Handed {
    /// The socket of the one that listens.
    pub listener: Option<OwnedFd>,
    /// The network and mount namespaces that `up` was started in, for those that move there.
    pub outside: Option<(OwnedFd, OwnedFd)>,
}

impl Services {
    pub fn new(specs: Vec<ServiceSpec>, path: String, handed: Handed) -> Self {
        let services = specs
            .into_iter()
            .map(|spec| Service {
                spec,
                state: State::Waiting,
                restarts: 0,
                failures: 0,
                told: false,
                ready: false,
            })
            .collect();
        Services {
            services,
            happened: BTreeSet::new(),
            path,
            handed,
            stopping: None,
        }
    }

    /// Has all services end, each before those that it came after; none is started from now on.
    pub fn stop(&mut self, now: Instant) {
        if self.stopping.is_none() {
            self.stopping = Some(now + STOP_GRACE);
            self.stop_due();
        }
    }

    /// Asks those services to end that nothing which runs has come after.
    fn stop_due(&mut self) {
        let runs = |service: &&Service| matches!(service.state, State::Running { .. });
        let running = self.services.iter().filter(runs);
        let needed: BTreeSet<String> = running.flat_map(|s| s.spec.after.clone()).collect();
        for service in &mut self.services {
            if let State::Running { pid, .. } = service.state
                && !service.told
                && !needed.contains(&service.spec.name)
            {
                service.told = true;
                // One that has just ended by itself is collected like any other.
                let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM);
            }
        }
    }

    /// Whether the node was told to stop and no service runs, or those that do have had their time.
    pub fn have_stopped(&self, now: Instant) -> bool {
        let runs = |service: &Service| matches!(service.state, State::Running { .. });
        self.stopping
            .is_some_and(|deadline| now >= deadline || !self.services.iter().any(runs))
    }

    /// Records that something has happened that services may wait for.
    pub fn happened(&mut self, name: String) {
        self.happened.insert(name);
    }

    /// A service has said that it is ready; others may have waited for that.
    pub fn is_ready(&mut self, name: String) {
        let named = self.services.iter_mut().find(|s| s.spec.name == name);
        if let Some(service) = named {
            service.ready = true;
        }
        self.happened(name);
    }

    /// Starts all services that can start at `now`; failures to start are reported, and tried again.
    pub fn start_due(&mut self, now: Instant) -> Vec<Event> {
        let mut events = Vec::new();
        if self.stopping.is_some() {
            return events;
        }
        for service in &mut self.services {
            let due = match service.state {
                State::Waiting => service
                    .spec
                    .after
                    .iter()
                    .all(|name| self.happened.contains(name)),
                State::Resting { until } => until <= now,
                State::Running { .. } => false,
            };
            if !due {
                continue;
            }
            match start(&service.spec, &self.path, &self.handed) {
                Ok(pid) => service.state = State::Running { pid, since: now },
                Err(error) => events.push(service.ended(format!("cannot start: {error}"), now)),
            }
        }
        events
    }

    /// The service whose process is `pid` has ended. None when the process is not a service's own.
    pub fn ended(&mut self, pid: u32, status: String, now: Instant) -> Option<Event> {
        let service = self.services.iter_mut().find(
            |service| matches!(service.state, State::Running { pid: own, .. } if own == pid),
        )?;
        let event = service.ended(status, now);
        if self.stopping.is_some() {
            self.stop_due();
        }
        Some(event)
    }

    /// The service that runs as `pid`.
    pub fn name_of(&self, pid: u32) -> Option<&str> {
        let service = self.services.iter().find(
            |service| matches!(service.state, State::Running { pid: own, .. } if own == pid),
        )?;
        Some(&service.spec.name)
    }

    /// When the next resting service is due, or the node ends.
    pub fn next_start(&self) -> Option<Instant> {
        if self.stopping.is_some() {
            return self.stopping;
        }
        self.services
            .iter()
            .filter_map(|service| {
                if let State::Resting { until } = service.state {
                    Some(until)
                } else {
                    None
                }
            })
            .min()
    }

    pub fn status(&self) -> Vec<ServiceStatus> {
        self.services
            .iter()
            .map(|service| ServiceStatus {
                name: service.spec.name.clone(),
                pid: if let State::Running { pid, .. } = service.state {
                    Some(pid)
                } else {
                    None
                },
                restarts: service.restarts,
                ready: service.spec.notifies.then_some(service.ready),
            })
            .collect()
    }
}

impl Service {
    fn ended(&mut self, status: String, now: Instant) -> Event {
        if matches!(self.state, State::Running { since, .. } if now.duration_since(since) >= HEALTHY)
        {
            self.failures = 0;
        }
        self.state = State::Resting {
            until: now + rest(self.failures),
        };
        self.ready = false;
        self.failures += 1;
        self.restarts += 1;
        Event::Exited {
            service: self.spec.name.clone(),
            status,
            restarts: self.restarts,
        }
    }
}

fn start(spec: &ServiceSpec, path: &str, handed: &Handed) -> io::Result<u32> {
    let log = open_log(&spec.name)?;
    // A child inherits the signals that PID 1 has blocked, and with them every container; and LISTEN_PID is known only
    // after the fork. So a service is started through a step that sets both right.
    let mut command = Command::new(Path::new(BIN_DIR).join("keelway"));
    command.arg("node-exec");
    let mut output = Stdio::from(log.try_clone()?);
    match (&handed.listener, &handed.outside) {
        (Some(listener), _) if spec.listens => {
            command
                .arg("--listener")
                .stdin(Stdio::from(listener.try_clone()?));
        }
        (_, Some((network, mount))) if spec.outside => {
            command
                .arg("--outside")
                .stdin(Stdio::from(network.try_clone()?));
            output = Stdio::from(mount.try_clone()?);
        }
        _ => {
            command.stdin(Stdio::null());
        }
    }
    command.arg("--").args(&spec.argv);
    command
        .env_clear()
        .env("PATH", path)
        .env("HOME", "/root")
        .envs(&spec.env);
    if spec.notifies {
        command.env("NOTIFY_SOCKET", NOTIFY_SOCKET);
    }
    // A group of its own, so that a signal to the node's group from a terminal does not reach it.
    let child = command
        .stdout(output)
        .stderr(log)
        .process_group(0)
        .spawn()?;
    Ok(child.id())
}

fn open_log(service: &str) -> io::Result<File> {
    let path = Path::new(LOG_DIR).join(format!("{service}.log"));
    if path.metadata().is_ok_and(|meta| meta.len() > LOG_BYTES_MAX) {
        std::fs::rename(&path, path.with_extension("log.1"))?;
    }
    OpenOptions::new().append(true).create(true).open(path)
}

/// `keelway node-exec`: unblocks all signals and becomes the given program. With `listener`, standard input is a listening
/// socket, which becomes descriptor 3, told of by LISTEN_FDS and LISTEN_PID (sd_listen_fds(3)). With `outside`, standard input and
/// output are namespaces, and stay what they are. Returns only when that fails.
pub fn exec_service(argv: &[String], listener: bool, outside: bool) -> io::Error {
    let Some((program, arguments)) = argv.split_first() else {
        return io::Error::other("no program is given");
    };
    let mut command = Command::new(program);
    if listener {
        match nix::fcntl::fcntl(io::stdin(), nix::fcntl::FcntlArg::F_DUPFD(3)) {
            Ok(3) => {}
            Ok(other) => {
                return io::Error::other(format!("descriptor 3 is taken already (got {other})"));
            }
            Err(error) => return error.into(),
        }
        command.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", "api");
        command.env("LISTEN_PID", std::process::id().to_string());
    }
    if let Err(error) = SigSet::empty().thread_set_mask() {
        return error.into();
    }
    if !outside {
        command.stdin(Stdio::null());
    }
    command.args(arguments).exec()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn spec(name: &str, after: &[&str]) -> ServiceSpec {
        ServiceSpec {
            name: name.into(),
            argv: vec!["/nonexistent/program".into()],
            env: BTreeMap::new(),
            after: after.iter().map(|name| (*name).to_owned()).collect(),
            notifies: false,
            listens: false,
            outside: false,
        }
    }

    #[test]
    fn rests_double_up_to_a_limit() {
        assert_eq!(rest(0), SHORTEST_REST);
        assert_eq!(rest(1), SHORTEST_REST * 2);
        assert_eq!(rest(40), LONGEST_REST);
    }

    #[test]
    fn a_service_waits_for_all_it_comes_after() {
        let mut services = Services::new(
            vec![spec("kubelet", &["network", "containerd"])],
            String::new(),
            Handed::default(),
        );
        let now = Instant::now();
        assert_eq!(services.start_due(now), []);
        services.happened("network".into());
        assert_eq!(services.start_due(now), []);
        services.happened("containerd".into());
        // The program does not exist, which shows that a start was tried.
        assert!(matches!(
            &services.start_due(now)[..],
            [Event::Exited { restarts: 1, .. }]
        ));
    }

    #[test]
    fn a_failed_start_is_tried_again_after_its_rest_and_not_before() {
        let mut services = Services::new(vec![spec("a", &[])], String::new(), Handed::default());
        let now = Instant::now();
        assert_eq!(services.start_due(now).len(), 1);
        let due = services.next_start().expect("it rests");
        assert_eq!(services.start_due(now).len(), 0);
        assert_eq!(services.start_due(due).len(), 1);
        assert_eq!(services.status()[0].restarts, 2);
    }

    #[test]
    fn a_service_ends_before_what_it_came_after() {
        let started = || {
            let child = Command::new("sleep").arg("60").spawn();
            child.expect("sleep starts")
        };
        let mut children = [started(), started()];
        let specs = vec![spec("etcd", &[]), spec("controlplane", &["etcd"])];
        let mut services = Services::new(specs, String::new(), Handed::default());
        let now = Instant::now();
        for (service, child) in services.services.iter_mut().zip(&children) {
            let (pid, since) = (child.id(), now);
            service.state = State::Running { pid, since };
        }
        services.stop(now);
        let ended = children[1].wait().expect("the one that nothing needs ends");
        assert!(!ended.success());
        assert!(children[0].try_wait().expect("a child").is_none());
        let event = services.ended(children[1].id(), "ended".into(), now);
        assert!(event.is_some() && !services.have_stopped(now));
        children[0].wait().expect("now the other one does");
        services.ended(children[0].id(), "ended".into(), now);
        assert!(services.have_stopped(now));
    }

    #[test]
    fn a_process_is_ready_when_it_has_said_so_and_the_next_one_is_not() {
        let told = ServiceSpec {
            notifies: true,
            ..spec("etcd", &[])
        };
        let specs = vec![told, spec("controlplane", &["etcd"])];
        let mut services = Services::new(specs, String::new(), Handed::default());
        let ready = |services: &Services| {
            let all = services.status().into_iter();
            all.map(|service| service.ready).collect::<Vec<_>>()
        };
        assert_eq!(ready(&services), [Some(false), None]);
        services.is_ready("etcd".into());
        assert_eq!(ready(&services), [Some(true), None]);
        let (pid, since) = (4711, Instant::now());
        services.services[0].state = State::Running { pid, since };
        services.ended(pid, "exit status 1".into(), since);
        assert_eq!(ready(&services), [Some(false), None]);
    }

    #[test]
    fn an_orphan_that_ends_is_no_service() {
        let mut services = Services::new(vec![spec("a", &[])], String::new(), Handed::default());
        assert_eq!(
            services.ended(4711, "exit status 0".into(), Instant::now()),
            None
        );
    }
}
