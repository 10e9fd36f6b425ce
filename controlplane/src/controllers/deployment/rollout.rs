//! How many replicas each ReplicaSet of a Deployment gets next. The bounds: never more than `replicas + maxSurge` in all,
//! never fewer available than `replicas - maxUnavailable` by our doing.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use serde_json::json;

use super::super::object::Target;
use super::super::plan::{Action, Note, Plan};
use super::super::pods::scaled;
use super::sets::{Sets, annotation, replicas};
use super::{DESIRED_REPLICAS, MAX_REPLICAS, REPORTER, wished};

/// maxSurge and maxUnavailable as numbers. Both zero would stand still, so one may then be unavailable.
pub fn limits(deployment: &Deployment) -> (i32, i32) {
    let strategy = deployment
        .spec
        .as_ref()
        .and_then(|spec| spec.strategy.as_ref());
    if strategy.and_then(|strategy| strategy.type_.as_deref()) == Some("Recreate") {
        return (0, 0);
    }
    let rolling = strategy.and_then(|strategy| strategy.rolling_update.as_ref());
    let wished = wished(deployment);
    let surge = scaled(
        rolling.and_then(|rolling| rolling.max_surge.as_ref()),
        wished,
        true,
        "25%",
    );
    let unavailable = scaled(
        rolling.and_then(|rolling| rolling.max_unavailable.as_ref()),
        wished,
        false,
        "25%",
    );
    match (surge.max(0), unavailable.clamp(0, wished.max(0))) {
        (0, 0) => (0, 1),
        limits => limits,
    }
}

pub fn replicas_max(deployment: &Deployment) -> i32 {
    wished(deployment).saturating_add(limits(deployment).0)
}

/// Replicas that the set of the current template may have now.
pub fn replicas_of_new(deployment: &Deployment, sets: &Sets) -> i32 {
    let wished = wished(deployment);
    let strategy = deployment
        .spec
        .as_ref()
        .and_then(|spec| spec.strategy.as_ref()?.type_.as_deref());
    if strategy == Some("Recreate") {
        return wished;
    }
    let now = sets.current.as_ref().map_or(0, |set| replicas(set));
    let room = replicas_max(deployment) - sets.occupied_total();
    if room <= 0 {
        now
    } else {
        now + room.min(wished - now)
    }
}

/// Writes the set's replicas, with the annotations that tell a later plan for which wish they were meant. True when
/// there is something to write.
pub fn scale(deployment: &Deployment, set: &Arc<ReplicaSet>, to: i32, plan: &mut Plan) -> bool {
    let from = replicas(set);
    let desired = wished(deployment).to_string();
    let max = replicas_max(deployment).to_string();
    if from == to
        && annotation(set, DESIRED_REPLICAS) == Some(&desired)
        && annotation(set, MAX_REPLICAS) == Some(&max)
    {
        return false;
    }
    let action = Action::Patch {
        target: Target::of(&**set),
        subresource: None,
        body: json!({
            "metadata": {
                "uid": set.metadata.uid,
                "annotations": {DESIRED_REPLICAS: desired, MAX_REPLICAS: max},
            },
            "spec": {"replicas": to},
        }),
    };
    if from == to {
        plan.push(action);
    } else {
        let direction = if to > from { "up" } else { "down" };
        let name = set.metadata.name.as_deref().unwrap_or_default();
        let message = format!("Scaled {direction} replica set {name} from {from} to {to}");
        plan.push_noted(
            action,
            Note::normal(
                &Target::of(deployment),
                REPORTER,
                "ScalingReplicaSet",
                message,
            ),
        );
    }
    from != to
}

/// Whether the wish changed since the active sets were last scaled.
pub fn was_scaled(deployment: &Deployment, sets: &Sets) -> bool {
    let desired = wished(deployment);
    sets.active().any(|set| {
        annotation(set, DESIRED_REPLICAS)
            .and_then(|found| found.parse::<i32>().ok())
            .is_some_and(|found| found != desired)
    })
}

/// After a change of the wish during a rollout, every active set gets its share of the change.
pub fn scale_proportionally(deployment: &Deployment, sets: &Sets, plan: &mut Plan) {
    let active: Vec<_> = sets.active().collect();
    let only = match active[..] {
        [] => sets.current.as_ref().or_else(|| sets.old.last()),
        [set] => Some(set),
        _ => None,
    };
    if let Some(set) = only {
        // Pods of other sets that are about to go still take up their places: the next plan scales up.
        let others = sets.occupied_total() - sets.occupied(set);
        if wished(deployment) <= replicas(set) || others == 0 {
            scale(deployment, set, wished(deployment), plan);
        }
        return;
    }
    if let Some(current) = sets
        .current
        .as_ref()
        .filter(|set| is_saturated(deployment, sets, set))
    {
        for set in active.into_iter().filter(|set| !Arc::ptr_eq(set, current)) {
            scale(deployment, set, 0, plan);
        }
        return;
    }
    let (surge, _) = limits(deployment);
    let allowed = if wished(deployment) > 0 {
        wished(deployment) + surge
    } else {
        0
    };
    let missing = match allowed - sets.total() {
        growth if growth > 0 => (allowed - sets.occupied_total()).max(0),
        cut => cut,
    };
    // The largest set takes its share first, so that rounding errs in its favour; what is left over goes to it.
    let mut order = active;
    order.sort_by_key(|set| {
        (
            std::cmp::Reverse(replicas(set)),
            std::cmp::Reverse(set.metadata.creation_timestamp.clone()),
        )
    });
    let mut left = missing;
    let mut targets: Vec<(&Arc<ReplicaSet>, i32)> = Vec::new();
    for set in order {
        let share = if missing == 0 || left == 0 {
            0
        } else {
            share_of(deployment, set, allowed, missing, left)
        };
        left -= share;
        targets.push((set, replicas(set) + share));
    }
    if let Some((_, first)) = targets.first_mut() {
        *first = (*first + left).max(0);
    }
    keep_serving(deployment, sets, &mut targets);
    for (set, target) in targets {
        scale(deployment, set, target, plan);
    }
}

