//! cgroups: `<root>/kubepods[/burstable|/besteffort]/pod<uid>` in every hierarchy that is mounted.
//!
//! The runtime makes a container's own cgroup below the pod's. On a hybrid machine that happens in each v1 hierarchy
//! and in the v2 one, so parents are made in all of them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Pod;

use crate::resources::{CPU_PERIOD_US, Limits, QosClass, pod_limits, qos_class};

/// A CgroupError names the cgroup that could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("cannot read /proc/self/mountinfo: {0}")]
    Mounts(io::Error),
    #[error("cannot make cgroup {path}: {source}")]
    Make { path: PathBuf, source: io::Error },
    #[error("no cgroup hierarchy is mounted")]
    None,
}

/// A Hierarchy is one mounted cgroup tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    pub mount: PathBuf,
    pub unified: bool,
    pub cpuset: bool,
}

/// Cgroups knows the hierarchies of this node and the kubelet's place in them.
#[derive(Debug, Clone)]
pub struct Cgroups {
    hierarchies: Vec<Hierarchy>,
    root: String,
}

/// Hierarchies in the text of /proc/self/mountinfo, the first mount of each.
pub fn hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
    let mut found: Vec<(String, Hierarchy)> = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let mut right = right.split(' ');
        let (Some(kind), Some(_), Some(options)) = (right.next(), right.next(), right.next())
        else {
            continue;
        };
        if kind != "cgroup" && kind != "cgroup2" {
            continue;
        }
        let Some(mount) = left.split(' ').nth(4) else {
            continue;
        };
        let unified = kind == "cgroup2";
        let identity = if unified {
            "cgroup2".to_owned()
        } else {
            options.to_owned()
        };
        if found.iter().any(|(known, _)| *known == identity) {
            continue;
        }
        let cpuset = !unified && options.split(',').any(|o| o == "cpuset");
        found.push((
            identity,
            Hierarchy {
                mount: PathBuf::from(mount),
                unified,
                cpuset,
            },
        ));
    }
    found.into_iter().map(|(_, hierarchy)| hierarchy).collect()
}

/// The cgroup of a pod, relative to each hierarchy: what CRI calls the cgroup parent.
pub fn pod_cgroup(root: &str, pod: &Pod) -> String {
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    match qos_class(pod) {
        QosClass::Guaranteed => format!("{root}/kubepods/pod{uid}"),
        QosClass::Burstable => format!("{root}/kubepods/burstable/pod{uid}"),
        QosClass::BestEffort => format!("{root}/kubepods/besteffort/pod{uid}"),
    }
}

impl Cgroups {
    /// Finds the hierarchies; `root` is absolute without trailing slash, empty for the top.
    pub fn discover(root: &str) -> Result<Self, CgroupError> {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").map_err(CgroupError::Mounts)?;
        let hierarchies = hierarchies(&mountinfo);
        if hierarchies.is_empty() {
            return Err(CgroupError::None);
        }
        Ok(Self {
            hierarchies,
            root: root.to_owned(),
        })
    }

    pub fn with_hierarchies(root: &str, hierarchies: Vec<Hierarchy>) -> Self {
        Self {
            hierarchies,
            root: root.to_owned(),
        }
    }

    pub fn root(&self) -> &str {
        &self.root
    }

    /// Makes the classes' cgroups once at start.
    pub fn make_classes(&self) -> Result<(), CgroupError> {
        for class in ["/kubepods", "/kubepods/burstable", "/kubepods/besteffort"] {
            self.make(&format!("{}{class}", self.root))?;
        }
        // Best-effort pods get the least share of a contended CPU.
        self.set_limits(
            &format!("{}/kubepods/besteffort", self.root),
            &Limits {
                cpu_shares: crate::resources::CPU_SHARES_MIN,
                cpu_quota_us: None,
                memory_bytes: None,
            },
        );
        Ok(())
    }

    /// Makes a pod's cgroup with its limits and answers its path for CRI.
    pub fn make_pod(&self, pod: &Pod) -> Result<String, CgroupError> {
        let path = pod_cgroup(&self.root, pod);
        self.make(&path)?;
        if let Some(spec) = &pod.spec {
            self.set_limits(&path, &pod_limits(spec));
        }
        Ok(path)
    }

    /// Removes a pod's cgroup, and what the runtime left below it. Cgroups with processes stay: the kernel refuses.
    /// The uid suffices, as nothing else may be known of a pod that was deleted while no kubelet ran.
    pub fn remove_uid(&self, uid: &str) {
        for class in ["", "/burstable", "/besteffort"] {
            for hierarchy in &self.hierarchies {
                remove_tree(&below(
                    &hierarchy.mount,
                    &format!("{}/kubepods{class}/pod{uid}", self.root),
                ));
            }
        }
    }

    fn make(&self, cgroup: &str) -> Result<(), CgroupError> {
        for hierarchy in &self.hierarchies {
            let path = below(&hierarchy.mount, cgroup);
            fs::create_dir_all(&path).map_err(|source| CgroupError::Make {
                path: path.clone(),
                source,
            })?;
            if hierarchy.cpuset {
                inherit_cpuset(&hierarchy.mount, cgroup);
            }
            if hierarchy.unified {
                enable_controllers(&hierarchy.mount, cgroup);
            }
        }
        Ok(())
    }

