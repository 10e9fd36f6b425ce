//! The server that is measured: ours, started here on CPUs of its own, or any other by its address and process.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

pub struct Subject {
    pub address: SocketAddr,
    pid: Option<u32>,
    child: Option<Child>,
}

/// Longest wait for a server to know the cluster.
const PATIENCE: Duration = Duration::from_secs(120);

impl Subject {
    /// A server that someone else has started.
    pub fn given(address: SocketAddr, pid: Option<u32>) -> Self {
        Self {
            address,
            pid,
            child: None,
        }
    }

    /// Starts ours on some CPUs, with a thread for each.
    pub fn start(
        program: &Path,
        kubeconfig: &Path,
        upstream: SocketAddr,
        cpus: &[usize],
    ) -> Result<Self> {
        let address = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let list: Vec<String> = cpus.iter().map(ToString::to_string).collect();
        let child = Command::new("taskset")
            .args(["--cpu-list", &list.join(",")])
            .arg(program)
            .arg("serve")
            .arg("--kubeconfig")
            .arg(kubeconfig)
            .args(["--listen", &address.to_string(), "--health", "127.0.0.1:0"])
            // An agent of this machine knows another cluster.
            .args(["--agent", "", "--upstream", &upstream.to_string()])
            .args(["--threads", &cpus.len().to_string()])
            .env("RUST_LOG", "warn")
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        // taskset becomes the server.
        Ok(Self {
            address,
            pid: Some(child.id()),
            child: Some(child),
        })
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
                bail!("the server has ended: {status}");
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

    /// Memory that the server holds, and the most that it has held, in MB.
    pub fn memory_mb(&self) -> Option<[f64; 2]> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid?)).ok()?;
        let kilobytes = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key))?;
            line.split_whitespace().next()?.parse::<f64>().ok()
        };
        Some([kilobytes("VmRSS:")? / 1000.0, kilobytes("VmHWM:")? / 1000.0])
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
