//! etcd servers of a test, on the loopback. They end with it, however it ends.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
};

use super::*;

/// Ports are free when they are chosen, and may be another's when they are used.
const PORT_TRIES: usize = 5;

pub struct Server {
    child: Child,
    flags: Vec<String>,
    endpoint: String,
    tls: Option<(PathBuf, PathBuf, PathBuf)>,
    _folder: tempfile::TempDir,
}

pub fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.local_addr().expect("an address").port()
}

impl Server {
    pub fn start() -> Self {
        Self::start_with(None)
    }

    /// An etcd of one member, ready to serve.
    pub fn start_with(tls: Option<&Tls>) -> Self {
        for _ in 0..PORT_TRIES {
            let peer = free_port();
            let cluster = format!("m=http://127.0.0.1:{peer}");
            let mut server = Self::member("m", peer, &cluster, tls);
            if server.wait_ready() {
                return server;
            }
        }
        panic!("etcd does not start {PORT_TRIES} times in a row");
    }

    /// One member of a cluster. It is ready when enough of the others are.
    pub fn member(name: &str, peer: u16, cluster: &str, tls: Option<&Tls>) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let scheme = if tls.is_some() { "https" } else { "http" };
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
        if let Some(tls) = tls {
            flags.extend([
                "--client-cert-auth".to_owned(),
                format!("--trusted-ca-file={}", tls.path("ca.crt").display()),
                format!("--cert-file={}", tls.path("server.crt").display()),
                format!("--key-file={}", tls.path("server.key").display()),
            ]);
        }
        Self {
            child: spawn(&flags),
            flags,
            endpoint,
            tls: tls.map(|tls| {
                let of = |name: &str| tls.path(name);
                (of("ca.crt"), of("client.crt"), of("client.key"))
            }),
            _folder: folder,
        }
    }

    /// Waits until it says that it serves; false when it ended instead.
    pub fn wait_ready(&mut self) -> bool {
        let Some(log) = self.child.stderr.take() else {
            return true;
        };
        let mut lines = BufReader::new(log).lines().map_while(Result::ok);
        let ready = lines.any(|line| line.contains("ready to serve client requests"));
        drain(lines);
        ready
    }

    pub fn config(&self) -> EtcdConfig {
        let mut config = EtcdConfig::at(vec![self.endpoint.clone()]);
        if let Some((ca, certificate, key)) = self.tls.clone() {
            config.ca_file = Some(ca);
            config.identity_files = Some((certificate, key));
        }
        config
    }

    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub async fn connect(&self) -> Etcd {
        Etcd::connect(&self.config()).await.expect("etcd answers")
    }

    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// On the same data and addresses.
    pub fn restart(&mut self) {
        self.kill();
        self.child = spawn(&self.flags);
        assert!(self.wait_ready(), "etcd starts again");
    }

    /// Stops it where it is, or lets it go on.
    pub fn pause(&self, paused: bool) {
        let signal = if paused { "-STOP" } else { "-CONT" };
        let sent = Command::new("kill")
            .args([signal, &self.child.id().to_string()])
            .status();
        assert!(sent.is_ok_and(|status| status.success()));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
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

/// Reads the rest of a log, so that its writer never waits.
fn drain(lines: impl Iterator<Item = String> + Send + 'static) {
    std::thread::spawn(move || lines.for_each(drop));
}

/// A certificate authority with a certificate of the server and one of the client.
pub struct Tls {
    folder: tempfile::TempDir,
}

impl Tls {
    pub fn make() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::self_signed(authority, key).expect("an authority");
        let write = |name: &str, text: String| {
            std::fs::write(folder.path().join(name), text).expect("the folder takes files");
        };
        write("ca.crt", issuer.pem());
        let uses = [
            ("server", ExtendedKeyUsagePurpose::ServerAuth),
            ("client", ExtendedKeyUsagePurpose::ClientAuth),
        ];
        for (name, usage) in uses {
            let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("a name");
            params.extended_key_usages = vec![usage];
            let key = KeyPair::generate().expect("a key");
            let certificate = params.signed_by(&key, &issuer).expect("a certificate");
            write(&format!("{name}.crt"), certificate.pem());
            write(&format!("{name}.key"), key.serialize_pem());
        }
        Self { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}
