//! The store on etcd, for clusters of several control planes: etcd decides and keeps, a replica in memory serves.
//!
//! A write is one transaction of etcd. A follower copies every change into the replica, in order; lists and watches are
//! served from there, as the embedded store's are. What makes a read linearizable is the fence before it: the revision
//! that etcd's quorum names at that moment is waited for. Reads that come while a fence is under way share the next one.

mod fence;
mod follow;
mod import;
mod leases;
mod lineage;
mod members;
mod membership;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, DeleteOptions, Identity, KeyValue,
    PutOptions, TlsOptions, Txn, TxnOp, TxnOpResponse,
};
use futures::future::BoxFuture;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::replica::{Bounds, Replica};
use super::{Expect, Page, Range, Record, Revision, Share, Store, StoreError, WatchStream, Write};
use fence::Fence;
use follow::Follower;
use leases::Leases;
use lineage::Lineage;
use members::Members;
pub use membership::{EtcdMember, EtcdMembership};

/// How long one request may take: longer than an election of etcd's default timing.
const PATIENCE: Duration = Duration::from_secs(5);
/// etcd refuses clients that ping more often than every five seconds.
const PING: Duration = Duration::from_secs(6);
const PING_PATIENCE: Duration = Duration::from_secs(3);
/// How much history etcd keeps for followers that come back.
const COMPACTION: Duration = Duration::from_secs(300);
/// The layout of what is kept below the prefix.
const FORMAT: &str = "1";

/// EtcdConfig says where etcd is and how to be let in.
#[derive(Clone, Debug)]
pub struct EtcdConfig {
    /// As `https://10.0.0.1:2379`; any of them may be away.
    pub endpoints: Vec<String>,
    /// Signs etcd's certificates.
    pub ca_file: Option<PathBuf>,
    /// The client certificate and its key.
    pub identity_files: Option<(PathBuf, PathBuf)>,
    /// What keys begin with: clusters that share an etcd have one each.
    pub prefix: String,
    /// Where it is remembered who is a member, as the members say: for an etcd whose members come and go, and say of themselves where
    /// they are reached. Without, the endpoints are all there is.
    pub members_file: Option<PathBuf>,
}

impl EtcdConfig {
    pub fn at(endpoints: Vec<String>) -> Self {
        Self {
            endpoints,
            ca_file: None,
            identity_files: None,
            prefix: "/keelway".to_owned(),
            members_file: None,
        }
    }

    fn options(&self) -> Result<ConnectOptions, StoreError> {
        let read = |path: &PathBuf| {
            std::fs::read(path).map_err(|error| StoreError::Disk {
                operation: "read",
                path: path.display().to_string(),
                reason: error.to_string(),
            })
        };
        let options = ConnectOptions::new()
            .with_connect_timeout(PATIENCE)
            .with_keep_alive(PING, PING_PATIENCE)
            .with_keep_alive_while_idle(true)
            // A member that lost its quorum ends its watches, so that they go on at another one.
            .with_require_leader(true);
        if self.ca_file.is_none() && self.identity_files.is_none() {
            return Ok(options);
        }
        let mut tls = TlsOptions::new();
        if let Some(ca) = &self.ca_file {
            tls = tls.ca_certificate(Certificate::from_pem(read(ca)?));
        }
        if let Some((certificate, key)) = &self.identity_files {
            tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
        }
        Ok(options.with_tls(tls))
    }
}

/// Etcd is the store of any number of processes over one etcd cluster.
pub struct Etcd {
    members: Arc<Members>,
    space: Space,
    replica: Replica,
    fence: Fence,
    lineage: Arc<Lineage>,
    leases: Leases,
    /// Wakes the follower when it seems to hang.
    doubt: Arc<Notify>,
    /// Ended with the store.
    _tasks: JoinSet<()>,
}

impl Etcd {
    /// Connects, and loads what is there. What was imported in part is refused.
    pub async fn connect(config: &EtcdConfig) -> Result<Self, StoreError> {
        let store = Self::open(config).await?;
        match store.replica.get(import::MARK) {
            None => Ok(store),
            Some(_) => Err(StoreError::Disk {
                operation: "use",
                path: config.prefix.clone(),
                reason: "a migration to it was not finished; run it again".to_owned(),
            }),
        }
    }

