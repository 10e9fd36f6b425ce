//! Flags and the file of `up --config`, turned once into a checked [`ClusterConfig`].

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

use crate::family::IpFamily;

/// Workers of one cluster: their /24 networks and addresses have to fit into the cluster's, with room to spare.
pub const NODES_MAX: u8 = 100;
/// Their addresses are before the workers'; an etcd of more members is slower, and no safer for a machine's purposes.
pub const CONTROL_PLANES_MAX: u8 = 5;
const NODES_DEFAULT: u8 = 3;
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(120);
/// Host names and cgroup folders contain it.
const NAME_CHARS_MAX: usize = 40;

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} is not a valid cluster configuration: {reason}")]
    Parse { path: PathBuf, reason: String },
    #[error("a cluster has 1 to {NODES_MAX} nodes, not {0}")]
    Nodes(u8),
    #[error("a cluster has 1 to {CONTROL_PLANES_MAX} control planes, not {0}")]
    ControlPlanes(u8),
    #[error("{0} control planes need a state that all of them reach: --store etcd")]
    NotShared(u8),
    #[error("cannot find {what} (looked for {places}); build it with `make`, or set {variable}")]
    Missing {
        what: String,
        places: String,
        variable: &'static str,
    },
    #[error("image archive {0} is not there")]
    NoArchive(PathBuf),
    #[error("registries: {0} is not a folder")]
    NoFolder(PathBuf),
}

/// The name of a cluster: a DNS label, so that it can be part of contexts, host names and folders.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClusterName(String);

impl FromStr for ClusterName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let ends = !text.starts_with('-') && !text.ends_with('-');
        if text.is_empty() || text.len() > NAME_CHARS_MAX || !text.chars().all(inner) || !ends {
            return Err(format!(
                "a name has 1 to {NAME_CHARS_MAX} lower-case letters, digits and dashes, and begins and ends with a letter or digit"
            ));
        }
        Ok(ClusterName(text.to_owned()))
    }
}

impl Default for ClusterName {
    fn default() -> Self {
        ClusterName("default".into())
    }
}

impl AsRef<str> for ClusterName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for ClusterName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// The flags of `keelway up`.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct UpFlags {
    /// Name of the cluster; its kubectl context is keelway-NAME [default: default]
    #[arg(long)]
    pub name: Option<ClusterName>,
    /// Worker nodes [default: 3]
    #[arg(long)]
    pub nodes: Option<u8>,
    /// Control planes, each with a member of an etcd; more than one needs --store etcd [default: 1]
    #[arg(long, value_name = "N")]
    pub control_planes: Option<u8>,
    /// Where the state is kept [default: embedded]
    #[arg(long, value_enum)]
    pub store: Option<StoreKind>,
    /// Addresses of nodes, pods and Services: IPv4, IPv6, or both with IPv4 first [default: ipv4]
    #[arg(long, value_name = "FAMILY")]
    pub ip_family: Option<IpFamily>,
    /// Port of the API server on 127.0.0.1 [default: a free one]
    #[arg(long)]
    pub api_port: Option<u16>,
    /// Give pods a way out, by the sockets of a process of the machine; there is none by default
    #[arg(long)]
    pub egress: bool,
    /// Never fetch an image that no node has; by default containerd fetches it through a proxy of the cluster
    #[arg(long)]
    pub no_pull: bool,
    /// File with the same settings, as YAML (see docs/up.md)
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Folder with the images' archives
    #[arg(long, value_name = "DIR", env = "KEELWAY_IMAGES_DIR")]
    pub image_dir: Option<PathBuf>,
    /// Folder with keelway-controlplane and keelway-kubelet [default: that of this program]
    #[arg(long, value_name = "DIR", env = "KEELWAY_BIN_DIR")]
    pub bin_dir: Option<PathBuf>,
    /// Seconds after which a cluster that does not come up is given up
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
    /// Leave a cluster that did not come up as it is, to look at it
    #[arg(long)]
    pub keep_on_error: bool,
}

/// Where a cluster's state is kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StoreKind {
    /// By the control plane itself
    #[default]
    Embedded,
    /// By etcd (Debian: etcd-server), a member beside each control plane
    Etcd,
}

