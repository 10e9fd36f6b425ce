//! cnitool, the CNI project's own runtime, with which tests call the plugin. Debian has its source, in the package of the project's
//! libraries, and builds no program of it; Debian's Go of a newer suite does, which is unpacked and not installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{apt, say};
use crate::process;
use crate::project::Project;

/// The Debian suite whose Go is new enough, and runs on Debian 12's C library.
const SUITE: &str = "trixie";
const GO: &str = "1.24";
/// The source package, and the suite that has version 1.3: the first whose cnitool knows STATUS and GC.
const SOURCE: &str = "golang-github-appc-cni";
const SOURCE_SUITE: &str = "forky";

/// Puts cnitool into the folder of the suites' clients. Without it its tests are skipped, so a machine without these suites can go on.
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
    let suites =
        apt::OtherSuites::fetch_with_sources(&staging.join("apt"), &[SUITE], &[SOURCE_SUITE])?;
    let root = go_root(&suites, staging)?;
    let source = staging.join("source");
    suites.unpack_source(SOURCE, &source)?;
    let program = staging.join("cnitool");
    // What it imports is all in that archive.
    process::run_quiet(
        Command::new(root.join("bin/go"))
            .args(["build", "-trimpath", "-o"])
            .arg(&program)
            .arg("./cnitool")
            .current_dir(&source)
            .env("GOROOT", &root)
            .env("GOPATH", staging.join("path"))
            .env("GOCACHE", staging.join("cache"))
            .env("GOPROXY", "off")
            .env("GOTOOLCHAIN", "local")
            .env("CGO_ENABLED", "0"),
    )?;
    Ok(program)
}

/// Go, unpacked below `staging`.
fn go_root(suites: &apt::OtherSuites, staging: &Path) -> Result<PathBuf> {
    let unpacked = staging.join("deb");
    fs::create_dir_all(&unpacked)?;
    for part in ["go", "src"] {
        let package = format!("golang-{GO}-{part}");
        let version = suites
            .version_starting(&package, GO)?
            .with_context(|| format!("Debian's {SUITE} has no {package}"))?;
        suites.unpack(&package, &version, &unpacked)?;
    }
    Ok(unpacked.join(format!("usr/lib/go-{GO}")))
}
