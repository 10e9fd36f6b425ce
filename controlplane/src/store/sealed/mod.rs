//! A store whose chosen values are kept sealed: what is on disk, in etcd, in backups and in the memory of the store below
//! cannot be read without the keys.

mod keys;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;

use super::{
    Expect, Page, Range, Record, Revision, Share, Store, StoreError, Wanted, WatchEvent,
    WatchStream, Write,
};
pub use keys::{Keys, KeysError};

/// Sealed seals what is written and opens what is read.
pub struct Sealed {
    inner: Arc<dyn Store>,
    keys: Arc<Keys>,
}

impl Sealed {
    pub fn new(inner: Arc<dyn Store>, keys: Keys) -> Self {
        Self {
            inner,
            keys: Arc::new(keys),
        }
    }

    /// Writes anew what was sealed with another key than the first, or not at all; how many values that were. Others may
    /// write meanwhile, also another server that does the same.
    pub async fn renew(&self) -> Result<usize, StoreError> {
        let mut renewed = 0;
        for prefix in self.keys.prefixes() {
            let page = self.inner.list(Range::all(prefix)).await?;
            for record in page.records {
                if self.keys.is_current(&record.key, &record.value) {
                    continue;
                }
                let (key, expect) = (record.key.clone(), Expect::Revision(record.revision));
                let value = open(&self.keys, record)?.value;
                match self.put(&key, value, expect).await {
                    Ok(_) => renewed += 1,
                    // Somebody wrote it, sealed as it should be.
                    Err(StoreError::Conflict { .. } | StoreError::NotFound { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(renewed)
    }

    fn seal(&self, key: &str, value: Bytes) -> Result<Bytes, StoreError> {
        let failed = |reason| StoreError::Sealed {
            key: key.to_owned(),
            reason,
        };
        self.keys.seal(key, value).map_err(failed)
    }

    fn open(&self, outcome: Result<Record, StoreError>) -> Result<Record, StoreError> {
        outcome
            .map_err(|error| open_error(&self.keys, error))
            .and_then(|record| open(&self.keys, record))
    }
}

fn open(keys: &Keys, record: Record) -> Result<Record, StoreError> {
    let failed = |reason| StoreError::Sealed {
        key: record.key.to_string(),
        reason,
    };
    let value = keys.open(&record.key, &record.value).map_err(failed)?;
    Ok(Record { value, ..record })
}

/// Errors carry the record that is there.
fn open_error(keys: &Keys, error: StoreError) -> StoreError {
    let opened = |current: Box<Record>| open(keys, *current).map(Box::new);
    match error {
        StoreError::Exists { key, current } => match opened(current) {
            Ok(current) => StoreError::Exists { key, current },
            Err(error) => error,
        },
        StoreError::Conflict { key, current } => match opened(current) {
            Ok(current) => StoreError::Conflict { key, current },
            Err(error) => error,
        },
        other => other,
    }
}

impl Store for Sealed {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(async move {
            let record = self.inner.get(key).await?;
            record.map(|record| open(&self.keys, record)).transpose()
        })
    }

    fn put<'a>(
        &'a self,
        key: &'a str,
        value: Bytes,
        expect: Expect,
    ) -> BoxFuture<'a, Result<Record, StoreError>> {
        Box::pin(async move {
            let value = self.seal(key, value)?;
            self.open(self.inner.put(key, value, expect).await)
        })
    }

    fn put_for<'a>(
        &'a self,
        key: &'a str,
        value: Bytes,
        expect: Expect,
        lifetime: Duration,
    ) -> BoxFuture<'a, Result<Record, StoreError>> {
        Box::pin(async move {
            let value = self.seal(key, value)?;
            self.open(self.inner.put_for(key, value, expect, lifetime).await)
        })
    }

    fn delete<'a>(
        &'a self,
        key: &'a str,
        expect: Expect,
    ) -> BoxFuture<'a, Result<Record, StoreError>> {
        Box::pin(async move { self.open(self.inner.delete(key, expect).await) })
    }

    fn commit(&self, first: Write, along: Vec<Write>) -> BoxFuture<'_, Result<Record, StoreError>> {
        Box::pin(async move {
            let sealed = |write: Write| {
                let value = write.value.map(|value| self.seal(&write.key, value));
                let value = value.transpose()?;
                Ok::<_, StoreError>(Write { value, ..write })
            };
            let along = along.into_iter().map(sealed).collect::<Result<_, _>>()?;
            self.open(self.inner.commit(sealed(first)?, along).await)
        })
    }

    fn list<'a>(&'a self, range: Range<'a>) -> BoxFuture<'a, Result<Page, StoreError>> {
        Box::pin(async move {
            if !self.keys.covers(range.prefix) {
                return self.inner.list(range).await;
            }
            // One that cannot be opened is wanted, and makes the whole list fail below.
            let wanted = |record: &Record| match open(&self.keys, record.clone()) {
                Ok(record) => range.wanted.is_none_or(|wanted| wanted(&record)),
                Err(_) => true,
            };
            let wanted: Wanted<'_> = &wanted;
            let kept = Range {
                wanted: range.wanted.map(|_| wanted),
                ..range
            };
            let page = self.inner.list(kept).await?;
            let records = page.records.into_iter();
            let records: Result<_, _> = records.map(|record| open(&self.keys, record)).collect();
            Ok(Page {
                records: records?,
                ..page
            })
        })
    }

    fn watch_share<'a>(
        &'a self,
        prefix: &'a str,
        share: Share<'a>,
        from: Revision,
    ) -> BoxFuture<'a, Result<Box<dyn WatchStream>, StoreError>> {
        Box::pin(async move {
            if !self.keys.covers(prefix) {
                return self.inner.watch_share(prefix, share, from).await;
            }
            // Below, nothing is seen of a value.
            let share = match share {
                Share::Node(_) => Share::All,
                Share::All | Share::Key(_) | Share::Name(_) => share,
            };
            let inner = self.inner.watch_share(prefix, share, from).await?;
            let keys = self.keys.clone();
            Ok(Box::new(Opened { inner, keys }) as Box<dyn WatchStream>)
        })
    }

    fn revision(&self) -> Revision {
        self.inner.revision()
    }

    fn reached(&self, revision: Revision) -> BoxFuture<'_, ()> {
        self.inner.reached(revision)
    }

    fn lost(&self) -> BoxFuture<'_, StoreError> {
        self.inner.lost()
    }

    fn is_shared(&self) -> bool {
        self.inner.is_shared()
    }

    fn kept(&self) -> &dyn Store {
        self.inner.kept()
    }
}

