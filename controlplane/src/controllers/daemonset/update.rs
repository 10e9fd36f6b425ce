//! Rolling update of a DaemonSet: pods of older revisions make way node by node, within maxUnavailable or maxSurge.

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;

use super::super::plan::{Plan, View};
use super::super::pods::{self, Availability, scaled};
use super::placement::Placement;
use super::{HASH_LABEL, PodsByNode};

fn surge_max(set: &DaemonSet, desired: i32) -> i32 {
    let strategy = set
        .spec
        .as_ref()
        .and_then(|spec| spec.update_strategy.as_ref());
    let rolling = strategy.and_then(|strategy| strategy.rolling_update.as_ref());
    scaled(
        rolling.and_then(|rolling| rolling.max_surge.as_ref()),
        desired,
        true,
        "0",
    )
    .max(0)
}

fn unavailable_max(set: &DaemonSet, desired: i32) -> i32 {
    let strategy = set
        .spec
        .as_ref()
        .and_then(|spec| spec.update_strategy.as_ref());
    let rolling = strategy.and_then(|strategy| strategy.rolling_update.as_ref());
    scaled(
        rolling.and_then(|rolling| rolling.max_unavailable.as_ref()),
        desired,
        true,
        "1",
    )
    .max(0)
}

/// Whether an update may have two pods on a node.
pub fn surges(set: &DaemonSet) -> bool {
    surge_max(set, 100) > 0
}

pub fn is_current(pod: &Pod, hash: &str) -> bool {
    pod.metadata
        .labels
        .as_ref()
        .and_then(|labels| labels.get(HASH_LABEL))
        .is_some_and(|found| found == hash)
}

#[expect(
    clippy::too_many_arguments,
    reason = "the two lists are the outcome, shared with the rest of the plan"
)]
pub fn plan<'a>(
    view: &View<'_>,
    set: &DaemonSet,
    places: &'a [Placement],
    owned: &PodsByNode<'a>,
    hash: &str,
    create: &mut Vec<&'a str>,
    delete: &mut Vec<&'a Pod>,
    plan: &mut Plan,
) {
    let Some(spec) = set.spec.as_ref() else {
        return;
    };
    if spec
        .update_strategy
        .as_ref()
        .and_then(|strategy| strategy.type_.as_deref())
        == Some("OnDelete")
    {
        return;
    }
    let min_ready_seconds = spec.min_ready_seconds.unwrap_or(0);
    let mut is_available = |pod: &Pod| match pods::availability(pod, min_ready_seconds, view.now) {
        Availability::Now => true,
        Availability::At(at) => {
            plan.look_again(at);
            false
        }
        Availability::No => false,
    };
    let wanted: Vec<&Placement> = places.iter().filter(|place| place.should_run).collect();
    let desired = i32::try_from(wanted.len()).unwrap_or(i32::MAX);
    let surges = surges(set);
    let mut unavailable = 0;
    let mut surging = 0;
    let mut candidates: Vec<(&'a str, &'a Pod)> = Vec::new();
    for place in wanted {
        let on_node = owned
            .get(&place.node)
            .map(Vec::as_slice)
            .unwrap_or_default();
        let active = || on_node.iter().copied().filter(|pod| pods::is_active(pod));
        let current = active().find(|pod| is_current(pod, hash));
        let old = active().find(|pod| !is_current(pod, hash));
        match (current, old) {
            (Some(current), Some(old)) => {
                // Both there: a surge under way. The old one goes when it serves nobody or the new one does.
                surging += 1;
                if is_available(current) || !is_available(old) {
                    delete.push(old);
                }
            }
            (Some(current), None) => {
                if !is_available(current) {
                    unavailable += 1;
                }
            }
            (None, Some(old)) if surges => candidates.push((&place.node, old)),
            (None, Some(old)) => {
                if is_available(old) {
                    candidates.push((&place.node, old));
                } else {
                    // It is unavailable already: replacing it costs nothing.
                    unavailable += 1;
                    delete.push(old);
                }
            }
            (None, None) => unavailable += 1,
        }
    }
    if surges {
        let room = usize::try_from(surge_max(set, desired) - surging).unwrap_or(0);
        create.extend(candidates.into_iter().take(room).map(|(node, _)| node));
    } else {
        let room = usize::try_from(unavailable_max(set, desired).max(1) - unavailable).unwrap_or(0);
        delete.extend(candidates.into_iter().take(room).map(|(_, pod)| pod));
    }
}
