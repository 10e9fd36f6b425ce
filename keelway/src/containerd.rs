//! containerd in a node: its configuration, and images put into it.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::sys::statfs::{FsType, statfs};
use serde_json::Value;
use tokio::process::Command;

/// Where containerd listens in a node.
pub const SOCKET: &str = "/run/containerd/containerd.sock";
/// Where its configuration is in a node.
pub const CONFIG: &str = "/etc/keelway-containerd.toml";
/// Where it finds what is special about a registry: a folder with a hosts.toml for each.
pub const REGISTRIES: &str = "/etc/containerd/certs.d";
/// The index of an archive has a line for each of its images.
const INDEX_BYTES_MAX: u64 = 1 << 20;
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
    #[error("images of {node} cannot be listed: {message}")]
    List { node: String, message: String },
    #[error("cannot read {archive}: {source}")]
    Archive { archive: PathBuf, source: io::Error },
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

/// Names of the images in an OCI archive, each with its digest; none of a Docker archive.
///
/// # Errors
/// When the file cannot be read.
pub fn images_in(archive: &Path) -> Result<BTreeMap<String, String>, ImageError> {
    let index = index_of(archive).map_err(|source| ImageError::Archive {
        archive: archive.to_owned(),
        source,
    })?;
    let manifests = index["manifests"].as_array().into_iter().flatten();
    let named = manifests.filter_map(|manifest| {
        let name = manifest["annotations"]["io.containerd.image.name"].as_str()?;
        Some((name.to_owned(), manifest["digest"].as_str()?.to_owned()))
    });
    Ok(named.collect())
}

/// The same of all archives that can be read.
pub fn digests(archives: &[PathBuf]) -> BTreeMap<String, String> {
    let images = archives
        .iter()
        .filter_map(|archive| images_in(archive).ok());
    images.flatten().collect()
}

/// The file `index.json` of an archive; null when there is none, or it is packed in another way.
fn index_of(archive: &Path) -> io::Result<Value> {
    let mut archive = tar::Archive::new(File::open(archive)?);
    let files = archive.entries_with_seek()?.map_while(Result::ok);
    let is_index = |path: &Path| path.strip_prefix(".").unwrap_or(path) == Path::new("index.json");
    let mut files = files.filter(|file| file.path().is_ok_and(|path| is_index(&path)));
    let Some(index) = files.next() else {
        return Ok(Value::Null);
    };
    Ok(serde_json::from_reader(index.take(INDEX_BYTES_MAX))?)
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

    /// Names of the images that pods can use, each with its digest.
    ///
    /// # Errors
    /// What ctr has to say.
    pub async fn images(&self) -> Result<BTreeMap<String, String>, ImageError> {
        let listed = self.ctr(&["list".as_ref()]).await?;
        let text = listed.map_err(|message| ImageError::List {
            node: self.node.clone(),
            message,
        })?;
        // REF TYPE DIGEST SIZE ..., below a line that says so.
        let image = |line: &str| {
            let mut words = line.split_whitespace();
            Some((words.next()?.to_owned(), words.nth(1)?.to_owned()))
        };
        Ok(text.lines().skip(1).filter_map(image).collect())
    }

    /// Imports an OCI or Docker archive, so that pods can use its images.
    ///
    /// # Errors
    /// What ctr has to say.
    pub async fn import(&self, archive: &Path) -> Result<(), ImageError> {
        let arguments: [&OsStr; 4] = [
            "import".as_ref(),
            "--snapshotter".as_ref(),
            self.snapshotter.name().as_ref(),
            archive.as_os_str(),
        ];
        let imported = self.ctr(&arguments).await?;
        let failed = |message| ImageError::Import {
            archive: archive.to_owned(),
            node: self.node.clone(),
            message,
        };
        imported.map(drop).map_err(failed)
    }

    /// A command about images: what it prints, or what it has to say against it.
    async fn ctr(&self, arguments: &[&OsStr]) -> Result<Result<String, String>, ImageError> {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(&self.socket);
        command.args(["--namespace", NAMESPACE, "images"]);
        command.args(arguments).stdin(Stdio::null());
        let output = command.kill_on_drop(true).output().await;
        let output = output.map_err(ImageError::Run)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(match output.status.success() {
            true => Ok(text(&output.stdout)),
            false => Err(text(&output.stderr).trim().to_owned()),
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
    fn an_archive_tells_its_images_and_their_digests() {
        let folder = tempfile::tempdir().expect("a folder");
        let index = r#"{"manifests":[{"digest":"sha256:1","annotations":{"io.containerd.image.name":"a/b:1"}}]}"#;
        let archive = |files: &[(&str, &str)]| {
            let path = folder.path().join("archive.tar");
            let mut archive = tar::Builder::new(File::create(&path).expect("made"));
            for (name, contents) in files {
                let mut header = tar::Header::new_ustar();
                header.set_size(contents.len() as u64);
                let contents = contents.as_bytes();
                let put = archive.append_data(&mut header, name, contents);
                put.expect("written");
            }
            archive.finish().expect("written");
            images_in(&path).expect("it can be read")
        };
        let found = archive(&[("oci-layout", "{}"), ("index.json", index)]);
        assert_eq!(found, BTreeMap::from([("a/b:1".into(), "sha256:1".into())]));
        assert_eq!(archive(&[("manifest.json", "[]")]), BTreeMap::new());
        assert!(images_in(&folder.path().join("none.tar")).is_err());
    }

    #[test]
    fn proc_is_never_taken_for_something_that_cannot_hold_overlays() {
        assert_eq!(
            Snapshotter::for_folder(Path::new("/proc")),
            Snapshotter::Overlay
        );
    }
}
