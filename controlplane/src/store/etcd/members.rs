//! The members of an etcd cluster, of which one at a time is asked: the next one when it does not answer.

mod list;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use etcd_client::{Client, ConnectOptions};
use tokio::time::{Instant, sleep, timeout};

use super::{EtcdConfig, PATIENCE, StoreError};

/// How long members may be without a leader: two elections of etcd's default timing.
const ELECTION: Duration = Duration::from_secs(3);
const ROUND_PAUSE: Duration = Duration::from_millis(100);
/// How often it is looked who is a member, and whether the credentials have been replaced.
const LOOK_PERIOD: Duration = Duration::from_secs(10);

pub(super) struct Members {
    config: EtcdConfig,
    known: Mutex<Known>,
}

/// The members that are asked, and whose turn it is.
struct Known {
    /// One per endpoint, never empty. They connect when they are used.
    clients: Vec<(String, Client)>,
    /// Only grows, so that a turn that is over is told from those after it.
    turn: usize,
}

impl Known {
    fn endpoints(&self) -> Vec<String> {
        let endpoints = self.clients.iter().map(|(endpoint, _)| endpoint.clone());
        endpoints.collect()
    }

    /// Puts others in the place of the clients; who has the turn keeps it, if it is one of them.
    fn replace(&mut self, clients: Vec<(String, Client)>) {
        let before = &self.clients[self.turn % self.clients.len()].0;
        let at = clients.iter().position(|(endpoint, _)| endpoint == before);
        let rounds = self.turn / clients.len() + 1;
        self.turn = rounds * clients.len() + at.unwrap_or_default();
        self.clients = clients;
    }
}

impl Members {
    pub async fn new(config: &EtcdConfig) -> Result<Self, StoreError> {
        let mut endpoints = config.endpoints.clone();
        for endpoint in list::remembered(config.members_file.as_deref()) {
            if !endpoints.contains(&endpoint) {
                endpoints.push(endpoint);
            }
        }
        let clients = connect(&endpoints, config.options()?).await?;
        if clients.is_empty() {
            return Err(StoreError::Unavailable {
                operation: "connect",
                reason: "no endpoint is named".to_owned(),
            });
        }
        Ok(Self {
            config: config.clone(),
            known: Mutex::new(Known { clients, turn: 0 }),
        })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose turn it is, for [`Members::leave`].
    pub fn turn(&self) -> usize {
        self.known().turn
    }

    /// Goes on to the next member, unless somebody else has done so already.
    pub fn leave(&self, turn: usize) {
        let mut known = self.known();
        if known.turn == turn {
            known.turn += 1;
        }
    }

    /// Learns who is a member, where that is wanted, and takes up credentials that were replaced, for as long as the store lives.
    pub async fn keep(self: Arc<Self>) {
        let mut stamp = self.config.stamp();
        loop {
            let before = self.known().endpoints();
            let mut endpoints = before.clone();
            if let Some(path) = &self.config.members_file
                && let Ok(now) = self.learn().await
                && !now.is_empty()
            {
                list::remember(path, &now);
                endpoints = now;
            }
            let now = self.config.stamp();
            if endpoints != before || now != stamp {
                match self.change(&endpoints).await {
                    Ok(()) => {
                        tracing::info!(members = ?endpoints, "etcd is asked at these, with the credentials there are now");
                        stamp = now;
                    }
                    // Half of a pair may be replaced already: it is looked at again soon.
                    Err(error) => tracing::warn!(%error, "etcd is asked as before"),
                }
            }
            sleep(LOOK_PERIOD).await;
        }
    }

    async fn change(&self, endpoints: &[String]) -> Result<(), StoreError> {
        let clients = connect(endpoints, self.config.options()?).await?;
        self.known().replace(clients);
        Ok(())
    }

    /// Where those are that can be asked: the configured ones first.
    async fn learn(&self) -> Result<Vec<String>, StoreError> {
        let ask = async |mut client: Client| client.member_list().await;
        let answer = self.ask_any("list the members", ask).await?;
        // One without a vote answers no question, and one that has never started has no address.
        let voters = answer
            .members()
            .iter()
            .filter(|member| !member.is_learner());
        let found = voters.flat_map(|member| member.client_urls().to_vec());
        Ok(list::ordered(&self.config.endpoints, found.collect()))
    }

    /// Asks one member, once. When it fails, it is not known whether it did what it was asked.
    pub async fn ask<T, F>(
        &self,
        operation: &'static str,
        request: impl FnOnce(Client) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let (turn, client) = {
            let known = self.known();
            let at = known.turn % known.clients.len();
            (known.turn, known.clients[at].1.clone())
        };
        let reason = match timeout(PATIENCE, request(client)).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(etcd_client::Error::GRpcStatus(status))) => status.message().to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {PATIENCE:?}"),
        };
        // Of room, all have the same.
        if !is_full(&reason) {
            self.leave(turn);
        }
        Err(StoreError::Unavailable { operation, reason })
    }

    /// Asks what may be asked again: each member, until one answers. While they choose a leader none does, or those that are away refuse at
    /// once: they are asked again for as long as that takes.
    pub async fn ask_any<T, F>(
        &self,
        operation: &'static str,
        request: impl Fn(Client) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let begun = Instant::now();
        loop {
            let members = self.known().clients.len();
            let mut outcome = self.ask(operation, &request).await;
            for _ in 1..members {
                if !is_to_ask_again(&outcome) {
                    break;
                }
                outcome = self.ask(operation, &request).await;
            }
            if !is_to_ask_again(&outcome) || begun.elapsed() >= ELECTION {
                return outcome;
            }
            sleep(ROUND_PAUSE).await;
        }
    }
}

fn is_to_ask_again<T>(outcome: &Result<T, StoreError>) -> bool {
    matches!(outcome, Err(StoreError::Unavailable { reason, .. }) if !is_full(reason))
}

/// Whether etcd has refused what takes room: its quota is used up, of which an alarm tells until it is taken off. What reached it before the
/// alarm may have happened all the same.
fn is_full(reason: &str) -> bool {
    reason.contains("database space exceeded")
}

/// A client per endpoint.
async fn connect(
    endpoints: &[String],
    options: ConnectOptions,
) -> Result<Vec<(String, Client)>, StoreError> {
    let mut clients = Vec::with_capacity(endpoints.len());
    for endpoint in endpoints {
        let client = Client::connect([endpoint], Some(options.clone())).await;
        let client = client.map_err(|error| StoreError::Unavailable {
            operation: "connect",
            reason: format!("{endpoint}: {error}"),
        })?;
        clients.push((endpoint.clone(), client));
    }
    Ok(clients)
}

impl EtcdConfig {
    /// What changes when the credentials are replaced.
    fn stamp(&self) -> Vec<Option<SystemTime>> {
        let identity = self.identity_files.iter();
        let identity = identity.flat_map(|(certificate, key)| [certificate, key]);
        let files = self.ca_file.iter().chain(identity);
        let of = |path: &Path| {
            std::fs::metadata(path)
                .and_then(|meta| meta.modified())
                .ok()
        };
        files.map(|path| of(path)).collect()
    }
}
