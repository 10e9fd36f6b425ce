//! How Deployments, ReplicaSets, DaemonSets and their kin print.

use serde_json::Value;

use super::{
    Printer, age, column, containers, count, created, human_duration, name, pairs, selector, wide,
};
use crate::api::fields::Fields;

fn template(object: &Value) -> &Value {
    object.pointer("/spec/template").unwrap_or(&Value::Null)
}

pub(super) static DEPLOYMENT: Printer = Printer {
    columns: &[
        column("Name"),
        column("Ready"),
        column("Up-to-date"),
        column("Available"),
        column("Age"),
        wide("Containers"),
        wide("Images"),
        wide("Selector"),
    ],
    cells: |deployment| {
        let (names, images) = containers(template(deployment));
        vec![
            name(deployment),
            format!(
                "{}/{}",
                deployment.int("/status/readyReplicas"),
                deployment.int("/spec/replicas")
            )
            .into(),
            deployment.int("/status/updatedReplicas").into(),
            deployment.int("/status/availableReplicas").into(),
            created(deployment),
            names,
            images,
            selector(deployment.pointer("/spec/selector")).into(),
        ]
    },
};

/// ReplicationControllers print the same.
pub(super) static REPLICA_SET: Printer = Printer {
    columns: &[
        column("Name"),
        count("Desired"),
        count("Current"),
        count("Ready"),
        column("Age"),
        wide("Containers"),
        wide("Images"),
        wide("Selector"),
    ],
    cells: |set| {
        let (names, images) = containers(template(set));
        vec![
            name(set),
            set.int("/spec/replicas").into(),
            set.int("/status/replicas").into(),
            set.int("/status/readyReplicas").into(),
            created(set),
            names,
            images,
            // A ReplicationController has the labels alone.
            match set.pointer("/spec/selector") {
                Some(of) if of.has("/matchLabels") || of.has("/matchExpressions") => {
                    selector(Some(of))
                }
                labels => pairs(labels.and_then(Value::as_object)),
            }
            .into(),
        ]
    },
};

pub(super) static DAEMON_SET: Printer = Printer {
    columns: &[
        column("Name"),
        count("Desired"),
        count("Current"),
        count("Ready"),
        count("Up-to-date"),
        count("Available"),
        column("Node Selector"),
        column("Age"),
        wide("Containers"),
        wide("Images"),
        wide("Selector"),
    ],
    cells: |set| {
        let (names, images) = containers(template(set));
        vec![
            name(set),
            set.int("/status/desiredNumberScheduled").into(),
            set.int("/status/currentNumberScheduled").into(),
            set.int("/status/numberReady").into(),
            set.int("/status/updatedNumberScheduled").into(),
            set.int("/status/numberAvailable").into(),
            pairs(template(set).object("/spec/nodeSelector")).into(),
            created(set),
            names,
            images,
            selector(set.pointer("/spec/selector")).into(),
        ]
    },
};

pub(super) static STATEFUL_SET: Printer = Printer {
    columns: &[
        column("Name"),
        column("Ready"),
        column("Age"),
        wide("Containers"),
        wide("Images"),
    ],
    cells: |set| {
        let (names, images) = containers(template(set));
        let ready = format!(
            "{}/{}",
            set.int("/status/readyReplicas"),
            set.int("/spec/replicas")
        );
        vec![name(set), ready.into(), created(set), names, images]
    },
};

pub(super) static CONTROLLER_REVISION: Printer = Printer {
    columns: &[
        column("Name"),
        column("Controller"),
        column("Revision"),
        column("Age"),
    ],
    cells: |revision| {
        let owner = revision
            .items("/metadata/ownerReferences")
            .iter()
            .find(|owner| owner.flag("/controller"));
        let controller = owner.map_or("<none>".to_owned(), |owner| {
            let group = owner
                .text("/apiVersion")
                .rsplit_once('/')
                .map_or(String::new(), |(group, _)| format!(".{group}"));
            format!(
                "{}{group}/{}",
                owner.text("/kind").to_lowercase(),
                owner.text("/name")
            )
        });
        vec![
            name(revision),
            controller.into(),
            revision.int("/revision").into(),
            created(revision),
        ]
    },
};

pub(super) static JOB: Printer = Printer {
    columns: &[
        column("Name"),
        column("Status"),
        column("Completions"),
        column("Duration"),
        column("Age"),
        wide("Containers"),
        wide("Images"),
        wide("Selector"),
    ],
    cells: |job| {
        let (names, images) = containers(template(job));
        let is = |kind: &str| {
            job.items("/status/conditions")
                .iter()
                .any(|c| c.text("/type") == kind && c.text("/status") == "True")
        };
        let status = match () {
            () if is("Complete") => "Complete",
            () if is("Failed") => "Failed",
            () if job.has("/metadata/deletionTimestamp") => "Terminating",
            () if is("Suspended") => "Suspended",
            () if is("FailureTarget") => "FailureTarget",
            () if is("SuccessCriteriaMet") => "SuccessCriteriaMet",
            () => "Running",
        };
        let succeeded = job.int("/status/succeeded");
        let completions = match (
            job.pointer("/spec/completions").and_then(Value::as_i64),
            job.int("/spec/parallelism"),
        ) {
            (Some(wanted), _) => format!("{succeeded}/{wanted}"),
            (None, parallel) if parallel > 1 => format!("{succeeded}/1 of {parallel}"),
            (None, _) => format!("{succeeded}/1"),
        };
        let moment = |field: &str| {
            job.text(field)
                .parse::<jiff::Timestamp>()
                .map(jiff::Timestamp::as_second)
        };
        let duration = match (
            moment("/status/startTime"),
            moment("/status/completionTime"),
        ) {
            (Ok(start), Ok(end)) => human_duration(end - start),
            (Ok(_), Err(_)) => age(job.text("/status/startTime")),
            (Err(_), _) => String::new(),
        };
        vec![
            name(job),
            status.into(),
            completions.into(),
            duration.into(),
            created(job),
            names,
            images,
            selector(job.pointer("/spec/selector")).into(),
        ]
    },
};
