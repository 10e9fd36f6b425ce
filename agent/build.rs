//! Builds the eBPF programs into an object that the agent carries: with nightly, because `core` is built for a target that has
//! none, and into a target folder of their own, so that every profile of the agent shares the result.

use std::{
    env, fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

const PROGRAMS: &str = "dataplane-ebpf";
const TARGET: &str = "bpfel-unknown-none";

fn main() -> anyhow::Result<()> {
    for watched in [
        "dataplane-ebpf/src",
        "dataplane-ebpf/Cargo.toml",
        "dataplane-abi/src",
    ] {
        println!("cargo:rerun-if-changed=../{watched}");
    }
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    let out_dir = PathBuf::from(env::var("OUT_DIR")?);
    let target_dir = target_dir(&out_dir)?.join("ebpf");
    let flags = [
        format!("--cfg=bpf_target_arch=\"{arch}\""),
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
    ];
    let output = Command::new("rustup")
        .args([
            "run",
            "nightly",
            "cargo",
            "build",
            "--quiet",
            "--release",
            "--package",
            PROGRAMS,
            "--bins",
            "--features",
            "bpf",
        ])
        .args(["--target", TARGET, "-Z", "build-std=core", "--target-dir"])
        .arg(&target_dir)
        // Cargo gives build scripts its own tools; the inner one finds nightly's. Without debug information there is no
        // BTF, and callbacks are refused.
        .env_remove("RUSTC")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .output()
        .context("cannot run rustup, which runs nightly for the eBPF programs")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!(
            "the eBPF programs do not build; `cargo xtask setup` puts nightly's rust-src and bpf-linker in place\n{said}"
        );
    }
    let object = target_dir.join(TARGET).join("release").join(PROGRAMS);
    let missing = || format!("no object at {}", object.display());
    fs::copy(&object, out_dir.join(PROGRAMS)).with_context(missing)?;
    // By this number programs that are in the kernel already are known for those of the object.
    let mut hasher = DefaultHasher::new();
    fs::read(&object).with_context(missing)?.hash(&mut hasher);
    println!("cargo:rustc-env=DATAPLANE_OBJECT={:016x}", hasher.finish());
    Ok(())
}

/// Cargo's target folder: the one that holds its cache tag, above OUT_DIR.
fn target_dir(out_dir: &Path) -> anyhow::Result<&Path> {
    let tagged = out_dir
        .ancestors()
        .find(|dir| dir.join("CACHEDIR.TAG").exists());
    tagged.with_context(|| format!("no target folder above {}", out_dir.display()))
}
