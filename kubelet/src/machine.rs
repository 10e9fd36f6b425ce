//! machine: facts about the node that do not change while it runs.

use std::fs;

use k8s_openapi::api::core::v1::NodeSystemInfo;

/// What the node has.
#[derive(Debug, Clone)]
pub struct Machine {
    pub cpus: i64,
    pub memory_bytes: i64,
    pub disk_bytes: i64,
    pub info: NodeSystemInfo,
}

/// The API level that this kubelet speaks, with our own version behind it.
const VERSION: &str = concat!("v1.36.0+keelway.", env!("CARGO_PKG_VERSION"));

impl Machine {
    /// Reads /proc and friends. `root_dir` is where pods' files go.
    pub fn read(root_dir: &std::path::Path, runtime_version: &str) -> Self {
        let line = |path: &str| {
            fs::read_to_string(path)
                .map(|text| text.trim().to_owned())
                .unwrap_or_default()
        };
        let disk_bytes = nix::sys::statvfs::statvfs(root_dir)
            .map_or(0, |stat| stat.blocks() * stat.fragment_size());
        Self {
            cpus: std::thread::available_parallelism()
                .map_or(1, |n| i64::try_from(n.get()).unwrap_or(i64::MAX)),
            memory_bytes: memory_total(&line("/proc/meminfo")).unwrap_or(0),
            disk_bytes: i64::try_from(disk_bytes).unwrap_or(i64::MAX),
            info: NodeSystemInfo {
                architecture: architecture().to_owned(),
                operating_system: "linux".to_owned(),
                kernel_version: line("/proc/sys/kernel/osrelease"),
                boot_id: line("/proc/sys/kernel/random/boot_id"),
                machine_id: line("/etc/machine-id"),
                system_uuid: line("/sys/class/dmi/id/product_uuid"),
                os_image: os_image(&line("/etc/os-release")),
                container_runtime_version: runtime_version.to_owned(),
                kubelet_version: VERSION.to_owned(),
                kube_proxy_version: String::new(),
                ..Default::default()
            },
        }
    }
}

/// The architecture in Go's words, which Kubernetes uses.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn memory_total(meminfo: &str) -> Option<i64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<i64>()
        .ok()
        .map(|kib| kib * 1024)
}

fn os_image(os_release: &str) -> String {
    let pretty = os_release
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="));
    pretty.map_or("Linux".to_owned(), |name| name.trim_matches('"').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_read_from_the_usual_files() {
        assert_eq!(
            memory_total("MemTotal:       16384 kB\nMemFree: 1 kB\n"),
            Some(16 << 20)
        );
        assert_eq!(os_image("NAME=x\nPRETTY_NAME=\"Debian 12\"\n"), "Debian 12");
        assert_eq!(os_image(""), "Linux");
    }
}
