//! Services of both families under churn: pods, endpoints and Services come and go, workers are killed every 20 s and supervisors now
//! and then. No client sees a request fail but those that are on their way to an endpoint that dies without notice, from its death until
//! it is out of every node's maps. `KEELWAY_SOAK_S` says for how many seconds, `KEELWAY_SOAK_SEED` with which numbers. A minute or less
//! kills more often, so that a short run sees it all.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use keelway_agent::dataplane::held;
use keelway_tests::agents::{AgentNode, Pod, Segment, Service, dual_stack_segment, program, until};
use keelway_tests::dice::{Dice, soak};
use keelway_tests::nodes::{self, ECHO_PORT, ask};
use keelway_tests::sandbox::{Network, Sandbox, ip, is_root};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 7);
const WEB_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 7);
const NODE_PORT: u16 = 30_080;
/// How long one request may take. A lost packet of TCP is sent again within a second, and shows.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two requests of a client.
const PACE: Duration = Duration::from_millis(20);
/// How long a server serves on after it was told to end: as pods do that end well, and longer than a worker is away.
const DRAIN: Duration = Duration::from_secs(8);
/// How long nobody knows of a death: as long as clients of all kinds need to meet it.
const UNNOTICED: Duration = Duration::from_millis(300);
/// Backends of the Service that is asked: so many at least, so many at most.
const BACKENDS: std::ops::Range<usize> = 3..8;

/// What a client does over and over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// A connection for each request.
    Http,
    /// A connection that is kept until its server says that it ends.
    KeptHttp,
    /// A socket for each datagram.
    Udp,
    /// A connected socket, the same to the end.
    ConnectedUdp,
}

const KINDS: [Kind; 4] = [Kind::Http, Kind::KeptHttp, Kind::Udp, Kind::ConnectedUdp];

/// What came of a client's requests.
#[derive(Debug, Default)]
struct Tally {
    asked: u64,
    slowest: Duration,
    failed: Vec<Failure>,
}

/// A request that failed.
#[derive(Clone, Debug)]
struct Failure {
    /// Since the beginning.
    when: Duration,
    took: Duration,
    why: String,
}

/// An endpoint that went without notice: when, and when it was out of every node's maps. Since the beginning.
#[derive(Clone, Copy, Debug)]
struct Death {
    died: Duration,
    gone: Duration,
}

impl Death {
    /// Whether a request may have been on its way to the endpoint.
    fn explains(&self, failure: &Failure) -> bool {
        failure.when <= self.gone && failure.when + failure.took >= self.died
    }
}

/// A client of one kind, with the sockets that it keeps.
struct Asking {
    kind: Kind,
    at: SocketAddr,
    kept: Option<BufReader<TcpStream>>,
    connected: Option<UdpSocket>,
    number: u64,
}

impl Asking {
    fn once(&mut self) -> io::Result<()> {
        self.number += 1;
        match self.kind {
            Kind::Http => get(&mut open(self.at)?, true).map(drop),
            Kind::KeptHttp => {
                let mut stream = match self.kept.take() {
                    Some(stream) => stream,
                    None => open(self.at)?,
                };
                let ends = get(&mut stream, false)?;
                self.kept = (!ends).then_some(stream);
                Ok(())
            }
            Kind::Udp => self.datagram(&datagram_socket(self.at)?),
            Kind::ConnectedUdp => {
                let socket = match self.connected.take() {
                    Some(socket) => socket,
                    None => datagram_socket(self.at)?,
                };
                let asked = self.datagram(&socket);
                self.connected = Some(socket);
                asked
            }
        }
    }

    fn datagram(&self, socket: &UdpSocket) -> io::Result<()> {
        socket.send(self.number.to_string().as_bytes())?;
        let mut buffer = [0; 512];
        socket.recv(&mut buffer).map(drop)
    }
}

fn datagram_socket(at: SocketAddr) -> io::Result<UdpSocket> {
    let any = match at {
        SocketAddr::V4(_) => "0.0.0.0:0",
        SocketAddr::V6(_) => "[::]:0",
    };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(at)?;
    Ok(socket)
}

