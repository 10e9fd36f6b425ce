//! The file systems of a node: a small root of its own, with the machine's programs read-only in it.
//!
//! Nothing a node does reaches the machine's files: its /etc, /run, /tmp, /opt and home folders are its own, its /var is a
//! folder of the cluster's state. Mount propagation ends at the node, and is shared within it, so that pods with
//! bidirectional mounts work.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{chdir, pivot_root};

use super::{Bind, NodeSpec};
use crate::sys;

/// Folders of the machine that hold programs and what they need to run.
const PROGRAM_FOLDERS: [&str; 9] = [
    "usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "nix", "gnu",
];
/// Parts of the machine's /etc that programs in a node need: accounts, linker, certificates, time zone.
const ETC: [&str; 14] = [
    "passwd",
    "group",
    "nsswitch.conf",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "ssl",
    "pki",
    "ca-certificates",
    "alternatives",
    "localtime",
    "services",
    "protocols",
    "ethertypes",
];
/// Folders at a node's root that are its own, whatever the machine has there.
const OWN: [&str; 8] = ["proc", "sys", "dev", "run", "tmp", "opt", "etc", "var"];
/// Folders of a node's /var, which is kept on disk.
const VAR: [&str; 7] = [
    "lib/kubelet",
    "lib/keelway",
    "lib/cni",
    "log/pods",
    "log/containers",
    "log/keelway",
    "tmp",
];

#[derive(Debug, thiserror::Error)]
pub enum MountError {
    #[error("cannot mount {what} at {at}: {source}")]
    Mount {
        what: String,
        at: PathBuf,
        source: nix::Error,
    },
    #[error("cannot {action} {path}: {source}")]
    File {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("cannot make the node's root the root: {0}")]
    Pivot(nix::Error),
    #[error("cannot enter the node's file systems: {0}")]
    Enter(nix::Error),
}

fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MountError {
    let path = path.to_owned();
    move |source| MountError::File {
        action,
        path,
        source,
    }
}

/// A mount of a file system type, with a node's path and options.
struct FileSystem {
    kind: &'static str,
    at: &'static str,
    flags: MsFlags,
    data: &'static str,
}

const NO_SUID_DEV: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

const FILE_SYSTEMS: [FileSystem; 8] = [
    FileSystem {
        kind: "proc",
        at: "/proc",
        flags: NO_SUID_DEV.union(MsFlags::MS_NOEXEC),
        data: "",
    },
    // A fresh sysfs shows the interfaces of the network namespace we are in.
    FileSystem {
        kind: "sysfs",
        at: "/sys",
        flags: NO_SUID_DEV.union(MsFlags::MS_NOEXEC),
        data: "",
    },
    FileSystem {
        kind: "bpf",
        at: "/sys/fs/bpf",
        flags: NO_SUID_DEV,
        data: "mode=0700",
    },
    FileSystem {
        kind: "devpts",
        at: "/dev/pts",
        flags: MsFlags::MS_NOSUID,
        data: "newinstance,ptmxmode=0666,mode=0620,gid=5",
    },
    FileSystem {
        kind: "tmpfs",
        at: "/dev/shm",
        flags: NO_SUID_DEV,
        data: "mode=1777",
    },
    FileSystem {
        kind: "mqueue",
        at: "/dev/mqueue",
        flags: NO_SUID_DEV,
        data: "",
    },
    FileSystem {
        kind: "tmpfs",
        at: "/run",
        flags: NO_SUID_DEV,
        data: "mode=0755",
    },
    FileSystem {
        kind: "tmpfs",
        at: "/tmp",
        flags: NO_SUID_DEV,
        data: "mode=1777",
    },
];

