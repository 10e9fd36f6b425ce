//! The machine that figures are from: figures of two machines, or of a busy and a quiet one, are not compared.

use std::fs;
use std::io;

use serde::{Deserialize, Serialize};

/// What of a machine its figures depend on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Machine {
    pub kernel: String,
    pub cpu: String,
    pub cpus: usize,
    pub memory_mb: u64,
    /// Under a hypervisor: waking another CPU costs an exit to it.
    pub is_virtual: bool,
    /// Processes that wanted a CPU during the minute before the run; a quiet machine has less than 0.2.
    pub load_before: f64,
}

impl Machine {
    /// One that is nobody's, for tests of what is said about runs.
    #[cfg(test)]
    pub fn of_nobody() -> Self {
        Self {
            kernel: String::new(),
            cpu: String::new(),
            cpus: 2,
            memory_mb: 0,
            is_virtual: false,
            load_before: 0.0,
        }
    }

    pub fn describe() -> io::Result<Self> {
        let info = fs::read_to_string("/proc/cpuinfo")?;
        let field = |name: &str| {
            let line = info.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_once(':'))
                .map_or("unknown", |(_, value)| value.trim())
        };
        let memory = fs::read_to_string("/proc/meminfo")?;
        let total_kb = memory.split_whitespace().nth(1);
        let load = fs::read_to_string("/proc/loadavg")?;
        Ok(Self {
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
                .trim()
                .to_owned(),
            cpu: field("model name").to_owned(),
            cpus: std::thread::available_parallelism()?.get(),
            memory_mb: total_kb
                .and_then(|kb| kb.parse::<u64>().ok())
                .unwrap_or_default()
                / 1024,
            is_virtual: field("flags").contains("hypervisor"),
            load_before: load
                .split_whitespace()
                .next()
                .and_then(|minute| minute.parse().ok())
                .unwrap_or_default(),
        })
    }

    /// Whether absolute figures of both may be compared.
    pub fn is_like(&self, other: &Self) -> bool {
        let key = |machine: &Self| (machine.kernel.clone(), machine.cpu.clone(), machine.cpus);
        key(self) == key(other)
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Linux {}, {} x {}{}, {} MB, load {:.2} before the run",
            self.kernel,
            self.cpus,
            self.cpu,
            if self.is_virtual { " (virtual)" } else { "" },
            self.memory_mb,
            self.load_before
        )
    }
}
