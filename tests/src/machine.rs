//! The machine below a development cluster: what of it must stay as it was.

use std::fs;
use std::path::{Path, PathBuf};

use crate::process::run;

/// The machine's own network settings, and what a cluster could leave behind.
#[derive(Debug, PartialEq, Eq)]
pub struct MachineState {
    parts: Vec<(&'static str, String)>,
}

impl MachineState {
    /// Looks at the machine. Of processes, mounts and folders only those count that belong to `cluster`: others may be at work.
    pub fn of(cluster: &str) -> MachineState {
        let text = |command: &[&str]| run(command, &[], 20).ok();
        MachineState {
            parts: vec![
                ("addresses", text(&["ip", "-oneline", "address"])),
                ("links", names_of_links(&text(&["ip", "-oneline", "link"]))),
                ("routes", text(&["ip", "route", "show", "table", "all"])),
                ("rules", text(&["ip", "rule"])),
                ("nftables", text(&["nft", "list", "ruleset"])),
                ("named network namespaces", text(&["ip", "netns", "list"])),
                ("network sysctls", network_sysctls()),
                ("BPF pins", listing(Path::new("/sys/fs/bpf"))),
                ("mounts", mounts(cluster)),
                ("control groups", groups(cluster)),
                ("processes", format!("{:?}", processes(cluster, ""))),
            ],
        }
    }

    /// What differs from `self` in a later look, as text; None when nothing does.
    pub fn difference(&self, later: &MachineState) -> Option<String> {
        let mut differences = String::new();
        for ((name, before), (_, after)) in self.parts.iter().zip(&later.parts) {
            if before != after {
                differences += &format!("{name} were\n{before}\nand are\n{after}\n");
            }
        }
        (!differences.is_empty()).then_some(differences)
    }
}

/// The link state holds counters and times; the names are what a cluster could add to.
fn names_of_links(listing: &str) -> String {
    listing
        .lines()
        .filter_map(|line| line.split(": ").nth(1))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Settings below /proc/sys/net, without the values that count what goes on.
fn network_sysctls() -> String {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from("/proc/sys/net")];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else {
            continue;
        };
        for entry in entries.flatten() {
            let path = entry.path();
            let name = entry.file_name();
            if path.is_dir() {
                folders.push(path);
            } else if !["nf_conntrack_count", "dentry_state", "stable_secret"]
                .iter()
                .any(|live| name == *live)
                && let Ok(value) = fs::read_to_string(&path)
            {
                found.push(format!("{} {}", path.display(), value.trim()));
            }
        }
    }
    found.sort();
    found.join("\n")
}

fn listing(folder: &Path) -> String {
    let mut names: Vec<String> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names.join("\n")
}

fn mounts(cluster: &str) -> String {
    let needle = format!("/{cluster}/");
    fs::read_to_string("/proc/self/mountinfo")
        .unwrap_or_default()
        .lines()
        .filter(|line| line.contains("keelway") && line.contains(&needle))
        .collect::<Vec<_>>()
        .join("\n")
}

fn groups(cluster: &str) -> String {
    let mut found = Vec::new();
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(root).into_iter().flatten().flatten();
    for folder in hierarchies
        .map(|entry| entry.path())
        .chain([root.to_path_buf()])
    {
        let group = folder.join("keelway").join(cluster);
        if group.exists() {
            found.push(group.display().to_string());
        }
    }
    found.sort();
    found.join("\n")
}

/// A process, as the machine numbers it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    pub pid: i32,
    pub parent: i32,
    pub name: String,
}

/// The processes in the control groups `/keelway/<within>` and below whose name starts with `name`.
pub fn processes(within: &str, name: &str) -> Vec<Process> {
    let group = format!("/keelway/{within}");
    let belongs = |line: &str| {
        line.splitn(3, ':')
            .nth(2)
            .and_then(|path| path.strip_prefix(&group))
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else {
            continue;
        };
        // A process may end at any moment of this look.
        let read = |file: &str| fs::read_to_string(entry.path().join(file)).unwrap_or_default();
        if !read("cgroup").lines().any(belongs) {
            continue;
        }
        let (comm, stat) = (read("comm"), read("stat"));
        let mut rest = stat
            .rsplit_once(')')
            .map_or("", |(_, rest)| rest)
            .split_whitespace();
        // A zombie has ended; its parent has only not looked yet.
        let ended = matches!(rest.next(), None | Some("Z" | "X"));
        let parent = rest.next().and_then(|pid| pid.parse().ok());
        if !ended && comm.trim().starts_with(name) {
            found.push(Process {
                pid,
                parent: parent.unwrap_or(0),
                name: comm.trim().to_owned(),
            });
        }
    }
    found.sort();
    found
}