/// Builds the node's file systems in the mount namespace of the caller, and makes them its root.
/// The caller is in the node's other namespaces already: /proc, /sys and /dev/mqueue show those.
///
/// # Errors
/// Names the mount or file that could not be made. The machine is untouched in any case.
pub fn enter(spec: &NodeSpec) -> Result<(), MountError> {
    // Before anything else, or what we mount would appear on the machine.
    remount(Path::new("/"), MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;

    let root = spec.dir.join("root");
    fs::create_dir_all(&root).map_err(file("make", &root))?;
    mount_at("tmpfs", &root, "tmpfs", MsFlags::empty(), "mode=0755")?;

    bind_programs(&root)?;
    bind_etc(&root)?;
    for folder in [
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "root",
        "home",
        "mnt",
        "opt/cni/bin",
        "etc/cni/net.d",
        "etc/keelway",
        "var",
    ] {
        make_folder(&root.join(folder))?;
    }
    bind(Path::new("/dev"), &root.join("dev"), false, false)?;
    for system in &FILE_SYSTEMS {
        let at = below(&root, Path::new(system.at));
        if system.at == "/dev/mqueue" && !at.is_dir() {
            // A folder here would be made in the machine's /dev. Nothing of ours uses message queues.
            continue;
        }
        mount_at(system.kind, &at, system.kind, system.flags, system.data)?;
    }
    protect_machine_sysctls(&root)?;
    bind(
        Path::new("/sys/fs/cgroup"),
        &root.join("sys/fs/cgroup"),
        true,
        false,
    )?;

    let var = spec.dir.join("var");
    for folder in VAR {
        make_folder(&var.join(folder))?;
    }
    bind(&var, &root.join("var"), false, false)?;
    let run_link = var.join("run");
    if run_link.symlink_metadata().is_err() {
        symlink("/run", &run_link).map_err(file("link", &run_link))?;
    }

    if spec.machine {
        bind_others(&root)?;
    }
    for Bind {
        from,
        to,
        read_only,
    } in &spec.binds
    {
        bind(from, &below(&root, to), true, *read_only)?;
    }
    for (path, contents) in &spec.files {
        let path = below(&root, path);
        if let Some(folder) = path.parent() {
            make_folder(folder)?;
        }
        fs::write(&path, contents).map_err(file("write", &path))?;
    }

    // pivot_root(".", ".") puts the old root on top of the new one, from where it is taken off (pivot_root(2)).
    chdir(&root)
        .and_then(|()| pivot_root(".", "."))
        .and_then(|()| umount2(".", MntFlags::MNT_DETACH))
        .map_err(MountError::Pivot)?;
    chdir("/").map_err(MountError::Pivot)?;
    remount(Path::new("/"), MsFlags::MS_REC | MsFlags::MS_SHARED)
}

/// The machine's program folders, read-only; where it has links (/bin to usr/bin), the same links.
fn bind_programs(root: &Path) -> Result<(), MountError> {
    for name in PROGRAM_FOLDERS {
        let from = Path::new("/").join(name);
        let Ok(meta) = from.symlink_metadata() else {
            continue;
        };
        let to = root.join(name);
        if meta.is_symlink() {
            let target = fs::read_link(&from).map_err(file("read", &from))?;
            symlink(target, &to).map_err(file("link", &to))?;
        } else {
            bind(&from, &to, true, true)?;
        }
    }
    Ok(())
}

/// Folders at the machine's root that a node has none of its own instead of: what pods with hostPath look for.
fn bind_others(root: &Path) -> Result<(), MountError> {
    let top = Path::new("/");
    for entry in fs::read_dir(top).map_err(file("read", top))?.flatten() {
        let (from, to) = (entry.path(), root.join(entry.file_name()));
        let own = entry
            .file_name()
            .to_str()
            .is_none_or(|name| OWN.contains(&name) || PROGRAM_FOLDERS.contains(&name));
        if !own && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            bind(&from, &to, true, false)?;
        }
    }
    Ok(())
}

fn bind_etc(root: &Path) -> Result<(), MountError> {
    let etc = root.join("etc");
    make_folder(&etc)?;
    for name in ETC {
        let from = Path::new("/etc").join(name);
        let to = etc.join(name);
        if from.is_dir() {
            bind(&from, &to, false, true)?;
        } else if from.is_file() {
            // Copied, so that a machine that replaces the file (a package upgrade does) does not matter.
            fs::copy(&from, &to).map_err(file("copy", &from))?;
        }
    }
    Ok(())
}

/// Settings that are not of the node's own namespaces cannot be written from within it.
fn protect_machine_sysctls(root: &Path) -> Result<(), MountError> {
    let sysctls = root.join("proc/sys");
    let net = sysctls.join("net");
    bind(&sysctls, &sysctls, false, true)?;
    // A mount of its own on top, whose flag can differ.
    bind(&net, &net, false, false)?;
    mount(
        None::<&str>,
        &net,
        None::<&str>,
        MsFlags::MS_BIND | MsFlags::MS_REMOUNT,
        None::<&str>,
    )
    .map_err(|source| MountError::Mount {
        what: "net sysctls, writable".into(),
        at: net,
        source,
    })
}

