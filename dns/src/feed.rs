//! From the API server's watch to the served zone.

use std::sync::Arc;

use cluster_model::watch::{Report, kube::Client, watch};
use cluster_model::{Dirty, Kind, Snapshot};
use tokio::sync::mpsc;

use crate::server::Shared;

/// Reports that may wait: a burst becomes few batches, and the watch is slowed down rather than buffered.
const REPORTS_MAX: usize = 4096;

/// Follows Services and EndpointSlices for as long as the process lives. While the API server is away the last zone
/// is served on.
pub async fn follow(shared: Arc<Shared>, client: Client) {
    let (sender, mut reports) = mpsc::channel(REPORTS_MAX);
    tokio::spawn(async move { watch(client, &[Kind::Service, Kind::EndpointSlice], sender).await });
    let mut snapshot = Snapshot::default();
    let mut batch = Vec::with_capacity(REPORTS_MAX);
    while reports.recv_many(&mut batch, REPORTS_MAX).await > 0 {
        let mut dirty = Dirty::default();
        for report in batch.drain(..) {
            match report {
                Report::Change(change) => snapshot.apply(change, &mut dirty),
                Report::Rejected(rejected) => tracing::warn!(%rejected, "left out"),
                Report::Failed { kind, error } => {
                    tracing::warn!(%kind, error, "watching; it is tried again")
                }
            }
        }
        if dirty.is_empty() {
            continue;
        }
        let mut zone = (**shared.zone.load()).clone();
        let was_synced = zone.synced();
        zone.update(&snapshot, &dirty);
        if zone.synced() && !was_synced {
            tracing::info!(services = snapshot.count(Kind::Service), "synced");
        }
        shared.zone.store(Arc::new(zone));
    }
}
