//! Roles of controllers: upstream's, one for the ServiceAccount of each (its controller manager runs against us), and that
//! of our own, which are one program with one identity.

use std::collections::BTreeMap;

use super::{EVENTS, READ, Row, on};
use crate::auth::rbac::Rule;
use crate::registry::Resource;

/// Controller, rules.
pub(super) const ROLES: &[(&str, &[Row])] = &[
    (
        "attachdetach-controller",
        &[
            on(
                "list watch",
                "core",
                "persistentvolumes persistentvolumeclaims pods",
            ),
            on(READ, "core", "nodes"),
            on("patch update", "core", "nodes/status"),
            on(
                "get create delete list watch",
                "storage.k8s.io",
                "volumeattachments",
            ),
            on(READ, "storage.k8s.io", "csidrivers csinodes"),
            EVENTS,
        ],
    ),
    (
        "clusterrole-aggregation-controller",
        &[on(
            "escalate get list watch update patch",
            "rbac.authorization.k8s.io",
            "clusterroles",
        )],
    ),
    (
        "cronjob-controller",
        &[
            on("get list watch update", "batch", "cronjobs"),
            on("get list watch create update delete patch", "batch", "jobs"),
            on("update", "batch", "cronjobs/status cronjobs/finalizers"),
            on("list watch delete", "core", "pods"),
            EVENTS,
        ],
    ),
    (
        "daemon-set-controller",
        &[
            on(READ, "extensions apps", "daemonsets"),
            on(
                "update",
                "extensions apps",
                "daemonsets/status daemonsets/finalizers",
            ),
            on("list watch", "core", "nodes"),
            on("list watch create delete patch", "core", "pods"),
            on("create", "core", "pods/binding"),
            on(
                "get list watch create delete update patch",
                "apps",
                "controllerrevisions",
            ),
            EVENTS,
        ],
    ),
    (
        "deployment-controller",
        &[
            on("get list watch update", "extensions apps", "deployments"),
            on(
                "update",
                "extensions apps",
                "deployments/status deployments/finalizers",
            ),
            on(
                "get list watch create update patch delete",
                "extensions apps",
                "replicasets",
            ),
            on("get list watch update", "core", "pods"),
            EVENTS,
        ],
    ),
    (
        "disruption-controller",
        &[
            on(READ, "extensions apps", "deployments replicasets"),
            on(READ, "apps", "statefulsets"),
            on(READ, "core", "replicationcontrollers"),
            on(READ, "policy", "poddisruptionbudgets"),
            on("update", "policy", "poddisruptionbudgets/status"),
            on("patch update", "core", "pods/status"),
            on("list watch", "core", "pods"),
            on("get", "*", "*/scale"),
            EVENTS,
        ],
    ),
    (
        "endpoint-controller",
        &[
            on(READ, "core", "services pods"),
            on("get list watch create update delete", "core", "endpoints"),
            on("create", "core", "endpoints/restricted"),
            EVENTS,
        ],
    ),
    (
        "endpointslice-controller",
        &[
            on(READ, "core", "services pods nodes"),
            on("update", "core", "services/finalizers"),
            on(
                "get list watch create update delete",
                "discovery.k8s.io",
                "endpointslices",
            ),
            EVENTS,
        ],
    ),
    (
        "endpointslicemirroring-controller",
        &[
            on(READ, "core", "services endpoints"),
            on("update", "core", "services/finalizers endpoints/finalizers"),
            on(
                "get list watch create update delete",
                "discovery.k8s.io",
                "endpointslices",
            ),
            EVENTS,
        ],
    ),
    (
        "expand-controller",
        &[
            on("get list watch update patch", "core", "persistentvolumes"),
            on(READ, "core", "persistentvolumeclaims"),
            on("update patch", "core", "persistentvolumeclaims/status"),
            EVENTS,
        ],
    ),
    (
        "ephemeral-volume-controller",
        &[
            on(READ, "core", "pods"),
            on("update", "core", "pods/finalizers"),
            on("get list watch create", "core", "persistentvolumeclaims"),
            EVENTS,
        ],
    ),
    (
        "generic-garbage-collector",
        &[on("get list watch patch update delete", "*", "*"), EVENTS],
    ),
    (
        "horizontal-pod-autoscaler",
        &[
            on(READ, "autoscaling", "horizontalpodautoscalers"),
            on("update", "autoscaling", "horizontalpodautoscalers/status"),
            on("get update", "*", "*/scale"),
            on("list watch", "core", "pods"),
            on("list watch", "metrics.k8s.io", "pods"),
            on(READ, "custom.metrics.k8s.io external.metrics.k8s.io", "*"),
            EVENTS,
        ],
    ),
    (
        "job-controller",
        &[
            on("get list watch update patch", "batch", "jobs"),
            on("update", "batch", "jobs/status jobs/finalizers"),
            on("list watch create delete patch", "core", "pods"),
            EVENTS,
        ],
    ),
    (
        "namespace-controller",
        &[
            on("get list watch delete", "core", "namespaces"),
            on("update", "core", "namespaces/finalize namespaces/status"),
            on("get list watch delete deletecollection", "*", "*"),
        ],
    ),
    (
        "node-controller",
        &[
            on("get list watch update delete patch", "core", "nodes"),
            on("patch update", "core", "nodes/status pods/status"),
            on("get list watch delete", "core", "pods"),
            EVENTS,
        ],
    ),
    (
        "persistent-volume-binder",
        &[
            on(
                "get list watch update create delete",
                "core",
                "persistentvolumes",
            ),
            on("get list watch update", "core", "persistentvolumeclaims"),
            on(
                "update",
                "core",
                "persistentvolumes/status persistentvolumeclaims/status",
            ),
            on("get list watch create delete", "core", "pods"),
            on(READ, "storage.k8s.io", "storageclasses"),
            on("list watch", "core", "nodes"),
            on("watch", "core", "events"),
            EVENTS,
        ],
    ),
    (
        "pod-garbage-collector",
        &[
            on("list watch delete", "core", "pods"),
            on(READ, "core", "nodes"),
            on("patch", "core", "pods/status"),
        ],
    ),
    (
        "pv-protection-controller",
        &[
            on("get list watch update", "core", "persistentvolumes"),
            EVENTS,
        ],
    ),
    (
        "pvc-protection-controller",
        &[
            on("get list watch update", "core", "persistentvolumeclaims"),
            on(READ, "core", "pods"),
            EVENTS,
        ],
    ),
    (
        "replicaset-controller",
        &[
            on("get list watch update", "extensions apps", "replicasets"),
            on(
                "update",
                "extensions apps",
                "replicasets/status replicasets/finalizers",
            ),
            on("list watch patch create delete", "core", "pods"),
            EVENTS,
        ],
    ),
    (
        "replication-controller",
        &[
            on("get list watch update", "core", "replicationcontrollers"),
            on(
                "update",
                "core",
                "replicationcontrollers/status replicationcontrollers/finalizers",
            ),
            on("list watch patch create delete", "core", "pods"),
            EVENTS,
        ],
    ),
    (
        "resource-claim-controller",
        &[
            on(READ, "core", "pods"),
            on("update", "core", "pods/finalizers"),
            on(
                "get list watch create delete update patch",
                "resource.k8s.io",
                "resourceclaims",
            ),
            on("update patch", "resource.k8s.io", "resourceclaims/status"),
            on(READ, "resource.k8s.io", "resourceclaimtemplates"),
            on("update patch", "core", "pods/status"),
            EVENTS,
        ],
    ),
    (
        "resourcequota-controller",
        &[
            on("list watch", "*", "*"),
            on("update", "core", "resourcequotas/status"),
            EVENTS,
        ],
    ),
    (
        "root-ca-cert-publisher",
        &[on("create update", "core", "configmaps"), EVENTS],
    ),
    (
        "route-controller",
        &[
            on("list watch", "core", "nodes"),
            on("patch", "core", "nodes/status"),
            EVENTS,
        ],
    ),
    (
        "service-account-controller",
        &[on("create", "core", "serviceaccounts"), EVENTS],
    ),
    (
        "service-cidrs-controller",
        &[
            on(
                "get list watch patch update",
                "networking.k8s.io",
                "servicecidrs",
            ),
            on(
                "patch update",
                "networking.k8s.io",
                "servicecidrs/finalizers servicecidrs/status",
            ),
            on(READ, "networking.k8s.io", "ipaddresses"),
            EVENTS,
        ],
    ),
    (
        "service-controller",
        &[
            on(READ, "core", "services"),
            on("patch update", "core", "services/status"),
            on("list watch", "core", "nodes"),
            EVENTS,
        ],
    ),
    (
        "statefulset-controller",
        &[
            on("get list watch create delete update patch", "core", "pods"),
            on(READ, "apps", "statefulsets"),
            on(
                "update",
                "apps",
                "statefulsets/status statefulsets/finalizers",
            ),
            on(
                "get list watch create delete update patch",
                "apps",
                "controllerrevisions",
            ),
            on(
                "get list watch create update delete",
                "core",
                "persistentvolumeclaims",
            ),
            on("update", "core", "pods/finalizers"),
            EVENTS,
        ],
    ),
    (
        "ttl-after-finished-controller",
        &[on("get list watch delete", "batch", "jobs"), EVENTS],
    ),
    (
        "ttl-controller",
        &[on("update patch list watch", "core", "nodes"), EVENTS],
    ),
    (
        "certificate-controller",
        &[
            on(
                "get list watch delete",
                "certificates.k8s.io",
                "certificatesigningrequests",
            ),
            on(
                "update",
                "certificates.k8s.io",
                "certificatesigningrequests/status certificatesigningrequests/approval",
            ),
            APPROVES,
            SIGNS,
            on("create", "authorization.k8s.io", "subjectaccessreviews"),
            EVENTS,
        ],
    ),
    (
        "validatingadmissionpolicy-status-controller",
        &[
            on(
                READ,
                "admissionregistration.k8s.io",
                "validatingadmissionpolicies",
            ),
            on(
                "get patch update",
                "admissionregistration.k8s.io",
                "validatingadmissionpolicies/status",
            ),
            EVENTS,
        ],
    ),
    (
        "volumeattributesclass-protection-controller",
        &[
            on(READ, "core", "persistentvolumeclaims persistentvolumes"),
            on(
                "get list watch update",
                "storage.k8s.io",
                "volumeattributesclasses",
            ),
            EVENTS,
        ],
    ),
    (
        "legacy-service-account-token-cleaner",
        &[
            Row::On(
                "get",
                "core",
                "configmaps",
                "kube-apiserver-legacy-service-account-token-tracking",
            ),
            on("patch delete", "core", "secrets"),
        ],
    ),
];

