//! Kubelets that are simulated, at the rates of real ones: each renews its lease, reports its status, and watches its pods and the
//! Services, over a connection of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use futures::future::try_join_all;
use hdrhistogram::Histogram;
use http::Method;
use serde_json::json;
use tokio::sync::{Mutex, Semaphore, oneshot};
use tokio::task::JoinSet;

use super::endpoint::{Caller, Endpoint, Events, Frame};
use super::work::NAMESPACE;

/// As kubelets have it: nodeLeaseDurationSeconds / 4, and nodeStatusReportFrequency.
const LEASE_PERIOD: Duration = Duration::from_secs(10);
const STATUS_PERIOD: Duration = Duration::from_secs(300);
/// Changes of pods' states in a second, of all nodes together: what Kubernetes is measured with (thresholds of sig-scalability).
const CHURN_PER_SECOND: f64 = 20.0;
const MAKERS: usize = 64;
/// How many kubelets begin at a time. All of them at once would wait for each other's handshakes longer than a server waits for those.
const BEGINNERS: usize = 64;
/// How long all watches together may take to see what is there when they begin.
const PATIENCE: Duration = Duration::from_secs(600);

/// How large.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub nodes: usize,
    pub pods_per_node: usize,
    pub services: usize,
}

/// What requests took, by what they did.
pub struct Times {
    pub of: Vec<(&'static str, Histogram<u64>)>,
    pub events: u64,
    pub failed: u64,
    pub took: Duration,
    pub cpu: Option<Duration>,
    pub memory: Option<f64>,
}

#[derive(Default)]
struct Shared {
    leases: Mutex<Vec<u64>>,
    statuses: Mutex<Vec<u64>>,
    pods: Mutex<Vec<u64>>,
    reads: Mutex<Vec<u64>>,
    events: AtomicU64,
    failed: AtomicU64,
    /// Kubelets whose watches have seen all that was there when they began.
    begun: tokio::sync::watch::Sender<usize>,
}

/// How far the run is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// Kubelets begin, and wait for each other.
    Begins,
    Lives,
    Stops,
}

/// Makes the nodes with all that is theirs, lets their kubelets live for a while, and measures.
pub async fn run(
    endpoint: &Endpoint,
    size: Size,
    duration: Duration,
    say: impl Fn(String),
) -> Result<Times> {
    let pods = size.nodes * size.pods_per_node;
    say(format!(
        "making {} nodes, {pods} pods and {} Services",
        size.nodes, size.services
    ));
    let began = Instant::now();
    make(endpoint, size).await?;
    let made = began.elapsed();
    say(format!(
        "made in {} s; {} watches begin",
        made.as_secs(),
        2 * size.nodes
    ));
    let shared = Arc::new(Shared::default());
    let turns = Arc::new(Semaphore::new(BEGINNERS));
    let stage = tokio::sync::watch::Sender::new(Stage::Begins);
    let mut kubelets = JoinSet::new();
    let mut count = shared.begun.subscribe();
    for number in 0..size.nodes {
        let kubelet = Kubelet {
            caller: endpoint.caller()?,
            number,
            size,
            shared: shared.clone(),
        };
        let (turns, stage) = (turns.clone(), stage.subscribe());
        kubelets.spawn(async move { kubelet.live(&turns, stage).await });
    }
    // What it costs that all of them begin is not what is measured.
    let all = count.wait_for(|count| *count == size.nodes);
    tokio::select! {
        all = tokio::time::timeout(PATIENCE, all) => drop(all.with_context(|| {
            let count = *shared.begun.borrow();
            format!("{count} of {} kubelets have seen what is there", size.nodes)
        })?),
        Some(ended) = kubelets.join_next() => {
            ended?.context("a kubelet cannot begin")?;
            bail!("a kubelet has ended");
        }
    }
    let begun = began.elapsed() - made;
    say(format!("all have begun in {} s", begun.as_secs()));
    stage.send_replace(Stage::Lives);
    // Until each has the connection that it asks on.
    tokio::time::sleep(LEASE_PERIOD).await;
    shared.events.store(0, Ordering::Relaxed);
    for times in [
        &shared.leases,
        &shared.statuses,
        &shared.pods,
        &shared.reads,
    ] {
        times.lock().await.clear();
    }
    shared.failed.store(0, Ordering::Relaxed);
    say(format!("measuring for {} s", duration.as_secs()));
    let (cpu, began) = (endpoint.cpu()?, Instant::now());
    tokio::time::sleep(duration).await;
    let used = endpoint
        .cpu()?
        .zip(cpu)
        .map(|(after, before)| after - before);
    let (took, memory) = (began.elapsed(), endpoint.memory()?);
    stage.send_replace(Stage::Stops);
    while let Some(ended) = kubelets.join_next().await {
        ended??;
    }
    let histogram = async |times: &Mutex<Vec<u64>>| {
        let mut histogram = Histogram::<u64>::new(3).context("a histogram")?;
        for micros in times.lock().await.iter() {
            histogram.record(*micros)?;
        }
        Ok::<_, anyhow::Error>(histogram)
    };
    Ok(Times {
        of: vec![
            ("lease renewed", histogram(&shared.leases).await?),
            ("node status", histogram(&shared.statuses).await?),
            ("pod status", histogram(&shared.pods).await?),
            ("own pod read", histogram(&shared.reads).await?),
        ],
        events: shared.events.load(Ordering::Relaxed),
        failed: shared.failed.load(Ordering::Relaxed),
        took,
        cpu: used,
        memory,
    })
}

