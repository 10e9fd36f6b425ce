//! What a machine needs before a cluster can be made on it. Asked before anything is made.

use std::path::{Path, PathBuf};

use crate::cgroup::{CgroupError, Hierarchies};
use crate::family::IpFamily;
use crate::forward::NFT;

/// The oldest kernel that the data plane may work on (docs/services.md): the verifier of 6.1 refuses some programs.
const KERNEL_MIN: (u32, u32) = (6, 6);
/// Programs that nodes run, and the Debian package each is in.
const PROGRAMS: [(&str, &str); 4] = [
    ("containerd", "containerd"),
    ("containerd-shim-runc-v2", "containerd"),
    ("ctr", "containerd"),
    ("runc", "runc"),
];
/// Folders that packages use, also when a user's PATH leaves them out.
const SYSTEM_PATH: [&str; 6] = [
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
];

#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    #[error(
        "keelway {0} needs root: it makes namespaces, mounts and eBPF programs. Try: sudo -E keelway {0}"
    )]
    NotRoot(&'static str),
    #[error("Linux {found} is too old: Keelway needs {}.{} or newer", KERNEL_MIN.0, KERNEL_MIN.1)]
    OldKernel { found: String },
    #[error("this kernel lacks {0}")]
    Kernel(String),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("{program} is not installed; on Debian: apt-get install {package}")]
    NoProgram {
        program: &'static str,
        package: &'static str,
    },
}

/// What the checks found out.
#[derive(Debug, Clone)]
pub struct Machine {
    pub hierarchies: Hierarchies,
    /// The PATH on which nodes find containerd and runc.
    pub path: String,
}

/// # Errors
/// When the caller is not root. `what` is the command it wanted.
pub fn root(what: &'static str) -> Result<(), CheckError> {
    if nix::unistd::geteuid().is_root() {
        Ok(())
    } else {
        Err(CheckError::NotRoot(what))
    }
}

/// # Errors
/// The first thing that is missing, with what to do about it.
pub fn machine() -> Result<Machine, CheckError> {
    root("up")?;
    kernel()?;
    let hierarchies = Hierarchies::of_this_machine()?;
    let mut path: Vec<PathBuf> = SYSTEM_PATH.iter().map(PathBuf::from).collect();
    path.extend(
        std::env::var_os("PATH")
            .iter()
            .flat_map(std::env::split_paths),
    );
    let mut needed: Vec<PathBuf> = SYSTEM_PATH.iter().map(PathBuf::from).collect();
    for (program, package) in PROGRAMS {
        let folder = path
            .iter()
            .find(|folder| folder.join(program).is_file())
            .ok_or(CheckError::NoProgram { program, package })?;
        if !needed.contains(folder) {
            needed.insert(0, folder.clone());
        }
    }
    let path = needed
        .iter()
        .map(|folder| folder.display().to_string())
        .collect::<Vec<_>>()
        .join(":");
    Ok(Machine { hierarchies, path })
}

/// # Errors
/// When the kernel has no IPv6, and the cluster is to have it.
pub fn family(family: IpFamily) -> Result<(), CheckError> {
    if family.has_v6() && !Path::new("/proc/sys/net/ipv6").exists() {
        let what = "IPv6 (was it started with ipv6.disable=1?); use --ip-family ipv4";
        return Err(CheckError::Kernel(what.to_owned()));
    }
    Ok(())
}

/// # Errors
/// When a program is missing that a way out for pods needs.
pub fn egress(machine: &Machine) -> Result<(), CheckError> {
    let found = std::env::split_paths(&machine.path).any(|folder| folder.join(NFT).is_file());
    if found {
        return Ok(());
    }
    Err(CheckError::NoProgram {
        program: NFT,
        package: "nftables",
    })
}

/// # Errors
/// When etcd is to keep the state, and is not there.
pub fn etcd(machine: &Machine) -> Result<(), CheckError> {
    let found = std::env::split_paths(&machine.path).any(|folder| folder.join("etcd").is_file());
    if found {
        return Ok(());
    }
    Err(CheckError::NoProgram {
        program: "etcd",
        package: "etcd-server",
    })
}

fn kernel() -> Result<(), CheckError> {
    let release = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    if version(&release).is_some_and(|found| found < KERNEL_MIN) {
        return Err(CheckError::OldKernel { found: release });
    }
    let lacks = |what: &str| Err(CheckError::Kernel(what.to_owned()));
    for namespace in ["net", "mnt", "pid", "uts", "ipc"] {
        if !Path::new("/proc/self/ns").join(namespace).exists() {
            return lacks(&format!("{namespace} namespaces"));
        }
    }
    let file_systems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let has = |name: &str| file_systems.split_whitespace().any(|word| word == name);
    if !has("bpf") {
        return lacks("the BPF file system (CONFIG_BPF_SYSCALL)");
    }
    // overlayfs may be a module that is loaded when it is first used, so its absence here says nothing.
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        return lacks("type information for BPF (CONFIG_DEBUG_INFO_BTF: /sys/kernel/btf/vmlinux)");
    }
    Ok(())
}

/// Major and minor version of a kernel's release name.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_are_compared_by_number() {
        assert_eq!(version("6.18.44-fc-v657"), Some((6, 18)));
        assert_eq!(version("5.4.0-150-generic"), Some((5, 4)));
        assert!(version("5.15.0-91-generic").expect("read") < KERNEL_MIN);
        assert!(version("6.1.0-18-amd64").expect("read") < KERNEL_MIN);
        assert!(version("6.12.0").expect("read") > KERNEL_MIN);
        assert_eq!(version("weird"), None);
    }
}
