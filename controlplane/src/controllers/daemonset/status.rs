//! What a DaemonSet says about itself.

use k8s_openapi::api::apps::v1::{DaemonSet, DaemonSetStatus};
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;

use super::super::plan::{Plan, View};
use super::super::pods::{self, Availability};
use super::PodsByNode;
use super::placement::Placement;
use super::update::is_current;

pub fn report(
    view: &View<'_>,
    set: &DaemonSet,
    places: &[Placement],
    owned: &PodsByNode<'_>,
    hash: &str,
    plan: &mut Plan,
) {
    let min_ready_seconds = set
        .spec
        .as_ref()
        .and_then(|spec| spec.min_ready_seconds)
        .unwrap_or(0);
    let mut new = DaemonSetStatus {
        observed_generation: set.metadata.generation,
        ..Default::default()
    };
    let (mut updated, mut available) = (0, 0);
    for place in places {
        let pod = owned.get(&place.node).and_then(|on_node| counted(on_node));
        match (place.should_run, pod) {
            (true, pod) => {
                new.desired_number_scheduled += 1;
                let Some(pod) = pod else { continue };
                new.current_number_scheduled += 1;
                if pods::is_ready(pod) {
                    new.number_ready += 1;
                }
                match pods::availability(pod, min_ready_seconds, view.now) {
                    Availability::Now => available += 1,
                    Availability::At(at) => plan.look_again(at),
                    Availability::No => {}
                }
                if is_current(pod, hash) {
                    updated += 1;
                }
            }
            (false, Some(_)) => new.number_misscheduled += 1,
            (false, None) => {}
        }
    }
    new.updated_number_scheduled = Some(updated);
    new.number_available = Some(available);
    new.number_unavailable = Some(new.desired_number_scheduled - available);
    if same(&set.status.clone().unwrap_or_default(), &new) {
        return;
    }
    plan.push(pods::status_patch(
        set,
        json!({
            "observedGeneration": new.observed_generation,
            "desiredNumberScheduled": new.desired_number_scheduled,
            "currentNumberScheduled": new.current_number_scheduled,
            "numberMisscheduled": new.number_misscheduled,
            "numberReady": new.number_ready,
            "updatedNumberScheduled": new.updated_number_scheduled,
            "numberAvailable": new.number_available,
            "numberUnavailable": new.number_unavailable,
        }),
    ));
}

/// The pod that stands for a node in the counts: of several, the oldest that is not on its way out.
fn counted<'a>(on_node: &[&'a Pod]) -> Option<&'a Pod> {
    on_node
        .iter()
        .copied()
        .filter(|pod| !pods::is_terminating(pod))
        .min_by_key(|pod| {
            (
                !pods::is_ready(pod),
                pod.metadata.creation_timestamp.clone(),
                pod.metadata.name.clone(),
            )
        })
}

fn same(old: &DaemonSetStatus, new: &DaemonSetStatus) -> bool {
    let numbers = |status: &DaemonSetStatus| {
        [
            status.desired_number_scheduled,
            status.current_number_scheduled,
            status.number_misscheduled,
            status.number_ready,
            status.updated_number_scheduled.unwrap_or(0),
            status.number_available.unwrap_or(0),
            status.number_unavailable.unwrap_or(0),
        ]
    };
    numbers(old) == numbers(new) && old.observed_generation == new.observed_generation
}
