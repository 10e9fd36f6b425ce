//! report: getting a pod's status to the API, newest first, without holding up the worker.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::PodStatus;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::backoff::Quick;
use crate::cluster::{Cluster, ClusterError};
use crate::pod::PodKey;
use crate::task::Scoped;

/// How long the API may show something else than what was reported before it is reported again.
const DRIFT_TIME: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Default)]
struct Wish {
    number: u64,
    status: Option<PodStatus>,
}

/// A Reporter posts the latest status of one pod. Statuses that were overtaken before they could be posted are skipped.
#[derive(Debug)]
pub struct Reporter {
    wish: watch::Sender<Wish>,
    posted: watch::Receiver<(u64, Instant)>,
    _task: Scoped,
}

impl Reporter {
    /// `known`: the status that the API has.
    pub fn start(cluster: Arc<dyn Cluster>, key: PodKey, known: PodStatus) -> Self {
        let (wish, mut wishes) = watch::channel(Wish::default());
        let (post, posted) = watch::channel((0, Instant::now()));
        let task = Scoped::spawn(async move {
            let mut known = known;
            let mut retry = Quick::default();
            loop {
                let wish = wishes.borrow_and_update().clone();
                let done = post.borrow().0 >= wish.number;
                let Some(status) = wish.status.filter(|_| !done) else {
                    if wishes.changed().await.is_err() {
                        return;
                    }
                    continue;
                };
                match cluster.report(&key, &known, &status).await {
                    // A pod that is gone needs no report; whoever waits for it may go on.
                    Ok(()) | Err(ClusterError::Gone { .. }) => {
                        known = status;
                        retry.clear();
                        let _ = post.send((wish.number, Instant::now()));
                    }
                    Err(error) => {
                        tracing::debug!(pod = %key, %error, "cannot report the status; trying again");
                        tokio::time::sleep(retry.wait()).await;
                    }
                }
            }
        });
        Self {
            wish,
            posted,
            _task: task,
        }
    }

    /// Wants this status in the API. `shown`: what the API showed last.
    pub fn want(&self, status: PodStatus, shown: Option<&PodStatus>) {
        let (posted, at) = *self.posted.borrow();
        self.wish.send_if_modified(|wish| {
            let settled = posted == wish.number && at.elapsed() > DRIFT_TIME;
            let first = wish.status.is_none();
            let drifted = (settled || first) && shown.is_none_or(|shown| differ(shown, &status));
            if wish.status.as_ref() == Some(&status) && !drifted {
                return false;
            }
            if first && !drifted {
                // The API has it already: this kubelet follows another that reported the same.
                wish.status = Some(status);
                return false;
            }
            *wish = Wish {
                number: wish.number + 1,
                status: Some(status),
            };
            true
        });
    }

    /// Waits until the latest status is in the API.
    pub async fn flush(&self) {
        let number = self.wish.borrow().number;
        let mut posted = self.posted.clone();
        // An error means that the reporter ended, which only its drop does.
        let _ = posted.wait_for(|(done, _)| *done >= number).await;
    }
}

/// Whether what others act on is different: phase, address, conditions, and which containers are ready.
fn differ(shown: &PodStatus, wanted: &PodStatus) -> bool {
    let facts = |status: &PodStatus| {
        let conditions = status
            .conditions
            .iter()
            .flatten()
            .map(|c| (c.type_.clone(), c.status.clone()));
        let mut conditions: Vec<_> = conditions.collect();
        conditions.sort();
        let all = status
            .init_container_statuses
            .iter()
            .chain(&status.container_statuses)
            .flatten();
        let containers: Vec<_> = all
            .map(|c| {
                (
                    c.name.clone(),
                    c.ready,
                    c.restart_count,
                    c.container_id.clone(),
                )
            })
            .collect();
        (
            status.phase.clone(),
            status.pod_ip.clone(),
            conditions,
            containers,
        )
    };
    facts(shown) != facts(wanted)
}
