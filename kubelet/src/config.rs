//! Config: what the command line says, validated once.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::Parser;
use k8s_openapi::api::core::v1::Taint;

/// Flags are the command line of `keelway-kubelet` (docs/ARCHITECTURE.md, "Commands").
#[derive(Parser, Debug, Clone)]
#[command(
    name = "keelway-kubelet",
    version,
    about = "Runs the pods of one Kubernetes node through CRI"
)]
pub struct Flags {
    /// Name of the Node object
    #[arg(long)]
    pub node_name: String,
    /// Address of the node: its InternalIP, and where the server listens. With two, one of each family, the first one's
    /// family comes first in pods' addresses too
    #[arg(long, value_name = "IP[,IP]", value_delimiter = ',', required = true)]
    pub node_ip: Vec<IpAddr>,
    /// Credentials for the API server
    #[arg(long)]
    pub kubeconfig: PathBuf,
    /// Unix socket of the CRI runtime, with or without unix://
    #[arg(long, default_value = "/run/containerd/containerd.sock")]
    pub runtime_endpoint: String,
    /// cgroup under which `kubepods` is made, relative to each hierarchy
    #[arg(long, default_value = "/")]
    pub cgroup_root: String,
    /// Certificate chain of the server on port 10250
    #[arg(long, required_unless_present = "cert_dir", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Private key of the server on port 10250
    #[arg(long, requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Where the node's certificates are kept that the cluster signs; the kubelet asks for them, and renews them. The kubeconfig is
    /// made, too
    #[arg(
        long,
        value_name = "DIR",
        conflicts_with = "tls_cert",
        requires = "bootstrap_kubeconfig"
    )]
    pub cert_dir: Option<PathBuf>,
    /// Credentials for asking for the node's first certificate
    #[arg(long, value_name = "FILE", requires = "cert_dir")]
    pub bootstrap_kubeconfig: Option<PathBuf>,
    /// Authority that certificates of the server's clients must be signed by
    #[arg(long)]
    pub client_ca: PathBuf,
    /// Address of the cluster DNS (may be repeated)
    #[arg(long)]
    pub cluster_dns: Vec<IpAddr>,
    /// Domain of the cluster
    #[arg(long, default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Where volumes are kept
    #[arg(long, default_value = "/var/lib/kubelet")]
    pub root_dir: PathBuf,
    /// Where container logs are kept; containers' CRI log directory
    #[arg(long, default_value = "/var/log/pods")]
    pub log_dir: PathBuf,
    /// resolv.conf that pods with dnsPolicy Default inherit
    #[arg(long, default_value = "/etc/resolv.conf")]
    pub resolv_conf: PathBuf,
    /// Port of the HTTPS server
    #[arg(long, default_value_t = 10250)]
    pub port: u16,
    /// Address of the plain health endpoint
    #[arg(long, default_value = "127.0.0.1:10248")]
    pub healthz: SocketAddr,
    /// Pods that fit on this node
    #[arg(long, default_value_t = 110)]
    pub max_pods: u32,
    /// Labels that the node registers with
    #[arg(long, value_name = "KEY=VALUE[,KEY=VALUE]", value_delimiter = ',', value_parser = label)]
    pub node_labels: Vec<(String, String)>,
    /// Taints that the node registers with
    #[arg(long, value_name = "KEY[=VALUE]:EFFECT[,...]", value_delimiter = ',', value_parser = taint)]
    pub register_with_taints: Vec<Taint>,
}

fn label(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(key, _)| !key.is_empty());
    let pair = pair.map(|(key, value)| (key.to_owned(), value.to_owned()));
    pair.ok_or_else(|| "a label is KEY=VALUE".to_owned())
}

fn taint(text: &str) -> Result<Taint, String> {
    let (what, effect) = text
        .rsplit_once(':')
        .ok_or("a taint is KEY[=VALUE]:EFFECT")?;
    if !["NoSchedule", "PreferNoSchedule", "NoExecute"].contains(&effect) {
        return Err("a taint's effect is NoSchedule, PreferNoSchedule or NoExecute".to_owned());
    }
    let (key, value) = match what.split_once('=') {
        Some((key, value)) => (key, Some(value.to_owned())),
        None => (what, None),
    };
    if key.is_empty() {
        return Err("a taint has a key".to_owned());
    }
    Ok(Taint {
        key: key.to_owned(),
        value,
        effect: effect.to_owned(),
        time_added: None,
    })
}

/// What the server on port 10250 shows, and what the kubelet is to the API server.
#[derive(Debug, Clone)]
pub enum Credentials {
    /// Files that somebody else renews: certificate and key of the server. The client's are in the kubeconfig.
    Given { cert: PathBuf, key: PathBuf },
    /// A folder with what the cluster has signed, and the kubeconfig that the first is asked for with.
    Own { dir: PathBuf, bootstrap: PathBuf },
}

