//! Debian packages: what is missing is installed, and packages of other suites can be unpacked without installing them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::say;
use crate::process;

/// Packages that building and running needs, and why.
const PACKAGES: &[(&str, &str)] = &[
    (
        "build-essential",
        "the linker and libc.a that static binaries are made with",
    ),
    ("busybox-static", "the client image's programs"),
    ("ca-certificates", "downloads"),
    ("containerd", "each node runs its own"),
    (
        "containernetworking-plugins",
        "tests chain them with ours, the bench measures both",
    ),
    (
        "etcd-server",
        "the store of several control planes is tested on it",
    ),
    ("ethtool", "tests turn offloads of interfaces on and off"),
    ("iproute2", "tests and people look at namespaces with it"),
    ("iptables", "tests put its old tables in an agent's way"),
    (
        "libprotobuf-dev",
        "definitions that etcd's are written with",
    ),
    (
        "nftables",
        "tests compare the machine's rules before and after",
    ),
    (
        "protobuf-compiler",
        "the CRI client is generated from its definition",
    ),
    ("runc", "containerd starts containers with it"),
    (
        "strace",
        "tests kill programs at their system calls, and make disks slow",
    ),
    ("xz-utils", "unpacks archives"),
];

/// Installs the packages of [`PACKAGES`] that are missing, and keeps Debian from starting what it installs.
pub fn install_missing() -> Result<()> {
    let missing = missing_packages()?;
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|(name, _)| *name).collect();
    if !process::is_root() {
        bail!(
            "Debian packages are missing; install them as root:\n  apt-get install --no-install-recommends {}",
            names.join(" ")
        );
    }
    for (name, purpose) in &missing {
        say(format_args!(
            "installing the Debian package {name}: {purpose}"
        ));
    }
    let no_start = NoServiceStart::engage()?;
    let mut result = install(&names);
    if result.is_err() {
        // The usual reason is a package list that is missing or out of date.
        say("refreshing apt's package lists");
        result =
            process::run_quiet(apt_get().args(["update", "-q"])).and_then(|()| install(&names));
    }
    drop(no_start);
    result.context("the machine's apt sources must carry Debian 12's packages")?;
    if names.contains(&"containerd") && Path::new("/run/systemd/system").exists() {
        // Keelway runs a containerd of its own in each node; the machine's would only sit there.
        say("leaving the containerd service disabled");
        process::run_quiet(Command::new("systemctl").args([
            "disable",
            "--now",
            "--quiet",
            "containerd.service",
        ]))?;
    }
    Ok(())
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn install(names: &[&str]) -> Result<()> {
    process::run_quiet(
        apt_get()
            .args(["install", "-q", "-y", "--no-install-recommends"])
            .args(names),
    )
}

fn missing_packages() -> Result<Vec<(&'static str, &'static str)>> {
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat", "${Package} ${db:Status-Status}\n"])
        .args(PACKAGES.iter().map(|(name, _)| name))
        .output()
        .context("cannot run dpkg-query; Keelway's set-up is made for Debian 12")?;
    // Unknown packages make dpkg-query fail, and still print the others.
    Ok(missing_in(&String::from_utf8_lossy(&output.stdout)))
}

fn missing_in(listing: &str) -> Vec<(&'static str, &'static str)> {
    PACKAGES
        .iter()
        .filter(|(name, _)| {
            !listing
                .lines()
                .any(|line| line == format!("{name} installed"))
        })
        .copied()
        .collect()
}

/// While this exists, packages that apt installs do not start their services (deb-systemd-invoke and invoke-rc.d ask it).
struct NoServiceStart {
    created: Option<PathBuf>,
}

impl NoServiceStart {
    fn engage() -> Result<NoServiceStart> {
        use std::os::unix::fs::PermissionsExt;
        let path = PathBuf::from("/usr/sbin/policy-rc.d");
        if path.exists() {
            // The machine has a policy of its own (as container images do); it stays in charge.
            return Ok(NoServiceStart { created: None });
        }
        fs::write(&path, "#!/bin/sh\nexit 101\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(NoServiceStart {
            created: Some(path),
        })
    }
}

impl Drop for NoServiceStart {
    fn drop(&mut self) {
        if let Some(path) = &self.created
            && let Err(error) = fs::remove_file(path)
        {
            say(format_args!("cannot remove {}: {error}", path.display()));
        }
    }
}

/// apt with suites of its own choosing, isolated from the machine's configuration: lists and cache are in a folder that
/// the caller removes, the mirror and its signing keys are the machine's.
pub struct OtherSuites {
    options: Vec<String>,
}

impl OtherSuites {
    /// Fetches the package lists of `suites` into `folder`.
    pub fn fetch(folder: &Path, suites: &[&str]) -> Result<OtherSuites> {
        Self::fetch_with_sources(folder, suites, &[])
    }