    fn set_limits(&self, cgroup: &str, limits: &Limits) {
        // v2 weights are 1..10000 where v1 shares are 2..262144; the conversion is the one of runc and systemd.
        let weight = 1 + (limits.cpu_shares - 2) * 9999 / 262_142;
        let max = limits
            .cpu_quota_us
            .map_or("max".to_owned(), |quota| quota.to_string());
        let memory = limits
            .memory_bytes
            .map_or("max".to_owned(), |bytes| bytes.to_string());
        let settings = [
            (false, "cpu.shares", limits.cpu_shares.to_string()),
            (false, "cpu.cfs_period_us", CPU_PERIOD_US.to_string()),
            (
                false,
                "cpu.cfs_quota_us",
                limits.cpu_quota_us.unwrap_or(-1).to_string(),
            ),
            (
                false,
                "memory.limit_in_bytes",
                limits.memory_bytes.unwrap_or(-1).to_string(),
            ),
            (true, "cpu.weight", weight.to_string()),
            (true, "cpu.max", format!("{max} {CPU_PERIOD_US}")),
            (true, "memory.max", memory),
        ];
        for hierarchy in &self.hierarchies {
            for (unified, file, value) in &settings {
                let path = below(&hierarchy.mount, cgroup).join(file);
                if *unified != hierarchy.unified || !path.exists() {
                    continue;
                }
                if let Err(error) = fs::write(&path, value) {
                    tracing::warn!(path = %path.display(), value, %error, "cannot set a cgroup limit");
                }
            }
        }
    }
}

fn below(mount: &Path, cgroup: &str) -> PathBuf {
    mount.join(cgroup.trim_start_matches('/'))
}

fn ancestors<'a>(mount: &'a Path, cgroup: &'a str) -> impl Iterator<Item = PathBuf> + 'a {
    let mut at = mount.to_path_buf();
    cgroup
        .split('/')
        .filter(|part| !part.is_empty())
        .map(move |part| {
            at.push(part);
            at.clone()
        })
}

/// v1 cpusets are born empty and take no process until they name CPUs and memory nodes.
fn inherit_cpuset(mount: &Path, cgroup: &str) {
    let mut parent = mount.to_path_buf();
    for path in ancestors(mount, cgroup) {
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let empty =
                fs::read_to_string(path.join(file)).is_ok_and(|text| text.trim().is_empty());
            if empty && let Ok(value) = fs::read_to_string(parent.join(file)) {
                let _ = fs::write(path.join(file), value.trim());
            }
        }
        parent = path;
    }
}

/// On v2 a controller works in a cgroup only if its parent hands it down. A hybrid machine's v2 tree has none to hand.
fn enable_controllers(mount: &Path, cgroup: &str) {
    let mut parent = mount.to_path_buf();
    for path in ancestors(mount, cgroup) {
        for controller in ["cpuset", "cpu", "io", "memory", "pids"] {
            let available = fs::read_to_string(parent.join("cgroup.controllers"))
                .is_ok_and(|text| text.split_whitespace().any(|c| c == controller));
            if available {
                let _ = fs::write(
                    parent.join("cgroup.subtree_control"),
                    format!("+{controller}"),
                );
            }
        }
        parent = path;
    }
}

fn remove_tree(path: &Path) {
    let Ok(entries) = fs::read_dir(path) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    let _ = fs::remove_dir(path);
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const HYBRID: &str = "\
30 25 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
32 30 0:28 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset
33 30 0:29 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
34 30 0:29 / /mnt/again rw,relatime - cgroup2 cgroup2 rw
";

    #[test]
    fn every_hierarchy_is_found_once() {
        let found = hierarchies(HYBRID);
        let mounts: Vec<_> = found
            .iter()
            .map(|h| (h.mount.to_str().unwrap(), h.unified, h.cpuset))
            .collect();
        assert_eq!(
            mounts,
            [
                ("/sys/fs/cgroup/cpu", false, false),
                ("/sys/fs/cgroup/cpuset", false, true),
                ("/sys/fs/cgroup/unified", true, false)
            ]
        );
    }

    #[test]
    fn a_pod_is_made_in_every_hierarchy_under_its_class_and_removed_again() {
        let dir = tempfile::tempdir().unwrap();
        let mounts: Vec<_> = ["cpu", "unified"]
            .iter()
            .map(|name| dir.path().join(name))
            .collect();
        let cgroups = Cgroups::with_hierarchies(
            "/keelway/c/n",
            mounts
                .iter()
                .map(|mount| Hierarchy {
                    mount: mount.clone(),
                    unified: false,
                    cpuset: false,
                })
                .collect(),
        );
        let pod: Pod = serde_json::from_value(
            json!({"metadata": {"uid": "u1"}, "spec": {"containers": [{"name": "a"}]}}),
        )
        .unwrap();
        let path = cgroups.make_pod(&pod).unwrap();
        assert_eq!(path, "/keelway/c/n/kubepods/besteffort/podu1");
        for mount in &mounts {
            assert!(mount.join("keelway/c/n/kubepods/besteffort/podu1").is_dir());
        }
        cgroups.remove_uid("u1");
        for mount in &mounts {
            assert!(!mount.join("keelway/c/n/kubepods/besteffort/podu1").exists());
            assert!(mount.join("keelway/c/n/kubepods/besteffort").is_dir());
        }
    }
}