/// A ConfigError names the flag that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("--runtime-endpoint {0}: only Unix sockets are supported (unix:///path or /path)")]
    Endpoint(String),
    #[error("--{flag} {path}: {source}")]
    Unreadable {
        flag: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("--node-ip takes one address, or one of each family, and none of them unspecified")]
    NodeIps,
    #[error("either --tls-cert and --tls-key, or --cert-dir and --bootstrap-kubeconfig are needed")]
    Credentials,
    #[error("--cgroup-root {0}: must be an absolute path without `..`")]
    CgroupRoot(String),
    #[error("--{flag} {path}: must be an absolute path")]
    Relative { flag: &'static str, path: PathBuf },
}

/// A Config is what the rest of the kubelet reads. Nothing else reads flags or the environment.
#[derive(Debug, Clone)]
pub struct Config {
    pub node_name: String,
    /// One, or one of each family, the primary one first.
    pub node_ips: Vec<IpAddr>,
    pub kubeconfig: PathBuf,
    pub runtime_socket: PathBuf,
    /// Absolute, without a trailing slash; empty for the root of the hierarchy.
    pub cgroup_root: String,
    pub credentials: Credentials,
    pub client_ca: PathBuf,
    pub cluster_dns: Vec<IpAddr>,
    pub cluster_domain: String,
    pub root_dir: PathBuf,
    pub log_dir: PathBuf,
    pub resolv_conf: PathBuf,
    pub port: u16,
    pub healthz: SocketAddr,
    pub pods_max: u32,
    pub labels: Vec<(String, String)>,
    pub taints: Vec<Taint>,
}

impl TryFrom<Flags> for Config {
    type Error = ConfigError;

    fn try_from(flags: Flags) -> Result<Self, ConfigError> {
        let socket = flags
            .runtime_endpoint
            .strip_prefix("unix://")
            .unwrap_or(&flags.runtime_endpoint);
        if !socket.starts_with('/') {
            return Err(ConfigError::Endpoint(flags.runtime_endpoint));
        }
        let families = flags.node_ip.iter().filter(|ip| ip.is_ipv4()).count();
        if !matches!((flags.node_ip.len(), families), (1, _) | (2, 1))
            || flags.node_ip.iter().any(IpAddr::is_unspecified)
        {
            return Err(ConfigError::NodeIps);
        }
        if !flags.cgroup_root.starts_with('/')
            || flags.cgroup_root.split('/').any(|part| part == "..")
        {
            return Err(ConfigError::CgroupRoot(flags.cgroup_root));
        }
        for (flag, path) in [("root-dir", &flags.root_dir), ("log-dir", &flags.log_dir)] {
            if !path.is_absolute() {
                return Err(ConfigError::Relative {
                    flag,
                    path: path.clone(),
                });
            }
        }
        let mut files = vec![("client-ca", &flags.client_ca)];
        // With certificates of its own, the first start makes the kubeconfig, and from then on needs no other.
        match &flags.bootstrap_kubeconfig {
            Some(bootstrap) if !flags.kubeconfig.exists() => {
                files.push(("bootstrap-kubeconfig", bootstrap));
            }
            _ => files.push(("kubeconfig", &flags.kubeconfig)),
        }
        let given = [("tls-cert", &flags.tls_cert), ("tls-key", &flags.tls_key)];
        files.extend(
            given
                .into_iter()
                .filter_map(|(flag, path)| Some((flag, path.as_ref()?))),
        );
        for (flag, path) in files {
            std::fs::File::open(path).map_err(|source| ConfigError::Unreadable {
                flag,
                path: path.clone(),
                source,
            })?;
        }
        let credentials = match (
            (flags.cert_dir, flags.bootstrap_kubeconfig),
            (flags.tls_cert, flags.tls_key),
        ) {
            ((Some(dir), Some(bootstrap)), _) => Credentials::Own { dir, bootstrap },
            (_, (Some(cert), Some(key))) => Credentials::Given { cert, key },
            _ => return Err(ConfigError::Credentials),
        };
        Ok(Self {
            runtime_socket: PathBuf::from(socket),
            cgroup_root: flags.cgroup_root.trim_end_matches('/').to_owned(),
            node_name: flags.node_name,
            node_ips: flags.node_ip,
            kubeconfig: flags.kubeconfig,
            credentials,
            client_ca: flags.client_ca,
            cluster_dns: flags.cluster_dns,
            cluster_domain: flags.cluster_domain.trim_matches('.').to_owned(),
            root_dir: flags.root_dir,
            log_dir: flags.log_dir,
            resolv_conf: flags.resolv_conf,
            port: flags.port,
            healthz: flags.healthz,
            pods_max: flags.max_pods,
            labels: flags.node_labels,
            taints: flags.register_with_taints,
        })
    }
}
