//! The members of an etcd cluster, of which one at a time is asked: the next one when it does not answer.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use etcd_client::Client;
use tokio::time::{Instant, sleep, timeout};

use super::{EtcdConfig, PATIENCE, StoreError};

/// How long members may be without a leader: two elections of etcd's default timing.
const ELECTION: Duration = Duration::from_secs(3);
const ROUND_PAUSE: Duration = Duration::from_millis(100);

pub(super) struct Members {
    /// One per endpoint, never empty. They connect when they are used.
    clients: Vec<Client>,
    turn: AtomicUsize,
}

impl Members {
    pub async fn new(config: &EtcdConfig) -> Result<Self, StoreError> {
        let options = config.options()?;
        let mut clients = Vec::with_capacity(config.endpoints.len());
        for endpoint in &config.endpoints {
            let client = Client::connect([endpoint], Some(options.clone())).await;
            clients.push(client.map_err(|error| StoreError::Unavailable {
                operation: "connect",
                reason: format!("{endpoint}: {error}"),
            })?);
        }
        if clients.is_empty() {
            return Err(StoreError::Unavailable {
                operation: "connect",
                reason: "no endpoint is named".to_owned(),
            });
        }
        Ok(Self {
            clients,
            turn: AtomicUsize::new(0),
        })
    }

    /// Whose turn it is, for [`Members::leave`].
    pub fn turn(&self) -> usize {
        self.turn.load(Ordering::Relaxed)
    }

    /// Goes on to the next member, unless somebody else has done so already.
    pub fn leave(&self, turn: usize) {
        // Losing the race is as good.
        let _ = self
            .turn
            .compare_exchange(turn, turn + 1, Ordering::Relaxed, Ordering::Relaxed);
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
        let turn = self.turn();
        let client = self.clients[turn % self.clients.len()].clone();
        let reason = match timeout(PATIENCE, request(client)).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(etcd_client::Error::GRpcStatus(status))) => status.message().to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {PATIENCE:?}"),
        };
        self.leave(turn);
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
            let mut outcome = self.ask(operation, &request).await;
            for _ in 1..self.clients.len() {
                if outcome.is_ok() {
                    break;
                }
                outcome = self.ask(operation, &request).await;
            }
            if outcome.is_ok() || begun.elapsed() >= ELECTION {
                return outcome;
            }
            sleep(ROUND_PAUSE).await;
        }
    }
}
