//! Answers of others, kept for as long as their TTLs say, and a while longer for when those others are away.
//!
//! An entry is the answer's own bytes behind the question: a name in a question is as long whoever spells it, so that every
//! compression pointer still fits, and serving an entry is a copy and a few TTLs.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hickory_proto::op::Message;

use crate::answer::{Policy, Rcode, Transport, Verdict, Writer, room};
use crate::message::{BadReply, Kind, Reply};
use crate::name::{NAME_BYTES_MAX, Name, in_any};
use crate::query::{Query, rtype};

/// What an operator can choose of a cache.
#[derive(Clone, Debug, PartialEq)]
pub struct CacheRules {
    /// Names of these zones are kept; of all, where none is named.
    pub zones: Vec<Name>,
    pub success: Share,
    pub denial: Share,
    /// How long a failure is remembered (RFC 2308, 7.1 allows five minutes).
    pub servfail: Duration,
    /// Entries asked for this often are renewed before they expire; 0 for never.
    pub prefetch_hits: u32,
    /// Share of the TTL that is left when they are renewed, in percent.
    pub prefetch_percent: u32,
    /// How long after its end an entry may still be served when it can't be renewed (RFC 8767); zero for never.
    pub stale: Duration,
    /// Stale entries are served at once and renewed behind the client's back, rather than after an attempt to renew them.
    pub stale_immediately: bool,
}

/// Bounds of one kind of entries.
#[derive(Clone, Debug, PartialEq)]
pub struct Share {
    pub entries_max: usize,
    pub ttl_min: Duration,
    pub ttl_max: Duration,
    /// Of names in these zones nothing of this kind is kept.
    pub except: Vec<Name>,
}

impl Default for CacheRules {
    fn default() -> Self {
        let share = |ttl_max_s| Share {
            // CoreDNS's own bound.
            entries_max: 9984,
            ttl_min: Duration::ZERO,
            ttl_max: Duration::from_secs(ttl_max_s),
            except: Vec::new(),
        };
        Self {
            zones: Vec::new(),
            success: share(3600),
            denial: share(1800),
            servfail: Duration::from_secs(5),
            prefetch_hits: 4,
            prefetch_percent: 10,
            stale: Duration::from_secs(3600),
            stale_immediately: false,
        }
    }
}

/// The TTL of what is served stale, and how long a renewal that failed is not tried again (RFC 8767, 4 and 5).
const STALE_TTL_S: u32 = 30;
const STALE_RETRY: Duration = Duration::from_secs(30);
/// Bytes that an entry may take on average: large answers may not fill memory by their number alone.
const ENTRY_BYTES_MEAN: usize = 1024;
const SHARDS: usize = 16;

/// What is asked: a name in lower-case wire format, a type, and the DNSSEC bits that change an answer.
#[derive(Clone, Copy)]
pub struct Key {
    bytes: [u8; NAME_BYTES_MAX + 3],
    length: usize,
}

impl Key {
    pub fn new(name: &[u8], rtype: u16, dnssec_ok: bool, checking_disabled: bool) -> Self {
        let mut bytes = [0; NAME_BYTES_MAX + 3];
        let length = name.len().min(NAME_BYTES_MAX);
        bytes[..length].copy_from_slice(&name[..length]);
        bytes[length..length + 2].copy_from_slice(&rtype.to_be_bytes());
        bytes[length + 2] = u8::from(dnssec_ok) | u8::from(checking_disabled) << 1;
        Self {
            bytes,
            length: length + 3,
        }
    }

    pub fn of(query: &Query<'_>) -> Self {
        Self::new(
            query.name(),
            query.rtype,
            query.dnssec_ok(),
            query.checking_disabled,
        )
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    fn is_in(&self, zones: &[Name]) -> bool {
        in_any(&self.bytes[..self.length - 3], zones)
    }
}

/// One answer of others.
pub struct Entry {
    reply: Reply,
    received: Instant,
    lifetime: Duration,
    ttl_max_s: u32,
    hits: AtomicU32,
    /// Somebody has been told to renew it.
    renewing: AtomicBool,
    /// Milliseconds after `received` before which no renewal is tried again.
    retry_after_ms: AtomicU64,
}

/// What the cache has for a question.
pub enum Found {
    Fresh {
        entry: Arc<Entry>,
        /// It is asked for often and ends soon: renew it. Told to one only.
        renew: bool,
    },
    /// Its time is over, but it may be served when it can't be renewed.
    Stale(Arc<Entry>),
    Nothing,
}

impl Entry {
    /// An answer that is served once, to those who wait for it.
    pub fn fleeting(reply: Reply, now: Instant) -> Self {
        Self::new(reply, now, Duration::MAX, u32::MAX)
    }