/// Shares go by size and know nothing of health: where a cut would leave fewer pods serving than promised, places of pods that
/// do not serve go in their stead. Upstream takes the shares as they are, and a Deployment that is scaled down while it moves to
/// a broken template may lose all that serves.
fn keep_serving(deployment: &Deployment, sets: &Sets, targets: &mut [(&Arc<ReplicaSet>, i32)]) {
    let (_, unavailable_max) = limits(deployment);
    let promised = (wished(deployment) - unavailable_max).min(sets.serving_total());
    let served: i32 = targets
        .iter()
        .map(|(set, target)| (*target).min(sets.serving(set)))
        .sum();
    let missing = promised - served;
    if missing <= 0 {
        return;
    }
    let mut back = missing;
    for (set, target) in targets.iter_mut() {
        let given = (sets.serving(set) - *target).clamp(0, back);
        *target += given;
        back -= given;
    }
    let mut owed = missing - back;
    for (set, target) in targets.iter_mut() {
        let taken = (*target - sets.serving(set)).clamp(0, owed);
        *target -= taken;
        owed -= taken;
    }
}

fn is_saturated(deployment: &Deployment, sets: &Sets, set: &ReplicaSet) -> bool {
    let desired = annotation(set, DESIRED_REPLICAS).and_then(|found| found.parse::<i32>().ok());
    let wished = wished(deployment);
    replicas(set) == wished && desired == Some(wished) && sets.serving(set) == wished
}

/// A set's part of the replicas that are to be added (or, negative, taken away), never past what is left.
fn share_of(
    deployment: &Deployment,
    set: &ReplicaSet,
    allowed: i32,
    missing: i32,
    left: i32,
) -> i32 {
    let (surge, _) = limits(deployment);
    let size = f64::from(replicas(set));
    let before = annotation(set, MAX_REPLICAS)
        .and_then(|found| found.parse::<i32>().ok())
        .filter(|found| *found > 0)
        .unwrap_or_else(|| wished(deployment) + surge)
        .max(1);
    let grown = (size * f64::from(allowed) / f64::from(before)).round();
    #[expect(
        clippy::cast_possible_truncation,
        reason = "bounded by what is left just below"
    )]
    let share = (grown - size) as i32;
    if missing > 0 {
        share.clamp(0, left)
    } else {
        share.clamp(left, 0).max(-replicas(set))
    }
}

/// Scales the set of the current template as far as the surge allows. True when it changes.
pub fn scale_current(deployment: &Deployment, sets: &Sets, plan: &mut Plan) -> bool {
    let Some(set) = &sets.current else {
        return false;
    };
    let target = if replicas(set) > wished(deployment) {
        wished(deployment)
    } else {
        replicas_of_new(deployment, sets)
    };
    scale(deployment, set, target, plan)
}

/// Scales old sets down as far as availability allows: unhealthy pods first, then the oldest sets. True when any changes.
pub fn scale_old_down(deployment: &Deployment, sets: &Sets, plan: &mut Plan) -> bool {
    let Some(current) = &sets.current else {
        return false;
    };
    let old_total: i32 = sets.old.iter().map(|set| replicas(set)).sum();
    if old_total == 0 {
        return false;
    }
    let (_, unavailable_max) = limits(deployment);
    let available_min = wished(deployment) - unavailable_max;
    let current_unavailable = replicas(current) - sets.serving(current);
    let mut room = sets.total() - available_min - current_unavailable;
    if room <= 0 {
        return false;
    }
    let mut targets: Vec<i32> = sets.old.iter().map(|set| replicas(set)).collect();
    // Pods that serve nobody can go without lowering what is available.
    for (set, target) in sets.old.iter().zip(&mut targets) {
        let gone = (*target - sets.serving(set)).clamp(0, room.max(0));
        *target -= gone;
        room -= gone;
    }
    let mut spare = (sets.serving_total() - available_min).min(room);
    for (set, target) in sets.old.iter().zip(&mut targets) {
        if spare <= 0 {
            break;
        }
        let gone = (*target).min(spare);
        *target -= gone;
        spare -= gone;
        debug_assert!(*target >= 0, "{:?}", set.metadata.name);
    }
    let mut changed = false;
    for (set, target) in sets.old.iter().zip(targets) {
        if target != replicas(set) {
            changed |= scale(deployment, set, target, plan);
        }
    }
    changed
}

/// Recreate: all old sets go to zero at once.
pub fn scale_old_to_zero(deployment: &Deployment, sets: &Sets, plan: &mut Plan) -> bool {
    let mut changed = false;
    for set in sets.old.iter().filter(|set| replicas(set) > 0) {
        changed |= scale(deployment, set, 0, plan);
    }
    changed
}
