//! Control groups that only a bench uses, on any machine that has the second version of them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// Inside and outside of what the socket hooks are attached to.
pub struct ControlGroups {
    root: PathBuf,
}

impl ControlGroups {
    pub fn make() -> Result<Self> {
        let hierarchy = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
            .into_iter()
            .map(Path::new)
            .find(|path| path.join("cgroup.controllers").exists())
            .context("no cgroup v2 hierarchy at /sys/fs/cgroup or /sys/fs/cgroup/unified")?;
        clear(hierarchy);
        let groups = Self {
            root: hierarchy.join(format!("{PREFIX}{}", std::process::id())),
        };
        for group in groups.all() {
            fs::create_dir_all(&group).with_context(|| format!("making {}", group.display()))?;
        }
        Ok(groups)
    }

    pub fn hooked(&self) -> PathBuf {
        self.root.join("hooked")
    }

    pub fn plain(&self) -> PathBuf {
        self.root.join("plain")
    }

    /// For the hooks of all nodes that no client is on: one that is called passes the programs of all whose group it is in.
    pub fn elsewhere(&self) -> PathBuf {
        self.root.join("elsewhere")
    }

    /// For hooks that do nothing.
    pub fn empty_hooks(&self) -> PathBuf {
        self.root.join("empty-hooks")
    }

    fn all(&self) -> [PathBuf; 4] {
        [
            self.hooked(),
            self.elsewhere(),
            self.plain(),
            self.empty_hooks(),
        ]
    }
}

impl Drop for ControlGroups {
    fn drop(&mut self) {
        for group in self.all().into_iter().chain([self.root.clone()]) {
            // One with processes in it stays.
            let _ = fs::remove_dir(group);
        }
    }
}

/// What the names of all runs' groups begin with; the process's id follows.
const PREFIX: &str = "keelway-bench-";

/// Takes away what runs left that were killed.
fn clear(hierarchy: &Path) {
    for entry in fs::read_dir(hierarchy).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Its end removes it.
            drop(ControlGroups { root: entry.path() });
        }
    }
}
