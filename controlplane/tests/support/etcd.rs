//! A real etcd for a test, on the loopback. It ends with it, however it ends.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

/// Ports are free when they are chosen, and may be another's when they are used.
const PORT_TRIES: usize = 5;

pub struct Etcd {
    child: Child,
    ports: [u16; 2],
    folder: tempfile::TempDir,
}

impl Etcd {
    pub fn start() -> Self {
        for _ in 0..PORT_TRIES {
            let folder = tempfile::tempdir().expect("a temporary directory");
            let ports = [(); 2].map(|()| {
                let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
                listener.local_addr().expect("an address").port()
            });
            let path = folder.path().display().to_string();
            if let Some(child) = spawn(&path, ports) {
                return Self {
                    child,
                    ports,
                    folder,
                };
            }
        }
        panic!("etcd does not start {PORT_TRIES} times in a row");
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports[0])
    }

    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// On the same data and addresses.
    pub fn restart(&mut self) {
        self.kill();
        let path = self.folder.path().display().to_string();
        self.child = spawn(&path, self.ports).expect("etcd starts again");
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Waits until it says that it serves; None when it ended instead. `setpriv` makes it end with the test's thread.
fn spawn(folder: &str, [clients, peers]: [u16; 2]) -> Option<Child> {
    let clients = format!("http://127.0.0.1:{clients}");
    let peers = format!("http://127.0.0.1:{peers}");
    let flags = [
        ("data-dir", format!("{folder}/data")),
        ("listen-client-urls", clients.clone()),
        ("advertise-client-urls", clients),
        ("listen-peer-urls", peers.clone()),
        ("initial-advertise-peer-urls", peers.clone()),
        ("initial-cluster", format!("default={peers}")),
    ];
    let mut child = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "etcd"])
        .args(flags.map(|(flag, value)| format!("--{flag}={value}")))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("setpriv and etcd are installed: `cargo xtask setup` sees to it");
    let log = child.stderr.take().expect("its log");
    let mut lines = BufReader::new(log).lines().map_while(Result::ok);
    let ready = lines.any(|line| line.contains("ready to serve client requests"));
    // Its writer never waits.
    std::thread::spawn(move || lines.for_each(drop));
    ready.then_some(child)
}
