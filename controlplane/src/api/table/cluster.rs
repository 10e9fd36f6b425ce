//! How nodes, namespaces, configuration, events and access rules print.

use serde_json::Value;

use super::{Column, Printer, age, boolean, column, count, created, name, or_none, selector, wide};
use crate::api::fields::Fields;

pub(super) static NODE: Printer = Printer {
    columns: &[
        column("Name"),
        column("Status"),
        column("Roles"),
        column("Age"),
        column("Version"),
        wide("Internal-IP"),
        wide("External-IP"),
        wide("OS-Image"),
        wide("Kernel-Version"),
        wide("Container-Runtime"),
    ],
    cells: |node| {
        let address = |kind: &str| {
            let mut of_kind = node
                .items("/status/addresses")
                .iter()
                .filter(|address| address.text("/type") == kind);
            or_none(
                of_kind
                    .next()
                    .map_or("", |address| address.text("/address")),
            )
        };
        let info = |field: &str| {
            let text = node.text(&format!("/status/nodeInfo/{field}"));
            if text.is_empty() {
                "<unknown>".to_owned()
            } else {
                text.to_owned()
            }
        };
        vec![
            name(node),
            node_status(node).into(),
            roles(node).into(),
            created(node),
            node.text("/status/nodeInfo/kubeletVersion").into(),
            address("InternalIP").into(),
            address("ExternalIP").into(),
            info("osImage").into(),
            info("kernelVersion").into(),
            info("containerRuntimeVersion").into(),
        ]
    },
};

fn node_status(node: &Value) -> String {
    let ready = node
        .items("/status/conditions")
        .iter()
        .find(|c| c.text("/type") == "Ready");
    let status = match ready.map(|c| c.text("/status")) {
        Some("True") => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    };
    let cordoned = if node.flag("/spec/unschedulable") {
        ",SchedulingDisabled"
    } else {
        ""
    };
    format!("{status}{cordoned}")
}

fn roles(node: &Value) -> String {
    let mut roles: Vec<&str> = Vec::new();
    for (key, value) in node.object("/metadata/labels").into_iter().flatten() {
        if let Some(role) = key
            .strip_prefix("node-role.kubernetes.io/")
            .filter(|role| !role.is_empty())
        {
            roles.push(role);
        } else if key == "kubernetes.io/role" && value.as_str().is_some_and(|role| !role.is_empty())
        {
            roles.extend(value.as_str());
        }
    }
    roles.sort_unstable();
    roles.dedup();
    or_none(&roles.join(","))
}

pub(super) static NAMESPACE: Printer = Printer {
    columns: &[column("Name"), column("Status"), column("Age")],
    cells: |namespace| {
        vec![
            name(namespace),
            namespace.text("/status/phase").into(),
            created(namespace),
        ]
    },
};

pub(super) static CONFIG_MAP: Printer = Printer {
    columns: &[column("Name"), column("Data"), column("Age")],
    cells: |map| {
        let size = |field: &str| map.object(field).map_or(0, serde_json::Map::len);
        vec![
            name(map),
            (size("/data") + size("/binaryData")).into(),
            created(map),
        ]
    },
};

pub(super) static SECRET: Printer = Printer {
    columns: &[
        column("Name"),
        column("Type"),
        column("Data"),
        column("Age"),
    ],
    cells: |secret| {
        let size = secret.object("/data").map_or(0, serde_json::Map::len);
        vec![
            name(secret),
            secret.text("/type").into(),
            size.into(),
            created(secret),
        ]
    },
};

pub(super) static EVENT: Printer = Printer {
    columns: &[
        column("Last Seen"),
        column("Type"),
        column("Reason"),
        column("Object"),
        wide("Subobject"),
        wide("Source"),
        column("Message"),
        wide("First Seen"),
        Column {
            name: "Count",
            kind: "string",
            priority: 1,
        },
        Column {
            name: "Name",
            kind: "string",
            priority: 1,
        },
    ],
    cells: |event| {
        // The two versions of the kind name their fields differently.
        let either = |core: &str, newer: &str| match event.text(core) {
            "" => event.text(newer).to_owned(),
            text => text.to_owned(),
        };
        let object = if event.has("/involvedObject") {
            "/involvedObject"
        } else {
            "/regarding"
        };
        let of = |field: &str| event.text(&format!("{object}/{field}"));
        let first = match either("/firstTimestamp", "/deprecatedFirstTimestamp") {
            text if text.is_empty() => event.text("/eventTime").to_owned(),
            text => text,
        };
        let last = match event.text("/series/lastObservedTime") {
            "" => match either("/lastTimestamp", "/deprecatedLastTimestamp") {
                text if text.is_empty() => first.clone(),
                text => text,
            },
            text => text.to_owned(),
        };
        let count = match event.int("/series/count") {
            0 => event
                .int("/count")
                .max(event.int("/deprecatedCount"))
                .max(1),
            count => count,
        };
        let component = match either("/source/component", "/deprecatedSource/component") {
            text if text.is_empty() => either("/reportingComponent", "/reportingController"),
            text => text,
        };
        let host = either("/source/host", "/deprecatedSource/host");
        let source = if host.is_empty() {
            component
        } else {
            format!("{component}, {host}")
        };
        vec![
            age(&last).into(),
            event.text("/type").into(),
            event.text("/reason").into(),
            format!("{}/{}", of("kind").to_lowercase(), of("name")).into(),
            of("fieldPath").into(),
            source.into(),
            either("/message", "/note").trim().into(),
            age(&first).into(),
            count.into(),
            name(event),
        ]
    },
};

pub(super) static LEASE: Printer = Printer {
    columns: &[column("Name"), column("Holder"), column("Age")],
    cells: |lease| {
        vec![
            name(lease),
            lease.text("/spec/holderIdentity").into(),
            created(lease),
        ]
    },
};

pub(super) static PRIORITY_CLASS: Printer = Printer {
    columns: &[
        column("Name"),
        count("Value"),
        boolean("Global-Default"),
        column("Age"),
        column("PreemptionPolicy"),
    ],
    cells: |class| {
        vec![
            name(class),
            class.int("/value").into(),
            class.flag("/globalDefault").into(),
            created(class),
            class.text("/preemptionPolicy").into(),
        ]
    },
};

pub(super) static ROLE_BINDING: Printer = Printer {
    columns: &[
        column("Name"),
        column("Role"),
        column("Age"),
        wide("Users"),
        wide("Groups"),
        wide("ServiceAccounts"),
    ],
    cells: binding,
};

fn binding(binding: &Value) -> Vec<Value> {
    let subjects = |kind: &str| {
        let of_kind = binding
            .items("/subjects")
            .iter()
            .filter(|subject| subject.text("/kind") == kind);
        let names: Vec<String> = of_kind
            .map(|subject| match subject.text("/namespace") {
                "" => subject.text("/name").to_owned(),
                namespace => format!("{namespace}/{}", subject.text("/name")),
            })
            .collect();
        names.join(", ")
    };
    vec![
        name(binding),
        format!(
            "{}/{}",
            binding.text("/roleRef/kind"),
            binding.text("/roleRef/name")
        )
        .into(),
        created(binding),
        subjects("User").into(),
        subjects("Group").into(),
        subjects("ServiceAccount").into(),
    ]
}

pub(super) static NETWORK_POLICY: Printer = Printer {
    columns: &[column("Name"), column("Pod-Selector"), column("Age")],
    cells: |policy| {
        vec![
            name(policy),
            selector(policy.pointer("/spec/podSelector")).into(),
            created(policy),
        ]
    },
};
