//! The server: UDP threads over the zone and the cache, TCP, and what takes longer.

pub mod at_once;
mod crowd;
mod limits;
pub mod looked;
pub mod rates;
mod slow;
mod tcp;
pub mod transfer;
mod udp;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, Guard};
use cluster_model::share::Offer;
use nix::ifaddrs::getifaddrs;
use tokio::net::TcpListener;
use tokio::sync::watch as latest;

use crate::answer::{Policy, cut};
use crate::forward::Upstream;
use crate::metrics::Metrics;
use crate::offer::offer;
use crate::settings::Settings;
use crate::sys;
use crate::zone::Zone;
pub use at_once::REPLY_BYTES_MAX;
use at_once::View;
use limits::Limits;
use rates::Rates;
pub(crate) use udp::renew_entry;

/// What answers come from at one moment. Zone and settings are those of one configuration: a name that is the cluster's by the new one is
/// not asked for elsewhere because the zone does not have it yet.
pub struct State {
    pub zone: Arc<Zone>,
    pub settings: Arc<Settings>,
}

/// What every part of the server shares.
pub struct Shared {
    state: ArcSwap<State>,
    pub metrics: Arc<Metrics>,
    /// For what no block is about.
    bare: Policy,
    turn: AtomicUsize,
    limits: Arc<Limits>,
    /// Bytes per second by which a client's answers may be longer than its questions, by UDP; 0 for no limit.
    amplified_s: u32,
    /// For the answers that come late.
    slow_rates: Mutex<Option<Rates>>,
    probes: Probes,
    /// Where it serves, once it does.
    serves: OnceLock<(SocketAddr, Vec<IpAddr>)>,
    /// What the agent of the node is told about its answers.
    offer: latest::Sender<Offer>,
    /// It was ready once.
    was_ready: AtomicBool,
    /// It is about to stop: readiness says no.
    stopping: AtomicBool,
    /// UDP threads end as soon as nothing is left to answer, and so do connections; no new one is taken.
    draining: latest::Sender<bool>,
    /// UDP threads, and listeners for TCP, that have not ended.
    serving: AtomicUsize,
}

impl Shared {
    pub fn new(settings: Settings, metrics: Metrics) -> Arc<Self> {
        Self::limited(settings, metrics, rates::BYTES_S)
    }

    /// With another limit on what is sent to one client beyond what it sends, in bytes per second; 0 for none.
    pub fn limited(settings: Settings, metrics: Metrics, amplified_s: u32) -> Arc<Self> {
        Arc::new(Self {
            state: ArcSwap::from_pointee(State {
                zone: Zone::new(settings.zone().clone()).into(),
                settings: settings.into(),
            }),
            metrics: Arc::new(metrics),
            bare: Policy::default(),
            turn: AtomicUsize::new(0),
            limits: Arc::default(),
            amplified_s,
            slow_rates: Mutex::new(Rates::new(amplified_s)),
            probes: Probes::default(),
            serves: OnceLock::new(),
            offer: latest::Sender::new(Offer::Refuse),
            was_ready: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            draining: latest::Sender::new(false),
            serving: AtomicUsize::new(0),
        })
    }

    /// Cuts a late answer, where its client may not have it in full by UDP.
    fn limit_slow(&self, client: IpAddr, query: &[u8], reply: &mut Vec<u8>) {
        let mut rates = self
            .slow_rates
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let Some(rates) = rates.as_mut() else { return };
        if !rates.may(client, query.len(), reply.len(), Instant::now()) {
            self.metrics.limited.inc();
            let bytes = cut(query, reply);
            reply.truncate(bytes);
        }
    }

    pub fn state(&self) -> Guard<Arc<State>> {
        self.state.load()
    }

    /// What answers come from by a state.
    pub fn view<'a>(&'a self, state: &'a State, now: Instant) -> View<'a> {
        View {
            zone: &state.zone,
            rules: &state.settings.rules,
            bare: &self.bare,
            caching: &self.metrics.caching,
            now,
        }
    }

    pub fn zone(&self) -> Arc<Zone> {
        self.state.load().zone.clone()
    }

    pub fn settings(&self) -> Arc<Settings> {
        self.state.load().settings.clone()
    }

    /// Serves another zone by the same settings.
    pub fn serve(&self, zone: Zone) {
        let zone = Arc::new(zone);
        self.state.rcu(|old| State {
            zone: zone.clone(),
            settings: old.settings.clone(),
        });
    }

    /// Why it is not ready; `None` when it is. Pods that are missed after a reload do not count: names of Services are answered, and a
    /// configuration that asks for what can't be watched must not take every node's DNS away.
    pub fn unready(&self) -> Option<&'static str> {
        let zone = self.zone();
        if self.is_stopping() {
            Some("stopping")
        } else if !zone.synced() {
            Some("Services and EndpointSlices are not synced yet")
        } else if !zone.pods_synced() && !self.was_ready.load(Ordering::Relaxed) {
            Some("Pods are not synced yet")
        } else {
            self.was_ready.store(true, Ordering::Relaxed);
            None
        }
    }

    fn turn(&self) -> usize {
        self.turn.fetch_add(1, Ordering::Relaxed)
    }

    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Says that the end is near: clients learn of it by readiness, and are served meanwhile.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// Waits until every query that has come is answered, `most` at the longest.
    pub async fn drain(&self, most: Duration) {
        self.draining.send_replace(true);
        let end = Instant::now() + most;
        let busy = || {
            self.serving.load(Ordering::Relaxed) > 0
                || self.limits.slow_queries() > 0
                || self.limits.connections() > 0
        };
        while busy() && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Takes a configuration over with the zone that is made by it, and looks for loops among its upstreams.
    pub fn configure(&self, zone: Arc<Zone>, settings: Arc<Settings>) {
        self.probes.send(&settings);
        // What is not so any more is not said any longer; what is new, only once it is so.
        self.offer.send_replace(Offer::Refuse);
        self.state.store(Arc::new(State { zone, settings }));
        self.renew_offer();
    }

    fn renew_offer(&self) {
        if let Some((address, own)) = self.serves.get() {
            let offer = offer(&self.settings().spec, *address, own);
            self.offer.send_replace(offer);
        }
    }

    /// By what rules others may answer in this server's place, and from when on by others.
    pub fn offers(&self) -> latest::Receiver<Offer> {
        self.offer.subscribe()
    }
}