    async fn open(config: &EtcdConfig) -> Result<Self, StoreError> {
        let members = Arc::new(Members::new(config).await?);
        let space = Space(config.prefix.as_str().into());
        check_format(&members, &space).await?;
        let (records, revision) = follow::load(&members, &space).await?;
        let replica = Replica::new(records, revision, Bounds::default());
        let (doubt, lineage) = (Arc::new(Notify::new()), Arc::new(Lineage::new()));
        let mut tasks = JoinSet::new();
        let follower = Follower {
            members: members.clone(),
            space: space.clone(),
            replica: replica.clone(),
            doubt: doubt.clone(),
            lineage: lineage.clone(),
        };
        tasks.spawn(follower.run());
        let followed = (replica.clone(), lineage.clone());
        let (fence, fencing) = Fence::new(members.clone(), &space, followed);
        tasks.spawn(fencing);
        tasks.spawn(compact(members.clone(), replica.clone()));
        tasks.spawn(members.clone().keep());
        let leases = Leases::new(members.clone());
        Ok(Self {
            members,
            space,
            replica,
            fence,
            lineage,
            leases,
            doubt,
            _tasks: tasks,
        })
    }

    /// Operations under conditions, all or none; what etcd answered to each, and the revision they made.
    async fn transact(
        &self,
        conditions: &[(&str, Expect)],
        operations: Vec<TxnOp>,
    ) -> Result<(Revision, Vec<TxnOpResponse>), StoreError> {
        self.lineage.check()?;
        let paths = conditions.iter().map(|(key, _)| self.space.path(key));
        let compare = |(key, expect): &(&str, Expect)| {
            let path = self.space.path(key);
            match expect {
                Expect::Any => None,
                Expect::Absent => Some(Compare::create_revision(path, CompareOp::Equal, 0)),
                Expect::Revision(revision) => {
                    let revision = signed(*revision);
                    Some(Compare::mod_revision(path, CompareOp::Equal, revision))
                }
            }
        };
        let txn = Txn::new()
            .when(conditions.iter().filter_map(compare).collect::<Vec<_>>())
            .and_then(operations)
            .or_else(paths.map(|path| TxnOp::get(path, None)).collect::<Vec<_>>());
        let write = |client: Client| async move { client.kv_client().txn(txn).await };
        let response = self.members.ask("write", write).await?;
        let answers = response.op_responses();
        if answers.len() != conditions.len() {
            return Err(nonsense("a transaction was answered in part"));
        }
        if response.succeeded() {
            return Ok((revision_of(response.header()), answers));
        }
        for ((key, expect), answer) in conditions.iter().zip(answers) {
            let found = match &answer {
                TxnOpResponse::Get(found) => found.kvs().first(),
                _ => None,
            };
            let key = (*key).to_owned();
            match (expect, found.and_then(|kv| self.space.record(kv))) {
                (Expect::Any, _) | (Expect::Absent, None) => {}
                (Expect::Revision(_), None) => return Err(StoreError::NotFound { key }),
                (Expect::Revision(wanted), Some(current)) if current.revision == *wanted => {}
                (Expect::Absent, Some(current)) => {
                    let current = Box::new(current);
                    return Err(StoreError::Exists { key, current });
                }
                (Expect::Revision(_), Some(current)) => {
                    let current = Box::new(current);
                    return Err(StoreError::Conflict { key, current });
                }
            }
        }
        Err(nonsense("a condition does not hold, and none is broken"))
    }

