//! Where things are in the checkout, and which binaries a profile produces.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Packages whose binaries a user or an image needs; the eBPF object is built by the agent's build script.
pub const PACKAGES: &[&str] = &[
    "keelway",
    "keelway-agent",
    "keelway-bench",
    "keelway-cni",
    "keelway-controlplane",
    "keelway-dns",
    "keelway-image-programs",
    "keelway-kubelet",
];

/// A checkout of Keelway: its root, the target triple that `.cargo/config.toml` builds for, and the version.
pub struct Project {
    pub root: PathBuf,
    pub target_dir: PathBuf,
    triple: &'static str,
    pub version: &'static str,
}

impl Project {
    /// The checkout that this xtask was compiled in.
    pub fn locate() -> Result<Project> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("xtask lies in a folder of the project")?
            .to_path_buf();
        if !root.join("Cargo.toml").exists() {
            bail!(
                "the project was moved from {} after xtask was built; run `cargo clean -p xtask`",
                root.display()
            );
        }
        let target_dir = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => root.join(dir),
            None => root.join("target"),
        };
        let triple = match std::env::consts::ARCH {
            "x86_64" => "x86_64-unknown-linux-gnu",
            "aarch64" => "aarch64-unknown-linux-gnu",
            other => bail!("Keelway is built on x86_64 and aarch64 Linux, this machine is {other}"),
        };
        Ok(Project {
            root,
            target_dir,
            triple,
            version: env!("CARGO_PKG_VERSION"),
        })
    }

    /// The folder that cargo puts a profile's binaries in.
    pub fn bin_dir(&self, profile: &str) -> PathBuf {
        let folder = if profile == "dev" { "debug" } else { profile };
        self.target_dir.join(self.triple).join(folder)
    }

    /// What is built for.
    pub fn triple(&self) -> &'static str {
        self.triple
    }

    pub fn images_dir(&self) -> PathBuf {
        self.target_dir.join("images")
    }

    /// kubectl and helm of the end-to-end suite.
    pub fn clients_dir(&self) -> PathBuf {
        self.target_dir.join("clients")
    }
}
