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
#[error("{}: {source}", path.display())]
pub struct InstallError {
    path: PathBuf,
    source: io::Error,
}

/// Copies the plugin that lies beside this program into `dir`, and again as `loopback` when there is none.
pub fn install_plugin(dir: &Path) -> Result<PathBuf, InstallError> {
    let own = std::env::current_exe().map_err(|source| InstallError {
        path: "/proc/self/exe".into(),
        source,
    })?;
    let plugin = own.with_file_name(PLUGIN);
    let bytes = fs::read(&plugin).map_err(|source| InstallError {
        path: plugin,
        source,
    })?;
    let target = dir.join(PLUGIN);
    // Runtimes may be executing the old one, which cannot be written to, only replaced.
    replace(&target, &bytes, 0o755)?;
    // containerd calls a plugin of this name for every pod; one that the machine has stays.
    let loopback = dir.join(keelway_cni::loopback::NAME);
    if !loopback.exists() {
        replace(&loopback, &bytes, 0o755)?;
    }
    Ok(target)
}

/// Writes the network configuration, unless it is there already.
///
/// It says 1.0.0: containerd 1.6 speaks no newer version, and newer runtimes speak this one.
pub fn write_conf_list(config: &Config) -> Result<(), InstallError> {
    let mut plugin = json!({
        "type": PLUGIN,
        "capabilities": {"portMappings": true, "ips": true, "mac": true, "dns": true},
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
    replace(&path, text.as_bytes(), 0o644)
}

fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), InstallError> {
    let write = || -> io::Result<()> {
        let dir = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(dir)?;
        // Runtimes read every *.conflist: this name is none of theirs.
        let partial = path.with_extension(format!("{}.partial", std::process::id()));
        let mut file = File::create(&partial)?;
        file.write_all(bytes)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()?;
        drop(file);
        fs::rename(&partial, path)
    };
    write().map_err(|source| InstallError {
        path: path.into(),
        source,
    })
}
