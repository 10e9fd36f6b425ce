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
use crate::shares::Place;

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
        let now = Instant::now();
        // What the upstream had to say may not have come into the cache, a failure least of all: what is known stays then, and is not
        // asked for again with every hit.
        let kept = block.cache.as_ref().and_then(|cache| cache.peek(&key, now));
        if let Some(kept) = kept
            && !new.is_ok_and(|new| Arc::ptr_eq(&new, &kept))
        {
            kept.renewal_failed(now);
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
    let joined = join(block, metrics, question, key, client);
    // Here, where nothing is locked: whoever reads the log may be slow.
    let mut waiting = joined.map_err(|error| {
        block.failures.tell(question, &error, Instant::now());
        Arc::new(error)
    })?;
    match waiting.wait_for(Option::is_some).await {
        Ok(outcome) => match &*outcome {
            Some(outcome) => outcome.clone(),
            None => Err(Arc::new(ForwardError::Silence(Duration::ZERO))),
        },
        // The task is gone without a word: it panicked, or the runtime is ending.
        Err(_) => Err(Arc::new(ForwardError::Silence(Duration::ZERO))),
    }
}

/// Where the answer to a question will be: that of whoever has asked it already, or of the client, in a place of its own.
fn join(
    block: &Arc<Block>,
    metrics: &Arc<Metrics>,
    question: &Question,
    key: &Key,
    client: IpAddr,
) -> Result<watch::Receiver<Option<Outcome>>, ForwardError> {
    let mut flights = block.flights.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(waiting) = flights.get(key.bytes()) {
        return Ok(waiting.clone());
    }
    // Before anyone can join: that this client has its share is nothing to others.
    let route = block.route(&question.name).ok_or(ForwardError::NoRoute)?;
    let place = route.forwarder.place(client)?;
    let (tell, waiting) = watch::channel(None);
    flights.insert(key.bytes().into(), waiting.clone());
    // A task of its own: it ends, and tells all, also when who came first gives up.
    let flight = Flight {
        block: block.clone(),
        key: *key,
        tell,
    };
    // A runtime that is ending drops it here and now, which takes it out again.
    drop(flights);
    tokio::spawn(flight.fly(question.clone(), metrics.clone(), place));
    Ok(waiting)
}

struct Flight {
    block: Arc<Block>,
    key: Key,
    tell: watch::Sender<Option<Outcome>>,
}

