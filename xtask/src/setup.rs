//! Set-up of a machine: everything that building and running Keelway needs beyond rustup's stable and nightly.
//!
//! Each step first looks whether its result is there, says what it does when it is not, and puts results in place by a
//! rename, so that an interrupted set-up is simply run again. A complete machine is recognised in a fraction of a second.

mod apt;
mod cnitool;
mod kubectl;
mod toolchain;

use anyhow::{Context, Result, bail};

use crate::process;
use crate::project::Project;

/// The oldest kernel with the BPF features that Keelway always uses: the newest of them is tcx.
const KERNEL_MIN: (u32, u32) = (6, 6);

/// Prints one line of progress; everything the set-up changes on a machine is announced this way.
pub(crate) fn say(text: impl std::fmt::Display) {
    eprintln!("setup: {text}");
}

/// Runs every step.
pub fn run(project: &Project) -> Result<()> {
    check_machine()?;
    apt::install_missing()?;
    toolchain::run(project)?;
    kubectl::install_if_absent(project)?;
    kubectl::pin_clients(project)?;
    cnitool::pin(project)
}

fn check_machine() -> Result<()> {
    if cfg!(not(target_os = "linux")) {
        bail!("Keelway runs on Linux only");
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .context("cannot read the kernel's version")?;
    check_kernel(release.trim())?;
    if process::find("rustup").is_none() {
        bail!(
            "rustup is not installed. Install it with Rust stable and nightly:\n  \
             curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y\n  \
             rustup toolchain install nightly --profile minimal"
        );
    }
    Ok(())
}

fn check_kernel(release: &str) -> Result<()> {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < KERNEL_MIN {
        bail!(
            "the kernel is {release}, and Keelway needs Linux {}.{} or newer (Debian 12 has 6.1, and newer ones in bookworm-backports)",
            KERNEL_MIN.0,
            KERNEL_MIN.1
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_from_6_6_on_are_accepted() {
        for release in ["6.6.0-91-generic", "6.12.9+bpo-amd64", "6.18.44", "10.0"] {
            assert!(check_kernel(release).is_ok(), "{release}");
        }
    }

    #[test]
    fn older_kernels_are_refused_with_the_version_that_is_needed() {
        for release in ["6.1.0-18-amd64", "5.15.21", "strange"] {
            let error = check_kernel(release).unwrap_err().to_string();
            assert!(error.contains(release) && error.contains("6.6"), "{error}");
        }
    }
}