/// The file of `--config`. Flags win over it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct File {
    name: Option<ClusterName>,
    nodes: Option<u8>,
    control_planes: Option<u8>,
    store: Option<StoreKind>,
    ip_family: Option<IpFamily>,
    api_port: Option<u16>,
    image_dir: Option<PathBuf>,
    images: Vec<PathBuf>,
    pull: Option<bool>,
    egress: bool,
    registries: Option<PathBuf>,
    timeout_seconds: Option<u64>,
    agent: AgentFile,
    dns: DnsFile,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct AgentFile {
    extra_args: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct DnsFile {
    upstreams: Vec<SocketAddr>,
}

/// A cluster to make.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    pub name: ClusterName,
    pub nodes: u8,
    pub control_planes: u8,
    pub store: StoreKind,
    pub ip_family: IpFamily,
    /// 0: any free port.
    pub api_port: u16,
    pub archives: Vec<PathBuf>,
    pub binaries: Binaries,
    /// Whether pods have a way out.
    pub egress: bool,
    /// Whether images that no node has are fetched.
    pub pull: bool,
    /// A folder with a hosts.toml per registry, as containerd has in /etc/containerd/certs.d.
    pub registries: Option<PathBuf>,
    pub timeout: Duration,
    pub keep_on_error: bool,
    /// Flags given to the agent beside those that `up` gives it.
    pub agent_args: Vec<String>,
    pub dns_upstreams: Vec<SocketAddr>,
}

/// Programs that nodes run, as paths of the machine.
#[derive(Debug, Clone)]
pub struct Binaries {
    pub keelway: PathBuf,
    pub controlplane: PathBuf,
    pub kubelet: PathBuf,
}

impl ClusterConfig {
    /// Merges flags and file, and finds binaries and images. `program` is the path of this program.
    ///
    /// # Errors
    /// Names the setting that is wrong or the file that is missing.
    pub fn new(flags: &UpFlags, program: &Path) -> Result<Self, ConfigError> {
        let file = flags
            .config
            .as_deref()
            .map(read)
            .transpose()?
            .unwrap_or_default();
        let nodes = flags.nodes.or(file.nodes).unwrap_or(NODES_DEFAULT);
        if !(1..=NODES_MAX).contains(&nodes) {
            return Err(ConfigError::Nodes(nodes));
        }
        let control_planes = flags.control_planes.or(file.control_planes).unwrap_or(1);
        let store = flags.store.or(file.store).unwrap_or_default();
        if !(1..=CONTROL_PLANES_MAX).contains(&control_planes) {
            return Err(ConfigError::ControlPlanes(control_planes));
        }
        if control_planes > 1 && store == StoreKind::Embedded {
            return Err(ConfigError::NotShared(control_planes));
        }
        let beside = program.parent().unwrap_or(Path::new("/"));
        let image_dir = flags.image_dir.clone().or(file.image_dir);
        let mut archives = archives(image_dir.as_deref(), beside)?;
        for image in file.images {
            if !image.is_file() {
                return Err(ConfigError::NoArchive(image));
            }
            archives.push(image);
        }
        let registries = match file.registries.as_deref().map(std::path::absolute) {
            Some(Ok(folder)) if folder.is_dir() => Some(folder),
            Some(_) => return Err(ConfigError::NoFolder(file.registries.unwrap_or_default())),
            None => None,
        };
        let timeout = flags
            .timeout
            .or(file.timeout_seconds)
            .map_or(TIMEOUT_DEFAULT, Duration::from_secs);
        Ok(ClusterConfig {
            name: flags.name.clone().or(file.name).unwrap_or_default(),
            nodes,
            control_planes,
            store,
            ip_family: flags.ip_family.or(file.ip_family).unwrap_or_default(),
            api_port: flags.api_port.or(file.api_port).unwrap_or(0),
            archives,
            binaries: binaries(flags.bin_dir.as_deref(), program)?,
            egress: flags.egress || file.egress,
            pull: !flags.no_pull && file.pull.unwrap_or(true),
            registries,
            timeout,
            keep_on_error: flags.keep_on_error,
            agent_args: file.agent.extra_args,
            dns_upstreams: file.dns.upstreams,
        })
    }
}

