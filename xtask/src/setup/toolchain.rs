//! The eBPF toolchain: a nightly compiler, the source of its `core`, and bpf-linker.
//!
//! aya's programs are compiled with `-Z build-std=core`, which needs the standard library's source (rust-src). rustup has
//! it for the nightlies it still serves; for an older one, Debian's rust-src of the same minor version has the same
//! `core`. bpf-linker loads the nightly's own LLVM, so its version and the nightly's LLVM belong together.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{apt, say};
use crate::process;
use crate::project::Project;

/// The bpf-linker that works with [`LLVM_MAJOR`] and the aya versions in the workspace table.
const BPF_LINKER: &str = "0.10.3";
const LLVM_MAJOR: u32 = 22;
/// Names an archive (.tar.xz) with the `library` folder of a matching rust-src, for machines that reach no mirror.
const RUST_SRC_VARIABLE: &str = "KEELWAY_RUST_SRC";
/// rustup retries for minutes when its server cannot be reached.
const RUSTUP_SECONDS_MAX: &str = "90";

/// Puts rust-src and bpf-linker in place.
pub fn run(project: &Project) -> Result<()> {
    let nightly = Nightly::find()?;
    if !nightly.has_library() {
        install_library(&nightly)?;
    }
    install_bpf_linker(project)
}

struct Nightly {
    sysroot: PathBuf,
    /// For example `1.97.0-nightly`.
    release: String,
}

impl Nightly {
    fn find() -> Result<Nightly> {
        const HOW: &str = "Install it with `rustup toolchain install nightly --profile minimal`; eBPF programs are compiled by it";
        let version =
            process::stdout_of(Command::new("rustup").args(["run", "nightly", "rustc", "-vV"]))
                .with_context(|| format!("Rust's nightly toolchain is missing. {HOW}"))?;
        let field = |name: &str| {
            version
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
                .map(str::to_owned)
                .with_context(|| {
                    format!("`rustc -vV` of the nightly toolchain does not tell its {name}")
                })
        };
        let llvm = field("LLVM version")?;
        if !llvm.starts_with(&format!("{LLVM_MAJOR}.")) {
            bail!(
                "the nightly toolchain has LLVM {llvm}, and bpf-linker {BPF_LINKER} works with LLVM {LLVM_MAJOR}: \
                 install a nightly of Rust 1.97, for example with `rustup toolchain install nightly-2026-05-20 --profile minimal`, \
                 and make it the one named nightly (`rustup toolchain link nightly ...`)"
            );
        }
        let sysroot = process::stdout_of(
            Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]),
        )?;
        Ok(Nightly {
            sysroot: PathBuf::from(sysroot),
            release: field("release")?,
        })
    }

    fn library(&self) -> PathBuf {
        self.sysroot.join("lib/rustlib/src/rust/library")
    }

    fn has_library(&self) -> bool {
        is_library(&self.library())
    }

    /// The version without its last number and suffix, as in `1.97.`.
    fn minor_prefix(&self) -> Result<String> {
        minor_prefix(&self.release)
    }
}

fn minor_prefix(release: &str) -> Result<String> {
    let mut numbers = release.split('.');
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) => Ok(format!("{major}.{minor}.")),
        _ => bail!("the nightly toolchain's release {release:?} is not a version"),
    }
}

/// What `-Z build-std=core` reads: the lock file of the library's workspace and the crates below it.
fn is_library(folder: &Path) -> bool {
    [
        "Cargo.lock",
        "Cargo.toml",
        "core/src/lib.rs",
        "compiler-builtins/Cargo.toml",
    ]
    .iter()
    .all(|file| folder.join(file).is_file())
}

/// One way to the library of a nightly.
type Way = fn(&Nightly) -> Result<()>;

fn install_library(nightly: &Nightly) -> Result<()> {
    say(format_args!(
        "the nightly toolchain ({}) has no rust-src; adding it",
        nightly.release
    ));
    if nightly.library().exists() {
        // Half a library is of no use to anyone, and would stop rustup.
        fs::remove_dir_all(nightly.library())
            .with_context(|| format!("cannot remove {}", nightly.library().display()))?;
    }
    let mut failures = Vec::new();
    let ways: [(&str, Way); 3] = [
        ("rustup component add rust-src", from_rustup),
        ("Debian's rust-src package", from_debian),
        (RUST_SRC_VARIABLE, from_archive),
    ];
    for (name, way) in ways {
        match way(nightly) {
            Ok(()) if nightly.has_library() => {
                say(format_args!("rust-src is in place, by {name}"));
                return Ok(());
            }
            Ok(()) => failures.push(format!("{name}: left no usable library")),
            Err(error) => failures.push(format!("{name}: {error:#}")),
        }
    }
    bail!(
        "no source of the nightly toolchain's standard library was found, which eBPF programs are built with:\n  {}\n\
         Set {RUST_SRC_VARIABLE} to a .tar.xz that holds the `library` folder of Rust {}x, or install a nightly \
         that rustup still serves.",
        failures.join("\n  "),
        nightly.minor_prefix()?
    )
}

fn from_rustup(_nightly: &Nightly) -> Result<()> {
    process::run_quiet(Command::new("timeout").args([
        RUSTUP_SECONDS_MAX,
        "rustup",
        "component",
        "add",
        "rust-src",
        "--toolchain",
        "nightly",
    ]))
}