fn open(at: SocketAddr) -> io::Result<BufReader<TcpStream>> {
    let stream = TcpStream::connect_timeout(&at, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(BufReader::new(stream))
}

/// A request, and whether the server ends the connection with its answer.
fn get(stream: &mut BufReader<TcpStream>, last: bool) -> io::Result<bool> {
    let connection = if last { "close" } else { "keep-alive" };
    let request = format!("GET / HTTP/1.1\r\nhost: web\r\nconnection: {connection}\r\n\r\n");
    stream.get_mut().write_all(request.as_bytes())?;
    let (mut length, mut ends, mut status) = (0, last, String::new());
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let line = line.trim_end().to_ascii_lowercase();
        if line.is_empty() {
            break;
        } else if status.is_empty() {
            status = line;
        } else if let Some(value) = line.strip_prefix("content-length: ") {
            length = value.parse().unwrap_or(0);
        } else if line == "connection: close" {
            ends = true;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    if status.contains(" 200 ") && body.starts_with(b"pod=") {
        Ok(ends)
    } else {
        Err(io::Error::other(status))
    }
}

/// Asks until `ended`.
fn run(kind: Kind, at: SocketAddr, began: Instant, ended: impl Fn() -> bool) -> Tally {
    let mut tally = Tally::default();
    let mut asking = Asking {
        kind,
        at,
        kept: None,
        connected: None,
        number: 0,
    };
    while !ended() {
        let start = Instant::now();
        let asked = asking.once();
        tally.asked += 1;
        tally.slowest = tally.slowest.max(start.elapsed());
        if let Err(error) = asked {
            tally.failed.push(Failure {
                when: start.duration_since(began),
                took: start.elapsed(),
                why: error.to_string(),
            });
        }
        thread::sleep(PACE);
    }
    tally
}

/// A client in a process of its own, in a control group whose sockets are translated: `<kind> <address> <group> <seconds> <began>`, the
/// last one in microseconds of the clock.
fn carry_out(request: &str) -> io::Result<String> {
    let words: Vec<&str> = request.split(' ').collect();
    let invalid = || io::Error::new(io::ErrorKind::InvalidInput, request.to_owned());
    let [kind, at, group, seconds, beginning] = words[..] else {
        return Err(invalid());
    };
    let named = |one: &&Kind| format!("{one:?}") == kind;
    let kind = *KINDS.iter().find(named).ok_or_else(invalid)?;
    let at = at.parse().map_err(|_no_address| invalid())?;
    let seconds = seconds.parse().map_err(|_no_number| invalid())?;
    fs::write(
        PathBuf::from(group).join("cgroup.procs"),
        std::process::id().to_string(),
    )?;
    let beginning = beginning.parse().map_err(|_no_number| invalid())?;
    let late = since_epoch().saturating_sub(Duration::from_micros(beginning));
    let began = Instant::now();
    let life = Duration::from_secs(seconds).saturating_sub(late);
    let tally = run(kind, at, began, || began.elapsed() >= life);
    let failed: Vec<Value> = tally
        .failed
        .iter()
        .map(|one| {
            json!([
                (one.when + late).as_secs_f64(),
                one.took.as_secs_f64(),
                one.why
            ])
        })
        .collect();
    Ok(json!([tally.asked, tally.slowest.as_secs_f64(), failed]).to_string())
}

fn since_epoch() -> Duration {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default()
}

#[test]
fn client() {
    nodes::client(carry_out);
}

fn read_tally(answer: &str) -> Result<Tally> {
    let read: (u64, f64, Vec<(f64, f64, String)>) =
        serde_json::from_str(answer).with_context(|| answer.to_owned())?;
    let failed = read.2.into_iter();
    Ok(Tally {
        asked: read.0,
        slowest: Duration::from_secs_f64(read.1),
        failed: failed
            .map(|(when, took, why)| Failure {
                when: Duration::from_secs_f64(when),
                took: Duration::from_secs_f64(took),
                why,
            })
            .collect(),
    })
}

/// A pod with a server that ends well.
struct Backend {
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
struct Churn {
    segment: Segment,
    dice: Dice,
    began: Instant,
    backends: Vec<Backend>,
    /// Those that were told to end.
    ending: Vec<(Instant, Backend)>,
    /// Services that nobody asks.
    others: BTreeMap<u8, Vec<(Ipv4Addr, &'static str)>>,
    pods: u32,
    writes: u32,
    deaths: Vec<Death>,
    log: Vec<String>,
}

const NAMES: [&str; 2] = ["node-1", "node-2"];

impl Churn {
    fn say(&mut self, what: String) {
        self.log
            .push(format!("{:8.3} {what}", self.began.elapsed().as_secs_f64()));
    }

    fn add(&mut self) -> Result<()> {
        let node = self.dice.below(2) as usize;
        self.pods += 1;
        let name = format!("p{}", self.pods);
        let backend = Backend::start(&self.segment.nodes[node], node, &name)?;
        self.say(format!("{name} comes at {}", backend.pod.address));
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
    fn lose(&mut self) -> Result<()> {
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
        self.deaths.push(Death { died, gone });
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

    fn kill_worker(&mut self, node: usize) -> Result<()> {
        self.say(format!("the worker of {} is killed", NAMES[node]));
        self.segment.nodes[node].kill_worker()?;
        Ok(())
    }

    fn kill_supervisor(&mut self, node: usize) -> Result<()> {
        self.say(format!("the supervisor of {} is killed", NAMES[node]));
        self.segment.nodes[node].kill()?;
        self.segment.nodes[node].start()?;
        self.say(format!("{} is ready again", NAMES[node]));
        Ok(())
    }

    /// One change.
    fn step(&mut self) -> Result<()> {
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

#[test]
fn whatever_changes_and_whoever_is_killed_no_request_fails() {
    if !is_root("whatever_changes_and_whoever_is_killed_no_request_fails") {
        return;
    }
    let (seconds, seed) = soak(25);
    let sandbox = Sandbox::enter().expect("a sandbox");
    let dir = tempfile::tempdir().expect("a folder");
    let ranges = [
        "--service-cidr",
        "10.96.0.0/16",
        "--service-cidr",
        "fd00:10:96::/112",
    ];
    let mut segment = dual_stack_segment(&sandbox, dir.path(), &ranges).expect("a segment");
    segment.cluster.write(&[]).expect("the cluster's file");
    for node in &mut segment.nodes {
        node.start().expect("an agent");
    }
    let clients = [
        segment.nodes[0].wire("client-1").expect("a pod"),
        segment.nodes[1].wire("client-2").expect("a pod"),
    ];
    let group = segment.nodes[0].cgroup.path().display().to_string();
    let beside = segment.client.try_clone().expect("the client's network");
    let hosts = [0, 1].map(|node| segment.nodes[node].host.try_clone().expect("a host"));
    let mut churn = Churn {
        segment,
        dice: Dice::new(seed),
        began: Instant::now(),
        backends: Vec::new(),
        ending: Vec::new(),
        others: BTreeMap::new(),
        pods: 0,
        writes: 0,
        deaths: Vec::new(),
        log: Vec::new(),
    };
    while churn.backends.len() < BACKENDS.start {
        churn.add().expect("a backend");
    }
    let (web, web_v6) = (SocketAddr::from((WEB, 80)), SocketAddr::from((WEB_V6, 80)));
    let ports = [0, 1].map(|node| SocketAddr::from((churn.segment.nodes[node].address, NODE_PORT)));
    let node_v6: IpAddr = "fd00:198:18::2".parse().expect("an address");
    let port_v6 = SocketAddr::new(node_v6, NODE_PORT);
    // Everybody is served before it begins.
    for (network, at) in [
        (&clients[0].network, web),
        (&clients[1].network, web),
        (&hosts[0], web),
        (&beside, ports[0]),
        (&beside, ports[1]),
        (&clients[0].network, web_v6),
        (&clients[1].network, web_v6),
        (&hosts[0], web_v6),
        (&beside, port_v6),
    ] {
        network
            .run(|| {
                until("an answer", || {
                    Ok(open(at).and_then(|mut stream| get(&mut stream, true)).ok())
                })
            })
            .expect("an answer");
    }

    let end = Arc::new(AtomicBool::new(false));
    let began = Instant::now();
    churn.began = began;
    let mut running = Vec::new();
    let mut start = |name: String, network: &Network, kind: Kind, at: SocketAddr| {
        let network = network.try_clone().expect("a network");
        let end = end.clone();
        let thread = thread::spawn(move || {
            Ok(network.run(|| run(kind, at, began, || end.load(Ordering::Relaxed))))
        });
        running.push((format!("{name}, {kind:?}"), thread));
    };
    for kind in KINDS {
        start("pod of node-1".into(), &clients[0].network, kind, web);
        start("outside, node-2's port".into(), &beside, kind, ports[1]);
    }
    for kind in [Kind::KeptHttp, Kind::ConnectedUdp] {
        let pod = &clients[0].network;
        start("pod of node-1, IPv6".into(), pod, kind, web_v6);
        start(
            "outside, node-2's port, IPv6".into(),
            &beside,
            kind,
            port_v6,
        );
    }
    let pod = &clients[1].network;
    start("pod of node-2, IPv6".into(), pod, Kind::Http, web_v6);
    start("node-1, IPv6".into(), &hosts[0], Kind::Http, web_v6);
    start("pod of node-2".into(), &clients[1].network, Kind::Http, web);
    start("node-1".into(), &hosts[0], Kind::Http, web);
    start("node-1".into(), &hosts[0], Kind::ConnectedUdp, web);
    start(
        "outside, node-1's port".into(),
        &beside,
        Kind::KeptHttp,
        ports[0],
    );
    let beginning = (since_epoch() - began.elapsed()).as_micros();
    for (kind, at) in [
        (Kind::Http, web),
        (Kind::ConnectedUdp, web),
        (Kind::Http, web_v6),
    ] {
        let (network, group) = (clients[0].network.try_clone().expect("it"), group.clone());
        let thread = thread::spawn(move || {
            let request = format!("{kind:?} {at} {group} {seconds} {beginning}");
            ask(&network, None, &request).and_then(|answer| read_tally(&answer))
        });
        let name = format!("pod of node-1 at the socket, {at}, {kind:?}");
        running.push((name, thread));
    }

    let length = Duration::from_secs(seconds);
    let every = Duration::from_secs(if seconds > 60 { 20 } else { 4 });
    let (mut kills, mut supervisors) = (0_u32, 0_u32);
    // One at least, also of a short run.
    let mut churned = churn.add().and_then(|()| churn.lose());
    let since = Instant::now();
    while churned.is_ok() && since.elapsed() < length {
        if since.elapsed() >= every * (kills + supervisors + 1) {
            let node = (kills + supervisors) as usize % 2;
            // Three workers, then a supervisor with its worker.
            churned = if (kills + supervisors) % 4 == 3 {
                supervisors += 1;
                churn.kill_supervisor(node)
            } else {
                kills += 1;
                churn.kill_worker(node)
            };
        } else {
            churned = churn.step();
            thread::sleep(Duration::from_millis(100 + churn.dice.below(300)));
        }
    }
    end.store(true, Ordering::Relaxed);
    let tallies: Vec<(String, Tally)> = running
        .into_iter()
        .map(|(name, thread)| {
            let tally: Result<Tally> = thread.join().expect("no panic");
            (name, tally.expect("a tally"))
        })
        .collect();
    println!(
        "{} pods came, {} died, the cluster changed {} times, {kills} workers and {supervisors} supervisors were killed",
        churn.pods,
        churn.deaths.len(),
        churn.writes
    );
    let (mut failed, mut lost) = (Vec::new(), 0);
    for (name, tally) in &tallies {
        println!(
            "{name}: {} requests, {} failed, the slowest took {:?}",
            tally.asked,
            tally.failed.len(),
            tally.slowest
        );
        for one in &tally.failed {
            let Failure { when, took, why } = one;
            if churn.deaths.iter().any(|death| death.explains(one)) {
                lost += 1;
            } else {
                failed.push(format!(
                    "{:8.3} {name}: {why} after {took:?}",
                    when.as_secs_f64()
                ));
            }
        }
    }
    println!("{lost} requests were lost to endpoints that died");
    if !failed.is_empty() {
        churn.log.extend(failed.iter().cloned());
        churn.log.sort();
        println!("{}", churn.log.join("\n"));
    }
    churned.expect("no change fails");
    assert!(kills > 0 && supervisors > 0, "nobody was killed");
    assert_eq!(failed, Vec::<String>::new(), "seed {seed}");
}