    /// The one write of a transaction, or its first.
    async fn write(
        &self,
        first: (Write, Option<PutOptions>),
        along: Vec<Write>,
    ) -> Result<Record, StoreError> {
        let (first, options) = first;
        let conditions: Vec<(&str, Expect)> = std::iter::once(&first)
            .chain(&along)
            .map(|write| (write.key.as_str(), write.expect))
            .collect();
        let operation = |write: &Write, options: Option<PutOptions>| {
            let path = self.space.path(&write.key);
            match &write.value {
                Some(value) => {
                    let options = options.unwrap_or_default().with_prev_key();
                    TxnOp::put(path, &**value, Some(options))
                }
                None => TxnOp::delete(path, Some(DeleteOptions::new().with_prev_key())),
            }
        };
        let mut operations = vec![operation(&first, options)];
        operations.extend(along.iter().map(|write| operation(write, None)));
        let (revision, answers) = self.transact(&conditions, operations).await?;
        let record = match (answers.first(), first.value) {
            (Some(TxnOpResponse::Put(put)), Some(value)) => Record {
                key: first.key.into(),
                value,
                revision,
                created: put
                    .prev_key()
                    .map_or(revision, |last| unsigned(last.create_revision())),
            },
            (Some(TxnOpResponse::Delete(deleted)), None) => {
                let last = deleted.prev_kvs().first();
                let last = last.and_then(|kv| self.space.record(kv));
                let last = last.ok_or(StoreError::NotFound { key: first.key })?;
                Record { revision, ..last }
            }
            _ => return Err(nonsense("a write was answered with something else")),
        };
        self.shown(revision).await;
        Ok(record)
    }

    /// Waits until the replica shows a write that etcd has answered. It is durable whether that comes to pass or not.
    async fn shown(&self, revision: Revision) {
        if timeout(PATIENCE, self.replica.reached(revision))
            .await
            .is_err()
        {
            self.doubt.notify_one();
        }
    }

    /// Waits until the replica shows all that was answered before now.
    async fn caught_up(&self) -> Result<(), StoreError> {
        let newest = self.fence.pass().await?;
        if timeout(PATIENCE, self.replica.reached(newest))
            .await
            .is_ok()
        {
            return Ok(());
        }
        self.doubt.notify_one();
        timeout(PATIENCE, self.replica.reached(newest))
            .await
            .map_err(|_| StoreError::Unavailable {
                operation: "follow",
                reason: format!("revision {newest} has not arrived"),
            })
    }
}

impl Store for Etcd {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(async move {
            self.caught_up().await?;
            Ok(self.replica.get(key))
        })
    }

    fn put<'a>(
        &'a self,
        key: &'a str,
        value: Bytes,
        expect: Expect,
    ) -> BoxFuture<'a, Result<Record, StoreError>> {
        self.commit(put(key, value, expect), Vec::new())
    }

    fn put_for<'a>(
        &'a self,
        key: &'a str,
        value: Bytes,
        expect: Expect,
        lifetime: Duration,
    ) -> BoxFuture<'a, Result<Record, StoreError>> {
        Box::pin(async move {
            loop {
                let lease = self.leases.lasting(lifetime).await?;
                let options = PutOptions::new().with_lease(lease.id);
                let first = (put(key, value.clone(), expect), Some(options));
                match self.write(first, Vec::new()).await {
                    // One that was granted earlier may have ended at etcd's clock; one that is new has not.
                    Err(error) if leases::is_gone(&error) && !lease.fresh => {
                        self.leases.forget(lease.id).await;
                    }
                    outcome => return outcome,
                }
            }
        })
    }

    fn delete<'a>(
        &'a self,
        key: &'a str,
        expect: Expect,
    ) -> BoxFuture<'a, Result<Record, StoreError>> {
        let delete = Write {
            key: key.to_owned(),
            value: None,
            expect,
        };
        self.commit(delete, Vec::new())
    }

    fn commit(&self, first: Write, along: Vec<Write>) -> BoxFuture<'_, Result<Record, StoreError>> {
        Box::pin(self.write((first, None), along))
    }

    fn list<'a>(&'a self, range: Range<'a>) -> BoxFuture<'a, Result<Page, StoreError>> {
        Box::pin(async move {
            if range.at.is_none_or(|at| at > self.replica.revision()) {
                self.caught_up().await?;
            }
            self.replica.range(range)
        })
    }

    fn watch_share<'a>(
        &'a self,
        prefix: &'a str,
        share: Share<'a>,
        from: Revision,
    ) -> BoxFuture<'a, Result<Box<dyn WatchStream>, StoreError>> {
        Box::pin(async move {
            // Another process may have told of it. Whether it comes is seen by the watch.
            let _ = timeout(PATIENCE, self.replica.reached(from)).await;
            self.replica.watch(prefix, share, from)
        })
    }

    fn revision(&self) -> Revision {
        self.replica.revision()
    }

    fn reached(&self, revision: Revision) -> BoxFuture<'_, ()> {
        Box::pin(self.replica.reached(revision))
    }

    fn lost(&self) -> BoxFuture<'_, StoreError> {
        Box::pin(self.lineage.broken())
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn kept(&self) -> &dyn Store {
        self
    }
}

