//! The control groups of a cluster's nodes, in the v2 hierarchy and in every v1 hierarchy of the machine.
//!
//! `/keelway/<cluster>/<node>` is a node's; its own processes are in `system` below it, pods in `kubepods`. On a machine
//! with v2 only, a group that passes controllers on may not hold processes itself, hence the leaf.

use std::fs;
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The folder under which all clusters' groups are.
const ROOT: &str = "keelway";
/// The folder of the group of this machine as a node, which `down` does not know.
const MACHINE_ROOT: &str = "keelway-node";
/// The leaf that holds a node's own processes.
const SYSTEM: &str = "system";

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error(
        "no cgroup hierarchy is mounted (looked in /proc/self/mountinfo); mount cgroup2 at /sys/fs/cgroup"
    )]
    NoHierarchy,
    #[error(
        "no cgroup v2 hierarchy is mounted, and the socket hooks need one; \
         mount one with: mount -t cgroup2 none /sys/fs/cgroup/unified"
    )]
    NoV2,
    #[error("cannot {action} cgroup {path}: {source}")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("processes in cgroup {path} do not end after SIGKILL: {pids:?}")]
    StillPopulated { path: PathBuf, pids: Vec<u32> },
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Io {
        action,
        path,
        source,
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    mount: PathBuf,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    V2,
    V1,
    /// v1 cpuset: a new group takes no process until it has CPUs and memory nodes.
    V1Cpuset,
}

/// The cgroup hierarchies that this machine has mounted, and the folder in each of them that ours are in.
#[derive(Debug, Clone)]
pub struct Hierarchies {
    found: Vec<Hierarchy>,
    root: &'static str,
}

impl Hierarchies {
    /// Those named in /proc/self/mountinfo.
    ///
    /// # Errors
    /// When there are none, or no v2 one.
    pub fn of_this_machine() -> Result<Self, CgroupError> {
        let path = Path::new("/proc/self/mountinfo");
        let found = Self::parse(&fs::read_to_string(path).map_err(io_error("read", path))?);
        if found.found.is_empty() {
            return Err(CgroupError::NoHierarchy);
        }
        if found.v2().is_none() {
            return Err(CgroupError::NoV2);
        }
        Ok(found)
    }

    fn parse(mountinfo: &str) -> Self {
        let mut found: Vec<Hierarchy> = Vec::new();
        for line in mountinfo.lines() {
            let Some((left, right)) = line.split_once(" - ") else {
                continue;
            };
            let Some(mount) = left.split(' ').nth(4) else {
                continue;
            };
            let mut fields = right.split(' ');
            let (fs_type, options) = (fields.next(), fields.nth(1).unwrap_or_default());
            let kind = match fs_type {
                Some("cgroup2") => Kind::V2,
                Some("cgroup") if options.split(',').any(|option| option == "cpuset") => {
                    Kind::V1Cpuset
                }
                Some("cgroup") => Kind::V1,
                _ => continue,
            };
            let hierarchy = Hierarchy {
                mount: PathBuf::from(mount),
                kind,
            };
            if !found.contains(&hierarchy) {
                found.push(hierarchy);
            }
        }
        Hierarchies { found, root: ROOT }
    }

    /// The same, for what this machine runs as a node itself.
    #[must_use]
    pub fn for_the_machine(&self) -> Self {
        Hierarchies {
            root: MACHINE_ROOT,
            ..self.clone()
        }
    }

    /// The group of a node below each hierarchy.
    pub fn group(&self, cluster: &str, node: &str) -> PathBuf {
        Path::new("/").join(self.root).join(cluster).join(node)
    }

    fn v2(&self) -> Option<&Hierarchy> {
        self.found
            .iter()
            .find(|hierarchy| hierarchy.kind == Kind::V2)
    }

    /// Where the v2 hierarchy is mounted: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` beside v1.
    pub fn v2_mount(&self) -> &Path {
        self.v2()
            .map_or(Path::new("/sys/fs/cgroup"), |hierarchy| &hierarchy.mount)
    }

    /// Names of clusters that have a group in any hierarchy.
    pub fn clusters(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .found
            .iter()
            .flat_map(|hierarchy| folders(&hierarchy.mount.join(self.root)))
            .collect();
        names.sort();
        names.dedup();
        names
    }

