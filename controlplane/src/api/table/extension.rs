//! How what extends the API prints: webhooks, policies, further servers, flow control, and devices.

use serde_json::Value;

use super::{Printer, boolean, column, count, created, name, or_none};
use crate::api::fields::Fields;

/// Kinds that show no more than their age.
pub(super) static AGED: Printer = Printer {
    columns: &[column("Name"), column("Age")],
    cells: |object| vec![name(object), created(object)],
};

pub(super) static WEBHOOKS: Printer = Printer {
    columns: &[column("Name"), count("Webhooks"), column("Age")],
    cells: |configuration| {
        let webhooks = configuration.items("/webhooks").len();
        vec![name(configuration), webhooks.into(), created(configuration)]
    },
};

fn param_kind(policy: &Value) -> Value {
    match policy.has("/spec/paramKind") {
        true => {
            let of = |field: &str| policy.text(&format!("/spec/paramKind/{field}"));
            format!("{}/{}", of("apiVersion"), of("kind")).into()
        }
        false => "<unset>".into(),
    }
}

pub(super) static VALIDATING_POLICY: Printer = Printer {
    columns: &[
        column("Name"),
        count("Validations"),
        column("ParamKind"),
        column("Age"),
    ],
    cells: |policy| {
        let rules = policy.items("/spec/validations").len();
        let parts = [rules.into(), param_kind(policy), created(policy)];
        [name(policy)].into_iter().chain(parts).collect()
    },
};

pub(super) static MUTATING_POLICY: Printer = Printer {
    columns: &[
        column("Name"),
        count("Mutations"),
        column("ParamKind"),
        column("Age"),
    ],
    cells: |policy| {
        let rules = policy.items("/spec/mutations").len();
        let parts = [rules.into(), param_kind(policy), created(policy)];
        [name(policy)].into_iter().chain(parts).collect()
    },
};

pub(super) static POLICY_BINDING: Printer = Printer {
    columns: &[
        column("Name"),
        column("PolicyName"),
        column("ParamRef"),
        column("Age"),
    ],
    cells: |binding| {
        let of = |field: &str| binding.text(&format!("/spec/paramRef/{field}"));
        let reference = match (of("namespace"), of("name")) {
            // Whether parameters without a namespace have one cannot be told from here.
            ("", named) if !named.is_empty() => format!("*/{named}"),
            (namespace, named) if !named.is_empty() => format!("{namespace}/{named}"),
            _ if binding.has("/spec/paramRef/selector") => {
                super::selector(binding.pointer("/spec/paramRef/selector"))
            }
            _ => "<unset>".to_owned(),
        };
        vec![
            name(binding),
            binding.text("/spec/policyName").into(),
            reference.into(),
            created(binding),
        ]
    },
};

pub(super) static API_SERVICE: Printer = Printer {
    columns: &[
        column("Name"),
        column("Service"),
        column("Available"),
        column("Age"),
    ],
    cells: |service| {
        let of = |field: &str| service.text(&format!("/spec/service/{field}"));
        let server = match service.has("/spec/service") {
            true => format!("{}/{}", of("namespace"), of("name")),
            false => "Local".to_owned(),
        };
        let mut conditions = service.items("/status/conditions").iter();
        let available = conditions.find(|condition| condition.text("/type") == "Available");
        let available = match available.map(|found| (found.text("/status"), found.text("/reason")))
        {
            None => "Unknown".to_owned(),
            Some((status, reason)) if status != "True" && !reason.is_empty() => {
                format!("{status} ({reason})")
            }
            Some((status, _)) => status.to_owned(),
        };
        vec![
            name(service),
            server.into(),
            available.into(),
            created(service),
        ]
    },
};

pub(super) static FLOW_SCHEMA: Printer = Printer {
    columns: &[
        column("Name"),
        column("PriorityLevel"),
        column("MatchingPrecedence"),
        column("DistinguisherMethod"),
        column("Age"),
        column("MissingPL"),
    ],
    cells: |schema| {
        let mut conditions = schema.items("/status/conditions").iter();
        let dangling = conditions.find(|condition| condition.text("/type") == "Dangling");
        vec![
            name(schema),
            schema.text("/spec/priorityLevelConfiguration/name").into(),
            schema.int("/spec/matchingPrecedence").into(),
            or_none(schema.text("/spec/distinguisherMethod/type")).into(),
            created(schema),
            dangling.map_or("?", |found| found.text("/status")).into(),
        ]
    },
};

pub(super) static PRIORITY_LEVEL: Printer = Printer {
    columns: &[
        column("Name"),
        column("Type"),
        column("NominalConcurrencyShares"),
        column("Queues"),
        column("HandSize"),
        column("QueueLengthLimit"),
        column("Age"),
    ],
    cells: |level| {
        let number = |pointer: &str| match level.pointer(pointer) {
            Some(number) => number.clone(),
            None => "<none>".into(),
        };
        let queuing = |field: &str| number(&format!("/spec/limited/limitResponse/queuing/{field}"));
        vec![
            name(level),
            level.text("/spec/type").into(),
            number("/spec/limited/nominalConcurrencyShares"),
            queuing("queues"),
            queuing("handSize"),
            queuing("queueLengthLimit"),
            created(level),
        ]
    },
};