fn read(path: &Path) -> Result<File, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })?;
    if text.trim().is_empty() {
        return Ok(File::default());
    }
    serde_saphyr::from_str(&text).map_err(|error| ConfigError::Parse {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}

/// The programs of nodes, in `dir` or beside this one.
///
/// # Errors
/// Names the one that is missing.
pub fn binaries(dir: Option<&Path>, program: &Path) -> Result<Binaries, ConfigError> {
    let beside = program.parent().unwrap_or(Path::new("/"));
    let dir = dir.unwrap_or(beside);
    Ok(Binaries {
        keelway: program.to_owned(),
        controlplane: binary(dir, "keelway-controlplane")?,
        kubelet: binary(dir, "keelway-kubelet")?,
    })
}

/// The archives of Keelway's images, in `dir` or where they are relative to this program.
///
/// # Errors
/// When there are none.
pub fn images(dir: Option<&Path>, program: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    archives(dir, program.parent().unwrap_or(Path::new("/")))
}

fn binary(dir: &Path, name: &str) -> Result<PathBuf, ConfigError> {
    let path = dir.join(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(ConfigError::Missing {
        what: name.into(),
        places: path.display().to_string(),
        variable: "KEELWAY_BIN_DIR",
    })
}

/// The archives in `dir`, or where a build or a package puts them relative to the program.
fn archives(dir: Option<&Path>, beside: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let places: Vec<PathBuf> = match dir {
        Some(dir) => vec![dir.to_owned()],
        None => ["images", "../../images", "../share/keelway/images"]
            .iter()
            .map(|place| beside.join(place))
            .collect(),
    };
    for place in &places {
        let Ok(entries) = std::fs::read_dir(place) else {
            continue;
        };
        let mut found: Vec<PathBuf> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|end| end == "tar"))
            .collect();
        if !found.is_empty() {
            found.sort();
            return Ok(found);
        }
    }
    let places = places
        .iter()
        .map(|place| place.join("*.tar").display().to_string())
        .collect::<Vec<_>>()
        .join(", ");
    Err(ConfigError::Missing {
        what: "the images".into(),
        places,
        variable: "KEELWAY_IMAGES_DIR",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder as a build leaves it: binaries in <triple>/debug, images beside.
    fn build() -> (tempfile::TempDir, PathBuf) {
        let target = tempfile::tempdir().expect("a folder");
        let bin = target.path().join("triple/debug");
        std::fs::create_dir_all(&bin).expect("made");
        std::fs::create_dir_all(target.path().join("images")).expect("made");
        for name in ["keelway", "keelway-controlplane", "keelway-kubelet"] {
            std::fs::write(bin.join(name), "").expect("written");
        }
        std::fs::write(target.path().join("images/pause.tar"), "").expect("written");
        let program = bin.join("keelway");
        (target, program)
    }

    fn with_file(text: &str, flags: UpFlags) -> Result<ClusterConfig, ConfigError> {
        let (target, program) = build();
        let path = target.path().join("config.yaml");
        std::fs::write(&path, text).expect("written");
        ClusterConfig::new(
            &UpFlags {
                config: Some(path),
                ..flags
            },
            &program,
        )
    }

    #[test]
    fn a_build_needs_no_flags() {
        let (target, program) = build();
        let config = ClusterConfig::new(&UpFlags::default(), &program).expect("valid");
        assert_eq!(
            (config.name.as_ref(), config.nodes, config.api_port),
            ("default", 3, 0)
        );
        assert_eq!(config.archives.len(), 1);
        assert!(config.binaries.kubelet.starts_with(target.path()));
    }

    #[test]
    fn flags_win_over_the_file() {
        let flags = UpFlags {
            nodes: Some(2),
            ..UpFlags::default()
        };
        let config = with_file(
            "name: dev\nnodes: 7\nipFamily: dual\nagent:\n  extraArgs: [--socket-lb=off]\n",
            flags,
        )
        .expect("valid");
        assert_eq!(
            (config.name.as_ref(), config.nodes, config.ip_family),
            ("dev", 2, IpFamily::Dual)
        );
        assert_eq!(config.agent_args, ["--socket-lb=off"]);
    }

    #[test]
    fn wrong_files_are_refused_and_named() {
        for (text, part) in [
            ("nodez: 3", "nodez"),
            ("ipFamily: ipv5", "ipv5"),
            ("nodes: many", "config.yaml"),
            ("nodes: 0", "1 to 100"),
            ("name: Not-A-Label", "lower-case"),
            ("images: [/nonexistent.tar]", "/nonexistent.tar"),
            ("registries: /nonexistent", "/nonexistent"),
            ("- a", "config.yaml"),
        ] {
            let error = with_file(text, UpFlags::default())
                .expect_err(text)
                .to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        let nothing = with_file("", UpFlags::default()).expect("an empty file asks for nothing");
        assert!(nothing.pull);
        let never = with_file("pull: false", UpFlags::default()).expect("valid");
        assert!(!never.pull);
    }

    #[test]
    fn names_are_dns_labels() {
        for name in ["a", "dev-1", "0", &"x".repeat(NAME_CHARS_MAX)] {
            name.parse::<ClusterName>().expect(name);
        }
        for name in [
            "",
            "-a",
            "a-",
            "A",
            "a.b",
            "a/b",
            "..",
            "a b",
            &"x".repeat(NAME_CHARS_MAX + 1),
        ] {
            name.parse::<ClusterName>().expect_err(name);
        }
    }

    #[test]
    fn a_missing_binary_is_named_with_what_to_do() {
        let (target, program) = build();
        std::fs::remove_file(target.path().join("triple/debug/keelway-kubelet")).expect("removed");
        let error = ClusterConfig::new(&UpFlags::default(), &program)
            .expect_err("missing")
            .to_string();
        assert!(
            error.contains("keelway-kubelet") && error.contains("make"),
            "{error}"
        );
    }
}
