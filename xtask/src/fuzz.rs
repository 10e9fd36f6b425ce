//! The fuzz targets: built with libFuzzer's instrumentation, as cargo-fuzz builds them, and run for a while each. What is
//! learnt stays in target/fuzz/corpus; what breaks a target stays in target/fuzz/artifacts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result, bail};

use crate::process;
use crate::project::Project;

/// What cargo-fuzz asks of rustc: counters at every edge, and the values that are compared. No sanitizer: the parsers have no
/// unsafe code, and stable Rust builds this. Linked dynamically, unlike all else: libFuzzer looks behind its own memcmp for the C
/// library's, and a static program has none there.
const INSTRUMENTED: &[&str] = &[
    "--cfg=fuzzing",
    "-Ctarget-feature=-crt-static",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// Bytes of an input; what takes more is found in the tests of hostile documents.
const INPUT_BYTES_MAX: u32 = 4096;
/// Past this, one input is a hang.
const INPUT_SECONDS_MAX: u32 = 10;
const MEMORY_MIB_MAX: u32 = 1024;

/// How much a target tries.
#[derive(Clone, Copy)]
pub enum Effort {
    /// By chance, going on from what earlier runs learnt.
    Seconds(u64),
    /// The same inputs every time, from the seeds alone: what passed once passes again.
    Inputs(u64),
}

/// Builds the targets and runs those named, or all, as many at once as there are CPUs.
pub fn run(project: &Project, names: &[String], effort: Effort) -> Result<()> {
    let folder = project.root.join("fuzz");
    let all = targets(&folder)?;
    if let Some(unknown) = names.iter().find(|name| !all.contains(name)) {
        bail!("no fuzz target {unknown}; there are {}", all.join(", "));
    }
    let chosen = if names.is_empty() {
        all
    } else {
        names.to_vec()
    };
    let work = project.target_dir.join("fuzz");
    process::run(
        process::cargo(&project.root)
            .args(["build", "--locked", "--quiet", "--package", "keelway-fuzz"])
            .args(["--bins", "--profile", "fuzz", "--target-dir"])
            .arg(&work)
            .env_remove("RUSTFLAGS")
            .env("CARGO_ENCODED_RUSTFLAGS", INSTRUMENTED.join("\u{1f}")),
    )?;
    let programs = work.join(project.triple()).join("fuzz");
    let waiting = Mutex::new(chosen.into_iter());
    let outcomes = Mutex::new(Vec::new());
    let places = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..places {
            scope.spawn(|| {
                loop {
                    let next = waiting.lock().expect("no thread panics").next();
                    let Some(name) = next else { return };
                    let outcome = try_out(&name, &programs, &folder, &work, effort);
                    outcomes.lock().expect("no thread panics").push(outcome);
                }
            });
        }
    });
    let mut faults = Vec::new();
    for outcome in outcomes.into_inner().expect("no thread panics") {
        match outcome {
            Ok(said) => eprintln!("{said}"),
            Err(fault) => faults.push(format!("{fault:#}")),
        }
    }
    if !faults.is_empty() {
        bail!("{}", faults.join("\n\n"));
    }
    Ok(())
}

/// Names of the targets, by their sources.
fn targets(folder: &Path) -> Result<Vec<String>> {
    let folder = folder.join("fuzz_targets");
    let mut names = Vec::new();
    for entry in
        fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?
    {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(
                path.file_stem()
                    .map(|name| name.to_string_lossy().into_owned()),
            );
        }
    }
    names.sort();
    Ok(names)
}

/// Runs one target; gives its last line, or what broke it and where that input is.
fn try_out(
    name: &str,
    programs: &Path,
    folder: &Path,
    work: &Path,
    effort: Effort,
) -> Result<String> {
    let made = |part: &str| -> Result<PathBuf> {
        let path = work.join(part).join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    };
    let artifacts = made("artifacts")?;
    let mut target = Command::new(programs.join(name));
    let corpus = match effort {
        Effort::Seconds(seconds) => {
            target.arg(format!("-max_total_time={seconds}"));
            made("corpus")?
        }
        Effort::Inputs(count) => {
            target.arg(format!("-runs={count}")).arg("-seed=1");
            let fresh = made("tried")?;
            fs::remove_dir_all(&fresh)?;
            made("tried")?
        }
    };
    target
        .arg(format!("-max_len={INPUT_BYTES_MAX}"))
        .arg(format!("-timeout={INPUT_SECONDS_MAX}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB_MAX}"))
        .arg(format!("-dict={}", folder.join("words.dict").display()))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args(["-print_final_stats=1", "-verbosity=1"])
        .arg(&corpus)
        .arg(folder.join("seeds").join(name));
    let output = target
        .output()
        .with_context(|| format!("cannot start `{}`", process::shown(&target)))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let from = said.find("thread '<unnamed>'").or_else(|| said.find("=="));
        bail!(
            "the fuzz target {name} failed:\n{}",
            &said[from.unwrap_or(0)..]
        );
    }
    let figure = |key: &str| {
        let line = said.lines().find_map(|line| line.strip_prefix(key));
        line.map_or("?", str::trim).to_owned()
    };
    let runs = figure("stat::number_of_executed_units:");
    let found = figure("stat::new_units_added:");
    Ok(format!("fuzz {name}: {runs} inputs, {found} new ones kept"))
}