/// Questions that were sent to upstreams to see whether they come back.
#[derive(Default)]
struct Probes(Mutex<HashMap<Vec<u8>, Arc<Upstream>>>);

impl Probes {
    fn send(&self, settings: &Settings) {
        let probes = settings.probe_loops();
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *all = probes.iter().cloned().collect();
        drop(all);
        for (name, upstream) in probes {
            upstream.send_probe(name);
        }
    }

    fn came_back(&self, name: &[u8]) -> bool {
        let probes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        probes
            .get(name)
            .inspect(|upstream| upstream.found_leading_back())
            .is_some()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("{transport} {address} can't be bound: {source}")]
    Bind {
        transport: &'static str,
        address: SocketAddr,
        source: io::Error,
    },
}

/// Sets up the process for a server's needs; to be called before threads are started.
pub fn prepare_process() {
    sys::keep_memory_small();
}

/// Has the calling thread, which makes zones of what is told of the cluster, wait for those that answer: a list takes it as long as some
/// thousand answers. To be called once those have been started, since threads are as patient as who starts them.
pub fn answers_go_first() {
    if let Err(error) = sys::let_others_go_first() {
        tracing::debug!(%error, "news of the cluster may delay answers");
    }
}

/// Binds `address` for UDP, once per thread, and for TCP, and serves until the process ends or it is drained. Must be called
/// within a tokio runtime, which carries TCP and what is forwarded.
pub async fn start(
    shared: &Arc<Shared>,
    address: SocketAddr,
    threads: usize,
) -> Result<SocketAddr, ServerError> {
    let (first, listener, address) = bind(address).await?;
    let mut sockets = vec![first];
    while sockets.len() < threads {
        sockets.push(sys::bind(address).map_err(refused("udp", address))?);
    }
    // A UDP socket has one family, so that clients have the addresses they are known by. The TCP listener takes both.
    if address.ip() == IpAddr::from(Ipv6Addr::UNSPECIFIED) {
        let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
        for _ in 0..threads {
            sockets.push(sys::bind(address).map_err(refused("udp", address))?);
        }
    }
    let runtime = tokio::runtime::Handle::current();
    // And the listener for TCP.
    shared
        .serving
        .fetch_add(sockets.len() + 1, Ordering::Relaxed);
    for socket in sockets {
        let (shared, runtime) = (shared.clone(), runtime.clone());
        thread::spawn(move || {
            udp::serve(&shared, &Arc::new(socket), &runtime);
            shared.serving.fetch_sub(1, Ordering::Relaxed);
        });
    }
    tokio::spawn(tcp::serve(shared.clone(), listener));
    shared.probes.send(&shared.settings());
    shared.serves.get_or_init(|| (address, own_addresses()));
    shared.renew_offer();
    Ok(address)
}

/// How often port 0 is tried: the port that the kernel gives to TCP may be another's by UDP.
const PORT_TRIES: usize = 16;

/// One socket of each transport on one port. TCP first: only that says that another server is there already, of whose datagrams a socket
/// for UDP would have a part.
async fn bind(wanted: SocketAddr) -> Result<(UdpSocket, TcpListener, SocketAddr), ServerError> {
    let mut tries = 0;
    loop {
        tries += 1;
        let tcp = TcpListener::bind(wanted).await;
        let tcp = tcp.map_err(refused("tcp", wanted))?;
        let address = tcp.local_addr().map_err(refused("tcp", wanted))?;
        match sys::bind(address) {
            Ok(udp) => return Ok((udp, tcp, address)),
            Err(error)
                if wanted.port() == 0
                    && error.kind() == io::ErrorKind::AddrInUse
                    && tries < PORT_TRIES => {}
            Err(error) => return Err(refused("udp", address)(error)),
        }
    }
}

fn refused(transport: &'static str, address: SocketAddr) -> impl FnOnce(io::Error) -> ServerError {
    move |source| ServerError::Bind {
        transport,
        address,
        source,
    }
}

/// The addresses of this process's interfaces.
fn own_addresses() -> Vec<IpAddr> {
    let interfaces = match getifaddrs() {
        Ok(interfaces) => interfaces,
        Err(error) => {
            tracing::warn!(%error, "the addresses of this machine are not known");
            return Vec::new();
        }
    };
    let addresses = interfaces.filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    });
    let is_of_link = |address: &IpAddr| {
        matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()) || address.is_loopback()
    };
    addresses.filter(|address| !is_of_link(address)).collect()
}
