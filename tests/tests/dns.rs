//! `keelway-dns` as a process, through what clusters do to it: outages and relists of the API server, restarts, rollouts and
//! changed configurations. Names that exist are never denied.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use keelway_tests::cluster::program;
use keelway_tests::lists::{ListServer, services};
use keelway_tests::process::eventually;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

struct Server {
    child: Child,
    address: SocketAddr,
    health: SocketAddr,
}

fn free_port() -> SocketAddr {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    socket.local_addr().expect("an address")
}

impl Server {
    fn start(kubeconfig: &Path, arguments: &[&str]) -> Self {
        let (address, health) = (free_port(), free_port());
        let child = Command::new(program("keelway-dns"))
            .arg("serve")
            .arg("--kubeconfig")
            .arg(kubeconfig)
            .args([
                "--listen",
                &address.to_string(),
                "--health",
                &health.to_string(),
            ])
            .args(arguments)
            .env("RUST_LOG", "keelway_dns=error")
            .stdin(Stdio::null())
            .spawn()
            .expect("keelway-dns starts");
        Self {
            child,
            address,
            health,
        }
    }

    fn http(&self, path: &str) -> Result<String, String> {
        let failed = |error: std::io::Error| error.to_string();
        let mut stream = TcpStream::connect(self.health).map_err(failed)?;
        let request = format!("GET {path} HTTP/1.0\r\nHost: dns\r\n\r\n");
        stream.write_all(request.as_bytes()).map_err(failed)?;
        let mut response = String::new();
        stream.read_to_string(&mut response).map_err(failed)?;
        let (head, body) = response.split_once("\r\n\r\n").ok_or("no response")?;
        if head.contains(" 200 ") {
            Ok(body.to_owned())
        } else {
            Err(body.to_owned())
        }
    }

    fn wait_ready(&self) {
        eventually("a server that is ready", Duration::from_secs(60), || {
            self.http("/readyz")
        });
    }

    fn memory_most_mb(&self) -> f64 {
        let status =
            fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .expect("VmHWM");
        let kilobytes: f64 = line
            .split_whitespace()
            .next()
            .expect("a number")
            .parse()
            .expect("a number");
        kilobytes / 1000.0
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("a pid");
        kill(Pid::from_raw(pid), signal).expect("it can be signalled");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn question(id: u16, name: &str) -> Vec<u8> {
    let mut wire = id.to_be_bytes().to_vec();
    wire.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        wire.push(label.len() as u8);
        wire.extend(label.bytes());
    }
    wire.extend([0, 0, 1, 0, 1]);
    wire
}

/// Code and number of answers; `None` when nothing came in time.
fn ask(server: SocketAddr, name: &str) -> Option<(u8, u8)> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).ok()?;
    socket.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    socket.connect(server).ok()?;
    socket.send(&question(7, name)).ok()?;
    let mut reply = [0; 1500];
    let bytes = socket.recv(&mut reply).ok()?;
    (bytes > 12 && reply[..2] == [0, 7]).then(|| (reply[3] & 15, reply[7]))
}

const NOERROR: u8 = 0;
const SERVFAIL: u8 = 2;
const NXDOMAIN: u8 = 3;

fn service_name(i: usize) -> String {
    format!("svc-{i}.ns-{}.svc.cluster.local", i % 50)
}

/// Clients that ask for existing names until they are told to stop, and what they were told.
struct Clients {
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<Counts>>,
}

#[derive(Debug, Default)]
struct Counts {
    good: usize,
    servfail: usize,
    denied: usize,
    unanswered: usize,
}

impl Clients {
    fn start(
        count: usize,
        services: usize,
        server: impl Fn() -> SocketAddr + Send + Clone + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let client = |number: usize| {
            let (stop, server) = (stop.clone(), server.clone());
            thread::spawn(move || {
                let mut counts = Counts::default();
                let mut i = number;
                while !stop.load(Ordering::Relaxed) {
                    i = (i + 7919) % services;
                    match ask(server(), &service_name(i)) {
                        Some((NOERROR, 1..)) => counts.good += 1,
                        Some((SERVFAIL, _)) => counts.servfail += 1,
                        Some(_) => counts.denied += 1,
                        None => counts.unanswered += 1,
                    }
                }
                counts
            })
        };
        let threads = (0..count).map(client).collect();
        Self { stop, threads }
    }