    /// Fetches the package lists of `suites`, and of the source packages of `sources`.
    pub fn fetch_with_sources(
        folder: &Path,
        suites: &[&str],
        sources: &[&str],
    ) -> Result<OtherSuites> {
        let mirror = debian_mirror()?;
        let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
        let packages = suites.iter().map(|suite| ("deb", suite));
        let sources: String = packages
            .chain(sources.iter().map(|suite| ("deb-src", suite)))
            .map(|(kind, suite)| format!("{kind} [signed-by={keys}] {mirror} {suite} main\n"))
            .collect();
        fs::create_dir_all(folder.join("lists/partial"))?;
        fs::create_dir_all(folder.join("cache/archives/partial"))?;
        let list = folder.join("sources.list");
        fs::write(&list, sources)?;
        let options = vec![
            format!("Dir::Etc::sourcelist={}", list.display()),
            "Dir::Etc::sourceparts=/dev/null".into(),
            format!("Dir::State::lists={}", folder.join("lists").display()),
            format!("Dir::Cache={}", folder.join("cache").display()),
            "Acquire::Languages=none".into(),
            // Without it, `apt-get update` calls a mirror it could not reach a warning.
            "APT::Update::Error-Mode=any".into(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".into(),
            // The folder may lie where the unprivileged _apt user cannot write.
            "APT::Sandbox::User=root".into(),
        ];
        let suites = OtherSuites { options };
        process::run_quiet(suites.command("apt-get").args(["update", "-q"]))
            .with_context(|| format!("cannot read the package lists of {mirror}"))?;
        Ok(suites)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for option in &self.options {
            command.args(["-o", option]);
        }
        command
    }

    /// The newest version of a package that starts with `prefix`.
    pub fn version_starting(&self, package: &str, prefix: &str) -> Result<Option<String>> {
        let table = process::stdout_of(self.command("apt-cache").args(["madison", package]))?;
        Ok(version_in_madison(&table, prefix))
    }

    /// Downloads a package, checked against the signed lists, and unpacks it below `into`. Nothing is installed.
    pub fn unpack(&self, package: &str, version: &str, into: &Path) -> Result<()> {
        let download = into.join(".download");
        fs::create_dir_all(&download)?;
        process::run_quiet(self.command("apt-get").current_dir(&download).args([
            "download",
            "-q",
            &format!("{package}={version}"),
        ]))?;
        let deb = fs::read_dir(&download)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .with_context(|| format!("apt downloaded no file for {package}={version}"))?;
        process::run_quiet(
            Command::new("dpkg-deb")
                .arg("--extract")
                .arg(&deb)
                .arg(into),
        )?;
        fs::remove_dir_all(&download)?;
        Ok(())
    }

    /// Downloads the archive that a source package is made from, as its authors published it, and unpacks it into `into`.
    pub fn unpack_source(&self, package: &str, into: &Path) -> Result<()> {
        let download = into.join(".download");
        fs::create_dir_all(&download)?;
        process::run_quiet(self.command("apt-get").current_dir(&download).args([
            "source",
            "-q",
            "--download-only",
            "--tar-only",
            package,
        ]))?;
        let archive = fs::read_dir(&download)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.to_string_lossy().contains(".orig.tar."))
            .with_context(|| format!("apt downloaded no archive for the source of {package}"))?;
        process::run_quiet(
            Command::new("tar")
                .args(["--strip-components=1", "-xf"])
                .arg(&archive)
                .arg("-C")
                .arg(into),
        )?;
        fs::remove_dir_all(&download)?;
        Ok(())
    }
}

/// The base address of the Debian mirror that apt is set up with.
fn debian_mirror() -> Result<String> {
    if let Some(mirror) = mirror_in(&index_targets()?) {
        return Ok(mirror);
    }
    // Without package lists apt does not know whose archive an address is.
    if process::is_root() {
        say("refreshing apt's package lists");
        process::run_quiet(apt_get().args(["update", "-q"]))?;
    }
    mirror_in(&index_targets()?).context(
        "apt knows no Debian mirror: see /etc/apt/sources.list.d, and run `apt-get update` as root",
    )
}

fn index_targets() -> Result<String> {
    process::stdout_of(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(ORIGIN) $(REPO_URI)",
        "Created-By: Packages",
    ]))
}

/// The first Debian archive in the lines `<origin> <address>`; the security archive carries no other suites' packages.
fn mirror_in(targets: &str) -> Option<String> {
    targets
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(origin, address)| {
            *origin == "Debian" && !address.trim_end_matches('/').ends_with("-security")
        })
        .map(|(_, address)| address.to_owned())
}

fn version_in_madison(table: &str, prefix: &str) -> Option<String> {
    table
        .lines()
        .filter_map(|line| line.split('|').nth(1))
        .map(str::trim)
        .find(|version| version.starts_with(prefix))
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_that_are_removed_or_unknown_count_as_missing() {
        let mut listing: String = PACKAGES
            .iter()
            .map(|(name, _)| format!("{name} installed\n"))
            .collect();
        assert!(missing_in(&listing).is_empty());
        listing = listing.replace("containerd installed", "containerd config-files");
        listing = listing.replace("runc installed\n", "");
        let names: Vec<&str> = missing_in(&listing).iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["containerd", "runc"]);
    }

    #[test]
    fn the_mirror_is_debians_own_archive() {
        let targets = "Node https://deb.example/node\n\
                       Debian http://mirror.example/debian-security/\n\
                       Debian http://mirror.example/debian/\n";
        assert_eq!(mirror_in(targets).unwrap(), "http://mirror.example/debian/");
        assert_eq!(mirror_in("Node https://deb.example/node\n"), None);
    }

    #[test]
    fn a_version_is_chosen_by_its_prefix() {
        let table = " rust-src | 1.98.0+dfsg1-1 | http://m/debian sid/main amd64 Packages\n \
                     rust-src | 1.97.1+dfsg1-1 | http://m/debian forky/main amd64 Packages";
        assert_eq!(
            version_in_madison(table, "1.97.").unwrap(),
            "1.97.1+dfsg1-1"
        );
        assert_eq!(version_in_madison(table, "1.9."), None);
        assert_eq!(version_in_madison("", "1.97."), None);
    }
}
