//! Takes away what agents leave on a node, so that another network plugin and another proxy find it as it was.
//!
//! Everything that an agent leaves is there to outlive it: pods keep their network while agents come and go. So it goes only when
//! somebody says so, and not while an agent runs, which would make it anew.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::addresses::is_host_interface;
use crate::config::share_beside;
use crate::dataplane::PacketProgram;
use crate::install::{CONF_LIST, PLUGIN, same_file};
use crate::net::{Direction, Kernel, Link, Netlink, NetlinkError, OUTER, OVERLAY};
use crate::{supervisor, surroundings};

/// Programs of ours that filters may have.
const PROGRAMS: [&str; 5] = {
    let [a, b, c, d, e] = PacketProgram::ALL;
    [a.name(), b.name(), c.name(), d.name(), e.name()]
};

/// Where an agent has left what is to go.
#[derive(Clone, Debug, clap::Args)]
pub struct Places {
    /// Directory with the CNI plugin.
    #[arg(long, default_value = "/opt/cni/bin")]
    bin_dir: PathBuf,
    /// Directory with the CNI configuration.
    #[arg(long, default_value = "/etc/cni/net.d")]
    cni_conf_dir: PathBuf,
    /// Directory on a bpffs with programs and maps.
    #[arg(long, default_value = "/sys/fs/bpf/keelway")]
    pin_root: PathBuf,
    /// Directory with the pods' addresses.
    #[arg(long, default_value = "/var/lib/keelway/agent")]
    state_dir: PathBuf,
    /// Unix socket of the agent.
    #[arg(long, default_value = keelway_cni::AGENT_SOCKET)]
    socket: PathBuf,
    /// Also take their network from pods that still run.
    #[arg(long)]
    with_pods: bool,
}

/// Why something is left.
#[derive(Debug, thiserror::Error)]
pub enum UninstallError {
    #[error(
        "an agent of this node runs, and would make everything anew: delete the DaemonSet keelway-agent first"
    )]
    AgentRuns,
    #[error(
        "pods of this node still have their network from Keelway ({0}): drain the node first, or take it from them with --with-pods"
    )]
    Pods(usize),
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

/// One thing to remove.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Item {
    File(PathBuf),
    Folder(PathBuf),
    /// Interfaces, which go together.
    Links(Vec<String>),
    /// Programs that hang by filters on an interface that stays.
    Filters(u32, String),
    /// All routes of ours.
    Routes(usize),
    /// All rules of ours in the packet filter.
    Rules,
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Item::File(path) | Item::Folder(path) => write!(f, "{}", path.display()),
            Item::Links(names) => write!(f, "interfaces {}", names.join(", ")),
            Item::Filters(_, name) => write!(f, "programs on {name}"),
            Item::Routes(count) => write!(f, "{count} routes"),
            Item::Rules => write!(f, "rules in the packet filter"),
        }
    }
}

/// What is on the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Found {
    links: Vec<String>,
    routes: usize,
    rules: bool,
    filters: Vec<(u32, String)>,
    /// Those that exist, in the order in which they go.
    paths: Vec<Item>,
}

/// Removes what is there and says what that was; nothing when nothing was.
pub fn uninstall(places: &Places) -> Result<Vec<String>, UninstallError> {
    // Held to the end: an agent that is started meanwhile waits for it.
    let _lock = supervisor::try_lock(&places.socket)
        .map_err(|source| UninstallError::File {
            path: places.socket.clone(),
            source,
        })?
        .ok_or(UninstallError::AgentRuns)?;
    let mut kernel = Kernel::new(Netlink::open()?);
    let found = find(places, &mut kernel)?;
    let mut done = Vec::new();
    for item in plan(found, places.with_pods)? {
        remove(&item, &mut kernel)?;
        done.push(item.to_string());
    }
    Ok(done)
}

/// What goes, in this order: first the configuration, so that no pod comes any more; then what leads packets to Services and pods.
fn plan(found: Found, with_pods: bool) -> Result<Vec<Item>, UninstallError> {
    let of_pods = |name: &&String| is_host_interface(name);
    let pods = found.links.iter().filter(of_pods).count();
    if pods > 0 && !with_pods {
        return Err(UninstallError::Pods(pods));
    }
    let mut items = found.paths;
    if found.rules {
        items.push(Item::Rules);
    }
    if found.routes > 0 {
        items.push(Item::Routes(found.routes));
    }
    let filters = found.filters.into_iter();
    items.extend(filters.map(|(index, name)| Item::Filters(index, name)));
    if !found.links.is_empty() {
        items.push(Item::Links(found.links));
    }
    Ok(items)
}