    fn finish(self) -> Counts {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Counts::default();
        for thread in self.threads {
            let one = thread.join().expect("a client");
            all.good += one.good;
            all.servfail += one.servfail;
            all.denied += one.denied;
            all.unanswered += one.unanswered;
        }
        all
    }
}

fn api(
    services_count: usize,
    endpoints: usize,
) -> (ListServer, tempfile::TempDir, std::path::PathBuf) {
    let api = ListServer::start().expect("a free port");
    let [listed, slices] = services(services_count, endpoints);
    api.set("services", listed);
    api.set("endpointslices", slices);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let kubeconfig = api.kubeconfig(folder.path()).expect("a kubeconfig");
    (api, folder, kubeconfig)
}

#[test]
fn names_are_answered_while_the_api_server_is_away_and_news_are_taken_when_it_is_back() {
    let (api, _folder, kubeconfig) = api(200, 2);
    let server = Server::start(&kubeconfig, &["--threads", "1"]);
    server.wait_ready();
    api.go_away();
    let address = server.address;
    let clients = Clients::start(2, 200, move || address);
    // Long enough for every watch to have failed and been tried again several times.
    let [mut listed, slices] = services(201, 2);
    listed.remove(0);
    api.set("services", listed);
    api.set("endpointslices", slices);
    let until = Instant::now() + Duration::from_secs(8);
    while Instant::now() < until {
        assert_eq!(
            ask(address, &service_name(0)),
            Some((NOERROR, 1)),
            "the last state is served"
        );
        assert!(server.http("/readyz").is_ok(), "it serves, so it is ready");
    }
    let counts = clients.finish();
    assert!(
        counts.good > 1000 && counts.denied + counts.servfail + counts.unanswered == 0,
        "{counts:?}"
    );
    api.come_back();
    eventually("the news", Duration::from_secs(20), || {
        match (
            ask(address, &service_name(0)),
            ask(address, &service_name(200)),
        ) {
            (Some((NXDOMAIN, 0)), Some((NOERROR, 1))) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}

#[test]
fn a_storm_of_restarts_denies_nothing() {
    let (_api, _folder, kubeconfig) = api(2000, 5);
    for _ in 0..10 {
        let server = Server::start(&kubeconfig, &["--threads", "1"]);
        let mut seen = [0; 3];
        let end = Instant::now() + Duration::from_secs(30);
        // From the first packet that it hears to the first good answer.
        loop {
            assert!(
                Instant::now() < end,
                "it does not come to know the cluster: {seen:?}"
            );
            match ask(server.address, &service_name(1998)) {
                None => seen[0] += 1,
                Some((SERVFAIL, _)) => seen[1] += 1,
                Some((NOERROR, 1)) => break,
                other => panic!("{other:?} after {seen:?}"),
            }
        }
        server.signal(Signal::SIGKILL);
    }
}

#[test]
fn ten_thousand_services_and_a_hundred_thousand_endpoints_are_relisted_within_bounds() {
    let (api, _folder, kubeconfig) = api(10_000, 10);
    let server = Server::start(&kubeconfig, &["--threads", "1"]);
    server.wait_ready();
    let before = server.memory_most_mb();
    let address = server.address;
    let clients = Clients::start(1, 9000, move || address);
    let lists = api.lists();
    for round in 1..=3 {
        api.expire();
        eventually("a relist", Duration::from_secs(60), || match api.lists() {
            count if count >= lists + 2 * round => Ok(()),
            count => Err(format!("{count} lists")),
        });
    }
    // The last lists have been taken in when what they brought is served.
    let [listed, slices] = services(10_001, 10);
    api.set("services", listed);
    api.set("endpointslices", slices);
    api.expire();
    eventually("the last list", Duration::from_secs(60), || {
        match ask(address, &service_name(10_000)) {
            Some((NOERROR, 1)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    let counts = clients.finish();
    let after = server.memory_most_mb();
    println!("most memory: {before:.0} MB after the first list, {after:.0} MB after four more");
    assert!(
        counts.good > 100 && counts.denied + counts.servfail + counts.unanswered == 0,
        "{counts:?}"
    );
    // The limit of the DaemonSet is 170 MiB.
    assert!(after < 150.0, "{after} MB");
}

#[test]
fn a_rollout_loses_no_query() {
    let (_api, _folder, kubeconfig) = api(100, 2);
    let mut current = Server::start(&kubeconfig, &["--threads", "2", "--lameduck", "2"]);
    current.wait_ready();
    let address = Arc::new(AtomicUsize::new(usize::from(current.address.port())));
    let port = address.clone();
    // Clients ask whoever is ready, and learn of a change late: up to a second after readiness has gone.
    let clients = Clients::start(4, 90, move || {
        (Ipv4Addr::LOCALHOST, port.load(Ordering::Relaxed) as u16).into()
    });
    for _ in 0..3 {
        let next = Server::start(&kubeconfig, &["--threads", "2", "--lameduck", "2"]);
        next.wait_ready();
        current.signal(Signal::SIGTERM);
        eventually(
            "readiness to go",
            Duration::from_secs(5),
            || match current.http("/readyz") {
                Err(body) if body.contains("stopping") => Ok(()),
                other => Err(format!("{other:?}")),
            },
        );
        thread::sleep(Duration::from_secs(1));
        address.store(usize::from(next.address.port()), Ordering::Relaxed);
        let status = current.child.wait().expect("it ends");
        assert!(status.success(), "{status}");
        current = next;
    }
    let counts = clients.finish();
    assert!(
        counts.good > 1000 && counts.denied + counts.servfail + counts.unanswered == 0,
        "{counts:?}"
    );
}

#[test]
fn a_changed_corefile_is_taken_over_and_one_with_an_error_is_not() {
    let (_api, folder, kubeconfig) = api(10, 1);
    let corefile = folder.path().join("Corefile");
    let listen = free_port();
    let write = |domain: &str, more: &str| {
        let text = format!(
            ".:{} {{\n kubernetes {domain} in-addr.arpa\n errors\n {more}\n}}\n",
            listen.port()
        );
        let partial = folder.path().join("partial");
        fs::write(&partial, text).expect("written");
        fs::rename(&partial, &corefile).expect("renamed");
    };
    write("cluster.local", "");
    let config = corefile.display().to_string();
    let server = Server::start(&kubeconfig, &["--threads", "1", "--config", &config]);
    server.wait_ready();
    let in_domain = |domain: &str| ask(server.address, &format!("svc-0.ns-0.svc.{domain}"));
    assert_eq!(in_domain("cluster.local"), Some((NOERROR, 1)));
    write("other.example", "no-such-plugin");
    eventually("the error to be counted", Duration::from_secs(10), || {
        let metrics = server.http("/metrics")?;
        let counted = metrics
            .lines()
            .any(|line| line == "coredns_reload_failed_total 1");
        if counted { Ok(()) } else { Err(metrics) }
    });
    assert_eq!(in_domain("cluster.local"), Some((NOERROR, 1)));
    write("other.example", "");
    eventually(
        "the new domain",
        Duration::from_secs(10),
        || match in_domain("other.example") {
            Some((NOERROR, 1)) => Ok(()),
            other => Err(format!("{other:?}")),
        },
    );
    let why = server
        .http("/explain?name=svc-0.ns-0.svc.other.example&type=A")
        .expect("an explanation");
    assert!(
        why.contains("from Service ns-0/svc-0") && why.contains("other.example."),
        "{why}"
    );
}
