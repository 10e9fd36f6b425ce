//! How the agent was told to run: flags, validated once.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::balancer::Pools;
use cluster_model::watch::{self, ApiOptions};
use ipnetwork::IpNetwork;
use keelway_dns::config::spec::everywhere;
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use crate::dataplane::{XdpMode, maglev};
use crate::node_ranges::{ClusterRange, ClusterRangeError};
use crate::plan::{Balancing, Dsr, Routing};

/// kube-proxy's.
const HEALTHZ_PORT: u16 = 10256;
/// By which pods are told of the API server: its Service's address.
const SERVICE_HOST: &str = "KUBERNETES_SERVICE_HOST";

/// Flags of `keelway-agent run`.
#[derive(Clone, Debug, clap::Args)]
pub struct RunFlags {
    /// Name of this node's Node object.
    #[arg(long, env = "NODE_NAME")]
    node_name: String,
    /// URL of the API server, in place of the one in the kubeconfig or the environment. Must not be a Service's.
    #[arg(long, env = "KEELWAY_API_SERVER")]
    api_server: Option<String>,
    /// Kubeconfig file; without one, the pod's ServiceAccount is used.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// Read Services, EndpointSlices and Nodes from this JSON file, and again when it changes, instead of an API server.
    #[arg(long, conflicts_with_all = ["api_server", "kubeconfig"])]
    snapshot: Option<PathBuf>,
    /// Control group (v2) whose sockets are translated; by default the root of the hierarchy.
    #[arg(long, env = "KEELWAY_CGROUP")]
    cgroup: Option<PathBuf>,
    /// Translate Service addresses at the socket.
    #[arg(long, value_enum, default_value_t = Switch::On)]
    socket_lb: Switch,
    /// Translate Service addresses per packet, for what the socket did not.
    #[arg(long, value_enum, default_value_t = Switch::On)]
    packet_lb: Switch,
    /// How backends are chosen for clients outside, unless a Service says otherwise (annotation keelway.io/balancing): at random by each
    /// node, or by tables that are the same on all (Maglev).
    #[arg(long, value_enum, default_value_t = BalancingFlag::Random)]
    balancing: BalancingFlag,
    /// Entries of a Maglev table, a prime, of 2 bytes each: losing one backend moves at most one in a hundred of the other backends' clients
    /// with 65521 entries up to 250 backends, with 131071 up to 1000; up to two in a hundred with 16381. All nodes must have the same.
    #[arg(long, default_value_t = maglev::SIZE_DEFAULT, value_name = "ENTRIES")]
    maglev_table_size: u32,
    /// Let clients outside be answered by their endpoint's node directly, wherever they asked, so that endpoints see their addresses:
    /// never, for Services that say so (annotation keelway.io/dsr: on), or unless one says otherwise. Needs the overlay.
    #[arg(long, value_enum, default_value_t = Dsr::Off)]
    dsr: Dsr,
    /// Translate what comes by the uplink for Services, and leaves by it again, in its driver (XDP), where that can: `auto` falls back to
    /// tc by itself, and `status` says so.
    #[arg(long, value_enum, default_value_t = XdpMode::Auto)]
    xdp: XdpMode,
    /// Interface by which clients outside and other nodes come, beside the one that has the node's address; may be given more than once.
    /// By default all that have an address of the machine's for others, or a default route.
    #[arg(long, value_name = "INTERFACE")]
    uplink: Vec<String>,
    /// Range of Service addresses, IPv4 or IPv6; may be given more than once.
    #[arg(long, default_value = "10.96.0.0/16")]
    service_cidr: Vec<IpNetwork>,
    /// How other nodes' pods are reached.
    #[arg(long, value_enum, default_value_t = Routing::Auto)]
    routing: Routing,
    /// Range of all pods of the cluster: nodes that have no range of their own get one out of it, by one of the agents. For clusters whose
    /// controller manager gives none; one for each family at most.
    #[arg(long, value_name = "RANGE")]
    cluster_cidr: Vec<IpNetwork>,
    /// Prefix length of the nodes' ranges out of an IPv4 --cluster-cidr.
    #[arg(long, default_value_t = 24, value_name = "BITS")]
    node_cidr_mask_size_ipv4: u8,
    /// Prefix length of the nodes' ranges out of an IPv6 --cluster-cidr.
    #[arg(long, default_value_t = 64, value_name = "BITS")]
    node_cidr_mask_size_ipv6: u8,
    /// Give what pods send out of the cluster over IPv4 the node's address as its source.
    #[arg(long, value_enum, default_value_t = Switch::Off)]
    masquerade: Switch,
    /// Range of destinations to which pods keep their own addresses, beside the cluster's own; may be given more than once.
    #[arg(long, value_name = "RANGE")]
    non_masquerade_cidr: Vec<IpNetwork>,
    /// Answer pods' questions for addresses of cluster names at their interfaces, in the kernel, as this node's DNS server says it would.
    #[arg(long, value_enum, default_value_t = Switch::On)]
    kernel_dns: Switch,
    /// Address for /metrics, /healthz and /readyz.
    #[arg(long)]
    metrics: Option<SocketAddr>,
    /// Address for the proxy's own /healthz and /livez, as kube-proxy has them; empty for none. Every address and port 10256 by default.
    #[arg(long, value_name = "ADDR")]
    healthz_bind_address: Option<String>,
    /// File with the pools of load balancers' addresses, instead of the ConfigMap kube-system/keelway-config.
    #[arg(long, value_name = "FILE")]
    load_balancer_config: Option<PathBuf>,
    /// CRI socket of a container runtime of this node: pods that it has not had for a while have their addresses collected. May be given
    /// more than once; all runtimes that make pods here have to be named, those that are not there do no harm.
    #[arg(long, value_name = "SOCKET")]
    runtime_endpoint: Vec<PathBuf>,
    /// How long a runtime must have been without a pod's sandbox before its addresses are collected, in seconds: longer than it takes to
    /// make one.
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    collect_after: u64,
    /// Unix socket for the CNI plugin and `status`.
    #[arg(long, default_value = keelway_cni::AGENT_SOCKET)]
    socket: PathBuf,
    /// Unix socket by which processes of the node, such as its DNS server, are told of the cluster; cluster/watch.sock beside --socket by default.
    #[arg(long, value_name = "PATH")]
    share_socket: Option<PathBuf>,
    /// Directory for what must survive a reboot.
    #[arg(long, default_value = "/var/lib/keelway/agent")]
    state_dir: PathBuf,
    /// Directory on a bpffs for what must survive the agent.
    #[arg(long, default_value = "/sys/fs/bpf/keelway")]
    pin_root: PathBuf,
    /// Directory that the CNI configuration is written to once pods can be served.
    #[arg(long, default_value = "/etc/cni/net.d")]
    cni_conf_dir: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum BalancingFlag {
    Random,
    Maglev,
}

/// Where the agent learns about the cluster.
#[derive(Clone, Debug)]
pub enum Source {
    Api(ApiOptions),
    /// A file as `kubectl get services,endpointslices,nodes -A -o json` writes it.
    File(PathBuf),
}

/// A validated configuration.
#[derive(Clone, Debug)]
pub struct Config {
    pub node_name: String,
    pub source: Source,
    pub cgroup: PathBuf,
    pub socket_lb: bool,
    pub packet_lb: bool,
    pub balancing: Balancing,
    pub xdp: XdpMode,
    /// The uplinks beside the node's own, where they are not to be found out.
    pub uplinks: Vec<String>,
    pub service_ranges: Vec<IpNetwork>,
    pub routing: Routing,
    /// What nodes get their ranges out of, where the cluster gives them none.
    pub cluster_ranges: Vec<ClusterRange>,
    pub masquerade: bool,
    pub unmasqueraded: Vec<IpNetwork>,
    /// Questions may be answered at pods' interfaces.
    pub kernel_dns: bool,
    pub metrics: Option<SocketAddr>,
    pub healthz: Option<SocketAddr>,
    /// Pools from a file; without one, they are read from a ConfigMap, and followed.
    pub pools: Option<Arc<Pools>>,
    /// CRI sockets of the runtimes that make pods here.
    pub runtimes: Vec<PathBuf>,
    pub collect_after: Duration,
    pub socket: PathBuf,
    /// By which others of the node are told of the cluster.
    pub share: PathBuf,
    pub state_dir: PathBuf,
    /// Deletions that the CNI plugin wrote down while no agent answered.
    pub spool: PathBuf,
    pub pin_root: PathBuf,
    pub cni_conf_dir: PathBuf,
}

/// Why the flags make no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("--node-name is empty")]
    NodeName,
    #[error("--cgroup {}: not a folder of a cgroup v2 hierarchy", .0.display())]
    Cgroup(PathBuf),
    #[error(
        "no cgroup v2 hierarchy at /sys/fs/cgroup or /sys/fs/cgroup/unified: mount one, or use --socket-lb off"
    )]
    NoCgroup,
    #[error("--socket-lb off and --packet-lb off: nothing would translate Service addresses")]
    NothingOn,
    #[error(
        "--masquerade on needs --packet-lb on: packets are given the node's address where they are balanced"
    )]
    MasqueradeAlone,
    #[error("--dsr needs --packet-lb on: clients outside are served per packet")]
    DsrAlone,
    #[error(
        "--dsr needs the overlay, by which packets are sent on as they came: --routing auto or vxlan"
    )]
    DsrWithoutOverlay,
    #[error("--maglev-table-size {0}: must be one of {sizes:?}", sizes = maglev::SIZES)]
    TableSize(u32),
    #[error("--service-cidr {0}: has bits set after its prefix")]
    ServiceRange(IpNetwork),
    #[error("--cluster-cidr {0}")]
    ClusterRange(#[from] ClusterRangeError),
    #[error(
        "{from} {address} is a Service's address (--service-cidr {range}): the agent makes Services work and must not need one to reach the API server; pass --api-server with a node's address"
    )]
    ApiServer {
        from: &'static str,
        address: IpAddr,
        range: IpNetwork,
    },
    #[error("--load-balancer-config {}: {why}", path.display())]
    Pools { path: PathBuf, why: String },
    #[error("--healthz-bind-address {0:?}: not an address with a port, such as 0.0.0.0:10256")]
    Healthz(String),
    #[error("{flag} {}: not an absolute path", path.display())]
    Relative { flag: &'static str, path: PathBuf },
}

