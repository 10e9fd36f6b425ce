//! containerd in a node: its configuration, and images put into it.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::sys::statfs::{FsType, statfs};
use tokio::process::Command;

/// Where containerd listens in a node.
pub const SOCKET: &str = "/run/containerd/containerd.sock";
/// Where its configuration is in a node.
pub const CONFIG: &str = "/etc/keelway-containerd.toml";
/// Where it finds what is special about a registry: a folder with a hosts.toml for each.
pub const REGISTRIES: &str = "/etc/containerd/certs.d";
/// containerd's name space for what the kubelet runs.
const NAMESPACE: &str = "k8s.io";

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("cannot run ctr, which comes with containerd: {0}")]
    Run(io::Error),
    #[error("{archive} cannot be imported on {node}: {message}")]
    Import {
        archive: PathBuf,
        node: String,
        message: String,
    },
}

/// How containerd keeps images and containers on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Snapshotter {
    Overlay,
    /// Copies; for file systems that cannot hold an overlay's upper folder.
    Native,
}

impl Snapshotter {
    /// What works on the file system that `dir` is on.
    pub fn for_folder(dir: &Path) -> Self {
        // From the kernel's magic.h; nix names only some of them.
        const CANNOT: [i64; 9] = [
            0x794c_7630, // overlayfs
            0x6969,      // NFS
            0x6573_5546, // FUSE
            0x0102_1997, // 9P
            0xff53_4d42, // CIFS
            0xfe53_4d42, // SMB2
            0x4d44,      // FAT
            0xf15f,      // eCryptfs
            0x6175_6673, // aufs
        ];
        match statfs(dir) {
            Ok(found)
                if CANNOT
                    .iter()
                    .any(|magic| found.filesystem_type() == FsType(*magic)) =>
            {
                Snapshotter::Native
            }
            _ => Snapshotter::Overlay,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Snapshotter::Overlay => "overlayfs",
            Snapshotter::Native => "native",
        }
    }
}

/// The configuration of a node's containerd. What a node does not use is off: each plugin costs time at its start.
pub fn config(pause_image: &str, snapshotter: Snapshotter) -> String {
    let other = match snapshotter {
        Snapshotter::Overlay => "native",
        Snapshotter::Native => "overlayfs",
    };
    let snapshotter = snapshotter.name();
    format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
oom_score = 0
# Without it no pod runs; better no containerd than half a one.
required_plugins = ["io.containerd.grpc.v1.cri"]
disabled_plugins = [
  "io.containerd.internal.v1.opt",
  "io.containerd.internal.v1.tracing",
  "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.blockfile",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.{other}",
  "io.containerd.snapshotter.v1.zfs",
]

[grpc]
  address = "{SOCKET}"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause_image}"
  # Without CAP_SYS_RESOURCE a process cannot lower its OOM score; asking for it would fail every pod.
  restrict_oom_score_adj = true
  # Its profile would be loaded into the machine's kernel, and stay there.
  disable_apparmor = true
  stream_server_address = "127.0.0.1"

[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "{REGISTRIES}"

[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/opt/cni/bin"
  conf_dir = "/etc/cni/net.d"
  max_conf_num = 1

[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "{snapshotter}"
  default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
  SystemdCgroup = false
"#
    )
}

/// A node's containerd, reached from outside the node: through the root folder of its PID 1.
#[derive(Debug, Clone)]
pub struct Containerd {
    node: String,
    socket: PathBuf,
    snapshotter: Snapshotter,
}

impl Containerd {
    pub fn of_node(node: &str, init_pid: u32, snapshotter: Snapshotter) -> Self {
        let socket = PathBuf::from(format!("/proc/{init_pid}/root{SOCKET}"));
        Containerd {
            node: node.to_owned(),
            socket,
            snapshotter,
        }
    }

    /// Imports an OCI or Docker archive, so that pods can use its images.
    ///
    /// # Errors
    /// What ctr has to say.
    pub async fn import(&self, archive: &Path) -> Result<(), ImageError> {
        let arguments: [&OsStr; 8] = [
            "--address".as_ref(),
            self.socket.as_os_str(),
            "--namespace".as_ref(),
            NAMESPACE.as_ref(),
            "images".as_ref(),
            "import".as_ref(),
            "--snapshotter".as_ref(),
            self.snapshotter.name().as_ref(),
        ];
        let output = Command::new("ctr")
            .args(arguments)
            .arg(archive)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .map_err(ImageError::Run)?;
        if output.status.success() {
            return Ok(());
        }
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(ImageError::Import {
            archive: archive.to_owned(),
            node: self.node.clone(),
            message,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_snapshotter_that_is_used_is_not_disabled() {
        let config = config("pause:1", Snapshotter::Overlay);
        assert!(!config.contains("snapshotter.v1.overlayfs"));
        assert!(
            config.contains(r#"snapshotter = "overlayfs""#)
                && config.contains("snapshotter.v1.native")
        );
    }

    #[test]
    fn proc_is_never_taken_for_something_that_cannot_hold_overlays() {
        assert_eq!(
            Snapshotter::for_folder(Path::new("/proc")),
            Snapshotter::Overlay
        );
    }
}
