//! A real etcd for tests of the store and of the API server, on the loopback. It ends with its test, however that ends.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

/// Ports are free when they are chosen, and may be another's when they are used.
const PORT_TRIES: usize = 5;

/// A member of an etcd cluster.
pub struct Etcd {
    pub child: Child,
    flags: Vec<String>,
    endpoint: String,
    folder: tempfile::TempDir,
}

impl Etcd {
    /// An etcd of one member, ready to serve by `http` or `https`; `more` are flags.
    pub fn start(scheme: &str, more: &[String]) -> Self {
        for _ in 0..PORT_TRIES {
            let peer = free_port();
            let cluster = format!("m=http://127.0.0.1:{peer}");
            let mut etcd = Self::member("m", peer, &cluster, scheme, more);
            if etcd.wait_ready() {
                return etcd;
            }
        }
        panic!("etcd does not start {PORT_TRIES} times in a row");
    }

    /// One member of a cluster. It is ready when enough of the others are.
    pub fn member(name: &str, peer: u16, cluster: &str, scheme: &str, more: &[String]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let endpoint = format!("{scheme}://127.0.0.1:{}", free_port());
        let peer = format!("http://127.0.0.1:{peer}");
        let data = folder.path().join("data").display().to_string();
        let mut flags: Vec<String> = [
            ("name", name),
            ("data-dir", &data),
            ("listen-client-urls", &endpoint),
            ("advertise-client-urls", &endpoint),
            ("listen-peer-urls", &peer),
            ("initial-advertise-peer-urls", &peer),
            ("initial-cluster", cluster),
        ]
        .iter()
        .map(|(flag, value)| format!("--{flag}={value}"))
        .collect();
        flags.extend_from_slice(more);
        Self {
            child: spawn(&flags),
            flags,
            endpoint,
            folder,
        }
    }

    /// Waits until it says that it serves; false when it ended instead.
    pub fn wait_ready(&mut self) -> bool {
        let Some(log) = self.child.stderr.take() else {
            return true;
        };
        let mut lines = BufReader::new(log).lines().map_while(Result::ok);
        let ready = lines.any(|line| line.contains("ready to serve client requests"));
        // The rest is read as well, so that its writer never waits.
        std::thread::spawn(move || lines.for_each(drop));
        ready
    }

    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Stops it, and keeps its data as they are; the name is for [`Etcd::put_back`].
    pub fn keep(&mut self, name: &str) {
        self.kill();
        self.copy("data", name);
    }

    /// Stops it, and puts its data back to what they were.
    pub fn put_back(&mut self, name: &str) {
        self.kill();
        std::fs::remove_dir_all(self.folder.path().join("data")).expect("its data");
        self.copy(name, "data");
    }

    fn copy(&self, from: &str, to: &str) {
        let [from, to] = [from, to].map(|name| self.folder.path().join(name));
        let copied = Command::new("cp").arg("-a").args([from, to]).status();
        assert!(copied.is_ok_and(|status| status.success()));
    }

    /// On the same data and addresses.
    pub fn restart(&mut self) {
        self.kill();
        self.child = spawn(&self.flags);
        assert!(self.wait_ready(), "etcd starts again");
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

pub fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.local_addr().expect("an address").port()
}

/// `setpriv` makes it end with the thread that runs the test.
fn spawn(flags: &[String]) -> Child {
    Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "etcd"])
        .args(flags)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("setpriv and etcd are installed: `cargo xtask setup` sees to it")
}