impl RunFlags {
    /// Checks the flags against each other and the machine.
    pub fn validate(self) -> Result<Config, ConfigError> {
        if self.node_name.is_empty() {
            return Err(ConfigError::NodeName);
        }
        let (socket_lb, packet_lb) = (self.socket_lb == Switch::On, self.packet_lb == Switch::On);
        if !socket_lb && !packet_lb {
            return Err(ConfigError::NothingOn);
        }
        if self.masquerade == Switch::On && !packet_lb {
            return Err(ConfigError::MasqueradeAlone);
        }
        if self.dsr != Dsr::Off && !packet_lb {
            return Err(ConfigError::DsrAlone);
        }
        if self.dsr != Dsr::Off && self.routing == Routing::Direct {
            return Err(ConfigError::DsrWithoutOverlay);
        }
        if !maglev::SIZES.contains(&self.maglev_table_size) {
            return Err(ConfigError::TableSize(self.maglev_table_size));
        }
        if let Some(range) = self
            .service_cidr
            .iter()
            .find(|range| range.ip() != range.network())
        {
            return Err(ConfigError::ServiceRange(*range));
        }
        let cluster_ranges: Vec<ClusterRange> = self
            .cluster_cidr
            .iter()
            .map(|range| {
                let prefix = if range.is_ipv4() {
                    self.node_cidr_mask_size_ipv4
                } else {
                    self.node_cidr_mask_size_ipv6
                };
                ClusterRange::new(*range, prefix)
            })
            .collect::<Result<_, _>>()?;
        ClusterRange::one_of_each(&cluster_ranges)?;
        for (flag, path) in [
            ("--socket", &self.socket),
            ("--state-dir", &self.state_dir),
            ("--pin-root", &self.pin_root),
            ("--cni-conf-dir", &self.cni_conf_dir),
            (
                "--share-socket",
                self.share_socket.as_ref().unwrap_or(&self.socket),
            ),
        ]
        .into_iter()
        .chain(
            self.runtime_endpoint
                .iter()
                .map(|path| ("--runtime-endpoint", path)),
        ) {
            if !path.is_absolute() {
                return Err(ConfigError::Relative {
                    flag,
                    path: path.clone(),
                });
            }
        }
        self.reach_api_server()?;
        let source = match self.snapshot {
            Some(file) => Source::File(file),
            None => Source::Api(ApiOptions {
                kubeconfig: self.kubeconfig,
                api_server: self.api_server,
            }),
        };
        Ok(Config {
            node_name: self.node_name,
            source,
            cgroup: if socket_lb {
                cgroup(self.cgroup)?
            } else {
                self.cgroup.unwrap_or_default()
            },
            socket_lb,
            packet_lb,
            xdp: if packet_lb { self.xdp } else { XdpMode::Off },
            uplinks: self.uplink,
            balancing: Balancing {
                maglev: self.balancing == BalancingFlag::Maglev,
                table_size: self.maglev_table_size,
                dsr: self.dsr,
            },
            service_ranges: self.service_cidr,
            routing: self.routing,
            cluster_ranges,
            masquerade: self.masquerade == Switch::On,
            unmasqueraded: self.non_masquerade_cidr,
            kernel_dns: self.kernel_dns == Switch::On,
            metrics: self.metrics,
            pools: self
                .load_balancer_config
                .as_deref()
                .map(pools)
                .transpose()?,
            healthz: match self.healthz_bind_address.as_deref() {
                None => Some(everywhere(HEALTHZ_PORT)),
                Some("") => None,
                Some(text) => Some(
                    text.parse()
                        .map_err(|_| ConfigError::Healthz(text.into()))?,
                ),
            },
            share: self
                .share_socket
                .unwrap_or_else(|| share_beside(&self.socket)),
            runtimes: self.runtime_endpoint,
            collect_after: Duration::from_secs(self.collect_after),
            socket: self.socket,
            spool: self.state_dir.join("deleted"),
            state_dir: self.state_dir,
            pin_root: self.pin_root,
            cni_conf_dir: self.cni_conf_dir,
        })
    }
}