const APPROVES: Row = Row::On(
    "approve",
    "certificates.k8s.io",
    "signers",
    "kubernetes.io/kube-apiserver-client-kubelet",
);
/// Upstream leaves serving certificates to others; ours decides by the Node's own addresses.
const APPROVES_SERVING: Row = Row::On(
    "approve",
    "certificates.k8s.io",
    "signers",
    "kubernetes.io/kubelet-serving",
);
const SIGNS: Row = Row::On(
    "sign",
    "certificates.k8s.io",
    "signers",
    "kubernetes.io/legacy-unknown kubernetes.io/kube-apiserver-client \
     kubernetes.io/kube-apiserver-client-kubelet kubernetes.io/kubelet-serving",
);

/// Of our own controllers, beside what garbage collection needs.
const OWN: &[Row] = &[
    on(
        "create",
        "core",
        "pods persistentvolumeclaims serviceaccounts serviceaccounts/token configmaps endpoints events",
    ),
    on("create", "events.k8s.io", "events"),
    on("create", "apps", "replicasets controllerrevisions"),
    on("create", "batch", "jobs"),
    on("create", "discovery.k8s.io", "endpointslices"),
    on("create", "coordination.k8s.io", "leases"),
    Row::On(
        "update",
        "coordination.k8s.io",
        "leases",
        "kube-controller-manager",
    ),
    on("update", "core", "namespaces/finalize"),
    on(
        "patch",
        "core",
        "pods/status nodes/status namespaces/status persistentvolumes/status persistentvolumeclaims/status \
         replicationcontrollers/status resourcequotas/status services/status",
    ),
    on(
        "patch",
        "apps",
        "deployments/status replicasets/status daemonsets/status statefulsets/status",
    ),
    on("patch", "batch", "jobs/status cronjobs/status"),
    on("patch", "policy", "poddisruptionbudgets/status"),
    on("patch", "networking.k8s.io", "servicecidrs/status"),
    on(
        "patch",
        "certificates.k8s.io",
        "certificatesigningrequests/status certificatesigningrequests/approval",
    ),
    APPROVES,
    APPROVES_SERVING,
    SIGNS,
    // Aggregated roles get rules that the controllers do not hold themselves.
    on("escalate", "rbac.authorization.k8s.io", "clusterroles"),
];

const OF_EVERY: [&str; 6] = [
    "get",
    "list",
    "watch",
    "patch",
    "delete",
    "deletecollection",
];

/// The rules of our own controllers. Garbage collection reads, changes and deletes objects of every resource; each is named,
/// since an asterisk would reach subresources too: a kubelet through its node's proxy, a shell through a pod.
pub(super) fn own(served: &[&'static Resource]) -> Vec<Rule> {
    let mut plurals: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let collected = served.iter().filter(|resource| {
        ["list", "delete"]
            .iter()
            .all(|verb| resource.verbs.contains(verb))
    });
    for resource in collected {
        let of_group = plurals.entry(resource.group).or_default();
        if !of_group.iter().any(|plural| plural == resource.plural) {
            of_group.push(resource.plural.to_owned());
        }
    }
    let every = plurals.into_iter().map(|(group, resources)| Rule {
        verbs: OF_EVERY.map(str::to_owned).to_vec(),
        api_groups: vec![group.to_owned()],
        resources,
        ..Rule::default()
    });
    every.chain(OWN.iter().map(|row| row.rule())).collect()
}
