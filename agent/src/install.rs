//! What the agent leaves in the node's folders: the CNI plugin, and its configuration.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::config::Config;

/// File name of the plugin.
pub const PLUGIN: &str = "keelway-cni";
/// File name of the network configuration; runtimes take the first by name.
pub const CONF_LIST: &str = "05-keelway.conflist";

/// What could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error(
        "{} is on a read-only file system: choose a writable folder with {flag} (in the manifest, the hostPath of the volume {volume}), and tell the container runtime to look there: {setting} in containerd's configuration",
        dir.display()
    )]
    ReadOnly {
        dir: PathBuf,
        flag: &'static str,
        volume: &'static str,
        setting: &'static str,
    },
}

/// A folder of the node that is written to, and how another one is chosen.
struct Folder<'a> {
    path: &'a Path,
    flag: &'static str,
    volume: &'static str,
    setting: &'static str,
}

impl<'a> Folder<'a> {
    fn of_plugins(path: &'a Path) -> Self {
        Self {
            path,
            flag: "--bin-dir",
            volume: "cni-bin",
            setting: "cni.bin_dir (bin_dirs since 2.1)",
        }
    }

    fn of_configurations(path: &'a Path) -> Self {
        Self {
            path,
            flag: "--cni-conf-dir",
            volume: "cni-conf",
            setting: "cni.conf_dir",
        }
    }
}

/// Copies the plugin that lies beside this program into `dir`, and again as `loopback` when there is none.
pub fn install_plugin(dir: &Path) -> Result<PathBuf, InstallError> {
    let own = std::env::current_exe().map_err(|source| InstallError::File {
        path: "/proc/self/exe".into(),
        source,
    })?;
    let plugin = own.with_file_name(PLUGIN);
    let bytes = fs::read(&plugin).map_err(|source| InstallError::File {
        path: plugin,
        source,
    })?;
    let folder = Folder::of_plugins(dir);
    let loopback = dir.join(keelway_cni::loopback::NAME);
    // containerd calls a plugin of this name for every pod; one that the machine has stays.
    let is_ours = !loopback.exists() || same_file(&loopback, &dir.join(PLUGIN));
    // Runtimes may be executing the old one, which cannot be written to, only replaced.
    let target = replace(&folder, PLUGIN, &bytes, 0o755)?;
    if is_ours {
        replace(&folder, keelway_cni::loopback::NAME, &bytes, 0o755)?;
    }
    Ok(target)
}

/// Writes the network configuration, unless it is there already.
///
/// It says 1.0.0: containerd 1.6 speaks no newer version, and newer runtimes speak this one.
pub fn write_conf_list(config: &Config) -> Result<(), InstallError> {
    let mut plugin = json!({
        "type": PLUGIN,
        "capabilities": {"portMappings": true, "bandwidth": true, "ips": true, "mac": true, "dns": true},
    });
    if config.socket != Path::new(keelway_cni::AGENT_SOCKET) {
        plugin["socket"] = json!(config.socket);
    }
    if config.spool != Path::new(keelway_cni::SPOOL_DIR) {
        plugin["spool"] = json!(config.spool);
    }
    let list = json!({"cniVersion": "1.0.0", "name": "keelway", "plugins": [plugin]});
    let text = format!("{list:#}\n");
    let path = config.cni_conf_dir.join(CONF_LIST);
    if fs::read(&path).is_ok_and(|there| there == text.as_bytes()) {
        return Ok(());
    }
    let folder = Folder::of_configurations(&config.cni_conf_dir);
    replace(&folder, CONF_LIST, text.as_bytes(), 0o644).map(drop)
}

/// Whether two files hold the same; `false` when one of them cannot be read.
pub fn same_file(a: &Path, b: &Path) -> bool {
    matches!((fs::read(a), fs::read(b)), (Ok(a), Ok(b)) if a == b)
}

fn replace(
    folder: &Folder<'_>,
    name: &str,
    bytes: &[u8],
    mode: u32,
) -> Result<PathBuf, InstallError> {
    let path = folder.path.join(name);
    // Runtimes read every *.conflist: this name is none of theirs.
    let partial = path.with_extension(format!("{}.partial", std::process::id()));
    let write = || -> io::Result<()> {
        fs::create_dir_all(folder.path)?;
        let mut file = File::create(&partial)?;
        file.write_all(bytes)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()?;
        drop(file);
        fs::rename(&partial, &path)
    };
    let written = write();
    if written.is_err() {
        // Nothing half written stays; that it was never there is the usual case.
        let _ = fs::remove_file(&partial);
    }
    match written {
        Ok(()) => Ok(path),
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            Err(InstallError::ReadOnly {
                dir: folder.path.into(),
                flag: folder.flag,
                volume: folder.volume,
                setting: folder.setting,
            })
        }
        Err(source) => Err(InstallError::File { path, source }),
    }
}