    fn new(reply: Reply, received: Instant, lifetime: Duration, ttl_max_s: u32) -> Self {
        Self {
            reply,
            received,
            lifetime,
            ttl_max_s,
            hits: AtomicU32::new(0),
            renewing: AtomicBool::new(false),
            retry_after_ms: AtomicU64::new(0),
        }
    }

    fn is_fresh(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.received) < self.lifetime
    }

    pub fn is_failure(&self) -> bool {
        self.reply.kind == Kind::Failure
    }

    pub fn rcode(&self) -> Rcode {
        self.reply.rcode
    }

    fn bytes(&self) -> usize {
        size_of::<Self>() + self.reply.bytes()
    }

    /// Whether a renewal may be tried; the one that failed last may be too recent.
    pub fn may_retry(&self, now: Instant) -> bool {
        let age = now.saturating_duration_since(self.received).as_millis() as u64;
        age >= self.retry_after_ms.load(Ordering::Relaxed)
    }

    /// Whether nobody renews it yet; whoever is told so does it.
    pub fn claim_renewal(&self, now: Instant) -> bool {
        if self.renewing.swap(true, Ordering::Acquire) {
            return false;
        }
        // Somebody's renewal may have failed since this was looked at.
        let may = self.may_retry(now);
        if !may {
            self.renewing.store(false, Ordering::Release);
        }
        may
    }

    /// Says that a renewal has failed: for a while, nobody tries again.
    pub fn renewal_failed(&self, now: Instant) {
        let until = now.saturating_duration_since(self.received) + STALE_RETRY;
        self.retry_after_ms
            .store(until.as_millis() as u64, Ordering::Relaxed);
        // Last: whoever finds nobody at it finds also that it is not to be tried.
        self.renewing.store(false, Ordering::Release);
    }

    /// How long it is fresh still.
    pub fn left(&self, now: Instant) -> Duration {
        self.lifetime
            .saturating_sub(now.saturating_duration_since(self.received))
    }

    /// Composes the answer to a query of this entry's question.
    pub fn compose(
        &self,
        query: &Query<'_>,
        policy: &Policy,
        transport: Transport,
        now: Instant,
        turn: usize,
        out: &mut [u8],
    ) -> Verdict {
        let room = room(query, policy, transport, out);
        let mut writer = Writer::start(query, policy, &mut out[..room]);
        writer.authentic = self.reply.authentic && (query.dnssec_ok() || query.authentic_data);
        self.reply.write(&mut writer, turn, self.ttls(now));
        writer.finish(self.reply.rcode)
    }

    /// The TTL that is told at a moment, by that which was.
    fn ttls(&self, now: Instant) -> impl Fn(u32) -> u32 {
        let age = now.saturating_duration_since(self.received);
        let (fresh, ttl_max_s) = (age < self.lifetime, self.ttl_max_s);
        let age_s = age.as_secs().min(u64::from(u32::MAX)) as u32;
        move |told: u32| {
            if fresh {
                told.min(ttl_max_s).saturating_sub(age_s)
            } else {
                STALE_TTL_S
            }
        }
    }

    /// The whole answer at a moment, as a message about `question`, for those who take it apart.
    pub fn message(&self, question: &[u8], now: Instant) -> Result<Message, BadReply> {
        self.reply.to_message(question, self.ttls(now))
    }
}

/// Answers of others, within bounds.
pub struct Cache {
    success: Store,
    denial: Store,
    rules: CacheRules,
}

impl Cache {
    pub fn new(rules: CacheRules) -> Self {
        Self {
            success: Store::new(rules.success.entries_max),
            denial: Store::new(rules.denial.entries_max),
            rules,
        }
    }

