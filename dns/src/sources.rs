//! Who tells of Services and endpoints: the agent of the node where there is one, else a watch of our own.
//!
//! The zone never goes back in time. An agent that may know less than is served (it has just begun, or its watch lags) is not listened
//! to until it has caught up; and when an agent goes, the zone stays as it is until a complete list has come from the API server.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cluster_model::Object;
use cluster_model::share::{KINDS, Offer, Versions};
use cluster_model::watch::kube::Client;
use cluster_model::watch::{Report, watch_part};
use tokio::sync::{mpsc, watch as latest};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::agent::{Agent, AgentError};
use crate::metrics::Metrics;

/// How long an agent may be away before the cluster is watched without it: one that has died is back within a second, and a list from
/// every node at the same moment is what the API server can do without.
const GRACE: Duration = Duration::from_secs(3);
/// Pauses between looks for an agent: short while it is missed, long once it is done without.
const SOON: Duration = Duration::from_millis(100);
const LATER: Duration = Duration::from_secs(1);
/// An agent whose watch has gone well for so long knows all that we do, whatever the versions say: those of what has been deleted are in no
/// list, and after a restore of the store they begin anew.
const WELL: Duration = Duration::from_secs(30);
/// Reports of our own watch that may wait.
const REPORTS_MAX: usize = 1024;

/// What is watched with, and by whom it may be told.
pub struct Sources {
    pub client: Client,
    pub socket: PathBuf,
    pub part: fn(Object) -> Object,
    pub metrics: Arc<Metrics>,
    /// What the agent is told of this server's answers.
    pub offers: latest::Receiver<Offer>,
}

/// A watch of our own, which ends with this.
struct Own {
    reports: mpsc::Receiver<Report>,
    task: JoinHandle<()>,
}

impl Drop for Own {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Nobody listens any more.
struct Unheard;

/// What is known, and to whom it is told.
struct Teller {
    out: mpsc::Sender<Report>,
    known: Versions,
}

impl Teller {
    /// Passes a report on. True when everything that was passed on is known by its version too.
    async fn tell(&mut self, report: Report) -> Result<bool, Unheard> {
        let whole = match report {
            Report::Reached { kind, version } => {
                self.known.reached(kind, version);
                true
            }
            _ => false,
        };
        self.out.send(report).await.map_err(|_| Unheard)?;
        Ok(whole)
    }
}

impl Sources {
    /// Reports for as long as anybody listens.
    pub async fn run(self, out: mpsc::Sender<Report>) {
        let known = Versions::default();
        // It ends when nobody listens, and with nothing else.
        let Err(Unheard) = self.follow(Teller { out, known }).await;
    }

    async fn follow(&self, mut teller: Teller) -> Result<Infallible, Unheard> {
        let mut own: Option<Own> = None;
        let mut missed_since = Instant::now();
        let (mut was_there, mut pause) = (false, Duration::ZERO);
        loop {
            let why = match self.look(pause, &mut own, &mut teller).await? {
                Ok(agent) if agent.versions.include(&teller.known) || agent.well_for >= WELL => {
                    // What our own watch has not reported yet comes from the agent too.
                    own = None;
                    teller.known = agent.versions;
                    self.metrics.from_agent.set(1);
                    tracing::info!(socket = %self.socket.display(), "the agent tells of the cluster");
                    let why = self.listen(agent, &mut teller).await?;
                    self.metrics.from_agent.set(0);
                    tracing::warn!(%why, "the agent is missed");
                    (missed_since, was_there, pause) = (Instant::now(), true, SOON);
                    continue;
                }
                // One that is back has begun with nothing, and lists as we would.
                Ok(_) if was_there && missed_since.elapsed() < GRACE => {
                    pause = SOON;
                    continue;
                }
                Ok(_) => "the agent has not caught up".to_owned(),
                Err(error) => {
                    // Where none ever was, none is waited for.
                    let patience = match error {
                        AgentError::Absent if !was_there => Duration::ZERO,
                        _ => GRACE,
                    };
                    if missed_since.elapsed() < patience {
                        pause = SOON;
                        continue;
                    }
                    error.to_string()
                }
            };
            if own.is_none() {
                tracing::info!(why, "the cluster is watched without the agent");
                own = Some(self.watch());
            }
            pause = LATER;
        }
    }

    /// Looks for the agent after a pause. Meanwhile our own watch, if there is one, is passed on.
    async fn look(
        &self,
        pause: Duration,
        own: &mut Option<Own>,
        teller: &mut Teller,
    ) -> Result<Result<Agent, AgentError>, Unheard> {
        let looking = async {
            sleep(pause).await;
            Agent::connect(&self.socket).await
        };
        tokio::pin!(looking);
        let mut whole = true;
        let found = loop {
            tokio::select! {
                found = &mut looking => break found,
                Some(report) = next(own) => whole = teller.tell(report).await?,
            }
        };
        // A change that has been passed on counts as known only with its version.
        while !whole && let Some(report) = next(own).await {
            whole = teller.tell(report).await?;
        }
        Ok(found)
    }

    fn watch(&self) -> Own {
        let (sender, reports) = mpsc::channel(REPORTS_MAX);
        let (client, part) = (self.client.clone(), self.part);
        let task = tokio::spawn(async move { watch_part(client, &KINDS, part, sender).await });
        Own { reports, task }
    }

    /// Passes on what an agent tells until it does not any more, and returns why.
    async fn listen(&self, mut agent: Agent, teller: &mut Teller) -> Result<AgentError, Unheard> {
        agent.tell(self.offers.clone());
        loop {
            match agent.next(self.part).await {
                Ok(report) => teller.tell(report).await?,
                Err(error) => return Ok(error),
            };
        }
    }
}

/// The next report of a watch; never, where there is none.
async fn next(own: &mut Option<Own>) -> Option<Report> {
    match own {
        Some(own) => own.reports.recv().await,
        None => std::future::pending().await,
    }
}
