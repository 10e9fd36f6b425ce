//! A server as a process, a cluster that it lists, and clients that count what they are told.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use keelway_tests::cluster::program;
use keelway_tests::lists::{ListServer, services};
use keelway_tests::process::eventually;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub struct Server {
    pub child: Child,
    pub address: SocketAddr,
    pub health: SocketAddr,
}

pub fn free_port() -> SocketAddr {
    loop {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let address = socket.local_addr().expect("an address");
        // The server answers by TCP there, too, where some connection may be.
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

impl Server {
    pub fn start(kubeconfig: &Path, arguments: &[&str]) -> Self {
        Self::start_at(&free_port().to_string(), kubeconfig, arguments)
    }

    pub fn start_at(listen: &str, kubeconfig: &Path, arguments: &[&str]) -> Self {
        let (address, health) = (listen.parse().expect("an address"), free_port());
        let child = Command::new(program("keelway-dns"))
            .arg("serve")
            .arg("--kubeconfig")
            .arg(kubeconfig)
            // Unless a test says otherwise: an agent of this machine knows another cluster.
            .args(if arguments.contains(&"--agent") {
                &[][..]
            } else {
                &["--agent", ""]
            })
            .args(["--listen", listen, "--health", &health.to_string()])
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

    pub fn http(&self, path: &str) -> Result<String, String> {
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

    pub fn wait_ready(&self) {
        eventually("a server that is ready", Duration::from_secs(60), || {
            self.http("/readyz")
        });
    }

    pub fn memory_most_mb(&self) -> f64 {
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

    pub fn signal(&self, signal: Signal) {
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

pub fn question(id: u16, name: &str) -> Vec<u8> {
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
pub fn ask(server: SocketAddr, name: &str) -> Option<(u8, u8)> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).ok()?;
    socket.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    socket.connect(server).ok()?;
    socket.send(&question(7, name)).ok()?;
    let mut reply = [0; 1500];
    let bytes = socket.recv(&mut reply).ok()?;
    // Until the server is there, the kernel may give us its port: then we hear our own question.
    let answers = bytes > 12 && reply[..2] == [0, 7] && reply[2] & 0x80 != 0;
    answers.then(|| (reply[3] & 15, reply[7]))
}

/// A message as TCP carries it: behind two bytes with its length.
pub fn framed(wire: &[u8]) -> Vec<u8> {
    [&(wire.len() as u16).to_be_bytes()[..], wire].concat()
}

/// As [`ask`], over a connection of its own.
pub fn ask_by_tcp(server: SocketAddr, name: &str) -> Option<(u8, u8)> {
    let mut stream = TcpStream::connect(server).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    stream.write_all(&framed(&question(7, name))).ok()?;
    let mut reply = [0; 14];
    stream.read_exact(&mut reply).ok()?;
    Some((reply[5] & 15, reply[9]))
}

pub const NOERROR: u8 = 0;
pub const SERVFAIL: u8 = 2;
pub const NXDOMAIN: u8 = 3;

pub fn service_name(i: usize) -> String {
    format!("svc-{i}.ns-{}.svc.cluster.local", i % 50)
}

/// Clients that ask for existing names until they are told to stop, and what they were told.
pub struct Clients {
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<Counts>>,
}

#[derive(Debug, Default)]
pub struct Counts {
    pub good: usize,
    pub servfail: usize,
    pub denied: usize,
    pub unanswered: usize,
    /// The longest that an answer took.
    pub slowest: Duration,
}

impl Clients {
    pub fn start(
        count: usize,
        services: usize,
        server: impl Fn() -> SocketAddr + Send + Clone + 'static,
    ) -> Self {
        Self::start_with(count, services, ask, server)
    }

    pub fn start_with(
        count: usize,
        services: usize,
        ask: fn(SocketAddr, &str) -> Option<(u8, u8)>,
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
                    let begun = Instant::now();
                    match ask(server(), &service_name(i)) {
                        Some((NOERROR, 1..)) => counts.good += 1,
                        Some((SERVFAIL, _)) => counts.servfail += 1,
                        Some(_) => counts.denied += 1,
                        None => counts.unanswered += 1,
                    }
                    counts.slowest = counts.slowest.max(begun.elapsed());
                }
                counts
            })
        };
        let threads = (0..count).map(client).collect();
        Self { stop, threads }
    }

    pub fn finish(self) -> Counts {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Counts::default();
        for thread in self.threads {
            let one = thread.join().expect("a client");
            all.good += one.good;
            all.servfail += one.servfail;
            all.denied += one.denied;
            all.unanswered += one.unanswered;
            all.slowest = all.slowest.max(one.slowest);
        }
        all
    }
}

pub fn api(services_count: usize, endpoints: usize) -> (ListServer, tempfile::TempDir, PathBuf) {
    let api = ListServer::start().expect("a free port");
    let [listed, slices] = services(services_count, endpoints);
    api.set("services", listed);
    api.set("endpointslices", slices);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let kubeconfig = api.kubeconfig(folder.path()).expect("a kubeconfig");
    (api, folder, kubeconfig)
}