impl RunFlags {
    /// Refuses an address of the API server that is a Service's, as pods have it in their environment. Names are not looked up.
    fn reach_api_server(&self) -> Result<(), ConfigError> {
        let (from, host) = match (&self.snapshot, &self.api_server, &self.kubeconfig) {
            (None, Some(url), _) => ("--api-server", host_of(url)),
            // Of its clusters, whichever the context names: none can be one of this cluster's Services. What is no kubeconfig is
            // said when it is used.
            (None, None, Some(path)) => {
                let mut hosts = watch::servers(path)
                    .into_iter()
                    .filter_map(|url| host_of(&url));
                let within = |host: &String| self.service_range_of(host).is_some();
                ("--kubeconfig", hosts.find(within))
            }
            (None, None, None) => {
                let host = std::env::var(SERVICE_HOST).ok();
                (SERVICE_HOST, host)
            }
            (Some(_), ..) => return Ok(()),
        };
        match host.and_then(|host| self.service_range_of(&host)) {
            Some((address, range)) => Err(ConfigError::ApiServer {
                from,
                address,
                range,
            }),
            None => Ok(()),
        }
    }

    /// A host that is an address in a range of Services, and the range.
    fn service_range_of(&self, host: &str) -> Option<(IpAddr, IpNetwork)> {
        let address = host.trim_matches(['[', ']']).parse::<IpAddr>().ok()?;
        let mut ranges = self.service_cidr.iter();
        let range = ranges.find(|range| range.contains(address))?;
        Some((address, *range))
    }
}

