//! cnitool, the CNI project's own runtime, with which tests call the plugin. No Debian package has it, so it is built from its module by
//! Debian's Go of a newer suite, which is unpacked and not installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{apt, say};
use crate::process;
use crate::project::Project;

/// The Debian suite whose Go is new enough for the module, and runs on Debian 12's C library.
const SUITE: &str = "trixie";
const GO: &str = "1.24";
/// The module, at the version that tests are written for: the first that knows STATUS and GC.
const MODULE: &str = "github.com/containernetworking/cni/cnitool@v1.3.0";

/// Puts cnitool into the folder of the suites' clients. Without it its tests are skipped, so a machine without module proxy can go on.
pub fn pin(project: &Project) -> Result<()> {
    let target = project.clients_dir().join("cnitool");
    if target.is_file() {
        return Ok(());
    }
    say(format_args!("building cnitool into {}", target.display()));
    let staging = project.target_dir.join("cnitool-staging");
    let _ = fs::remove_dir_all(&staging);
    fs::create_dir_all(&staging)?;
    let staging = staging.canonicalize()?;
    let placed = build(&staging).and_then(|program| super::kubectl::place(&program, &target));
    // The module cache is read-only, which an owner who is not root has to undo.
    let _ = Command::new("chmod")
        .args(["-R", "u+w"])
        .arg(&staging)
        .status();
    let _ = fs::remove_dir_all(&staging);
    if let Err(error) = placed {
        say(format_args!(
            "it could not be had, so its tests are skipped: {error:#}"
        ));
    }
    Ok(())
}

fn build(staging: &Path) -> Result<PathBuf> {
    let root = go_root(staging)?;
    let bin = staging.join("bin");
    process::run_quiet(
        Command::new(root.join("bin/go"))
            .args(["install", "-trimpath", MODULE])
            .env("GOROOT", &root)
            .env("GOBIN", &bin)
            .env("GOPATH", staging.join("path"))
            .env("GOCACHE", staging.join("cache"))
            .env("GOTOOLCHAIN", "local")
            .env("CGO_ENABLED", "0"),
    )?;
    Ok(bin.join("cnitool"))
}

/// Go, unpacked below `staging`.
fn go_root(staging: &Path) -> Result<PathBuf> {
    let suite = apt::OtherSuites::fetch(&staging.join("apt"), &[SUITE])?;
    let unpacked = staging.join("deb");
    fs::create_dir_all(&unpacked)?;
    for part in ["go", "src"] {
        let package = format!("golang-{GO}-{part}");
        let version = suite
            .version_starting(&package, GO)?
            .with_context(|| format!("Debian's {SUITE} has no {package}"))?;
        suite.unpack(&package, &version, &unpacked)?;
    }
    Ok(unpacked.join(format!("usr/lib/go-{GO}")))
}
