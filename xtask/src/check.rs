//! What CI asks of a change: formatting, lints, and the tests.

use std::process::Command;

use anyhow::Result;

use crate::fuzz::{self, Effort};
use crate::process;
use crate::project::Project;

/// `cargo fmt --check`, clippy with every warning an error, and `cargo deny` where it is installed.
pub fn lint(project: &Project) -> Result<()> {
    step("formatting");
    process::run(process::cargo(&project.root).args(["fmt", "--all", "--check"]))?;
    step("clippy");
    process::run(process::cargo(&project.root).args([
        "clippy",
        "--locked",
        "--quiet",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))?;
    if process::run_quiet(process::cargo(&project.root).args(["deny", "--version"])).is_ok() {
        step("licences, sources and versions of dependencies");
        // Advisories come from the network, and change without the project: `cargo deny check advisories` asks for them.
        process::run(process::cargo(&project.root).args([
            "deny",
            "--log-level",
            "error",
            "check",
            "licenses",
            "bans",
            "sources",
        ]))?;
    }
    Ok(())
}

/// Inputs that CI tries on each fuzz target.
const FUZZ_INPUTS: u64 = 20_000;

/// The fuzz targets, with the same inputs every time; `cargo xtask fuzz` tries others, and for longer.
pub fn fuzz(project: &Project) -> Result<()> {
    step("fuzz targets");
    fuzz::run(project, &[], Effort::Inputs(FUZZ_INPUTS))
}

/// Runs the tests. With arguments, they choose; without, every test of every crate runs. The test runner speaks last.
pub fn test(project: &Project, profile: &str, args: &[String]) -> Result<()> {
    step("tests");
    let mut runner = runner(project, profile);
    if args.is_empty() {
        runner.arg("--workspace");
    }
    process::become_command(runner.args(args))
}

fn has_nextest(project: &Project) -> bool {
    process::run_quiet(process::cargo(&project.root).args(["nextest", "--version"])).is_ok()
}

fn runner(project: &Project, profile: &str) -> Command {
    let mut cargo = process::cargo(&project.root);
    if has_nextest(project) {
        cargo.args([
            "nextest",
            "run",
            "--locked",
            "--cargo-profile",
            profile,
            "--no-tests",
            "warn",
        ]);
    } else {
        cargo.args(["test", "--locked", "--profile", profile]);
    }
    crate::environment(&mut cargo, project, profile);
    cargo
}

fn step(name: &str) {
    eprintln!("== {name}");
}