    /// Makes the groups of a node everywhere.
    ///
    /// # Errors
    /// When a folder cannot be made, usually because we are not root.
    pub fn create(&self, cluster: &str, node: &str) -> Result<(), CgroupError> {
        for hierarchy in &self.found {
            let mut path = hierarchy.mount.clone();
            if hierarchy.kind == Kind::V2 {
                delegate(&path);
            }
            for part in [self.root, cluster, node, SYSTEM] {
                let parent = path.clone();
                path.push(part);
                match fs::create_dir(&path) {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    Err(error) => return Err(io_error("make", &path)(error)),
                }
                match hierarchy.kind {
                    Kind::V2 if part != SYSTEM => delegate(&path),
                    Kind::V1Cpuset => copy_cpuset(&parent, &path)?,
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Moves the calling process into a node's group for its own processes, everywhere.
    ///
    /// # Errors
    /// When a group is not there (any more).
    pub fn join(&self, cluster: &str, node: &str) -> Result<(), CgroupError> {
        for hierarchy in &self.found {
            let path = hierarchy
                .mount
                .join(self.root)
                .join(cluster)
                .join(node)
                .join(SYSTEM)
                .join("cgroup.procs");
            fs::write(&path, "0").map_err(io_error("join", &path))?;
        }
        Ok(())
    }

    /// Kills every process in a cluster's groups and waits until they are empty.
    ///
    /// # Errors
    /// When some process has not ended within `timeout`.
    pub fn kill(&self, cluster: &str, timeout: Duration) -> Result<(), CgroupError> {
        self.kill_below(Path::new(cluster), timeout)
    }

    /// The same for the groups of one node.
    ///
    /// # Errors
    /// As [`Hierarchies::kill`].
    pub fn kill_node(
        &self,
        cluster: &str,
        node: &str,
        timeout: Duration,
    ) -> Result<(), CgroupError> {
        self.kill_below(&Path::new(cluster).join(node), timeout)
    }

    fn kill_below(&self, folder: &Path, timeout: Duration) -> Result<(), CgroupError> {
        let deadline = Instant::now() + timeout;
        if let Some(v2) = self.v2() {
            let group = v2.mount.join(self.root).join(folder);
            if group.is_dir() {
                // cgroup.kill is from Linux 5.14, below our floor.
                let path = group.join("cgroup.kill");
                fs::write(&path, "1").map_err(io_error("kill", &path))?;
                wait_unpopulated(&group, deadline)?;
            }
        }
        // What was moved out of the v2 group, but not out of a v1 group.
        for hierarchy in self
            .found
            .iter()
            .filter(|hierarchy| hierarchy.kind != Kind::V2)
        {
            let group = hierarchy.mount.join(self.root).join(folder);
            loop {
                let pids = pids_below(&group);
                if pids.is_empty() {
                    break;
                }
                if Instant::now() > deadline {
                    return Err(CgroupError::StillPopulated { path: group, pids });
                }
                for pid in pids.into_iter().filter_map(crate::process::Process::now) {
                    // One that ends by itself in between is a success; one that does not is found by the next round.
                    drop(pid.kill_and_wait(Duration::from_secs(1)));
                }
            }
        }
        Ok(())
    }

    /// Removes a cluster's groups, and `/keelway` with the last cluster.
    ///
    /// # Errors
    /// When a group still holds a process after `timeout`.
    pub fn remove(&self, cluster: &str, timeout: Duration) -> Result<(), CgroupError> {
        let deadline = Instant::now() + timeout;
        for hierarchy in &self.found {
            let root = hierarchy.mount.join(self.root);
            remove_tree(&root.join(cluster), deadline)?;
            // Not empty while other clusters are up.
            drop(fs::remove_dir(&root));
        }
        Ok(())
    }

    /// Processes (numbers as this process sees them) in a cluster's groups.
    pub fn pids(&self, cluster: &str) -> Vec<u32> {
        let mut pids: Vec<u32> = self
            .found
            .iter()
            .flat_map(|hierarchy| pids_below(&hierarchy.mount.join(self.root).join(cluster)))
            .collect();
        pids.sort_unstable();
        pids.dedup();
        pids
    }
}

/// Passes the controllers of a v2 group on to its children, as far as it has any. Beside v1 hierarchies it has none.
fn delegate(group: &Path) {
    let Ok(controllers) = fs::read_to_string(group.join("cgroup.controllers")) else {
        return;
    };
    for controller in controllers.split_whitespace() {
        // One by one, and without a complaint: some (cpu with real-time tasks) are refused on some machines, and pods
        // then run without that limit.
        drop(fs::write(
            group.join("cgroup.subtree_control"),
            format!("+{controller}"),
        ));
    }
}

fn copy_cpuset(parent: &Path, group: &Path) -> Result<(), CgroupError> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let to = group.join(file);
        if fs::read_to_string(&to).is_ok_and(|value| value.trim().is_empty()) {
            let from = parent.join(file);
            let value = fs::read_to_string(&from).map_err(io_error("read", &from))?;
            fs::write(&to, value.trim()).map_err(io_error("set", &to))?;
        }
    }
    Ok(())
}

fn folders(path: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(path) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

fn pids_below(group: &Path) -> Vec<u32> {
    let mut pids: Vec<u32> = fs::read_to_string(group.join("cgroup.procs"))
        .map(|text| text.lines().filter_map(|line| line.parse().ok()).collect())
        .unwrap_or_default();
    for folder in folders(group) {
        pids.extend(pids_below(&group.join(folder)));
    }
    pids
}

/// Waits for `populated 0`; the kernel reports a change of cgroup.events as a priority event.
fn wait_unpopulated(group: &Path, deadline: Instant) -> Result<(), CgroupError> {
    let path = group.join("cgroup.events");
    let mut file = fs::File::open(&path).map_err(io_error("open", &path))?;
    loop {
        // Read through the descriptor that is polled: a change after this read then wakes the poll.
        let mut events = String::new();
        file.rewind()
            .and_then(|()| file.read_to_string(&mut events))
            .map_err(io_error("read", &path))?;
        if events.lines().any(|line| line == "populated 0") {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(CgroupError::StillPopulated {
                path: group.to_owned(),
                pids: pids_below(group),
            });
        }
        let wait = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        // An interrupted or timed-out wait looks again like any other.
        let _ = poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLPRI)], wait);
    }
}