fn host_of(url: &str) -> Option<String> {
    let uri = url.parse::<hyper::Uri>().ok()?;
    uri.host().map(str::to_owned)
}

/// In a folder of its own, so that a container can be given this socket without the other one.
pub fn share_beside(socket: &Path) -> PathBuf {
    socket.with_file_name("cluster").join("watch.sock")
}

fn pools(path: &Path) -> Result<Arc<Pools>, ConfigError> {
    let failed = |why: String| ConfigError::Pools {
        path: path.into(),
        why,
    };
    let yaml = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    let pools = Pools::parse(&yaml).map_err(|error| failed(error.to_string()))?;
    Ok(Arc::new(pools))
}

/// The folder that was named, or the root of the v2 hierarchy: alone, or beside v1 hierarchies.
fn cgroup(named: Option<PathBuf>) -> Result<PathBuf, ConfigError> {
    let is_v2 =
        |path: &Path| statfs(path).is_ok_and(|stat| stat.filesystem_type() == CGROUP2_SUPER_MAGIC);
    match named {
        Some(path) if is_v2(&path) => Ok(path),
        Some(path) => Err(ConfigError::Cgroup(path)),
        None => ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
            .into_iter()
            .map(PathBuf::from)
            .find(|path| is_v2(path))
            .ok_or(ConfigError::NoCgroup),
    }
}
