//! Answers of others by way of the cache: asked for once however many want them, and served stale when they can't be had.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::timeout;

use crate::answer::Rcode;
use crate::cache::{Entry, Found, Key};
use crate::forward::{ForwardError, Question};
use crate::metrics::Metrics;
use crate::settings::{Block, Outcome};

/// How long a client waits for a renewal before it gets what is stale (RFC 8767, 5).
const STALE_AFTER: Duration = Duration::from_millis(1800);

fn key(question: &Question) -> Key {
    Key::new(
        &question.name,
        question.rtype,
        question.dnssec_ok,
        question.checking_disabled,
    )
}

/// The answer to a question: from the cache while it is good, else from upstream, else from the cache all the same.
pub async fn fetch(
    block: &Arc<Block>,
    metrics: &Arc<Metrics>,
    question: &Question,
    client: IpAddr,
) -> Outcome {
    let key = key(question);
    let found = block
        .cache
        .as_ref()
        .map_or(Found::Nothing, |cache| cache.get(&key, Instant::now()));
    match found {
        Found::Fresh { entry, renew } => {
            metrics.caching.hit(entry.rcode());
            if renew {
                self::renew(block, metrics, question.clone());
            }
            Ok(entry)
        }
        Found::Stale(old) => Ok(renewed(block, metrics, question, &key, old, client).await),
        Found::Nothing => {
            metrics.caching.misses.inc();
            ask(block, metrics, question, &key, client).await
        }
    }
}

/// A renewal of a stale entry, if it comes in time, else the entry.
async fn renewed(
    block: &Arc<Block>,
    metrics: &Arc<Metrics>,
    question: &Question,
    key: &Key,
    old: Arc<Entry>,
    client: IpAddr,
) -> Arc<Entry> {
    if old.may_retry(Instant::now()) {
        let immediately = block
            .cache
            .as_ref()
            .is_some_and(|cache| cache.rules().stale_immediately);
        if immediately {
            if old.claim_renewal(Instant::now()) {
                renew(block, metrics, question.clone());
            }
        } else {
            match timeout(STALE_AFTER, ask(block, metrics, question, key, client)).await {
                Ok(Ok(new)) if !new.is_failure() => return new,
                Ok(_) => old.renewal_failed(Instant::now()),
                // It goes on, and may come to an answer yet; meanwhile nobody waits for it again.
                Err(_) => old.renewal_failed(Instant::now()),
            }
        }
    }
    metrics.caching.served_stale.inc();
    old
}

/// Who asks where nobody waits: all renewals have the share of one client.
const NOBODY: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

/// Has an entry renewed without anyone waiting for it. For whoever has claimed that.
pub fn renew(block: &Arc<Block>, metrics: &Arc<Metrics>, question: Question) {
    metrics.caching.prefetches.inc();
    let (block, metrics) = (block.clone(), metrics.clone());
    tokio::spawn(async move {
        let key = key(&question);
        let new = ask(&block, &metrics, &question, &key, NOBODY).await;
        // What the upstream had to say may not have come into the cache, a failure least of all: what is known stays then, and is not
        // asked for again with every hit.
        let kept = block.cache.as_ref().and_then(|cache| cache.peek(&key));
        if let Some(kept) = kept
            && !new.is_ok_and(|new| Arc::ptr_eq(&new, &kept))
        {
            kept.renewal_failed(Instant::now());
        }
    });
}

/// Asks upstream, or joins those who wait for the same answer.
async fn ask(
    block: &Arc<Block>,
    metrics: &Arc<Metrics>,
    question: &Question,
    key: &Key,
    client: IpAddr,
) -> Outcome {
    let mut waiting = {
        let mut flights = block.flights.lock().unwrap_or_else(PoisonError::into_inner);
        match flights.get(key.bytes()) {
            Some(waiting) => waiting.clone(),
            None => {
                let (tell, waiting) = watch::channel(None);
                flights.insert(key.bytes().into(), waiting.clone());
                // A task of its own: it ends, and tells all, also when who came first gives up.
                let flight = Flight {
                    block: block.clone(),
                    key: *key,
                    tell,
                };
                tokio::spawn(flight.fly(question.clone(), metrics.clone(), client));
                waiting
            }
        }
    };
    match waiting.wait_for(Option::is_some).await {
        Ok(outcome) => match &*outcome {
            Some(outcome) => outcome.clone(),
            None => Err(Arc::new(ForwardError::Silence(Duration::ZERO))),
        },
        // The task is gone without a word: it panicked, or the runtime is ending.
        Err(_) => Err(Arc::new(ForwardError::Silence(Duration::ZERO))),
    }
}

struct Flight {
    block: Arc<Block>,
    key: Key,
    tell: watch::Sender<Option<Outcome>>,
}

impl Flight {
    /// Asks at the cost of whoever came first.
    async fn fly(self, question: Question, metrics: Arc<Metrics>, client: IpAddr) {
        let outcome = match self.block.route(&question.name) {
            None => Err(Arc::new(ForwardError::NoRoute)),
            Some(route) => route
                .forwarder
                .ask(&question, client)
                .await
                .map_err(Arc::new),
        };
        let outcome = outcome.map(|reply| {
            let now = Instant::now();
            match &self.block.cache {
                Some(cache) => {
                    let entry = cache.put(&self.key, reply, now);
                    metrics.caching.entries(cache.entries());
                    metrics.caching.evictions.set(cache.evictions() as i64);
                    entry
                }
                None => Arc::new(Entry::fleeting(reply, now)),
            }
        });
        if let Err(error) = &outcome
            && self.block.spec.log.errors
        {
            let name = crate::name::Name::from_wire(&question.name);
            tracing::warn!(%name, rtype = %crate::log::type_name(question.rtype), %error, "forwarding");
        }
        // Dropped after the outcome is told: whoever comes next finds the cache filled.
        self.tell.send_replace(Some(outcome));
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let mut flights = self
            .block
            .flights
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        flights.remove(self.key.bytes());
    }
}

/// What a client is told when its question could not be asked: those that were never sent are refused, so that it may turn to
/// another server at once.
pub fn code_of(error: &ForwardError) -> Rcode {
    match error {
        ForwardError::Busy(_) | ForwardError::Loop | ForwardError::NoRoute => Rcode::Refused,
        _ => Rcode::ServFail,
    }
}