fn remove_tree(group: &Path, deadline: Instant) -> Result<(), CgroupError> {
    for folder in folders(group) {
        remove_tree(&group.join(folder), deadline)?;
    }
    loop {
        match fs::remove_dir(group) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            // A process that has ended leaves a v1 group only when its parent has collected it, and no event tells.
            Err(error)
                if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(io_error("remove", group)(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime shared:7 - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    #[test]
    fn hybrid_mounts_are_found_with_their_kinds() {
        let found = Hierarchies::parse(HYBRID);
        assert_eq!(found.v2_mount(), Path::new("/sys/fs/cgroup/unified"));
        let kinds: Vec<Kind> = found.found.iter().map(|hierarchy| hierarchy.kind).collect();
        assert_eq!(kinds, [Kind::V1, Kind::V1Cpuset, Kind::V1, Kind::V2]);
    }

    #[test]
    fn a_machine_with_v2_only_has_one_hierarchy() {
        let found = Hierarchies::parse(
            "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
        );
        assert_eq!(found.found.len(), 1);
        assert_eq!(found.v2_mount(), Path::new("/sys/fs/cgroup"));
    }

    #[test]
    fn groups_are_made_joined_killed_and_removed() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let hierarchies = Hierarchies::of_this_machine().expect("this machine has cgroups");
        let cluster = format!("cgroup-test-{}", std::process::id());
        hierarchies.create(&cluster, "node-1").expect("made");
        hierarchies
            .create(&cluster, "node-1")
            .expect("making again is fine");
        let started = || {
            let sleep = std::process::Command::new("/bin/sleep").arg("1000").spawn();
            sleep.expect("sleep starts")
        };
        hierarchies.create(&cluster, "node-2").expect("made");
        let mut children = [started(), started()];
        for hierarchy in &hierarchies.found {
            let group = hierarchy.mount.join(hierarchies.root).join(&cluster);
            for (node, child) in ["node-1", "node-2"].iter().zip(&children) {
                let procs = group.join(node).join(SYSTEM).join("cgroup.procs");
                fs::write(procs, child.id().to_string()).expect("the process is moved");
            }
        }
        let mut pids = children.each_ref().map(std::process::Child::id);
        pids.sort_unstable();
        assert_eq!(hierarchies.pids(&cluster), pids);
        assert!(hierarchies.clusters().contains(&cluster));
        hierarchies
            .kill_node(&cluster, "node-1", Duration::from_secs(5))
            .expect("killed");
        children[0].wait().expect("reaped");
        assert_eq!(hierarchies.pids(&cluster), [children[1].id()]);
        hierarchies
            .kill(&cluster, Duration::from_secs(5))
            .expect("killed");
        children[1].wait().expect("reaped");
        hierarchies
            .remove(&cluster, Duration::from_secs(5))
            .expect("removed");
        assert!(!hierarchies.clusters().contains(&cluster));
        hierarchies
            .kill(&cluster, Duration::from_secs(5))
            .expect("nothing to kill is fine");
        hierarchies
            .remove(&cluster, Duration::from_secs(5))
            .expect("nothing to remove is fine");
    }
}