/// Nodes, leases, pods that are bound to them, and Services.
async fn make(endpoint: &Endpoint, size: Size) -> Result<()> {
    let next = Arc::new(AtomicU64::new(0));
    let all = size.nodes + size.services;
    let makers = (0..MAKERS).map(|_| {
        let next = next.clone();
        async move {
            let caller = endpoint.caller()?;
            loop {
                let number = usize::try_from(next.fetch_add(1, Ordering::Relaxed))?;
                if number >= all {
                    return Ok::<_, anyhow::Error>(());
                }
                if number < size.nodes {
                    make_node(&caller, number, size.pods_per_node).await?;
                } else {
                    make_service(&caller, number - size.nodes).await?;
                }
            }
        }
    });
    try_join_all(makers).await.map(drop)
}

async fn make_node(caller: &Caller, number: usize, pods: usize) -> Result<()> {
    let name = node(number);
    let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}});
    caller.post("/api/v1/nodes", &object).await?.ok()?;
    let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name, "namespace": "kube-node-lease"},
        "spec": {"holderIdentity": name, "leaseDurationSeconds": 40}});
    let leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
    caller.post(leases, &lease).await?.ok()?;
    for pod in 0..pods {
        let object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": format!("{name}-{pod}"), "labels": {"app": "fleet"}},
            "spec": {"nodeName": name, "automountServiceAccountToken": false, "containers": [{"name": "main", "image": "nothing"}]}});
        let path = format!("/api/v1/namespaces/{NAMESPACE}/pods");
        caller.post(&path, &object).await?.ok()?;
    }
    Ok(())
}

async fn make_service(caller: &Caller, number: usize) -> Result<()> {
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": format!("s-{number}")},
        "spec": {"selector": {"app": "fleet"}, "ports": [{"port": 80}]}});
    let path = format!("/api/v1/namespaces/{NAMESPACE}/services");
    caller.post(&path, &service).await?.ok()?;
    Ok(())
}

fn node(number: usize) -> String {
    format!("fleet-{number}")
}

struct Kubelet {
    caller: Caller,
    number: usize,
    size: Size,
    shared: Arc<Shared>,
}

impl Kubelet {
    /// Begins when it is its turn, lives when all do, until all stop.
    async fn live(
        &self,
        turns: &Semaphore,
        mut stage: tokio::sync::watch::Receiver<Stage>,
    ) -> Result<()> {
        let mut stops = stage.clone();
        let turn = turns.acquire().await?;
        let ((own, own_seen), (services, services_seen)) = (oneshot::channel(), oneshot::channel());
        let work = async {
            own_seen.await.context("its pods")?;
            services_seen.await.context("the Services")?;
            drop(turn);
            self.shared.begun.send_modify(|count| *count += 1);
            stage.wait_for(|stage| *stage >= Stage::Lives).await?;
            self.work().await;
            Ok(())
        };
        let name = node(self.number);
        let of_node = format!("/api/v1/pods?watch=1&fieldSelector=spec.nodeName%3D{name}");
        let of_all = "/api/v1/services?watch=1&resourceVersion=0";
        tokio::select! {
            ended = self.watch(&of_node, self.size.pods_per_node, own) => ended,
            ended = self.watch(of_all, self.size.services, services) => ended,
            ended = work => ended,
            _ = stops.wait_for(|stage| *stage == Stage::Stops) => Ok(()),
        }
    }

    /// Watches, and tells when it has seen as many events as there are objects. One that ends before that has failed.
    async fn watch(&self, path: &str, there: usize, seen: oneshot::Sender<()>) -> Result<()> {
        let path = format!("{path}&timeoutSeconds=3600");
        let mut left = u64::try_from(there)?;
        let mut seen = Some(seen);
        let mut come = |events: u64| {
            self.shared.events.fetch_add(events, Ordering::Relaxed);
            left = left.saturating_sub(events);
            if left == 0
                && let Some(seen) = seen.take()
            {
                // Who is not told any more has stopped.
                let _ = seen.send(());
            }
            true
        };
        if there == 0 {
            come(0);
        }
        let frames = Events::Frames(Frame::default());
        let ended = self.caller.watch(&path, frames, come).await;
        if seen.is_some() {
            return ended;
        }
        self.shared.failed.fetch_add(1, Ordering::Relaxed);
        std::future::pending().await
    }

