//! A control plane of its own per test: the real binary on loopback, with credentials made for it and a state directory
//! that goes away with it.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use serde_json::Value;

use crate::etcd::Etcd;

/// How long the server may take to be ready, and a kubectl command to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running server with the means to talk to it.
pub struct Server {
    dir: tempfile::TempDir,
    port: u16,
    components: &'static str,
    /// The flags that say where its state is.
    state: Vec<String>,
    /// What runs it: a program and its arguments, or nothing.
    inside: Vec<String>,
    process: Mutex<Option<Child>>,
}

impl Server {
    /// Starts the API server alone.
    pub fn start() -> Self {
        Self::start_with("api")
    }

    pub fn start_with(components: &'static str) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let state = format!("--data-dir={}", dir.path().join("data").display());
        Self::start_in(dir, components, vec![state])
    }

    /// Starts the API server alone, on an etcd.
    pub fn start_on(etcd: &Etcd) -> Self {
        Self::start_with_on("api", etcd)
    }

    pub fn start_with_on(components: &'static str, etcd: &Etcd) -> Self {
        let state = format!("--store=etcd:{}", etcd.endpoint());
        Self::start_flagged(components, vec![state])
    }

    /// Starts it with flags of the caller's, which say where its state is.
    pub fn start_flagged(components: &'static str, flags: Vec<String>) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        Self::start_in(dir, components, flags)
    }

    /// Starts it by another program, which runs it in namespaces of its own.
    pub fn start_inside(components: &'static str, flags: Vec<String>, inside: Vec<String>) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        Self::make_in(dir, components, flags, inside)
    }