/// Opened is a watch of sealed values.
struct Opened {
    inner: Box<dyn WatchStream>,
    keys: Arc<Keys>,
}

impl WatchStream for Opened {
    fn next(&mut self) -> BoxFuture<'_, Result<Vec<Arc<WatchEvent>>, StoreError>> {
        Box::pin(async move {
            let events = self.inner.next().await?;
            let opened = |event: Arc<WatchEvent>| {
                let previous = event.previous.clone();
                let previous = previous.map(|record| open(&self.keys, record));
                Ok(Arc::new(WatchEvent {
                    change: event.change.clone(),
                    record: open(&self.keys, event.record.clone())?,
                    previous: previous.transpose()?,
                }))
            };
            events.into_iter().map(opened).collect()
        })
    }

    fn peers(&self) -> usize {
        self.inner.peers()
    }

    fn progress(&self) -> Revision {
        self.inner.progress()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::contract::contract_tests;
    use crate::store::{Embedded, EmbeddedConfig};
    use keys::tests::keys;

    fn embedded() -> (Arc<Embedded>, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let config = EmbeddedConfig::at(folder.path().join("state.redb"));
        (Arc::new(Embedded::open(&config).unwrap()), folder)
    }

    /// A store in which everything that the contract writes is sealed.
    fn all_sealed() -> (Sealed, tempfile::TempDir) {
        let (store, folder) = embedded();
        (Sealed::new(store, Keys::everything()), folder)
    }

    contract_tests!(all_sealed());

    const SECRET: &str = "/core/secrets/default/s";

    #[tokio::test]
    async fn what_is_kept_is_sealed_and_what_is_served_is_not() {
        let (inner, folder) = embedded();
        let store = Sealed::new(inner.clone(), keys(&["one"]));
        let mut watch = store.watch("/core/secrets/", Revision(1)).await.unwrap();
        let value =
            Bytes::from_static(br#"{"metadata":{"name":"s"},"data":{"password":"hunter2"}}"#);
        for round in 0..2 {
            let expect = [Expect::Absent, Expect::Any][round];
            let record = store.put(SECRET, value.clone(), expect).await.unwrap();
            assert_eq!(record.value, value);
        }
        let taken = store.put(SECRET, value.clone(), Expect::Absent).await;
        assert!(matches!(taken, Err(StoreError::Exists { current, .. }) if current.value == value));
        let page = store.list(Range::all("/core/")).await.unwrap();
        assert_eq!(page.records[0].value, value);
        for event in watch.next().await.unwrap() {
            assert_eq!(event.record.value, value);
            assert!(
                event
                    .previous
                    .as_ref()
                    .is_none_or(|previous| previous.value == value)
            );
        }
        let kept = inner.get(SECRET).await.unwrap().unwrap().value;
        assert!(kept.starts_with(b"k8s:enc:aesgcm:v1:one:"));
        let file = std::fs::read(folder.path().join("state.redb")).unwrap();
        assert!(!file.windows(7).any(|part| part == b"hunter2"));
    }

    #[tokio::test]
    async fn keys_are_rotated_while_the_values_stay() {
        let (inner, _folder) = embedded();
        let value = |at: usize| Bytes::from(format!("value {at}"));
        let key = |at: usize| format!("/core/secrets/default/{at}");
        for at in 0..10 {
            inner.put(&key(at), value(at), Expect::Any).await.unwrap();
        }
        let all_are_read = async |store: &Sealed| {
            for at in 0..10 {
                let read = store.get(&key(at)).await.unwrap().unwrap();
                assert_eq!(read.value, value(at));
            }
        };
        for (providers, renewed) in [
            (&["one", "identity"][..], 10),
            (&["one", "identity"], 0),
            (&["two", "one"], 10),
            (&["two"], 0),
            (&["identity", "two"], 10),
        ] {
            let store = Sealed::new(inner.clone(), keys(providers));
            all_are_read(&store).await;
            assert_eq!(store.renew().await.unwrap(), renewed, "{providers:?}");
            all_are_read(&store).await;
        }
        let (plain, lost) = (keys(&["one"]), Sealed::new(inner.clone(), keys(&["two"])));
        let unreadable = lost.get(&key(0)).await.unwrap_err();
        assert!(
            unreadable.to_string().contains("is not sealed"),
            "{unreadable}"
        );
        let sealed = Sealed::new(inner, plain)
            .put(&key(0), value(0), Expect::Any)
            .await;
        assert!(sealed.is_ok());
        let unreadable = lost.list(Range::all("/core/secrets/")).await.unwrap_err();
        assert!(
            unreadable.to_string().contains("not in the file"),
            "{unreadable}"
        );
    }
}