    pub fn rules(&self) -> &CacheRules {
        &self.rules
    }

    /// Looks a question up and counts it as asked for.
    pub fn get(&self, key: &Key, now: Instant) -> Found {
        let Some(entry) = self.peek(key, now) else {
            return Found::Nothing;
        };
        if entry.is_fresh(now) {
            let hits = entry.hits.fetch_add(1, Ordering::Relaxed) + 1;
            let rules = &self.rules;
            let renew = rules.prefetch_hits > 0
                && hits >= rules.prefetch_hits
                && !entry.is_failure()
                && entry.left(now) * 100 < entry.lifetime * rules.prefetch_percent
                && entry.may_retry(now)
                && entry.claim_renewal(now);
            return Found::Fresh { entry, renew };
        }
        if self.may_be_stale(&entry, now) {
            Found::Stale(entry)
        } else {
            Found::Nothing
        }
    }

    fn may_be_stale(&self, entry: &Entry, now: Instant) -> bool {
        let age = now.saturating_duration_since(entry.received);
        !entry.is_failure() && age < entry.lifetime + self.rules.stale
    }

    /// Keeps an answer as long as it may be kept, and returns it in the form in which it is served.
    pub fn put(&self, key: &Key, reply: Reply, now: Instant) -> Arc<Entry> {
        let kind = reply.kind;
        let rules = &self.rules;
        let kept = rules.zones.is_empty() || key.is_in(&rules.zones);
        let (lifetime, ttl_max) = match kind {
            _ if !kept => (Duration::ZERO, Duration::MAX),
            Kind::Data(_) if key.is_in(&rules.success.except) => (Duration::ZERO, Duration::MAX),
            Kind::Denial(_) if key.is_in(&rules.denial.except) => (Duration::ZERO, Duration::MAX),
            Kind::Data(ttl_s) => rules.success.clamp(ttl_s),
            // The SOA tells how long "no" may be believed, by its TTL too: whoever keeps it counts on from there (RFC 2308, 5).
            Kind::Denial(ttl_s) => {
                let (lifetime, _) = rules.denial.clamp(ttl_s);
                (lifetime, lifetime)
            }
            Kind::Failure => (rules.servfail, Duration::MAX),
            Kind::Uncacheable => (Duration::ZERO, Duration::MAX),
        };
        if lifetime.is_zero() {
            // What is newer and may not be kept is no reason to go on with what was kept before.
            if matches!(kind, Kind::Data(_) | Kind::Denial(_)) {
                self.success.remove(key);
                self.denial.remove(key);
            }
            return Arc::new(Entry::fleeting(reply, now));
        }
        let ttl_max_s = u32::try_from(ttl_max.as_secs()).unwrap_or(u32::MAX);
        let entry = Arc::new(Entry::new(reply, now, lifetime, ttl_max_s));
        match kind {
            Kind::Data(_) => {
                self.denial.remove(key);
                self.success.put(key, entry.clone());
            }
            Kind::Denial(_) => {
                self.success.remove(key);
                self.denial.put(key, entry.clone());
            }
            // What was known before is kept for serving it stale.
            _ if matches!(self.denial.get(key), Some(old) if self.may_be_stale(&old, now)) => {}
            _ => self.denial.put(key, entry.clone()),
        }
        entry
    }

    /// What there is for a question, whether it may be served or not, without counting it as asked for.
    pub fn peek(&self, key: &Key, now: Instant) -> Option<Arc<Entry>> {
        match (self.success.get(key), self.denial.get(key)) {
            // Only a failure is kept beside data: it hides neither what is good still nor what may be served stale.
            (Some(data), Some(_)) if self.may_serve(&data, now) => Some(data),
            (Some(_), Some(no)) => Some(no),
            (data, no) => data.or(no),
        }
    }

    /// Whether an entry may be served now.
    pub fn may_serve(&self, entry: &Entry, now: Instant) -> bool {
        entry.is_fresh(now) || self.may_be_stale(entry, now)
    }

    /// Entries of data and of denials.
    pub fn entries(&self) -> [usize; 2] {
        [self.success.entries(), self.denial.entries()]
    }

