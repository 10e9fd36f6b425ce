//! The unit by which systemd starts this machine's node.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tokio::process::Command;

/// The unit, as it is in deploy/ too.
const UNIT: &str = include_str!("../../../deploy/keelway.service");
const UNIT_FILE: &str = "/etc/systemd/system/keelway.service";
const PROGRAM: &str = "/usr/local/bin/keelway";
/// There when systemd is the machine's first process (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";

#[derive(Debug, thiserror::Error)]
pub enum SystemdError {
    #[error("systemd does not run on this machine; leave out --systemd")]
    NotBooted,
    #[error("cannot {action} {path}: {source}")]
    File {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("systemctl {0}: {1}")]
    Control(String, String),
}

/// # Errors
/// When there is no systemd.
pub fn check() -> Result<(), SystemdError> {
    if Path::new(BOOTED).is_dir() {
        Ok(())
    } else {
        Err(SystemdError::NotBooted)
    }
}

/// The unit for a program that may be anywhere.
fn unit(program: &Path) -> String {
    UNIT.replace(PROGRAM, &program.display().to_string())
}

/// Writes the unit, and has systemd start the node now and with the machine.
///
/// # Errors
/// What systemctl says.
pub async fn install(program: &Path) -> Result<(), SystemdError> {
    fs::write(UNIT_FILE, unit(program)).map_err(|source| SystemdError::File {
        action: "write",
        path: UNIT_FILE.into(),
        source,
    })?;
    control(&["daemon-reload"]).await?;
    control(&["enable", "--now", "keelway.service"]).await
}

/// Whether the node is in systemd's hands.
pub fn is_installed() -> bool {
    Path::new(UNIT_FILE).exists() && check().is_ok()
}

/// Stops the unit, if there is one, so that it does not start the node again by itself.
///
/// # Errors
/// What systemctl says.
pub async fn pause() -> Result<(), SystemdError> {
    if !is_installed() {
        return Ok(());
    }
    control(&["stop", "keelway.service"]).await
}

/// Starts the unit again.
///
/// # Errors
/// What systemctl says.
pub async fn resume() -> Result<(), SystemdError> {
    control(&["start", "keelway.service"]).await
}

/// Stops the unit and removes it; nothing when there is none.
///
/// # Errors
/// What systemctl says.
pub async fn remove() -> Result<(), SystemdError> {
    if !is_installed() {
        return Ok(());
    }
    control(&["disable", "--now", "keelway.service"]).await?;
    fs::remove_file(UNIT_FILE).map_err(|source| SystemdError::File {
        action: "remove",
        path: UNIT_FILE.into(),
        source,
    })?;
    control(&["daemon-reload"]).await
}

async fn control(arguments: &[&str]) -> Result<(), SystemdError> {
    let output = Command::new("systemctl").args(arguments).output().await;
    let failed = |reason: String| SystemdError::Control(arguments.join(" "), reason);
    let output = output.map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(failed(
        String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_starts_this_program() {
        let unit = unit(Path::new("/opt/k/keelway"));
        assert!(unit.contains("ExecStart=/opt/k/keelway start --foreground\n"));
        assert!(!unit.contains(PROGRAM));
    }
}
