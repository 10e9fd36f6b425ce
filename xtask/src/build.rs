//! Builds of our binaries by cargo.

use anyhow::Result;

use crate::process;
use crate::project::{PACKAGES, Project};

/// Builds every binary of the project with one call, so that cargo plans them together.
pub fn all(project: &Project, profile: &str) -> Result<()> {
    packages(project, profile, PACKAGES)
}

/// Builds the binaries of some packages.
pub fn packages(project: &Project, profile: &str, packages: &[&str]) -> Result<()> {
    let mut cargo = process::cargo(&project.root);
    cargo.args(["build", "--locked", "--bins", "--profile", profile]);
    for package in packages {
        cargo.args(["--package", package]);
    }
    process::run(&mut cargo)
}