fn put(key: &str, value: Bytes, expect: Expect) -> Write {
    Write {
        key: key.to_owned(),
        value: Some(value),
        expect,
    }
}

/// Space is the part of etcd's keys that is ours.
#[derive(Clone)]
struct Space(Arc<str>);

impl Space {
    fn path(&self, key: &str) -> String {
        format!("{}{key}", self.0)
    }

    /// Where the format is written: beside the keys, which go on with a slash.
    fn format_path(&self) -> String {
        format!("{}-format", self.0)
    }

    /// Our key, when it is one.
    fn key<'a>(&self, path: &'a [u8]) -> Option<&'a str> {
        let key = std::str::from_utf8(path).ok()?.strip_prefix(&*self.0)?;
        key.starts_with('/').then_some(key)
    }

    fn record(&self, kv: &KeyValue) -> Option<Record> {
        Some(Record {
            key: self.key(kv.key())?.into(),
            value: Bytes::copy_from_slice(kv.value()),
            revision: unsigned(kv.mod_revision()),
            created: unsigned(kv.create_revision()),
        })
    }
}

fn signed(revision: Revision) -> i64 {
    i64::try_from(revision.0).unwrap_or(i64::MAX)
}

fn unsigned(revision: i64) -> Revision {
    Revision(u64::try_from(revision).unwrap_or_default())
}

fn revision_of(header: Option<&etcd_client::ResponseHeader>) -> Revision {
    unsigned(header.map_or(0, etcd_client::ResponseHeader::revision))
}

fn nonsense(reason: &str) -> StoreError {
    StoreError::Unavailable {
        operation: "understand",
        reason: reason.to_owned(),
    }
}

/// Writes down which format is below the prefix, or refuses another one.
async fn check_format(members: &Members, space: &Space) -> Result<(), StoreError> {
    let path = space.format_path();
    let txn = Txn::new()
        .when([Compare::create_revision(path.clone(), CompareOp::Equal, 0)])
        .and_then([TxnOp::put(path.clone(), FORMAT, None)])
        .or_else([TxnOp::get(path.clone(), None)]);
    let write = |client: Client| {
        let txn = txn.clone();
        async move { client.kv_client().txn(txn).await }
    };
    let response = members.ask_any("write", write).await?;
    let found = match response.op_responses().pop() {
        Some(TxnOpResponse::Get(found)) => found,
        _ => return Ok(()),
    };
    let format = found.kvs().first().map_or(&b""[..], KeyValue::value);
    if format == FORMAT.as_bytes() {
        return Ok(());
    }
    Err(StoreError::Disk {
        operation: "use",
        path,
        reason: format!(
            "its format is {:?}, and this version reads {FORMAT:?}",
            String::from_utf8_lossy(format)
        ),
    })
}

/// Lets etcd forget what is older than a while. Several servers do so at once without harm.
async fn compact(members: Arc<Members>, replica: Replica) {
    let mut old = None;
    loop {
        tokio::time::sleep(COMPACTION).await;
        if let Some(revision) = old.replace(replica.revision()) {
            let compact = |client: Client| async move {
                client.kv_client().compact(signed(revision), None).await
            };
            if let Err(error) = members.ask("compact", compact).await {
                tracing::debug!(%error, %revision, "etcd's history was not compacted");
            }
        }
    }
}

#[cfg(test)]
mod tests;