/// A bind mount; its target is made when it is missing.
fn bind(from: &Path, to: &Path, recursive: bool, read_only: bool) -> Result<(), MountError> {
    if from.is_dir() {
        make_folder(to)?;
    } else if !to.exists() {
        if let Some(folder) = to.parent() {
            make_folder(folder)?;
        }
        fs::File::create(to).map_err(file("make", to))?;
    }
    let failed = |source| MountError::Mount {
        what: from.display().to_string(),
        at: to.to_owned(),
        source,
    };
    let mut flags = MsFlags::MS_BIND;
    flags.set(MsFlags::MS_REC, recursive);
    mount(Some(from), to, None::<&str>, flags, None::<&str>).map_err(failed)?;
    if read_only {
        // The kernel ignores the read-only flag of the first call; a second one sets it.
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, to, None::<&str>, flags, None::<&str>).map_err(failed)?;
    }
    Ok(())
}

/// Has a node that runs, by the number of its PID 1, see other files of the machine in the place of those that it was given. What runs goes on
/// with the file that it was started from.
///
/// # Errors
/// As [`enter`]; doing it again mends what was done in part.
pub fn replace(init: u32, binds: &[Bind]) -> Result<(), MountError> {
    let trees = binds.iter().map(|bind| {
        let tree = sys::open_tree(&bind.from);
        Ok((bind, tree.map_err(file("open", &bind.from))?))
    });
    let trees: Vec<_> = trees.collect::<Result<_, MountError>>()?;
    let path = PathBuf::from(format!("/proc/{init}/ns/mnt"));
    let namespace = fs::File::open(&path).map_err(file("open", &path))?;
    let put = || {
        // A thread may only go where no other one shares its root and working folder.
        unshare(CloneFlags::CLONE_FS)
            .and_then(|()| setns(&namespace, CloneFlags::CLONE_NEWNS))
            .map_err(MountError::Enter)?;
        trees
            .iter()
            .try_for_each(|(bind, tree)| put_over(bind, tree))
    };
    std::thread::scope(|scope| match scope.spawn(put).join() {
        Ok(outcome) => outcome,
        Err(_) => Err(MountError::Enter(nix::Error::ECANCELED)),
    })
}

/// Puts a mount where the calling thread sees another one, or none.
fn put_over(
    Bind {
        from,
        to,
        read_only,
    }: &Bind,
    tree: &OwnedFd,
) -> Result<(), MountError> {
    let failed = |source| MountError::Mount {
        what: from.display().to_string(),
        at: to.clone(),
        source,
    };
    match umount2(to, MntFlags::MNT_DETACH) {
        // Not a mount: an attempt before this one has ended here.
        Ok(()) | Err(nix::Error::EINVAL) => {}
        Err(error) => return Err(failed(error)),
    }
    sys::move_mount(tree, to).map_err(file("mount at", to))?;
    // Whatever is mounted over the machine's file later is none of the node's business.
    let mut settings = vec![MsFlags::MS_PRIVATE];
    if *read_only {
        settings.push(MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY);
    }
    settings.into_iter().try_for_each(|flags| {
        mount(None::<&str>, to, None::<&str>, flags, None::<&str>).map_err(failed)
    })
}

fn mount_at(
    what: &str,
    at: &Path,
    kind: &str,
    flags: MsFlags,
    data: &str,
) -> Result<(), MountError> {
    mount(
        Some(what),
        at,
        Some(kind),
        flags,
        Some(data).filter(|data| !data.is_empty()),
    )
    .map_err(|source| MountError::Mount {
        what: what.into(),
        at: at.to_owned(),
        source,
    })
}

fn remount(at: &Path, flags: MsFlags) -> Result<(), MountError> {
    mount(None::<&str>, at, None::<&str>, flags, None::<&str>).map_err(|source| MountError::Mount {
        what: "propagation".into(),
        at: at.to_owned(),
        source,
    })
}

fn make_folder(path: &Path) -> Result<(), MountError> {
    fs::create_dir_all(path).map_err(file("make", path))?;
    if path.ends_with("var/tmp") {
        fs::set_permissions(path, fs::Permissions::from_mode(0o1777))
            .map_err(file("set permissions of", path))?;
    }
    Ok(())
}

/// An absolute path of the node, below `root`.
fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_a_node_stay_below_its_root() {
        assert_eq!(
            below(Path::new("/r"), Path::new("/etc/hosts")),
            Path::new("/r/etc/hosts")
        );
        assert_eq!(
            below(Path::new("/r"), Path::new("etc/hosts")),
            Path::new("/r/etc/hosts")
        );
    }
}
