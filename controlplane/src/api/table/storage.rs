//! How volumes, claims, ingresses and what provides them print.

use serde_json::Value;

use super::{Printer, column, count, created, name, or_none, wide};
use crate::api::fields::Fields;

/// Access modes as users abbreviate them.
fn access(object: &Value, pointer: &str) -> String {
    let short = object
        .items(pointer)
        .iter()
        .filter_map(Value::as_str)
        .map(|mode| match mode {
            "ReadWriteOnce" => "RWO",
            "ReadOnlyMany" => "ROX",
            "ReadWriteMany" => "RWX",
            "ReadWriteOncePod" => "RWOP",
            other => other,
        });
    short.collect::<Vec<_>>().join(",")
}

fn or_unset(text: &str) -> Value {
    if text.is_empty() {
        "<unset>".into()
    } else {
        text.into()
    }
}

pub(super) static CLAIM: Printer = Printer {
    columns: &[
        column("Name"),
        column("Status"),
        column("Volume"),
        column("Capacity"),
        column("Access Modes"),
        column("StorageClass"),
        column("VolumeAttributesClass"),
        column("Age"),
        wide("VolumeMode"),
    ],
    cells: |claim| {
        let bound = !claim.text("/spec/volumeName").is_empty();
        let phase = match claim.has("/metadata/deletionTimestamp") {
            true => "Terminating",
            false => claim.text("/status/phase"),
        };
        vec![
            name(claim),
            phase.into(),
            claim.text("/spec/volumeName").into(),
            if bound {
                claim.text("/status/capacity/storage")
            } else {
                ""
            }
            .into(),
            if bound {
                access(claim, "/status/accessModes")
            } else {
                String::new()
            }
            .into(),
            claim.text("/spec/storageClassName").into(),
            or_unset(claim.text("/spec/volumeAttributesClassName")),
            created(claim),
            claim.text("/spec/volumeMode").into(),
        ]
    },
};

pub(super) static VOLUME: Printer = Printer {
    columns: &[
        column("Name"),
        column("Capacity"),
        column("Access Modes"),
        column("Reclaim Policy"),
        column("Status"),
        column("Claim"),
        column("StorageClass"),
        column("VolumeAttributesClass"),
        column("Reason"),
        column("Age"),
        wide("VolumeMode"),
    ],
    cells: |volume| {
        let claim = match volume.has("/spec/claimRef") {
            true => format!(
                "{}/{}",
                volume.text("/spec/claimRef/namespace"),
                volume.text("/spec/claimRef/name")
            ),
            false => String::new(),
        };
        let phase = match volume.has("/metadata/deletionTimestamp") {
            true => "Terminating",
            false => volume.text("/status/phase"),
        };
        vec![
            name(volume),
            volume.text("/spec/capacity/storage").into(),
            access(volume, "/spec/accessModes").into(),
            volume.text("/spec/persistentVolumeReclaimPolicy").into(),
            phase.into(),
            claim.into(),
            volume.text("/spec/storageClassName").into(),
            or_unset(volume.text("/spec/volumeAttributesClassName")),
            volume.text("/status/reason").into(),
            created(volume),
            volume.text("/spec/volumeMode").into(),
        ]
    },
};

pub(super) static STORAGE_CLASS: Printer = Printer {
    columns: &[
        column("Name"),
        column("Provisioner"),
        column("ReclaimPolicy"),
        column("VolumeBindingMode"),
        column("AllowVolumeExpansion"),
        column("Age"),
    ],
    cells: |class| {
        let default = "/metadata/annotations/storageclass.kubernetes.io~1is-default-class";
        let mut shown = class.text("/metadata/name").to_owned();
        if class.text(default) == "true" {
            shown += " (default)";
        }
        vec![
            shown.into(),
            class.text("/provisioner").into(),
            class.text("/reclaimPolicy").into(),
            class.text("/volumeBindingMode").into(),
            class.flag("/allowVolumeExpansion").into(),
            created(class),
        ]
    },
};

pub(super) static INGRESS: Printer = Printer {
    columns: &[
        column("Name"),
        column("Class"),
        column("Hosts"),
        column("Address"),
        column("Ports"),
        column("Age"),
    ],
    cells: |ingress| {
        let hosts: Vec<&str> = ingress
            .items("/spec/rules")
            .iter()
            .map(|rule| rule.text("/host"))
            .filter(|host| !host.is_empty())
            .collect();
        let hosts = if hosts.is_empty() {
            "*".to_owned()
        } else {
            hosts.join(",")
        };
        let addresses: Vec<&str> = ingress
            .items("/status/loadBalancer/ingress")
            .iter()
            .map(|point| match point.text("/ip") {
                "" => point.text("/hostname"),
                ip => ip,
            })
            .collect();
        let ports = if ingress.items("/spec/tls").is_empty() {
            "80"
        } else {
            "80, 443"
        };
        vec![
            name(ingress),
            or_none(ingress.text("/spec/ingressClassName")).into(),
            hosts.into(),
            addresses.join(",").into(),
            ports.into(),
            created(ingress),
        ]
    },
};

