//! Roles for the parts of a cluster: nodes, scheduler, kube-proxy, and what upstream's controller manager starts with.

use super::{EVENTS, READ, Role, Row, on, role};

/// The names of the signers of certificates.
const CLIENT: &str = "kubernetes.io/kube-apiserver-client";
const CLIENT_KUBELET: &str = "kubernetes.io/kube-apiserver-client-kubelet";
const SERVING: &str = "kubernetes.io/kubelet-serving";
const LEGACY: &str = "kubernetes.io/legacy-unknown";

const fn approves(signer: &'static str) -> Row {
    Row::On("approve", "certificates.k8s.io", "signers", signer)
}

/// Of nodes, for what is theirs. Reading Nodes and Pods is not among them: those are asked for by name or by node.
pub(super) const NODE: &[Row] = &[
    on("create", "authentication.k8s.io", "tokenreviews"),
    on(
        "create",
        "authorization.k8s.io",
        "subjectaccessreviews localsubjectaccessreviews",
    ),
    on(READ, "core", "services"),
    on("create update patch", "core", "nodes"),
    on("update patch", "core", "nodes/status"),
    EVENTS,
    on("create delete", "core", "pods"),
    on("update patch", "core", "pods/status"),
    on("create", "core", "pods/eviction"),
    on(READ, "core", "secrets configmaps"),
    on(
        "get",
        "core",
        "persistentvolumeclaims persistentvolumes endpoints",
    ),
    on("get update patch", "core", "persistentvolumeclaims/status"),
    on("create", "core", "serviceaccounts/token"),
    on(
        "create get list watch",
        "certificates.k8s.io",
        "certificatesigningrequests",
    ),
    on(
        "get create update patch delete",
        "coordination.k8s.io",
        "leases",
    ),
    on("get", "storage.k8s.io", "volumeattachments"),
    on(READ, "storage.k8s.io", "csidrivers"),
    on(
        "get create update patch delete",
        "storage.k8s.io",
        "csinodes",
    ),
    on(READ, "node.k8s.io", "runtimeclasses"),
    on("get", "resource.k8s.io", "resourceclaims"),
    on(
        "get list watch create update patch delete deletecollection",
        "resource.k8s.io",
        "resourceslices",
    ),
];

const fn leads(name: &'static str) -> Row {
    Row::On("get update patch", "coordination.k8s.io", "leases", name)
}

pub(super) const ROLES: &[Role] = &[
    role("system:node", NODE),
    role(
        "system:node-problem-detector",
        &[
            on("get", "core", "nodes"),
            on("patch", "core", "nodes/status"),
            EVENTS,
        ],
    ),
    role(
        "system:node-bootstrapper",
        &[on(
            "create get list watch",
            "certificates.k8s.io",
            "certificatesigningrequests",
        )],
    ),
    role(
        "system:kubelet-api-admin",
        &[
            on("get list watch proxy", "core", "nodes"),
            on(
                "*",
                "core",
                "nodes/proxy nodes/metrics nodes/stats nodes/log nodes/spec nodes/configz nodes/healthz nodes/pods",
            ),
        ],
    ),
    role(
        "system:node-proxier",
        &[
            on("list watch", "core", "services endpoints"),
            on(READ, "core", "nodes"),
            on("list watch", "discovery.k8s.io", "endpointslices"),
            on("list watch", "networking.k8s.io", "servicecidrs"),
            EVENTS,
        ],
    ),
    role(
        "system:kube-aggregator",
        &[on(READ, "core", "services endpoints")],
    ),
    role(
        "system:kube-dns",
        &[on("list watch", "core", "services endpoints")],
    ),
    role(
        "system:persistent-volume-provisioner",
        &[
            on("get list watch create delete", "core", "persistentvolumes"),
            on("get list watch update", "core", "persistentvolumeclaims"),
            on(READ, "storage.k8s.io", "storageclasses"),
            on("watch", "core", "events"),
            EVENTS,
        ],
    ),
    role(
        "system:kube-controller-manager",
        &[
            EVENTS,
            on("create", "coordination.k8s.io", "leases"),
            leads("kube-controller-manager"),
            on(
                "create",
                "core",
                "secrets serviceaccounts serviceaccounts/token",
            ),
            on("delete", "core", "secrets"),
            on(
                "get",
                "core",
                "namespaces secrets serviceaccounts configmaps",
            ),
            on("update", "core", "secrets serviceaccounts"),
            on("create", "authentication.k8s.io", "tokenreviews"),
            on("create", "authorization.k8s.io", "subjectaccessreviews"),
            on("list watch", "*", "*"),
        ],
    ),
    role(
        "system:kube-scheduler",
        &[
            EVENTS,
            on("create", "coordination.k8s.io", "leases"),
            leads("kube-scheduler"),
            on(
                READ,
                "core",
                "nodes namespaces services replicationcontrollers",
            ),
            on("get list watch delete", "core", "pods"),
            on("create", "core", "pods/binding bindings"),
            on("patch update", "core", "pods/status"),
            on(READ, "apps", "replicasets statefulsets"),
            on(READ, "policy", "poddisruptionbudgets"),
            on(READ, "core", "persistentvolumeclaims persistentvolumes"),
            on("create", "authentication.k8s.io", "tokenreviews"),
            on("create", "authorization.k8s.io", "subjectaccessreviews"),
            on(
                READ,
                "storage.k8s.io",
                "csinodes csidrivers csistoragecapacities volumeattachments",
            ),
            on(
                READ,
                "resource.k8s.io",
                "deviceclasses resourceclaims resourceslices",
            ),
            on(
                "update patch",
                "resource.k8s.io",
                "resourceclaims resourceclaims/status",
            ),
            on("update", "core", "pods/finalizers"),
        ],
    ),
    role(
        "system:volume-scheduler",
        &[
            on(
                "get list watch update patch",
                "core",
                "persistentvolumes persistentvolumeclaims",
            ),
            on(READ, "storage.k8s.io", "storageclasses"),
        ],
    ),
    role(
        "system:certificates.k8s.io:certificatesigningrequests:nodeclient",
        &[on(
            "create",
            "certificates.k8s.io",
            "certificatesigningrequests/nodeclient",
        )],
    ),
    role(
        "system:certificates.k8s.io:certificatesigningrequests:selfnodeclient",
        &[on(
            "create",
            "certificates.k8s.io",
            "certificatesigningrequests/selfnodeclient",
        )],
    ),
    role(
        "system:certificates.k8s.io:legacy-unknown-approver",
        &[approves(LEGACY)],
    ),
    role(
        "system:certificates.k8s.io:kubelet-serving-approver",
        &[approves(SERVING)],
    ),
    role(
        "system:certificates.k8s.io:kube-apiserver-client-approver",
        &[approves(CLIENT)],
    ),
    role(
        "system:certificates.k8s.io:kube-apiserver-client-kubelet-approver",
        &[approves(CLIENT_KUBELET)],
    ),
];