fn from_debian(nightly: &Nightly) -> Result<()> {
    let staging = Staging::beside(&nightly.library())?;
    let prefix = nightly.minor_prefix()?;
    let suites = apt::OtherSuites::fetch(&staging.0.join("apt"), &["forky", "sid"])?;
    let version = suites
        .version_starting("rust-src", &prefix)?
        .with_context(|| format!("Debian's forky and sid have no rust-src {prefix}x"))?;
    say(format_args!(
        "unpacking Debian's rust-src {version} (it is not installed)"
    ));
    let unpacked = staging.0.join("deb");
    fs::create_dir_all(&unpacked)?;
    suites.unpack("rust-src", &version, &unpacked)?;
    let sources = unpacked.join("usr/src");
    let library = fs::read_dir(&sources)
        .with_context(|| format!("Debian's rust-src {version} has no usr/src"))?
        .filter_map(|entry| Some(entry.ok()?.path().join("library")))
        .find(|folder| is_library(folder))
        .with_context(|| format!("Debian's rust-src {version} holds no library"))?;
    put_in_place(&library, nightly)
}

fn from_archive(nightly: &Nightly) -> Result<()> {
    let archive = std::env::var_os(RUST_SRC_VARIABLE).context("not set")?;
    let staging = Staging::beside(&nightly.library())?;
    say(format_args!("unpacking {}", Path::new(&archive).display()));
    process::run_quiet(
        Command::new("tar")
            .arg("--extract")
            .arg("--no-same-owner")
            .arg("--file")
            .arg(&archive)
            .arg("--directory")
            .arg(&staging.0),
    )?;
    let library = find_library(&staging.0, 4)
        .with_context(|| format!("{archive:?} holds no `library` folder"))?;
    put_in_place(&library, nightly)
}

/// Looks for a library folder at most `depth` levels down: archives differ in what they put around it.
fn find_library(folder: &Path, depth: usize) -> Option<PathBuf> {
    if is_library(folder) {
        return Some(folder.to_path_buf());
    }
    if depth == 0 {
        return None;
    }
    fs::read_dir(folder)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.is_dir())
        .find_map(|path| find_library(&path, depth - 1))
}

fn put_in_place(library: &Path, nightly: &Nightly) -> Result<()> {
    let destination = nightly.library();
    fs::rename(library, &destination).with_context(|| {
        format!(
            "cannot move {} to {}",
            library.display(),
            destination.display()
        )
    })
}

/// A folder on the same file system as its destination, removed with all it holds when dropped.
struct Staging(PathBuf);

impl Staging {
    fn beside(destination: &Path) -> Result<Staging> {
        let parent = destination.parent().context("a destination has a parent")?;
        let folder = parent.join(".keelway-staging");
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot write to {}", parent.display()))?;
        Ok(Staging(folder))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // What is left would only waste disk; the next set-up removes it.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn install_bpf_linker(project: &Project) -> Result<()> {
    if installed_bpf_linker().as_deref() == Some(BPF_LINKER) {
        return Ok(());
    }
    say(format_args!(
        "installing bpf-linker {BPF_LINKER} (takes about a minute)"
    ));
    let target = project.target_dir.join("bpf-linker");
    let result = process::run_quiet(
        Command::new("rustup")
            .args([
                "run",
                "stable",
                "cargo",
                "install",
                "--quiet",
                "--locked",
                "--force",
                "bpf-linker",
            ])
            .arg(format!("--version={BPF_LINKER}"))
            .env("CARGO_TARGET_DIR", &target)
            // The project's cargo configuration links statically; bpf-linker loads LLVM at run time and cannot be static.
            .current_dir("/")
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env_remove("CARGO_BUILD_TARGET"),
    );
    // Only the installed program is worth its space.
    let _ = fs::remove_dir_all(&target);
    result.context("cannot install bpf-linker")?;
    match installed_bpf_linker() {
        Some(version) if version == BPF_LINKER => Ok(()),
        other => bail!(
            "bpf-linker {BPF_LINKER} was installed, but the one found first in PATH is {}",
            other.as_deref().unwrap_or("not runnable")
        ),
    }
}

/// The version of the bpf-linker that rustc would run.
fn installed_bpf_linker() -> Option<String> {
    let mut command = Command::new("bpf-linker");
    if let Some(path) = process::path_with_cargo_bin() {
        command.env("PATH", path);
    }
    let output = process::stdout_of(command.arg("--version")).ok()?;
    Some(output.split_whitespace().nth(1)?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_minor_version_is_what_a_library_must_share() {
        assert_eq!(minor_prefix("1.97.0-nightly").unwrap(), "1.97.");
        assert!(minor_prefix("nightly").is_err());
    }

    #[test]
    fn a_library_is_found_where_archives_put_it_and_half_a_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let library = folder.path().join("usr/src/rustc-1.97.1/library");
        for file in ["Cargo.lock", "Cargo.toml", "core/src/lib.rs"] {
            let file = library.join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, "").unwrap();
        }
        assert_eq!(find_library(folder.path(), 4), None);
        fs::create_dir_all(library.join("compiler-builtins")).unwrap();
        fs::write(library.join("compiler-builtins/Cargo.toml"), "").unwrap();
        assert_eq!(find_library(folder.path(), 4), Some(library));
        assert_eq!(find_library(folder.path(), 3), None);
    }
}