pub(super) static INGRESS_CLASS: Printer = Printer {
    columns: &[
        column("Name"),
        column("Controller"),
        column("Parameters"),
        column("Age"),
    ],
    cells: |class| {
        let parameters = match class.has("/spec/parameters") {
            true => {
                let group = match class.text("/spec/parameters/apiGroup") {
                    "" => String::new(),
                    group => format!(".{group}"),
                };
                format!(
                    "{}{group}/{}",
                    class.text("/spec/parameters/kind"),
                    class.text("/spec/parameters/name")
                )
            }
            false => "<none>".to_owned(),
        };
        let default = "/metadata/annotations/ingressclass.kubernetes.io~1is-default-class";
        let shown = match class.text(default) {
            "true" => format!("{} (default)", class.text("/metadata/name")).into(),
            _ => name(class),
        };
        vec![
            shown,
            class.text("/spec/controller").into(),
            parameters.into(),
            created(class),
        ]
    },
};

pub(super) static CSI_NODE: Printer = Printer {
    columns: &[column("Name"), count("Drivers"), column("Age")],
    cells: |node| {
        vec![
            name(node),
            node.items("/spec/drivers").len().into(),
            created(node),
        ]
    },
};

pub(super) static RUNTIME_CLASS: Printer = Printer {
    columns: &[column("Name"), column("Handler"), column("Age")],
    cells: |class| vec![name(class), class.text("/handler").into(), created(class)],
};

pub(super) static IP_ADDRESS: Printer = Printer {
    columns: &[column("Name"), column("ParentRef")],
    cells: |address| {
        let parts = ["resource", "group", "namespace", "name"];
        let parts = parts.map(|part| address.text(&format!("/spec/parentRef/{part}")));
        let [resource, group, namespace, of] = parts;
        let resource = match group {
            "" => resource.to_owned(),
            group => format!("{resource}.{group}"),
        };
        let parts: Vec<&str> = [resource.as_str(), namespace, of]
            .into_iter()
            .filter(|part| !part.is_empty())
            .collect();
        vec![name(address), parts.join("/").into()]
    },
};

pub(super) static SERVICE_CIDR: Printer = Printer {
    columns: &[column("Name"), column("CIDRs"), column("Age")],
    cells: |ranges| {
        let cidrs = ranges.items("/spec/cidrs").iter().filter_map(Value::as_str);
        let cidrs = cidrs.collect::<Vec<_>>().join(",");
        vec![name(ranges), cidrs.into(), created(ranges)]
    },
};

pub(super) static SIGNING_REQUEST: Printer = Printer {
    columns: &[
        column("Name"),
        column("Age"),
        column("SignerName"),
        column("Requestor"),
        column("RequestedDuration"),
        column("Condition"),
    ],
    cells: |request| {
        let life = match request.int("/spec/expirationSeconds") {
            0 => "<none>".to_owned(),
            seconds => super::human_duration(seconds),
        };
        let mut conditions: Vec<&str> = request
            .items("/status/conditions")
            .iter()
            .map(|condition| condition.text("/type"))
            .collect();
        if conditions.is_empty() {
            conditions.push("Pending");
        }
        if !request.text("/status/certificate").is_empty() {
            conditions.push("Issued");
        }
        vec![
            name(request),
            created(request),
            or_none(request.text("/spec/signerName")).into(),
            request.text("/spec/username").into(),
            life.into(),
            conditions.join(",").into(),
        ]
    },
};

pub(super) static COMPONENT_STATUS: Printer = Printer {
    columns: &[
        column("Name"),
        column("Status"),
        column("Message"),
        column("Error"),
    ],
    cells: |status| {
        let healthy = status
            .items("/conditions")
            .iter()
            .find(|condition| condition.text("/type") == "Healthy");
        let of = |field: &str| {
            healthy
                .map_or("", |condition| condition.text(field))
                .to_owned()
        };
        let word = match of("/status").as_str() {
            "True" => "Healthy",
            "False" => "Unhealthy",
            _ => "Unknown",
        };
        vec![
            name(status),
            word.into(),
            of("/message").into(),
            of("/error").into(),
        ]
    },
};

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn claims_show_what_they_are_bound_to() {
        let mut claim = json!({"metadata": {"name": "c"}, "spec": {"volumeMode": "Filesystem"}, "status": {"phase": "Pending"}});
        assert_eq!(
            (CLAIM.cells)(&claim)[1..4],
            [json!("Pending"), json!(""), json!("")]
        );
        claim.set("/spec/volumeName", "v");
        claim.set("/status", json!({"phase": "Bound", "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce", "ReadOnlyMany"]}));
        let cells = (CLAIM.cells)(&claim);
        assert_eq!(
            cells[1..5],
            [json!("Bound"), json!("v"), json!("1Gi"), json!("RWO,ROX")]
        );
    }
}