pub(super) static DEVICE_CLAIM: Printer = Printer {
    columns: &[column("Name"), column("State"), column("Age")],
    cells: |claim| {
        let deleted = claim.has("/metadata/deletionTimestamp");
        let allocated = claim.has("/status/allocation");
        let reserved = allocated && !claim.items("/status/reservedFor").is_empty();
        let states = [
            (deleted, "deleted"),
            (!deleted && !allocated, "pending"),
            (allocated, "allocated"),
            (reserved, "reserved"),
        ];
        let states = states.into_iter().filter(|(holds, _)| *holds);
        let states: Vec<&str> = states.map(|(_, state)| state).collect();
        vec![name(claim), states.join(",").into(), created(claim)]
    },
};

pub(super) static DEVICE_SLICE: Printer = Printer {
    columns: &[
        column("Name"),
        column("Node"),
        column("Driver"),
        column("Pool"),
        column("Age"),
    ],
    cells: |slice| {
        vec![
            name(slice),
            slice.text("/spec/nodeName").into(),
            slice.text("/spec/driver").into(),
            slice.text("/spec/pool/name").into(),
            created(slice),
        ]
    },
};

pub(super) static CSI_DRIVER: Printer = Printer {
    columns: &[
        column("Name"),
        boolean("AttachRequired"),
        boolean("PodInfoOnMount"),
        boolean("StorageCapacity"),
        column("TokenRequests"),
        boolean("RequiresRepublish"),
        column("Modes"),
        column("Age"),
    ],
    cells: |driver| {
        let requests = match driver.has("/spec/tokenRequests") {
            true => {
                let requests = driver.items("/spec/tokenRequests").iter();
                let audiences = requests.map(|request| request.text("/audience"));
                audiences.collect::<Vec<_>>().join(",")
            }
            false => "<unset>".to_owned(),
        };
        let modes = driver.items("/spec/volumeLifecycleModes").iter();
        let modes: Vec<&str> = modes.filter_map(Value::as_str).collect();
        let attaches = !driver.has("/spec/attachRequired") || driver.flag("/spec/attachRequired");
        vec![
            name(driver),
            attaches.into(),
            driver.flag("/spec/podInfoOnMount").into(),
            driver.flag("/spec/storageCapacity").into(),
            requests.into(),
            driver.flag("/spec/requiresRepublish").into(),
            or_none(&modes.join(",")).into(),
            created(driver),
        ]
    },
};

pub(super) static VOLUME_ATTACHMENT: Printer = Printer {
    columns: &[
        column("Name"),
        column("Attacher"),
        column("PV"),
        column("Node"),
        boolean("Attached"),
        column("Age"),
    ],
    cells: |attachment| {
        vec![
            name(attachment),
            attachment.text("/spec/attacher").into(),
            attachment.text("/spec/source/persistentVolumeName").into(),
            attachment.text("/spec/nodeName").into(),
            attachment.flag("/status/attached").into(),
            created(attachment),
        ]
    },
};

pub(super) static VOLUME_ATTRIBUTES_CLASS: Printer = Printer {
    columns: &[column("Name"), column("DriverName"), column("Age")],
    cells: |class| {
        vec![
            name(class),
            class.text("/driverName").into(),
            created(class),
        ]
    },
};

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_left_out_shows_as_upstream_shows_it() {
        let named = json!({"metadata": {"name": "x"}});
        let cells = |printer: &Printer, object: &Value| (printer.cells)(object);
        assert_eq!(
            cells(&CSI_DRIVER, &named)[1..7],
            [
                json!(true),
                json!(false),
                json!(false),
                json!("<unset>"),
                json!(false),
                json!("<none>")
            ]
        );
        assert_eq!(cells(&API_SERVICE, &named)[1..3], ["Local", "Unknown"]);
        assert_eq!(cells(&DEVICE_CLAIM, &named)[1], "pending");
        assert_eq!(cells(&FLOW_SCHEMA, &named)[5], "?");
        assert_eq!(cells(&PRIORITY_LEVEL, &named)[2..6], ["<none>"; 4]);
        assert_eq!(cells(&POLICY_BINDING, &named)[2], "<unset>");
        let bound = json!({"metadata": {"name": "x"}, "spec": {"paramRef": {"name": "p"}}});
        assert_eq!(cells(&POLICY_BINDING, &bound)[2], "*/p");
        let claim = json!({"status": {"allocation": {}, "reservedFor": [{}]}});
        assert_eq!(cells(&DEVICE_CLAIM, &claim)[1], "allocated,reserved");
    }
}