    async fn work(&self) {
        let (caller, shared, number) = (&self.caller, &self.shared, self.number);
        let (name, nodes) = (node(number), self.size.nodes);
        let rest = LEASE_PERIOD.mul_f64(number as f64 / nodes as f64);
        tokio::time::sleep(rest).await;
        let mut reported =
            Instant::now() - STATUS_PERIOD.mul_f64(rest.as_secs_f64() / LEASE_PERIOD.as_secs_f64());
        let mut turn = 0_u64;
        // So often does a pod of this node change, in renewals of the lease.
        let churn = CHURN_PER_SECOND * LEASE_PERIOD.as_secs_f64() / nodes as f64;
        let mut due = share_of_a_turn(number);
        loop {
            let began = Instant::now();
            turn += 1;
            renew(caller, &name, shared).await;
            if reported.elapsed() >= STATUS_PERIOD {
                report(caller, &name, turn, shared).await;
                reported = Instant::now();
            }
            due += churn;
            while due >= 1.0 && self.size.pods_per_node > 0 {
                due -= 1.0;
                let pod = turn as usize % self.size.pods_per_node;
                change_pod(caller, &format!("{name}-{pod}"), turn, shared).await;
            }
            tokio::time::sleep(LEASE_PERIOD.saturating_sub(began.elapsed())).await;
        }
    }
}

/// How much of the way to its first change a node's pods have gone when it begins: evenly spread, also over nodes that renew their leases
/// one soon after the other.
fn share_of_a_turn(number: usize) -> f64 {
    // Multiples of the golden ratio leave no gap for long (Weyl's equidistribution).
    const GOLDEN: f64 = 0.618_033_988_749_895;
    (number as f64 * GOLDEN).fract()
}

async fn timed(
    caller: &Caller,
    (method, path): (Method, &str),
    body: Option<&serde_json::Value>,
    times: &Mutex<Vec<u64>>,
    failed: &AtomicU64,
) {
    match caller.send(method, path, "application/json", body).await {
        Ok(answer) if answer.status.is_success() => {
            let micros = u64::try_from(answer.took.as_micros()).unwrap_or(u64::MAX);
            times.lock().await.push(micros);
        }
        _ => drop(failed.fetch_add(1, Ordering::Relaxed)),
    }
}

async fn renew(caller: &Caller, name: &str, shared: &Shared) {
    let path = format!("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{name}");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.map_or(0, |since| since.as_micros());
    // A time of the day is enough: it only has to be another one each time.
    let (second, micro) = (now / 1_000_000, now % 1_000_000);
    let at = format!(
        "2026-11-26T{:02}:{:02}:{:02}.{micro:06}Z",
        second / 3600 % 24,
        second / 60 % 60,
        second % 60
    );
    let body = json!({"spec": {"renewTime": at}});
    timed(
        caller,
        (Method::PATCH, &path),
        Some(&body),
        &shared.leases,
        &shared.failed,
    )
    .await;
}

async fn report(caller: &Caller, name: &str, turn: u64, shared: &Shared) {
    let path = format!("/api/v1/nodes/{name}/status");
    let condition = json!({"type": "Ready", "status": "True", "reason": "KubeletReady", "message": format!("turn {turn}")});
    let body = json!({"status": {"capacity": {"cpu": "8", "memory": "32Gi", "pods": "110"}, "conditions": [condition]}});
    timed(
        caller,
        (Method::PATCH, &path),
        Some(&body),
        &shared.statuses,
        &shared.failed,
    )
    .await;
}

async fn change_pod(caller: &Caller, pod: &str, turn: u64, shared: &Shared) {
    let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{pod}");
    timed(
        caller,
        (Method::GET, &path),
        None,
        &shared.reads,
        &shared.failed,
    )
    .await;
    let body = json!({"status": {"phase": "Running", "message": format!("turn {turn}")}});
    let status = format!("{path}/status");
    timed(
        caller,
        (Method::PATCH, &status),
        Some(&body),
        &shared.pods,
        &shared.failed,
    )
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_change_from_the_first_turn_on_and_at_one_rate() {
        const NODES: usize = 5000;
        let churn = CHURN_PER_SECOND * LEASE_PERIOD.as_secs_f64() / NODES as f64;
        let mut due: Vec<f64> = (0..NODES).map(share_of_a_turn).collect();
        for turn in 0..50 {
            let mut changed = 0;
            for due in &mut due {
                *due += churn;
                if *due >= 1.0 {
                    *due -= 1.0;
                    changed += 1;
                }
            }
            assert!((190..=210).contains(&changed), "{changed} in turn {turn}");
        }
    }
}
