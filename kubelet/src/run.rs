//! run: puts the parts together and keeps them running.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use futures::future::join_all;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use k8s_openapi::api::core::v1::Node;
use kube::client::ConfigExt;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{broadcast, watch};

use crate::authorities::Authorities;
use crate::backoff::Quick;
use crate::certificates::{Certificates, Held};
use crate::cgroup::Cgroups;
use crate::clock::SystemClock;
use crate::cluster::KubeCluster;
use crate::config::{Config, Credentials};
use crate::machine::Machine;
use crate::node::{Registration, allocatable_memory_bytes, watch_runtime};
use crate::pod::operations::Context;
use crate::pod::status::NodeFacts;
use crate::pods::{Dispatcher, Registry, watch_changes};
use crate::runtime::{CriRuntime, ExitSource, Runtime, RuntimeStatus};
use crate::server::{self, Gate, Reviews, Server, Tls};

/// Announcements of the runtime that may wait for the dispatcher.
const CHANGES_MAX: usize = 4096;
/// Where a node's log files are, whatever folder those of pods have.
const NODE_LOG_DIR: &str = "/var/log";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a connection is tested, and how long the answer may take.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Runs the kubelet until it is told to stop. Pods go on without it.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let config = Arc::new(config);
    for folder in [&config.root_dir, &config.log_dir] {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let cgroups = Cgroups::discover(&config.cgroup_root)?;
    cgroups.make_classes()?;
    let Access { client, tls, own } = access(&config).await?;

    let mut https = Vec::new();
    for ip in &config.node_ips {
        let address = SocketAddr::new(*ip, config.port);
        let listener = server::bind(address).await;
        https.push(listener.with_context(|| format!("cannot listen on {address}"))?);
    }
    let health_listener = server::bind(config.healthz)
        .await
        .with_context(|| format!("cannot listen on {}", config.healthz))?;

    let runtime: Arc<dyn Runtime> = Arc::new(CriRuntime::new(&config.runtime_socket));
    let runtime_version = wait_for_runtime(runtime.as_ref()).await;
    let machine = Machine::read(&config.root_dir, &runtime_version);
    let cluster = KubeCluster::start(client.clone(), &config.node_name);

    let (runtime_status, status) = watch::channel(RuntimeStatus::default());
    let (network, network_ready) = watch::channel(false);
    let (exit_source, exit_sources) = watch::channel(ExitSource::Relist);
    let (changes, changed) = broadcast::channel(CHANGES_MAX);
    let registry = Registry::default();
    let context = Arc::new(Context {
        runtime: runtime.clone(),
        cluster: Arc::new(cluster.clone()),
        clock: Arc::new(SystemClock),
        cgroups,
        node: NodeFacts {
            ips: config.node_ips.iter().map(ToString::to_string).collect(),
        },
        runtime_name: runtime_version
            .split_once("://")
            .map_or("containerd".to_owned(), |(name, _)| name.to_owned()),
        cpu_milli: machine.cpus * 1000,
        memory_bytes: allocatable_memory_bytes(&machine),
        network_ready,
        exit_source: exit_sources,
        config: config.clone(),
    });
    let server = Arc::new(Server {
        runtime: runtime.clone(),
        pods: registry.clone(),
        gate: Gate::new(Reviews::new(client.clone(), &config.node_name)),
        log_dir: config.log_dir.clone(),
        node_log_dir: NODE_LOG_DIR.into(),
        changes: changes.clone(),
    });
    let registration = Registration {
        client: client.clone(),
        config: config.clone(),
        machine,
        recorder: cluster.recorder(),
        goes_by: goes_by(own.as_ref()),
    };

    let kept = client.clone();
    tracing::info!(node = config.node_name, addresses = ?config.node_ips, port = config.port, runtime = runtime_version, "kubelet starts");
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        () = watch_runtime(runtime.clone(), runtime_status, network) => {}
        () = watch_changes(runtime, changes, exit_source) => {}
        () = registration.run(status) => {}
        () = Dispatcher::new(context, registry).run(client.clone(), changed) => {}
        _ = join_all(https.into_iter().map(|listener| server::serve(server.clone(), listener, tls.clone()))) => {}
        () = server::serve_health(health_listener) => {}
        () = renew(own, kept) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("kubelet stops; pods go on");
    Ok(())
}

struct Access {
    client: Client,
    tls: Arc<Tls>,
    /// Certificates that are to be renewed, and the authorities that they go by, where one stands for servers and clients.
    own: Option<(Certificates, Option<Arc<Authorities>>)>,
}

