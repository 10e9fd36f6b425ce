//! Which pods are on which node. Every kubelet lists its own by that, and of thousands none is to look at the pods of all.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::Api;
use super::authority::View;
use super::request::{ListOptions, Target};
use super::status::Status;
use crate::codec::scan::Raw;
use crate::store::{PODS, Revision};

/// Placement is the keys of the pods of each node.
#[derive(Default)]
pub struct Placement {
    nodes: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    /// The node of each key.
    placed: HashMap<Arc<str>, Arc<str>>,
}

impl View for Placement {
    const PREFIXES: &'static [&'static str] = &[PODS];

    fn take(&mut self, prefix: &'static str, key: &str, value: Option<&[u8]>) {
        let key = format!("{prefix}{key}");
        let node = value.and_then(|value| Raw::new(value).at(["spec", "nodeName"])?.text());
        let node = node.filter(|node| !node.is_empty());
        let before = self.placed.get(&*key);
        if before.map(|before| &**before) == node.as_deref() {
            return;
        }
        if let Some((key, before)) = self.placed.remove_entry(&*key)
            && let Some(pods) = self.nodes.get_mut(&before)
        {
            pods.remove(&key);
            if pods.is_empty() {
                self.nodes.remove(&before);
            }
        }
        if let Some(node) = node {
            let key: Arc<str> = key.into();
            let known = self
                .nodes
                .get_key_value(&*node)
                .map(|(node, _)| node.clone());
            let node = known.unwrap_or_else(|| (&*node).into());
            self.placed.insert(key.clone(), node.clone());
            self.nodes.entry(node).or_default().insert(key);
        }
    }
}

impl Placement {
    fn keys(&self, node: &str) -> Vec<Arc<str>> {
        let pods = self.nodes.get(node).into_iter().flatten();
        pods.cloned().collect()
    }
}

impl Api {
    /// The keys of all pods that a list by node may select, in order, and the revision at which there are no others. None for
    /// what is no such list.
    pub(super) async fn placed(
        &self,
        target: &Target,
        options: &ListOptions,
    ) -> Result<Option<(Vec<Arc<str>>, Revision)>, Status> {
        let node = options.fields.exact("spec.nodeName");
        let node = node.filter(|node| !node.is_empty());
        let Some(node) = node.filter(|_| target.prefix().starts_with(PODS)) else {
            return Ok(None);
        };
        // Where others write to the store too, this waits until all that was answered is seen.
        self.store.get(PODS).await?;
        self.placement.catch_up(&*self.store).await?;
        let (placement, revision) = self.placement.view_at();
        Ok(Some((placement.keys(node), revision)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pods_are_where_their_last_state_says(
            changes in prop::collection::vec(("[ab]{1,2}", prop::option::of(prop::option::of("[xy]"))), 0..40)
        ) {
            let mut placement = Placement::default();
            let mut model: HashMap<String, String> = HashMap::new();
            for (name, change) in changes {
                let node = change.clone().flatten();
                let pod = change.map(|node| match node {
                    Some(node) => format!(r#"{{"metadata":{{}},"spec":{{"nodeName":"{node}"}}}}"#),
                    None => r#"{"metadata":{},"spec":{"nodeName":""}}"#.to_owned(),
                });
                placement.take(PODS, &name, pod.as_deref().map(str::as_bytes));
                match node {
                    Some(node) => model.insert(name, node),
                    None => model.remove(&name),
                };
                for node in ["x", "y"] {
                    let on = model.iter().filter(|(_, on)| *on == node);
                    let mut expected: Vec<String> = on.map(|(name, _)| format!("{PODS}{name}")).collect();
                    expected.sort();
                    let found = placement.keys(node);
                    prop_assert_eq!(found.iter().map(|key| &**key).collect::<Vec<_>>(), expected);
                }
            }
        }
    }
}