fn find(places: &Places, kernel: &mut Kernel) -> Result<Found, UninstallError> {
    let plugin = places.bin_dir.join(PLUGIN);
    let loopback = places.bin_dir.join(keelway_cni::loopback::NAME);
    let files = [
        Some(places.cni_conf_dir.join(CONF_LIST)),
        // One of another hand stays.
        same_file(&plugin, &loopback).then_some(loopback),
        Some(plugin),
        Some(places.socket.clone()),
        Some(share_beside(&places.socket)),
    ];
    let files = files.into_iter().flatten().map(Item::File);
    let folders = [places.pin_root.clone(), places.state_dir.clone()];
    let paths = files
        .chain(folders.map(Item::Folder))
        .filter(|item| match item {
            Item::File(path) | Item::Folder(path) => path.symlink_metadata().is_ok(),
            _ => true,
        });
    let ours = |name: &String| {
        // The pair's other end goes with it.
        name == OUTER || name == OVERLAY || is_host_interface(name)
    };
    let with_clsact = kernel.with_clsact()?;
    let (ours, others): (Vec<Link>, Vec<Link>) = kernel
        .links()?
        .into_iter()
        .partition(|link| ours(&link.name));
    let mut filters = Vec::new();
    for link in others
        .into_iter()
        .filter(|link| with_clsact.contains(&link.index))
    {
        for direction in [Direction::Ingress, Direction::Egress] {
            let names = kernel.filter_names(link.index, direction)?;
            if names.iter().any(|name| PROGRAMS.contains(&name.as_str())) {
                filters.push((link.index, link.name.clone()));
            }
        }
    }
    filters.dedup();
    Ok(Found {
        paths: paths.collect(),
        routes: kernel.count_routes()?,
        rules: surroundings::has_openings()?,
        filters,
        links: ours.into_iter().map(|link| link.name).collect(),
    })
}

fn remove(item: &Item, kernel: &mut Kernel) -> Result<(), UninstallError> {
    let gone = |path: &Path, outcome: io::Result<()>| match outcome {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(UninstallError::File {
            path: path.into(),
            source: error,
        }),
        _ => Ok(()),
    };
    match item {
        Item::File(path) => gone(path, fs::remove_file(path)),
        // Programs come off their hooks when nothing pins their links any more.
        Item::Folder(path) => gone(path, fs::remove_dir_all(path)),
        Item::Routes(_) => Ok(kernel.remove_routes()?),
        Item::Rules => Ok(surroundings::close_openings()?),
        Item::Filters(index, _) => Ok(kernel.remove_filters(*index, &PROGRAMS).map(drop)?),
        Item::Links(names) => Ok(kernel.delete_links(names)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(links: &[&str]) -> Found {
        Found {
            links: links.iter().map(|name| (*name).to_owned()).collect(),
            routes: 3,
            rules: false,
            filters: vec![],
            paths: vec![Item::File("/etc/cni/net.d/05-keelway.conflist".into())],
        }
    }

    #[test]
    fn pods_keep_their_network_unless_told_otherwise() {
        let there = found(&["keelway-svc", "kw0123456789ab"]);
        let refused = plan(there.clone(), false).expect_err("a pod is there");
        assert!(
            refused
                .to_string()
                .contains("still have their network from Keelway (1)"),
            "{refused}"
        );
        assert_eq!(plan(there, true).expect("told").len(), 3);
    }

    #[test]
    fn the_configuration_goes_first() {
        let items = plan(found(&["keelway-svc"]), false).expect("no pods");
        assert!(matches!(&items[0], Item::File(path) if path.ends_with(CONF_LIST)));
        assert_eq!(items[1].to_string(), "3 routes");
        assert_eq!(items[2].to_string(), "interfaces keelway-svc");
        assert_eq!(
            plan(Found::default(), false).expect("nothing"),
            Vec::<Item>::new()
        );
    }

    #[test]
    fn a_loopback_plugin_of_another_hand_stays() {
        let dir = tempfile::tempdir().expect("a folder");
        let (ours, other) = (dir.path().join("a"), dir.path().join("b"));
        fs::write(&ours, "ours").expect("a file");
        assert!(!same_file(&ours, &other));
        fs::write(&other, "theirs").expect("a file");
        assert!(!same_file(&ours, &other));
        fs::write(&other, "ours").expect("a file");
        assert!(same_file(&ours, &other));
    }
}
