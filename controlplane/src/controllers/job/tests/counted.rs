//! That every pod of a Job is counted once, whatever happens.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use k8s_openapi::api::batch::v1::Job;
use proptest::prelude::*;
use serde_json::json;

use super::{active, cluster, end, job, key, status};
use crate::controllers::job::facts;
use crate::controllers::plan::Propagation;
use crate::controllers::pods;
use crate::controllers::snapshot::Snapshot;

/// What a user and kubelets may do to a Job.
#[derive(Clone, Debug)]
enum Step {
    End(usize, i32),
    Vanish(usize),
    Finish,
    Parallelism(i32),
    Suspend(bool),
    Pass(i64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..8_usize, prop_oneof![3 => Just(0), 1 => Just(1)]).prop_map(|(pod, code)| Step::End(pod, code)),
        1 => (0..8_usize).prop_map(Step::Vanish),
        1 => Just(Step::Finish),
        1 => (0..6_i32).prop_map(Step::Parallelism),
        1 => any::<bool>().prop_map(Step::Suspend),
        2 => (1..700_i64).prop_map(Step::Pass),
    ];
    proptest::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..Default::default() })]

    /// Whatever happens: the counts never go back, no pod counts twice, no index runs twice at a time, there are never more
    /// pods than asked for, and a Job that may run comes to its end.
    #[test]
    fn every_pod_is_counted_once(indexed in any::<bool>(), completions in 1..6_i32, steps in steps()) {
        let mode = if indexed { "Indexed" } else { "NonIndexed" };
        let mut cluster = cluster(json!({
            "completions": completions, "parallelism": 2, "completionMode": mode, "backoffLimit": 1000,
        }));
        let worst = Arc::new(Mutex::new(None::<String>));
        let found = worst.clone();
        let mut counts = (0, 0);
        cluster.check = Some(Box::new(move |snapshot: &Snapshot| {
            let Some(job) = snapshot.jobs.get(&key()) else { return };
            let status = job.status.clone().unwrap_or_default();
            let now = (status.succeeded.unwrap_or(0), status.failed.unwrap_or(0));
            if now.0 < counts.0 || now.1 < counts.1 {
                *found.lock().unwrap() = Some(format!("counts went back from {counts:?} to {now:?}"));
            }
            counts = now;
            let live: Vec<_> = snapshot.pods.values().filter(|pod| pods::is_active(pod)).collect();
            let distinct: BTreeSet<_> = live.iter().filter_map(|pod| facts::index_of(pod)).collect();
            if indexed && distinct.len() != live.len() {
                *found.lock().unwrap() = Some("an index runs twice".into());
            }
        }));
        let (mut succeeded, mut failed) = (0, 0);
        for step in steps {
            let live = active(&cluster);
            match step {
                Step::End(index, code) if !live.is_empty() => {
                    let pod = live[index % live.len()].clone();
                    end(&mut cluster, &pod, code);
                    if code == 0 { succeeded += 1 } else { failed += 1 }
                }
                Step::Vanish(index) if !live.is_empty() => {
                    let pod = live[index % live.len()].clone();
                    cluster.delete(pod.metadata.name.as_ref().unwrap(), Propagation::Background);
                }
                Step::End(..) | Step::Vanish(_) => {}
                Step::Finish => cluster.finish_pods(),
                Step::Parallelism(number) => cluster.edit::<Job>(&key(), |job| {
                    job.spec.as_mut().unwrap().parallelism = Some(number);
                }),
                Step::Suspend(suspend) => cluster.edit::<Job>(&key(), |job| {
                    job.spec.as_mut().unwrap().suspend = Some(suspend);
                }),
                Step::Pass(seconds) => cluster.advance(seconds),
            }
            cluster.settle();
            let limit = job(&cluster).spec.as_ref().unwrap().parallelism.unwrap();
            prop_assert!(i32::try_from(active(&cluster).len()).unwrap() <= limit.max(0));
        }
        cluster.edit::<Job>(&key(), |job| {
            let spec = job.spec.as_mut().unwrap();
            spec.suspend = Some(false);
            spec.parallelism = Some(2);
        });
        for _ in 0..20 {
            cluster.advance(700);
            cluster.settle();
            for pod in active(&cluster) {
                end(&mut cluster, &pod, 0);
                succeeded += 1;
            }
            cluster.settle();
        }
        cluster.finish_pods();
        cluster.settle();
        prop_assert_eq!(worst.lock().unwrap().clone(), None);
        let status = status(&cluster);
        prop_assert!(facts::end(&job(&cluster)).is_some(), "it has not ended: {:?}", status);
        prop_assert_eq!(status.succeeded, Some(completions));
        prop_assert!(succeeded >= completions);
        // Pods that were deleted count as well, unless the Job was suspended.
        prop_assert!(status.failed.unwrap() >= failed);
        prop_assert!(cluster.snapshot.pods.values().all(|pod| !facts::is_tracked(pod)));
    }
}