    /// Starts the API server alone, with flags that name files of its credentials.
    pub fn start_told(flags: impl FnOnce(&Path) -> Vec<String>) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut state = vec![format!("--data-dir={}", dir.path().join("data").display())];
        state.extend(flags(dir.path()));
        Self::start_in(dir, "api", state)
    }

    /// Starts the killed server again, on another state.
    pub fn relaunch_on(&mut self, flags: Vec<String>) {
        self.state = flags;
        self.launch();
    }

    /// One more server on the state of this one, with the same credentials.
    pub fn beside(&self, components: &'static str) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (ours, port) = (self.url(), free_port());
        let theirs = format!("https://127.0.0.1:{port}");
        let folders = [&self.dir, &dir].map(|dir| dir.path().display().to_string());
        for file in std::fs::read_dir(self.dir.path()).expect("the credentials") {
            let file = file.expect("a file").path();
            if file.is_file() {
                let name = file.file_name().expect("a name");
                let text = std::fs::read_to_string(&file).expect("text");
                let text = text.replace(&ours, &theirs);
                let text = text.replace(&folders[0], &folders[1]);
                std::fs::write(dir.path().join(name), text)
                    .expect("a file in a temporary directory");
            }
        }
        let server = Self {
            dir,
            port,
            components,
            state: self.state.clone(),
            inside: self.inside.clone(),
            process: Mutex::new(None),
        };
        server.launch();
        server
    }

    /// The server's name among several.
    pub fn identity(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    fn start_in(dir: tempfile::TempDir, components: &'static str, state: Vec<String>) -> Self {
        Self::make_in(dir, components, state, Vec::new())
    }

    fn make_in(
        dir: tempfile::TempDir,
        components: &'static str,
        state: Vec<String>,
        inside: Vec<String>,
    ) -> Self {
        let port = free_port();
        write_credentials(dir.path(), port);
        let server = Self {
            dir,
            port,
            components,
            state,
            inside,
            process: Mutex::new(None),
        };
        server.launch();
        server
    }

    /// The process as it is to be started. It ends with the test's thread, however that ends.
    fn command(&self) -> Command {
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL"])
            .args(&self.inside)
            .arg(env!("CARGO_BIN_EXE_keelway-controlplane"))
            .args([
                "--advertise-address",
                "127.0.0.1",
                "--components",
                self.components,
            ])
            .arg("--bind")
            .arg(format!("127.0.0.1:{}", self.port))
            .args(&self.state)
            .args(["--authorization", "rules"])
            .arg("--pki-dir")
            .arg(self.dir.path())
            .env_remove("LISTEN_FDS")
            .env("RUST_LOG", "info")
            .stderr(Stdio::piped());
        command
    }

    /// What it says when it ends instead of listening.
    pub fn refuses_to_start(&self) -> String {
        let ended = self.command().output().expect("the control plane starts");
        let said = text(&ended.stderr);
        assert!(!ended.status.success(), "{said}");
        said
    }

    /// Starts the process and waits until it says that it listens.
    pub fn launch(&self) {
        let child = self.command().spawn();
        let mut child = child.expect("the control plane starts");
        let stderr = child.stderr.take().expect("its log");
        let (said, heard) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                eprintln!("server: {line}");
                if line.contains("the API server listens") {
                    let _ = said.send(());
                }
            }
        });
        *self.process.lock().expect("process") = Some(child);
        heard
            .recv_timeout(PATIENCE)
            .expect("the API server listens");
    }

    /// Ends the process the hard way.
    pub fn kill(&self) {
        if let Some(mut child) = self.process.lock().expect("process").take() {
            child.kill().expect("kill -9");
            child.wait().expect("it is gone");
        }
    }

    /// Asks the process to stop, and returns whether it ended well and how long it took.
    pub fn terminate(&self) -> (bool, Duration) {
        let mut child = self
            .process
            .lock()
            .expect("process")
            .take()
            .expect("a running server");
        let asked = Instant::now();
        let pid = child.id().to_string();
        assert!(
            Command::new("kill")
                .args(["-TERM", &pid])
                .status()
                .expect("kill")
                .success()
        );
        let status = child.wait().expect("it ends");
        (status.success(), asked.elapsed())
    }

    /// How often its threads of a name have gone to sleep. One that has nothing to do is not woken.
    pub fn sleeps_of(&self, threads: &str) -> u64 {
        let process = self.process.lock().expect("process");
        let pid = process.as_ref().expect("a running server").id();
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("its threads");
        let sleeps = tasks.filter_map(|task| {
            let read =
                |file: &str| std::fs::read_to_string(task.as_ref().ok()?.path().join(file)).ok();
            let is_of = read("comm")?.trim_end() == threads;
            let status = read("status").filter(|_| is_of)?;
            let mut lines = status.lines();
            let count = lines.find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            Some(count?.trim().parse::<u64>().expect("a number"))
        });
        let sleeps: Vec<u64> = sleeps.collect();
        assert!(!sleeps.is_empty(), "there is no thread {threads}");
        sleeps.iter().sum()
    }

    /// Waits until the process ends by itself, and returns whether that was as it should be.
    pub fn ended(&self) -> bool {
        let child = self.process.lock().expect("process").take();
        let mut child = child.expect("a running server");
        child.wait().expect("it ends").success()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn url(&self) -> String {
        format!("https://{}", self.address())
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Runs kubectl (or what `KUBECTL` names) as the administrator, with some text as its input.
    pub fn kubectl_with(&self, arguments: &[&str], input: &str) -> Output {
        self.kubectl_as("admin", arguments, input)
    }

    /// Runs kubectl as a user.
    pub fn kubectl_as(&self, user: &str, arguments: &[&str], input: &str) -> Output {
        use std::io::Write;
        let program = std::env::var("KUBECTL").unwrap_or("kubectl".to_owned());
        let mut child = Command::new("timeout")
            .arg(PATIENCE.as_secs().to_string())
            .arg(&program)
            .arg("--kubeconfig")
            .arg(self.path(&format!("{user}.kubeconfig")))
            .args(arguments)
            .env("HOME", self.dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{program} starts: {error}"));
        // A command that reads nothing may be gone by now.
        let _ = child
            .stdin
            .take()
            .expect("its input")
            .write_all(input.as_bytes());
        child.wait_with_output().expect("kubectl ends")
    }

    /// The output of a kubectl command that must succeed.
    pub fn kubectl(&self, arguments: &str) -> String {
        self.kubectl_in(arguments, "")
    }

    pub fn kubectl_in(&self, arguments: &str, input: &str) -> String {
        let words: Vec<&str> = arguments.split_whitespace().collect();
        let output = self.kubectl_with(&words, input);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(
            output.status.success(),
            "kubectl {arguments} failed:\n{out}{err}"
        );
        out
    }

    /// The complaint of a kubectl command that must fail.
    pub fn kubectl_fails(&self, arguments: &str, input: &str) -> String {
        let words: Vec<&str> = arguments.split_whitespace().collect();
        let output = self.kubectl_with(&words, input);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(
            !output.status.success(),
            "kubectl {arguments} should have failed, but said:\n{out}"
        );
        err
    }

    /// An object as JSON.
    pub fn object(&self, arguments: &str) -> Value {
        let text = self.kubectl(&format!("get {arguments} -o json --show-managed-fields"));
        serde_json::from_str(&text).expect("kubectl prints JSON")
    }

    /// The status code and body of a GET, without a client that tries again.
    pub fn raw(&self, path: &str) -> (u16, Value) {
        let file = |name: &str| self.path(name).display().to_string();
        let output = Command::new("curl")
            .args(["--silent", "--show-error", "--write-out", "\n%{http_code}"])
            .args([
                "--cacert",
                &file("ca.crt"),
                "--cert",
                &file("admin.crt"),
                "--key",
                &file("admin.key"),
            ])
            .arg(format!("{}{path}", self.url()))
            .output()
            .expect("curl");
        let said = text(&output.stdout);
        let (body, code) = said.rsplit_once('\n').expect("a body and a code");
        (
            code.parse().expect("a code"),
            serde_json::from_str(body).expect("JSON"),
        )
    }

    /// The status code, content type and body of a request as curl makes it from arguments, without a client that helps.
    pub fn curl(&self, arguments: &[&str], path: &str) -> (u16, String, Vec<u8>) {
        self.curl_as("admin", arguments, path)
    }

    /// As `curl`, with the certificate of another user; "" shows none. Code 0 is a refused connection.
    pub fn curl_as(&self, user: &str, arguments: &[&str], path: &str) -> (u16, String, Vec<u8>) {
        let file = |name: &str| self.path(name).display().to_string();
        let credentials = [format!("{user}.crt"), format!("{user}.key")].map(|name| file(&name));
        let credentials = ["--cert", &credentials[0], "--key", &credentials[1]];
        let credentials = if user.is_empty() {
            &[][..]
        } else {
            &credentials[..]
        };
        let body = tempfile::NamedTempFile::new().expect("a file for the body");
        let output = Command::new("curl")
            .args(["--silent", "--show-error"])
            .args(["--write-out", "%{http_code} %{content_type}", "--output"])
            .arg(body.path())
            .args(["--cacert", &file("ca.crt")])
            .args(credentials)
            .args(arguments)
            .arg(format!("{}{path}", self.url()))
            .output()
            .expect("curl");
        let said = text(&output.stdout);
        let (code, content_type) = said.split_once(' ').expect("a code and a content type");
        (
            code.parse().expect("a code"),
            content_type.to_owned(),
            std::fs::read(body.path()).expect("the body"),
        )
    }

    /// A kube-rs client of the administrator.
    pub async fn client(&self) -> kube::Client {
        kube::Client::try_from(self.config().await).expect("a client")
    }

    /// What a client of the administrator is made of.
    pub async fn config(&self) -> kube::Config {
        let kubeconfig = kube::config::Kubeconfig::read_from(self.path("admin.kubeconfig"))
            .expect("a kubeconfig");
        let options = kube::config::KubeConfigOptions::default();
        kube::Config::from_custom_kubeconfig(kubeconfig, &options)
            .await
            .expect("a client's configuration")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Bound and freed again: the server takes it a moment later.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|l| l.local_addr())
        .expect("a free port")
        .port()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn named(name: &str, organization: Option<&str>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    if let Some(organization) = organization {
        params
            .distinguished_name
            .push(DnType::OrganizationName, organization);
    }
    params
}

/// A certificate for the loopback, and its key, both PEM.
pub fn signed(
    mut params: CertificateParams,
    usage: ExtendedKeyUsagePurpose,
    issuer: &Issuer<'_, KeyPair>,
) -> [String; 2] {
    let key = KeyPair::generate().expect("a key");
    params.extended_key_usages = vec![usage];
    let loopback = SanType::IpAddress(std::net::Ipv4Addr::LOCALHOST.into());
    params.subject_alt_names.push(loopback);
    let signed = params.signed_by(&key, issuer).expect("a certificate");
    [signed.pem(), key.serialize_pem()]
}

/// What `keelway up` makes for a real cluster, as far as the API server needs it.
fn write_credentials(dir: &Path, port: u16) {
    let write = |name: &str, text: String| {
        std::fs::write(dir.join(name), text).expect("a file in a temporary directory")
    };
    let ca_key = KeyPair::generate().expect("a key");
    let mut ca = named("test-ca", None);
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    write("ca.crt", ca.self_signed(&ca_key).expect("a CA").pem());
    let issuer = Issuer::new(ca, ca_key);
    let leaf = |file: &str, params: CertificateParams, usage: ExtendedKeyUsagePurpose| {
        let [certificate, key] = signed(params, usage, &issuer);
        write(&format!("{file}.crt"), certificate);
        write(&format!("{file}.key"), key);
    };
    leaf(
        "apiserver",
        named("kube-apiserver", None),
        ExtendedKeyUsagePurpose::ServerAuth,
    );
    leaf(
        "kubelet",
        named("kubelet", None),
        ExtendedKeyUsagePurpose::ServerAuth,
    );
    let (masters, nodes) = (Some("system:masters"), Some("system:nodes"));
    for (file, name, organization) in [
        (
            "apiserver-kubelet-client",
            "kube-apiserver-kubelet-client",
            None,
        ),
        ("admin", "admin", masters),
        ("controllers", "system:keelway-controllers", None),
        ("scheduler", "system:kube-scheduler", None),
        ("controller-manager", "system:kube-controller-manager", None),
        ("node-1", "system:node:node-1", nodes),
        ("node-2", "system:node:node-2", nodes),
        ("jane", "jane", Some("team")),
        ("posing", "front-proxy", masters),
    ] {
        leaf(
            file,
            named(name, organization),
            ExtendedKeyUsagePurpose::ClientAuth,
        );
    }
    let mut expired = named("admin", masters);
    expired.not_before = rcgen::date_time_ymd(2020, 1, 1);
    expired.not_after = rcgen::date_time_ymd(2021, 1, 1);
    leaf("expired", expired, ExtendedKeyUsagePurpose::ClientAuth);
    // Of an authority for proxies alone.
    let proxy_key = KeyPair::generate().expect("a key");
    let mut proxy_ca = named("proxy-ca", None);
    proxy_ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let signed = proxy_ca.self_signed(&proxy_key).expect("a CA");
    write("proxy-ca.crt", signed.pem());
    let proxies = Issuer::new(proxy_ca, proxy_key);
    for name in ["front-proxy", "other-proxy"] {
        let key = KeyPair::generate().expect("a key");
        let mut proxy = named(name, masters);
        proxy.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let proxy = proxy.signed_by(&key, &proxies).expect("a certificate");
        write(&format!("{name}.crt"), proxy.pem());
        write(&format!("{name}.key"), key.serialize_pem());
    }
    // Of an authority with the same name, that nobody here trusts.
    let other_key = KeyPair::generate().expect("a key");
    let mut other = named("test-ca", None);
    other.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let other = Issuer::new(other, other_key);
    let key = KeyPair::generate().expect("a key");
    let mut stranger = named("admin", masters);
    stranger.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let stranger = stranger.signed_by(&key, &other).expect("a certificate");
    write("stranger.crt", stranger.pem());
    write("stranger.key", key.serialize_pem());
    let tokens = KeyPair::generate().expect("a key");
    write("sa.key", tokens.serialize_pem());
    write("sa.pub", tokens.public_key_pem());
    for user in [
        "admin",
        "controllers",
        "controller-manager",
        "scheduler",
        "jane",
    ] {
        let path = |name: &str| dir.join(name).display().to_string();
        let kubeconfig = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": format!("https://127.0.0.1:{port}"),
                "certificate-authority": path("ca.crt")}}],
            "users": [{"name": "test", "user": {"client-certificate": path(&format!("{user}.crt")), "client-key": path(&format!("{user}.key"))}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        });
        write(&format!("{user}.kubeconfig"), kubeconfig.to_string());
    }
}
