//! The servers that are measured: ours and CoreDNS, started here on CPUs of their own, or any other by its address and process.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

pub const KEELWAY: &str = "keelway";
pub const COREDNS: &str = "coredns";
pub const GIVEN: &str = "given";

pub struct Subject {
    pub name: &'static str,
    pub address: SocketAddr,
    pid: Option<u32>,
    child: Option<Child>,
}

/// Longest wait for a server to know the cluster.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a server is to serve.
pub struct Surroundings<'a> {
    pub api: SocketAddr,
    pub upstream: SocketAddr,
    /// For configurations; one that has a kubeconfig in it.
    pub folder: &'a Path,
    pub kubeconfig: &'a Path,
}

fn free_port() -> std::io::Result<SocketAddr> {
    UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()
}

/// A program that is to run on some CPUs only; taskset becomes the program.
fn on(cpus: &[usize], program: &Path) -> Command {
    let list: Vec<String> = cpus.iter().map(ToString::to_string).collect();
    let mut command = Command::new("taskset");
    command.args(["--cpu-list", &list.join(",")]).arg(program);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

impl Subject {
    /// A server that someone else has started.
    pub fn given(address: SocketAddr, pid: Option<u32>) -> Self {
        Self {
            name: GIVEN,
            address,
            pid,
            child: None,
        }
    }

    /// Starts ours on some CPUs, with a thread for each.
    pub fn ours(program: &Path, around: &Surroundings<'_>, cpus: &[usize]) -> Result<Self> {
        let address = free_port()?;
        let child = on(cpus, program)
            .arg("serve")
            .arg("--kubeconfig")
            .arg(around.kubeconfig)
            .args(["--listen", &address.to_string(), "--health", "127.0.0.1:0"])
            // An agent of this machine knows another cluster.
            .args(["--agent", "", "--upstream", &around.upstream.to_string()])
            .args(["--threads", &cpus.len().to_string()])
            .env("RUST_LOG", "warn")
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        Ok(Self::started(KEELWAY, address, child))
    }

    /// Starts CoreDNS on some CPUs, with the plugins that kubeadm gives it and that matter here.
    pub fn coredns(program: &Path, around: &Surroundings<'_>, cpus: &[usize]) -> Result<Self> {
        let address = free_port()?;
        let corefile = around.folder.join("Corefile");
        let text = format!(
            ".:{} {{\n bind {}\n errors\n kubernetes cluster.local in-addr.arpa ip6.arpa {{\n  endpoint http://{}\n  \
             fallthrough in-addr.arpa ip6.arpa\n }}\n forward . {}\n cache 30\n loadbalance\n}}\n",
            address.port(),
            address.ip(),
            around.api,
            around.upstream
        );
        fs::write(&corefile, text)?;
        let child = on(cpus, program)
            .arg("-quiet")
            .arg("-conf")
            .arg(&corefile)
            .env("GOMAXPROCS", cpus.len().to_string())
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        Ok(Self::started(COREDNS, address, child))
    }

    fn started(name: &'static str, address: SocketAddr, child: Child) -> Self {
        Self {
            name,
            address,
            pid: Some(child.id()),
            child: Some(child),
        }
    }

    /// Waits until a question gets a good answer.
    pub fn wait(&mut self, question: &[u8]) -> Result<Duration> {
        let begun = Instant::now();
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        socket.connect(self.address)?;
        let mut reply = [0; 1232];
        while begun.elapsed() < PATIENCE {
            if let Some(child) = &mut self.child
                && let Some(status) = child.try_wait()?
            {
                bail!("{} has ended: {status}", self.name);
            }
            // Refused, as long as nobody listens.
            let _ = socket.send(question);
            match socket.recv(&mut reply) {
                Ok(12..) if reply[3] & 15 == 0 => return Ok(begun.elapsed()),
                _ => std::thread::sleep(Duration::from_millis(10)),
            }
        }
        bail!("{} has no good answer within {PATIENCE:?}", self.address)
    }

    /// CPU time that the server has used; `None` when its process is not known.
    pub fn cpu(&self) -> Option<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid?)).ok()?;
        let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
        let ticks: u64 =
            fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
        let hertz = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
        Some(Duration::from_secs_f64(ticks as f64 / hertz as f64))
    }

    /// Its memory once that has not changed for as long as a server may take to let go of what its lists needed.
    pub fn settled_memory(&self) -> Option<[f64; 2]> {
        const STILL: Duration = Duration::from_secs(4);
        const PATIENCE: Duration = Duration::from_secs(15);
        let begun = Instant::now();
        let (mut last, mut since) = (self.memory()?, begun);
        while since.elapsed() < STILL && begun.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(100));
            let now = self.memory()?;
            if now != last {
                (last, since) = (now, Instant::now());
            }
        }
        Some(last)
    }

    /// Memory that the server holds (its resident pages, those of its program file included), and the most that it has held, in bytes.
    pub fn memory(&self) -> Option<[f64; 2]> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid?)).ok()?;
        let bytes = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key))?;
            let kilobytes = line.split_whitespace().next()?.parse::<f64>().ok()?;
            Some(kilobytes * 1024.0)
        };
        Some([bytes("VmRSS:")?, bytes("VmHWM:")?])
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