/// Who gets what: role, kind of subject, names. Nodes get theirs from the Node authorizer, so that binding is empty.
pub(super) const BINDINGS: &[(&str, &str, &[&str])] = &[
    ("system:node", "Group", &[]),
    ("system:node-proxier", "User", &["system:kube-proxy"]),
    (
        "system:kube-controller-manager",
        "User",
        &["system:kube-controller-manager"],
    ),
    ("system:kube-scheduler", "User", &["system:kube-scheduler"]),
    (
        "system:volume-scheduler",
        "User",
        &["system:kube-scheduler"],
    ),
    ("system:kube-dns", "ServiceAccount", &["kube-dns"]),
    (
        "system:kubelet-api-admin",
        "User",
        &["kube-apiserver-kubelet-client"],
    ),
];

/// A Role with its binding: namespace, role, rules, binding, users, ServiceAccounts of kube-system.
type Namespaced = (
    &'static str,
    &'static str,
    &'static [Row],
    &'static str,
    &'static [&'static str],
    &'static [&'static str],
);

pub(super) const NAMESPACED: &[Namespaced] = &[
    (
        "kube-system",
        "extension-apiserver-authentication-reader",
        &[Row::On(
            READ,
            "core",
            "configmaps",
            "extension-apiserver-authentication",
        )],
        "system::extension-apiserver-authentication-reader",
        &["system:kube-controller-manager", "system:kube-scheduler"],
        &[],
    ),
    (
        "kube-system",
        "system::leader-locking-kube-controller-manager",
        &[
            on("watch", "core", "configmaps"),
            Row::On(
                "get update",
                "core",
                "configmaps",
                "kube-controller-manager",
            ),
        ],
        "system::leader-locking-kube-controller-manager",
        &["system:kube-controller-manager"],
        &["kube-controller-manager"],
    ),
    (
        "kube-system",
        "system::leader-locking-kube-scheduler",
        &[
            on("watch", "core", "configmaps"),
            Row::On("get update", "core", "configmaps", "kube-scheduler"),
        ],
        "system::leader-locking-kube-scheduler",
        &["system:kube-scheduler"],
        &["kube-scheduler"],
    ),
    (
        "kube-system",
        "system:controller:bootstrap-signer",
        &[on(READ, "core", "secrets")],
        "system:controller:bootstrap-signer",
        &[],
        &["bootstrap-signer"],
    ),
    (
        "kube-system",
        "system:controller:cloud-provider",
        &[on("create get list watch", "core", "configmaps")],
        "system:controller:cloud-provider",
        &[],
        &["cloud-provider"],
    ),
    (
        "kube-system",
        "system:controller:token-cleaner",
        &[on("get list watch delete", "core", "secrets"), EVENTS],
        "system:controller:token-cleaner",
        &[],
        &["token-cleaner"],
    ),
    (
        "kube-public",
        "system:controller:bootstrap-signer",
        &[
            on(READ, "core", "configmaps"),
            Row::On("update", "core", "configmaps", "cluster-info"),
            EVENTS,
        ],
        "system:controller:bootstrap-signer",
        &[],
        &["bootstrap-signer"],
    ),
];
