//! The store on etcd, for clusters of several control planes: etcd decides and keeps, a replica in memory serves.
//!
//! A write is one transaction of etcd. A follower copies every change into the replica, in order; lists and watches are
//! served from there, as the embedded store's are. What makes a read linearizable is the fence before it: the revision
//! that etcd's quorum names at that moment is waited for. Reads that come while a fence is under way share the next one.

mod fence;
mod follow;
mod leases;
mod members;

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
use super::{Expect, Page, Range, Record, Revision, Store, StoreError, WatchStream};
use fence::Fence;
use follow::Follower;
use leases::Leases;
use members::Members;

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
}

impl EtcdConfig {
    pub fn at(endpoints: Vec<String>) -> Self {
        Self {
            endpoints,
            ca_file: None,
            identity_files: None,
            prefix: "/keelway".to_owned(),
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
    leases: Leases,
    /// Wakes the follower when it seems to hang.
    doubt: Arc<Notify>,
    /// Ended with the store.
    _tasks: JoinSet<()>,
}

impl Etcd {
    /// Connects, and loads what is there.
    pub async fn connect(config: &EtcdConfig) -> Result<Self, StoreError> {
        let members = Arc::new(Members::new(config).await?);
        let space = Space(config.prefix.as_str().into());
        check_format(&members, &space).await?;
        let (records, revision) = follow::load(&members, &space).await?;
        let replica = Replica::new(records, revision, Bounds::default());
        let doubt = Arc::new(Notify::new());
        let mut tasks = JoinSet::new();
        let follower = Follower {
            members: members.clone(),
            space: space.clone(),
            replica: replica.clone(),
            doubt: doubt.clone(),
        };
        tasks.spawn(follower.run());
        let (fence, fencing) = Fence::new(members.clone(), &space);
        tasks.spawn(fencing);
        tasks.spawn(compact(members.clone(), replica.clone()));
        let leases = Leases::new(members.clone());
        Ok(Self {
            members,
            space,
            replica,
            fence,
            leases,
            doubt,
            _tasks: tasks,
        })
    }

    /// One operation under a condition; what etcd answered, and the revision it made.
    async fn conditional(
        &self,
        key: &str,
        expect: Expect,
        operation: TxnOp,
    ) -> Result<(Revision, TxnOpResponse), StoreError> {
        let path = self.space.path(key);
        let condition = match expect {
            Expect::Any => Vec::new(),
            Expect::Absent => vec![Compare::create_revision(path.clone(), CompareOp::Equal, 0)],
            Expect::Revision(revision) => vec![Compare::mod_revision(
                path.clone(),
                CompareOp::Equal,
                signed(revision),
            )],
        };
        let txn = Txn::new()
            .when(condition)
            .and_then([operation])
            .or_else([TxnOp::get(path, None)]);
        let write = |client: Client| async move { client.kv_client().txn(txn).await };
        let response = self.members.ask("write", write).await?;
        let revision = revision_of(response.header());
        let answer = response.op_responses().pop();
        if response.succeeded() {
            return answer
                .map(|answer| (revision, answer))
                .ok_or_else(|| nonsense("a transaction was answered with nothing"));
        }
        let key = key.to_owned();
        let current = match &answer {
            Some(TxnOpResponse::Get(found)) => found.kvs().first(),
            _ => None,
        };
        Err(match current.and_then(|kv| self.space.record(kv)) {
            None => StoreError::NotFound { key },
            Some(current) if expect == Expect::Absent => StoreError::Exists {
                key,
                current: Box::new(current),
            },
            Some(current) => StoreError::Conflict {
                key,
                current: Box::new(current),
            },
        })
    }

    async fn put_with(
        &self,
        key: &str,
        value: Bytes,
        expect: Expect,
        options: PutOptions,
    ) -> Result<Record, StoreError> {
        let options = options.with_prev_key();
        let put = TxnOp::put(self.space.path(key), &*value, Some(options));
        let (revision, answer) = self.conditional(key, expect, put).await?;
        let created = match &answer {
            TxnOpResponse::Put(put) => put.prev_key().map(KeyValue::create_revision),
            _ => None,
        };
        self.shown(revision).await;
        Ok(Record {
            key: key.into(),
            value,
            revision,
            created: created.map_or(revision, unsigned),
        })
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
        Box::pin(self.put_with(key, value, expect, PutOptions::new()))
    }

    fn put_for<'a>(
        &'a self,
        key: &'a str,
        value: Bytes,
        expect: Expect,
        lifetime: Duration,
    ) -> BoxFuture<'a, Result<Record, StoreError>> {
        Box::pin(async move {
            let lease = self.leases.lasting(lifetime).await?;
            let options = PutOptions::new().with_lease(lease);
            self.put_with(key, value, expect, options).await
        })
    }

    fn delete<'a>(
        &'a self,
        key: &'a str,
        expect: Expect,
    ) -> BoxFuture<'a, Result<Record, StoreError>> {
        Box::pin(async move {
            let options = DeleteOptions::new().with_prev_key();
            let delete = TxnOp::delete(self.space.path(key), Some(options));
            let (revision, answer) = self.conditional(key, expect, delete).await?;
            let last = match &answer {
                TxnOpResponse::Delete(deleted) => deleted.prev_kvs().first(),
                _ => None,
            };
            let last = last.and_then(|kv| self.space.record(kv));
            let last = last.ok_or_else(|| StoreError::NotFound {
                key: key.to_owned(),
            })?;
            self.shown(revision).await;
            Ok(Record { revision, ..last })
        })
    }

    fn list<'a>(&'a self, range: Range<'a>) -> BoxFuture<'a, Result<Page, StoreError>> {
        Box::pin(async move {
            if range.at.is_none_or(|at| at > self.replica.revision()) {
                self.caught_up().await?;
            }
            self.replica.range(range)
        })
    }

    fn watch<'a>(
        &'a self,
        prefix: &'a str,
        from: Revision,
    ) -> BoxFuture<'a, Result<Box<dyn WatchStream>, StoreError>> {
        Box::pin(async move {
            // Another process may have told of it. Whether it comes is seen by the watch.
            let _ = timeout(PATIENCE, self.replica.reached(from)).await;
            self.replica.watch(prefix, from)
        })
    }

    fn revision(&self) -> Revision {
        self.replica.revision()
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