    pub fn evictions(&self) -> u64 {
        self.success.evictions.load(Ordering::Relaxed)
            + self.denial.evictions.load(Ordering::Relaxed)
    }
}

impl Share {
    /// How long something is kept whose TTL is `ttl_s`, and the longest TTL that is told.
    fn clamp(&self, ttl_s: u32) -> (Duration, Duration) {
        let told = Duration::from_secs(u64::from(ttl_s));
        (told.max(self.ttl_min).min(self.ttl_max), self.ttl_max)
    }
}

/// A bounded map in shards, each under a lock of its own.
struct Store {
    shards: Vec<Mutex<Shard>>,
    hasher: foldhash::fast::RandomState,
    evictions: AtomicU64,
}

#[derive(Default)]
struct Shard {
    places: HashMap<Arc<[u8]>, usize, foldhash::fast::RandomState>,
    slots: Vec<Slot>,
    /// Where the search for something to evict goes on (the CLOCK algorithm: second chances for what was used).
    hand: usize,
    bytes: usize,
    entries_max: usize,
}

struct Slot {
    key: Arc<[u8]>,
    entry: Arc<Entry>,
    used: bool,
}

impl Store {
    fn new(entries_max: usize) -> Self {
        let shard = || {
            Mutex::new(Shard {
                entries_max: entries_max.div_ceil(SHARDS),
                ..Shard::default()
            })
        };
        Self {
            shards: (0..SHARDS).map(|_| shard()).collect(),
            hasher: foldhash::fast::RandomState::default(),
            evictions: AtomicU64::new(0),
        }
    }

    fn shard(&self, key: &Key) -> std::sync::MutexGuard<'_, Shard> {
        use std::hash::BuildHasher;
        let at = self.hasher.hash_one(key.bytes()) as usize % SHARDS;
        self.shards[at]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, key: &Key) -> Option<Arc<Entry>> {
        let mut shard = self.shard(key);
        let at = *shard.places.get(key.bytes())?;
        let slot = shard.slots.get_mut(at)?;
        slot.used = true;
        Some(slot.entry.clone())
    }

    fn put(&self, key: &Key, entry: Arc<Entry>) {
        let mut shard = self.shard(key);
        if shard.entries_max == 0 {
            return;
        }
        shard.remove(key.bytes());
        shard.bytes += entry.bytes() + key.bytes().len();
        let bytes_max = shard.entries_max * ENTRY_BYTES_MEAN;
        while shard.slots.len() >= shard.entries_max
            || (shard.bytes > bytes_max && !shard.slots.is_empty())
        {
            shard.evict();
            self.evictions.fetch_add(1, Ordering::Relaxed);
        }
        let key: Arc<[u8]> = key.bytes().into();
        let at = shard.slots.len();
        shard.places.insert(key.clone(), at);
        shard.slots.push(Slot {
            key,
            entry,
            used: false,
        });
    }

    fn remove(&self, key: &Key) {
        self.shard(key).remove(key.bytes());
    }

    fn entries(&self) -> usize {
        let count = |shard: &Mutex<Shard>| {
            shard
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .slots
                .len()
        };
        self.shards.iter().map(count).sum()
    }
}

impl Shard {
    fn remove(&mut self, key: &[u8]) {
        if let Some(at) = self.places.remove(key) {
            let gone = self.slots.swap_remove(at);
            self.bytes -= gone.entry.bytes() + gone.key.len();
            if let Some(moved) = self.slots.get(at) {
                self.places.insert(moved.key.clone(), at);
            }
        }
    }

    fn evict(&mut self) {
        loop {
            if self.hand >= self.slots.len() {
                self.hand = 0;
            }
            let Some(slot) = self.slots.get_mut(self.hand) else {
                return;
            };
            if std::mem::take(&mut slot.used) {
                self.hand += 1;
                continue;
            }
            let key = slot.key.clone();
            self.remove(&key);
            return;
        }
    }
}

/// Whether answers to a type may be kept at all: transfers and "any" are not one answer.
pub fn may_be_kept(kind: u16) -> bool {
    !matches!(kind, rtype::AXFR | rtype::IXFR)
}
