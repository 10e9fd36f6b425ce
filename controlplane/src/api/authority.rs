//! What access is decided by: roles, bindings, and where pods are. Each follows the store, so that a binding that was
//! written is in force for the next request.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use futures::FutureExt;
use tokio::sync::Mutex;

use crate::auth::node::NodePods;
use crate::auth::policy;
use crate::auth::rbac::{Index, Rule};
use crate::store::{Change, PODS, Range, Revision, Store, StoreError, WatchStream};

/// View is made of the values of some keys.
pub trait View: Default + Send + Sync {
    const PREFIXES: &'static [&'static str];

    /// Takes over the value of a key, given without its prefix; None when it is gone.
    fn take(&mut self, prefix: &'static str, key: &str, value: Option<&[u8]>);
}

const ROLES: &str = "/rbac.authorization.k8s.io/roles/";
const ROLE_BINDINGS: &str = "/rbac.authorization.k8s.io/rolebindings/";
const CLUSTER_ROLES: &str = "/rbac.authorization.k8s.io/clusterroles/";
const CLUSTER_ROLE_BINDINGS: &str = "/rbac.authorization.k8s.io/clusterrolebindings/";

impl View for Index {
    const PREFIXES: &'static [&'static str] =
        &[ROLES, ROLE_BINDINGS, CLUSTER_ROLES, CLUSTER_ROLE_BINDINGS];

    fn take(&mut self, prefix: &'static str, key: &str, value: Option<&[u8]>) {
        let (namespace, name) = key.split_once('/').unwrap_or(("", key));
        match prefix {
            ROLES | CLUSTER_ROLES => self.set_role(namespace, name, value),
            _ => self.set_binding(namespace, name, value),
        }
    }
}

impl View for NodePods {
    const PREFIXES: &'static [&'static str] = &[PODS];

    fn take(&mut self, _prefix: &'static str, key: &str, value: Option<&[u8]>) {
        if let Some((namespace, name)) = key.split_once('/') {
            self.set_pod(namespace, name, value);
        }
    }
}

/// Authority is what the server decides access by.
pub struct Authority {
    pub rules: Followed<Index>,
    pub pods: Followed<NodePods>,
    pub node_rules: Vec<Rule>,
}

impl Default for Authority {
    fn default() -> Self {
        Self {
            rules: Followed::default(),
            pods: Followed::default(),
            node_rules: policy::node_rules(),
        }
    }
}

/// Followed is a view that is brought up to date when it is asked for, from watches that are read without waiting: a write is
/// in its watches before it is answered.
#[derive(Default)]
pub struct Followed<V> {
    streams: Mutex<Vec<(&'static str, Box<dyn WatchStream>)>>,
    view: RwLock<V>,
    /// Every write up to this revision is in the view.
    seen: AtomicU64,
    /// The newest write that is in the view; changed while the view is.
    newest: AtomicU64,
}

impl<V: View> Followed<V> {
    /// Takes in all that has been written.
    pub async fn catch_up(&self, store: &dyn Store) -> Result<(), StoreError> {
        // Most writes are of other keys, but between two writes this is all there is to do.
        if self.seen.load(Ordering::Acquire) >= store.revision().0 {
            return Ok(());
        }
        let mut streams = self.streams.lock().await;
        let newest = store.revision().0;
        if self.seen.load(Ordering::Acquire) >= newest {
            return Ok(());
        }
        if streams.is_empty() || !self.drain(&mut streams)? {
            streams.clear();
            *streams = self.restart(store).await?;
        }
        self.seen.store(newest, Ordering::Release);
        Ok(())
    }

    /// The view as `catch_up` left it.
    pub fn view(&self) -> RwLockReadGuard<'_, V> {
        self.view.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The view, and the revision of which it is; of one that is made of one prefix, whose writes come in order.
    pub fn view_at(&self) -> (RwLockReadGuard<'_, V>, Revision) {
        let view = self.view();
        let [seen, newest] = [&self.seen, &self.newest].map(|at| at.load(Ordering::Acquire));
        (view, Revision(seen.max(newest)))
    }

    /// Takes in what the watches have; false when one has fallen behind the kept history.
    fn drain(
        &self,
        streams: &mut [(&'static str, Box<dyn WatchStream>)],
    ) -> Result<bool, StoreError> {
        for (prefix, stream) in streams {
            let prefix = *prefix;
            while let Some(events) = stream.next().now_or_never() {
                let events = match events {
                    Ok(events) => events,
                    Err(StoreError::Compacted { .. }) => return Ok(false),
                    Err(error) => return Err(error),
                };
                let mut view = self.view.write().unwrap_or_else(PoisonError::into_inner);
                for event in events {
                    let revision = event.record.revision.0;
                    self.newest.fetch_max(revision, Ordering::AcqRel);
                    if let Some(key) = event.record.key.strip_prefix(prefix) {
                        let value = (event.change == Change::Put).then_some(&*event.record.value);
                        view.take(prefix, key, value);
                    }
                }
            }
        }
        Ok(true)
    }

    async fn restart(
        &self,
        store: &dyn Store,
    ) -> Result<Vec<(&'static str, Box<dyn WatchStream>)>, StoreError> {
        let (mut fresh, mut newest) = (V::default(), 0);
        let mut streams = Vec::with_capacity(V::PREFIXES.len());
        for prefix in V::PREFIXES {
            let page = store.list(Range::all(prefix)).await?;
            for record in &page.records {
                if let Some(key) = record.key.strip_prefix(prefix) {
                    fresh.take(prefix, key, Some(&record.value));
                }
            }
            newest = newest.max(page.revision.0);
            streams.push((*prefix, store.watch(prefix, page.revision).await?));
        }
        let mut view = self.view.write().unwrap_or_else(PoisonError::into_inner);
        *view = fresh;
        self.newest.fetch_max(newest, Ordering::AcqRel);
        drop(view);
        Ok(streams)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::store::{Embedded, EmbeddedConfig, Expect};

    #[tokio::test]
    async fn every_answered_write_is_in_the_next_look() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut config = EmbeddedConfig::at(folder.path().join("state.redb"));
        // So that the watch falls behind when many writes lie between two looks.
        config.history.events_max = 8;
        let store = Embedded::open(&config).expect("a store");
        let followed = Followed::<NodePods>::default();
        let pod = |node: &str| {
            Bytes::from(format!(
                r#"{{"metadata":{{}},"spec":{{"nodeName":"{node}"}}}}"#
            ))
        };
        let node_of = async |name: &str| {
            followed.catch_up(&store).await.expect("caught up");
            followed.view().node_of("a", name).map(str::to_owned)
        };
        assert_eq!(node_of("p").await, None);
        for round in 0..40 {
            let node = format!("n{round}");
            store
                .put("/core/pods/a/p", pod(&node), Expect::Any)
                .await
                .expect("written");
            if round % 20 < 10 {
                assert_eq!(node_of("p").await, Some(node));
            }
        }
        assert_eq!(
            node_of("p").await,
            Some("n39".to_owned()),
            "after a gap in the history"
        );
        store
            .delete("/core/pods/a/p", Expect::Any)
            .await
            .expect("deleted");
        assert_eq!(node_of("p").await, None);
    }
}
