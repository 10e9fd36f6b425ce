//! The newest revision of etcd, by its quorum: one question for all who ask at the same time.

use std::sync::Arc;

use etcd_client::{Client, GetOptions};
use tokio::sync::{mpsc, oneshot};

use super::{Lineage, Members, Replica, Revision, Space, StoreError, revision_of};

/// Readers that may wait before more are held back.
const WAITING_MAX: usize = 4096;

type Answer = oneshot::Sender<Result<Revision, StoreError>>;

pub(super) struct Fence {
    queue: mpsc::Sender<Answer>,
}

impl Fence {
    /// The fence, and the task that asks.
    pub fn new(
        members: Arc<Members>,
        space: &Space,
        (replica, lineage): (Replica, Arc<Lineage>),
    ) -> (Self, impl Future<Output = ()> + use<>) {
        let (queue, waiting) = mpsc::channel(WAITING_MAX);
        let path = space.format_path();
        let asking = run(members, path, (replica, lineage), waiting);
        (Self { queue }, asking)
    }

    /// A revision that is no older than any that was answered before this call.
    pub async fn pass(&self) -> Result<Revision, StoreError> {
        let (answer, outcome) = oneshot::channel();
        self.queue
            .send(answer)
            .await
            .map_err(|_| StoreError::Closed)?;
        outcome.await.map_err(|_| StoreError::Closed)?
    }
}

async fn run(
    members: Arc<Members>,
    path: String,
    (replica, lineage): (Replica, Arc<Lineage>),
    mut waiting: mpsc::Receiver<Answer>,
) {
    let mut answers = Vec::new();
    // All of them asked before the question is: it holds for each.
    while waiting.recv_many(&mut answers, WAITING_MAX).await > 0 {
        let known = replica.revision();
        let newest = ask(&members, &path).await;
        let outcome = newest.and_then(|newest| lineage.hold(known, newest).map(|()| newest));
        for answer in answers.drain(..) {
            // A reader that has gone away needs none.
            let _ = answer.send(outcome.clone());
        }
    }
}

/// The revision that etcd's quorum names.
pub(super) async fn ask(members: &Members, path: &str) -> Result<Revision, StoreError> {
    let count = |client: Client| async move {
        let options = GetOptions::new().with_count_only();
        client.kv_client().get(path, Some(options)).await
    };
    let response = members.ask_any("read", count).await?;
    Ok(revision_of(response.header()))
}