/// The client of the API server, and TLS of our own server.
async fn access(config: &Config) -> anyhow::Result<Access> {
    let ca = &config.client_ca;
    let (dir, bootstrap) = match &config.credentials {
        Credentials::Given { cert, key } => {
            return Ok(Access {
                client: connect(config, None, None).await?,
                tls: Arc::new(Tls::new(server::given(cert, key)?, ca)?),
                own: None,
            });
        }
        Credentials::Own { dir, bootstrap } => (dir, bootstrap),
    };
    let own = Certificates::read(dir, config)?;
    if own.client.life().is_none() || !config.kubeconfig.exists() {
        own.bootstrap(bootstrap, &config.kubeconfig).await?;
    }
    let authorities = authorities(dir, config)?;
    let ca = authorities.as_ref().map_or(ca.as_path(), |all| all.path());
    let tls = Arc::new(Tls::new(own.serving.clone(), ca)?);
    let client = connect(config, Some(own.client.clone()), authorities.clone()).await?;
    let own = Some((own, authorities));
    Ok(Access { client, tls, own })
}

/// The cluster's authorities, as it says which there are. None where clients are of another one than the API server: of those nobody tells.
fn authorities(dir: &Path, config: &Config) -> anyhow::Result<Option<Arc<Authorities>>> {
    let path = dir.join("ca.crt");
    let given = std::fs::read_to_string(&config.client_ca);
    let given = given.with_context(|| format!("cannot read {}", config.client_ca.display()))?;
    let of_server = server_authorities(&config.kubeconfig)?;
    if !path.exists() && of_server.as_deref() != Some(given.as_bytes()) {
        return Ok(None);
    }
    Ok(Some(Authorities::read(path, &given)?))
}

/// What a kubeconfig holds of the API server's authorities.
fn server_authorities(kubeconfig: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    let failed = || format!("cannot use {}", kubeconfig.display());
    let read = Kubeconfig::read_from(kubeconfig).with_context(failed)?;
    let cluster = read.clusters.into_iter().next();
    let data = cluster.and_then(|named| named.cluster?.certificate_authority_data);
    data.map(|data| BASE64_STANDARD.decode(data).with_context(failed))
        .transpose()
}

/// By which authorities the node goes, where these are followed.
fn goes_by(
    own: Option<&(Certificates, Option<Arc<Authorities>>)>,
) -> watch::Receiver<Option<String>> {
    let authorities = own.and_then(|(_, authorities)| authorities.as_ref());
    authorities.map_or_else(|| watch::channel(None).1, |all| all.goes_by())
}

async fn renew(own: Option<(Certificates, Option<Arc<Authorities>>)>, client: Client) {
    match own {
        Some((own, authorities)) => own.keep(client, authorities).await,
        None => std::future::pending().await,
    }
}

/// A client that shows the certificate that is current at each new connection; without one, that of the kubeconfig. So it is with the
/// authorities that it knows the server by.
fn client_of(
    config: kube::Config,
    certificate: Option<Arc<Held>>,
    authorities: Option<Arc<Authorities>>,
) -> Result<Client, kube::Error> {
    let Some(certificate) = certificate else {
        return Client::try_from(config);
    };
    let mut tls = config.rustls_client_config()?;
    tls.client_auth_cert_resolver = certificate;
    if let Some(authorities) = authorities {
        tls.dangerous().set_certificate_verifier(authorities);
    }
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(config.connect_timeout);
    let tls = hyper_rustls::HttpsConnectorBuilder::new()
        .with_tls_config(tls)
        .https_only()
        .enable_all_versions()
        .wrap_connector(tcp);
    let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .http2_keep_alive_interval(KEEP_ALIVE)
        .http2_keep_alive_timeout(KEEP_ALIVE)
        .build(tls);
    let service = tower::ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .layer(config.extra_headers_layer()?)
        .map_err(tower::BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace))
}

async fn connect(
    config: &Config,
    certificate: Option<Arc<Held>>,
    authorities: Option<Arc<Authorities>>,
) -> anyhow::Result<Client> {
    let path = &config.kubeconfig;
    let kubeconfig =
        Kubeconfig::read_from(path).with_context(|| format!("cannot read {}", path.display()))?;
    let options = KubeConfigOptions::default();
    let mut client_config = kube::Config::from_custom_kubeconfig(kubeconfig, &options)
        .await
        .with_context(|| format!("cannot use {}", path.display()))?;
    client_config.connect_timeout = Some(CONNECT_TIMEOUT);
    // What managedFields name the writer by.
    let program = concat!("kubelet/", env!("CARGO_PKG_VERSION"));
    let agent = http::HeaderValue::from_static(program);
    client_config
        .headers
        .push((http::header::USER_AGENT, agent));
    let client = client_of(client_config, certificate, authorities)
        .with_context(|| format!("cannot use {}", path.display()))?;
    // Not fatal: the API server may come up later, and pods that run go on meanwhile.
    if let Err(error) = Api::<Node>::all(client.clone())
        .get_opt(&config.node_name)
        .await
    {
        tracing::warn!(%error, "the API server does not answer yet");
    }
    Ok(client)
}

async fn wait_for_runtime(runtime: &dyn Runtime) -> String {
    let mut retry = Quick::default();
    loop {
        match runtime.version().await {
            Ok(version) => return version,
            Err(error) => tracing::warn!(%error, "waiting for the container runtime"),
        }
        tokio::time::sleep(retry.wait()).await;
    }
}
