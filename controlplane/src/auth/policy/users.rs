//! Roles for people and programs: what is bound to everybody, and what administrators bind.

use super::{READ, READ_WRITE, Role, Row, WRITE, on, role};

/// A role whose rules are those of the roles that carry its label.
pub(super) struct Aggregated {
    pub name: &'static str,
    pub joins: Option<&'static str>,
}

pub(super) const AGGREGATED: &[Aggregated] = &[
    Aggregated {
        name: "admin",
        joins: None,
    },
    Aggregated {
        name: "edit",
        joins: Some("admin"),
    },
    Aggregated {
        name: "view",
        joins: Some("edit"),
    },
];

const fn joining(name: &'static str, joins: &'static str, rows: &'static [Row]) -> Role {
    Role {
        name,
        rows,
        joins: Some(joins),
    }
}

pub(super) const ROLES: &[Role] = &[
    role("cluster-admin", &[on("*", "*", "*"), Row::Paths("*", "*")]),
    role(
        "system:discovery",
        &[Row::Paths(
            "get",
            "/livez /readyz /healthz /version /version/ /openapi /openapi/* /api /api/* /apis /apis/*",
        )],
    ),
    role(
        "system:public-info-viewer",
        &[Row::Paths(
            "get",
            "/livez /readyz /healthz /version /version/",
        )],
    ),
    role(
        "system:monitoring",
        &[Row::Paths(
            "get",
            "/metrics /metrics/slis /livez /readyz /healthz /livez/* /readyz/* /healthz/*",
        )],
    ),
    role(
        "system:service-account-issuer-discovery",
        &[Row::Paths(
            "get",
            "/.well-known/openid-configuration /.well-known/openid-configuration/ /openid/v1/jwks /openid/v1/jwks/",
        )],
    ),
    role(
        "system:basic-user",
        &[
            on(
                "create",
                "authorization.k8s.io",
                "selfsubjectaccessreviews selfsubjectrulesreviews",
            ),
            on("create", "authentication.k8s.io", "selfsubjectreviews"),
        ],
    ),
    role(
        "system:auth-delegator",
        &[
            on("create", "authentication.k8s.io", "tokenreviews"),
            on("create", "authorization.k8s.io", "subjectaccessreviews"),
        ],
    ),
    joining(
        "system:aggregate-to-admin",
        "admin",
        &[
            on(
                "create",
                "authorization.k8s.io",
                "localsubjectaccessreviews",
            ),
            on(
                READ_WRITE,
                "rbac.authorization.k8s.io",
                "roles rolebindings",
            ),
        ],
    ),
    joining(
        "system:aggregate-to-edit",
        "edit",
        &[
            // Reading these is already more than looking.
            on(
                READ,
                "core",
                "pods/attach pods/proxy pods/exec pods/portforward secrets services/proxy",
            ),
            on("impersonate", "core", "serviceaccounts"),
            on(
                WRITE,
                "core",
                "pods pods/attach pods/proxy pods/exec pods/portforward",
            ),
            on("create", "core", "pods/eviction serviceaccounts/token"),
            on("update patch", "core", "pods/resize"),
            on(
                WRITE,
                "core",
                "replicationcontrollers replicationcontrollers/scale serviceaccounts services services/proxy \
                 persistentvolumeclaims configmaps secrets events",
            ),
            on(
                WRITE,
                "apps",
                "statefulsets statefulsets/scale daemonsets deployments deployments/scale deployments/rollback \
                 replicasets replicasets/scale",
            ),
            on(WRITE, "autoscaling", "horizontalpodautoscalers"),
            on(WRITE, "batch", "jobs cronjobs"),
            on(
                WRITE,
                "extensions",
                "daemonsets deployments deployments/scale deployments/rollback ingresses replicasets \
                 replicasets/scale replicationcontrollers/scale networkpolicies",
            ),
            on(WRITE, "policy", "poddisruptionbudgets"),
            on(WRITE, "networking.k8s.io", "networkpolicies ingresses"),
            on(READ_WRITE, "coordination.k8s.io", "leases"),
            on(
                WRITE,
                "resource.k8s.io",
                "resourceclaims resourceclaimtemplates",
            ),
        ],
    ),
    joining(
        "system:aggregate-to-view",
        "view",
        &[
            on(
                READ,
                "core",
                "pods replicationcontrollers replicationcontrollers/scale serviceaccounts services services/status \
                 endpoints persistentvolumeclaims persistentvolumeclaims/status configmaps limitranges resourcequotas \
                 bindings events pods/status resourcequotas/status namespaces/status replicationcontrollers/status \
                 pods/log namespaces",
            ),
            on(READ, "discovery.k8s.io", "endpointslices"),
            on(
                READ,
                "apps",
                "controllerrevisions statefulsets statefulsets/status statefulsets/scale daemonsets daemonsets/status \
                 deployments deployments/status deployments/scale replicasets replicasets/status replicasets/scale",
            ),
            on(
                READ,
                "autoscaling",
                "horizontalpodautoscalers horizontalpodautoscalers/status",
            ),
            on(READ, "batch", "jobs jobs/status cronjobs cronjobs/status"),
            on(
                READ,
                "extensions",
                "daemonsets daemonsets/status deployments deployments/scale deployments/status ingresses \
                 ingresses/status replicasets replicasets/scale replicasets/status replicationcontrollers/scale \
                 networkpolicies",
            ),
            on(
                READ,
                "policy",
                "poddisruptionbudgets poddisruptionbudgets/status",
            ),
            on(
                READ,
                "networking.k8s.io",
                "networkpolicies ingresses ingresses/status",
            ),
            on(
                READ,
                "resource.k8s.io",
                "resourceclaims resourceclaims/status resourceclaimtemplates",
            ),
        ],
    ),
];

/// Who gets what: role, kind of subject, names.
pub(super) const BINDINGS: &[(&str, &str, &[&str])] = &[
    ("cluster-admin", "Group", &["system:masters"]),
    ("system:discovery", "Group", &["system:authenticated"]),
    ("system:basic-user", "Group", &["system:authenticated"]),
    (
        "system:public-info-viewer",
        "Group",
        &["system:authenticated", "system:unauthenticated"],
    ),
    ("system:monitoring", "Group", &["system:monitoring"]),
    (
        "system:service-account-issuer-discovery",
        "Group",
        &["system:serviceaccounts"],
    ),
];