impl Flight {
    /// Asks in the place of whoever came first.
    async fn fly(self, question: Question, metrics: Arc<Metrics>, place: Place) {
        let outcome = match self.block.route(&question.name) {
            None => Err(Arc::new(ForwardError::NoRoute)),
            Some(route) => {
                let answer = route.forwarder.ask(&question, place).await;
                answer.map_err(Arc::new)
            }
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
        let failure = outcome.as_ref().err().cloned();
        // Dropped after the outcome is told: whoever comes next finds the cache filled.
        self.tell.send_replace(Some(outcome));
        let block = self.block.clone();
        drop(self);
        // Last: nobody waits for whoever reads the log.
        if let Some(error) = failure {
            block.failures.tell(&question, &error, Instant::now());
        }
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

#[cfg(test)]
mod tests {
    use std::io;
    use std::net::SocketAddr;
    use std::sync::Mutex;

    use tokio::net::UdpSocket;

    use super::*;
    use crate::config::spec::{BlockSpec, RouteSpec, ServerSpec, Spec};
    use crate::forward::ForwardRules;
    use crate::log::ErrorRules;
    use crate::name::Name;
    use crate::query::rtype;
    use crate::settings::Settings;
    use crate::zone::ZoneSettings;

    const PLACES: usize = 3;

    fn name(text: &str) -> Name {
        Name::parse(text).expect("a name")
    }

    fn question(about: &str) -> Question {
        Question {
            name: name(about).wire().to_vec(),
            rtype: rtype::A,
            dnssec_ok: false,
            checking_disabled: false,
        }
    }

    /// A block that asks one upstream.
    fn block_of(address: SocketAddr) -> Arc<Block> {
        let mut block = BlockSpec::of(vec![Name::root()]);
        block.log.errors = Some(ErrorRules::default());
        block.routes.push(RouteSpec {
            zone: Name::root(),
            except: Vec::new(),
            servers: vec![ServerSpec { address, tls: None }],
            rules: ForwardRules {
                concurrent_max: PLACES,
                ..ForwardRules::default()
            },
        });
        let spec = Spec {
            zone: ZoneSettings::of(name("cluster.local")),
            blocks: vec![block],
            port: None,
            http: Vec::new(),
            lameduck: None,
            warnings: Vec::new(),
        };
        let settings = Settings::build(spec, &Metrics::default(), None).expect("settings");
        settings.blocks().next().expect("one block").clone()
    }

    /// A block that asks an upstream, which knows names that begin with a w and is silent about all others.
    async fn block() -> Arc<Block> {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
        let address = socket.local_addr().expect("an address");
        tokio::spawn(async move {
            let mut message = [0; 1500];
            while let Ok((bytes, peer)) = socket.recv_from(&mut message).await {
                if message[13].eq_ignore_ascii_case(&b'w') {
                    message[2] |= 0x80;
                    let _ = socket.send_to(&message[..bytes], peer).await;
                }
            }
        });
        block_of(address)
    }

    #[tokio::test]
    async fn a_question_of_a_client_that_has_its_share_is_asked_for_others() {
        let (block, metrics) = (block().await, Arc::new(Metrics::default()));
        let [greedy, other] = [[10, 0, 0, 1], [10, 0, 0, 2]].map(IpAddr::from);
        // On one thread, so that nothing goes on between the first client's question and the second one's.
        for silent in ["n1.example.org", "n2.example.org"] {
            let (block, metrics) = (block.clone(), metrics.clone());
            tokio::spawn(async move { fetch(&block, &metrics, &question(silent), greedy).await });
            tokio::task::yield_now().await;
        }
        assert_eq!(block.in_flight(), 2);
        let asked = question("www.example.org");
        let (refused, answered) = tokio::join!(
            fetch(&block, &metrics, &asked, greedy),
            fetch(&block, &metrics, &asked, other)
        );
        assert!(
            matches!(refused.as_deref(), Err(error) if matches!(**error, ForwardError::Busy(_)))
        );
        assert!(answered.is_ok());
    }

    #[tokio::test]
    async fn nobody_waits_for_whoever_reads_of_a_refusal() {
        let (block, metrics) = (block().await, Arc::new(Metrics::default()));
        let free: Arc<Mutex<Vec<bool>>> = Arc::default();
        let (seen, others) = (free.clone(), block.clone());
        let log = tracing_subscriber::fmt().with_writer(move || {
            let is_free = others.flights.try_lock().is_ok();
            seen.lock().expect("no panic").push(is_free);
            io::sink()
        });
        let _log = tracing::subscriber::set_default(log.finish());
        let greedy = IpAddr::from([10, 0, 0, 1]);
        for silent in ["n1.example.org", "n2.example.org"] {
            let (block, metrics) = (block.clone(), metrics.clone());
            tokio::spawn(async move { fetch(&block, &metrics, &question(silent), greedy).await });
            tokio::task::yield_now().await;
        }
        for _ in 0..3 {
            let asked = question("www.example.org");
            assert!(fetch(&block, &metrics, &asked, greedy).await.is_err());
        }
        let free = free.lock().expect("no panic");
        assert!(
            !free.is_empty() && free.iter().all(|free| *free),
            "{free:?}"
        );
    }

    #[tokio::test]
    async fn clients_hear_of_a_failure_before_the_log_does() {
        let gone = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
        let address = gone.local_addr().expect("an address");
        drop(gone);
        let (block, metrics) = (block_of(address), Arc::new(Metrics::default()));
        let flying: Arc<Mutex<Vec<usize>>> = Arc::default();
        let (seen, asked) = (flying.clone(), block.clone());
        let log = tracing_subscriber::fmt().with_writer(move || {
            seen.lock().expect("no panic").push(asked.in_flight());
            io::sink()
        });
        let _log = tracing::subscriber::set_default(log.finish());
        let client = IpAddr::from([10, 0, 0, 1]);
        let outcome = fetch(&block, &metrics, &question("www.example.org"), client).await;
        assert!(outcome.is_err());
        while flying.lock().expect("no panic").is_empty() {
            tokio::task::yield_now().await;
        }
        assert!(flying.lock().expect("no panic").iter().all(|now| *now == 0));
    }
}
