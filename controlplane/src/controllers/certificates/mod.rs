//! CertificateSigningRequests: kubelets' own are approved, approved ones are signed, and old ones go.

mod authority;

use std::net::IpAddr;

use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequest, CertificateSigningRequestCondition, CertificateSigningRequestStatus,
};
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::json;

pub use self::authority::{Authority, CLIENT_SIGNER, Error, organizations};
use self::authority::{Request, Signer};
use super::object::{Key, Object, Target};
use super::plan::{Action, Controller, Keys, Plan, View};
use super::snapshot::{Change, Snapshot};
use crate::auth::{MASTERS, bootstrap};

/// How long requests stay that nobody decides about, and those that are done with.
const PENDING_MAX: SignedDuration = SignedDuration::from_hours(24);
const DONE_MAX: SignedDuration = SignedDuration::from_hours(1);
/// Who may ask for a kubelet's certificate and gets it without being looked at: joining nodes, and whoever may do all.
const TRUSTED: [&str; 2] = [bootstrap::GROUP, MASTERS];

pub const CONTROLLER: Controller = Controller {
    name: "certificatesigningrequest",
    affected,
    plan,
};

fn affected(snapshot: &Snapshot, change: &Change, keys: &mut Keys) {
    match change.object() {
        Object::CertificateSigningRequest(request) => {
            keys.insert(Key::of(&request.metadata));
        }
        // What its kubelet may vouch for has changed, or whether somebody else may become it.
        Object::Node(node) if decides(change) => {
            let user = format!(
                "system:node:{}",
                node.metadata.name.as_deref().unwrap_or("")
            );
            let undecided = snapshot.signing_requests.iter().filter(|(_, request)| {
                let status = request.status.as_ref();
                let conditions = status.and_then(|status| status.conditions.as_ref());
                let by_it = request.spec.username.as_ref() == Some(&user);
                conditions.is_none_or(Vec::is_empty) && (by_it || is_bootstrappers(request))
            });
            keys.extend(undecided.map(|(key, _)| key.clone()));
        }
        _ => {}
    }
}

/// Whether a change of a Node is one that requests are decided by.
fn decides(change: &Change) -> bool {
    let of = |object: &Option<Object>| match object {
        Some(Object::Node(node)) => Some((hosts(node), is_ready(node))),
        _ => None,
    };
    of(&change.old) != of(&change.new)
}

fn hosts(node: &Node) -> Vec<String> {
    let addresses = node.status.iter().flat_map(|status| &status.addresses);
    let addresses = addresses.flatten().map(|address| address.address.clone());
    addresses.collect()
}

fn is_ready(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|status| &status.conditions);
    conditions
        .flatten()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn is_in(request: &CertificateSigningRequest, wanted: &[&str]) -> bool {
    let mut groups = request.spec.groups.iter().flatten();
    groups.any(|group| wanted.contains(&group.as_str()))
}

fn is_bootstrappers(request: &CertificateSigningRequest) -> bool {
    is_in(request, &[bootstrap::GROUP])
}

fn plan(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let Some(request) = view.snapshot.signing_requests.get(key) else {
        return plan;
    };
    let status = request.status.clone().unwrap_or_default();
    let has = |type_: &str| {
        let mut conditions = status.conditions.iter().flatten();
        conditions.any(|condition| condition.type_ == type_)
    };
    let signed = status
        .certificate
        .as_ref()
        .is_some_and(|pem| !pem.0.is_empty());
    let done = signed || has("Denied") || has("Failed");
    if !done && !has("Approved") && is_kubelets_own(view.snapshot, request) {
        plan.push(conclude(
            request,
            &status,
            "approval",
            (
                "Approved",
                "AutoApproved",
                "Auto approving kubelet certificate.",
            ),
            view.now,
        ));
        return plan;
    }
    if !done && has("Approved") {
        sign(view, request, &status, &mut plan);
    }
    let since = request
        .metadata
        .creation_timestamp
        .as_ref()
        .map_or(view.now, |Time(at)| *at);
    let due = since.saturating_add(if done { DONE_MAX } else { PENDING_MAX });
    match due {
        Ok(due) if due > view.now => plan.look_again(due),
        _ => plan.push(Action::Delete {
            target: Target::of(&**request),
            propagation: None,
            grace_seconds: None,
        }),
    }
    plan
}

/// Whether a node asks for its own certificate, as a client or as a server, or one that joins for its first.
fn is_kubelets_own(snapshot: &Snapshot, request: &CertificateSigningRequest) -> bool {
    let spec = &request.spec;
    let signer = match Signer::of(&spec.signer_name) {
        Some(signer @ (Signer::KubeletClient | Signer::KubeletServing)) => signer,
        _ => return false,
    };
    let usages = spec.usages.as_deref().unwrap_or_default();
    let Ok(read) = Request::read(&spec.request.0, usages) else {
        return false;
    };
    if read.check(signer).is_err() {
        return false;
    }
    let own = spec.username.as_deref() == Some(read.common_name.as_str());
    let node = snapshot.nodes.get(&Key::cluster(read.node()));
    if signer == Signer::KubeletServing {
        // Only its own names, and none that another node has too.
        return own
            && node.is_some_and(|node| {
                let known = hosts(node);
                let elsewhere = |host: &String| {
                    let mut others = snapshot.nodes.values();
                    others.any(|other| {
                        !std::sync::Arc::ptr_eq(other, node) && hosts(other).contains(host)
                    })
                };
                let asked = read.hosts();
                asked.iter().all(|host| {
                    known.contains(host) && !elsewhere(host) && !is_clusters(snapshot, host)
                })
            });
    }
    // A token that lets machines join does not let one take the place of a node that lives.
    let taken = node.is_some_and(|node| is_ready(node));
    let trusted = is_in(request, &TRUSTED) && (!taken || is_in(request, &[MASTERS]));
    trusted || own
}

/// Whether the cluster, or every machine for itself, calls something so: a node says itself what it is called, and whoever showed a
/// certificate for such a name would be taken for the API server or another Service.
fn is_clusters(snapshot: &Snapshot, host: &str) -> bool {
    let Ok(address) = host.parse::<IpAddr>() else {
        let name = host.to_ascii_lowercase();
        let mut labels = name.split('.');
        return labels.next() == Some("kubernetes")
            || labels.any(|label| label == "svc")
            || name.rsplit('.').next() == Some("localhost");
    };
    let of_service = |service: &Service| {
        let spec = service.spec.iter();
        let mut addresses = spec.flat_map(|spec| spec.cluster_ips.iter().flatten());
        addresses.any(|one| one.parse() == Ok(address))
    };
    address.is_loopback()
        || address.is_unspecified()
        || address.is_multicast()
        || snapshot.services.values().any(|one| of_service(one))
}

fn sign(
    view: &View<'_>,
    request: &CertificateSigningRequest,
    status: &CertificateSigningRequestStatus,
    plan: &mut Plan,
) {
    let spec = &request.spec;
    let (Some(signer), Some(authority)) = (Signer::of(&spec.signer_name), &view.settings.authority)
    else {
        // Another signer's.
        return;
    };
    let usages = spec.usages.as_deref().unwrap_or_default();
    let outcome = Request::read(&spec.request.0, usages).and_then(|read| {
        read.check(signer)?;
        let id = request.metadata.uid.as_deref().unwrap_or_default();
        authority.sign(&read, id, spec.expiration_seconds, view.now)
    });
    match outcome {
        Ok(pem) => plan.push(super::pods::guarded_status_patch(
            request,
            json!({"certificate": ByteString(pem.into_bytes())}),
        )),
        Err(error) => plan.push(conclude(
            request,
            status,
            "status",
            ("Failed", "SignerValidationFailure", &error.to_string()),
            view.now,
        )),
    }
}

/// Adds a condition, given as type, reason and message.
fn conclude(
    request: &CertificateSigningRequest,
    status: &CertificateSigningRequestStatus,
    subresource: &'static str,
    (type_, reason, message): (&str, &str, &str),
    now: Timestamp,
) -> Action {
    let mut conditions = status.conditions.clone().unwrap_or_default();
    conditions.push(CertificateSigningRequestCondition {
        type_: type_.into(),
        status: "True".into(),
        reason: Some(reason.into()),
        message: Some(message.into()),
        last_update_time: Some(Time(now)),
        last_transition_time: Some(Time(now)),
    });
    let meta = &request.metadata;
    Action::Patch {
        target: Target::of(request),
        subresource: Some(subresource),
        body: json!({
            "metadata": {"uid": meta.uid, "resourceVersion": meta.resource_version},
            "status": {"conditions": conditions},
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair};
    use serde_json::Value;

    use super::super::testing::Cluster;
    use super::*;

    fn authority() -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "test-ca");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap().pem();
        Authority::new(&certificate, &key.serialize_pem()).unwrap()
    }

    fn pem(organization: &str, name: &str, hosts: &[&str]) -> String {
        let key = KeyPair::generate().unwrap();
        let hosts: Vec<String> = hosts.iter().map(|host| host.to_string()).collect();
        let mut params = CertificateParams::new(hosts).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::OrganizationName, organization);
        params.distinguished_name.push(DnType::CommonName, name);
        params.serialize_request(&key).unwrap().pem().unwrap()
    }

    /// The request after all that is done with it.
    fn asked(request: &str, spec: Value) -> CertificateSigningRequest {
        let mut cluster = Cluster::new(&[CONTROLLER]);
        cluster.settings.authority = Some(Arc::new(authority()));
        let mut value = json!({
            "metadata": {"name": "ask"},
            "spec": {
                "request": ByteString(request.as_bytes().to_vec()),
                "signerName": "kubernetes.io/kube-apiserver-client-kubelet",
                "usages": ["digital signature", "client auth"],
            },
        });
        json_patch::merge(&mut value, &json!({"spec": spec}));
        cluster.add::<CertificateSigningRequest>(serde_json::from_value(value).unwrap());
        cluster.settle();
        (**cluster.snapshot.signing_requests.values().next().unwrap()).clone()
    }

    fn conditions(request: &CertificateSigningRequest) -> Vec<String> {
        let status = request.status.clone().unwrap_or_default();
        let conditions = status.conditions.unwrap_or_default();
        conditions
            .into_iter()
            .map(|condition| condition.type_)
            .collect()
    }

    #[test]
    fn a_node_that_joins_gets_its_certificate() {
        let request = pem("system:nodes", "system:node:n1", &[]);
        let joined = asked(&request, json!({"groups": ["system:bootstrappers"]}));
        assert_eq!(conditions(&joined), ["Approved"]);
        let certificate = joined.status.unwrap().certificate.unwrap();
        let (_, parsed) = x509_parser::pem::parse_x509_pem(&certificate.0).unwrap();
        let parsed = parsed.parse_x509().unwrap();
        assert!(parsed.subject().to_string().contains("system:node:n1"));
        assert!(parsed.issuer().to_string().contains("test-ca"));
        assert!(
            parsed
                .extended_key_usage()
                .unwrap()
                .unwrap()
                .value
                .client_auth
        );
        assert!(!parsed.is_ca());
        let own = asked(&request, json!({"username": "system:node:n1"}));
        assert_eq!(conditions(&own), ["Approved"]);
    }

    #[test]
    fn nobody_gets_a_certificate_for_another() {
        let node = pem("system:nodes", "system:node:n1", &[]);
        for (request, spec) in [
            (&node, json!({"username": "system:node:n2"})),
            (
                &node,
                json!({"username": "mallory", "groups": ["system:authenticated"]}),
            ),
            (
                &pem("system:masters", "system:node:n1", &[]),
                json!({"groups": ["system:bootstrappers"]}),
            ),
            (
                &node,
                json!({"groups": ["system:bootstrappers"], "usages": ["client auth", "cert sign"]}),
            ),
            (
                &"no request at all".to_string(),
                json!({"groups": ["system:bootstrappers"]}),
            ),
        ] {
            let found = asked(request, spec.clone());
            assert!(conditions(&found).is_empty(), "{spec}");
            assert!(found.status.is_none(), "{spec}");
        }
    }

    #[test]
    fn what_was_approved_is_signed_or_refused_by_its_signers_rules() {
        let approved = json!({"conditions": [{"type": "Approved", "status": "True"}]});
        let serving = "kubernetes.io/kubelet-serving";
        for (request, signer, usages, outcome) in [
            (
                pem("system:nodes", "system:node:n", &["n.local"]),
                serving,
                ["digital signature", "server auth"],
                "signed",
            ),
            (
                pem("system:nodes", "system:node:n", &[]),
                serving,
                ["digital signature", "server auth"],
                "Failed",
            ),
            (
                pem("team", "bob", &[]),
                "kubernetes.io/kube-apiserver-client",
                ["digital signature", "client auth"],
                "signed",
            ),
            (
                pem("team", "bob", &[]),
                "kubernetes.io/kube-apiserver-client",
                ["digital signature", "server auth"],
                "Failed",
            ),
            (
                pem("system:masters", "bob", &[]),
                "kubernetes.io/kube-apiserver-client",
                ["digital signature", "client auth"],
                "Failed",
            ),
            (
                pem("team", "bob", &[]),
                "acme.io/own",
                ["digital signature", "client auth"],
                "left",
            ),
        ] {
            let mut cluster = Cluster::new(&[CONTROLLER]);
            cluster.settings.authority = Some(Arc::new(authority()));
            let value = json!({
                "metadata": {"name": "ask"},
                "spec": {"request": ByteString(request.into_bytes()), "signerName": signer, "usages": usages},
                "status": approved,
            });
            cluster.add::<CertificateSigningRequest>(serde_json::from_value(value).unwrap());
            cluster.settle();
            let found = cluster.snapshot.signing_requests.values().next().unwrap();
            let signed = found.status.as_ref().unwrap().certificate.is_some();
            let failed = conditions(found).contains(&"Failed".to_string());
            let expected = (outcome == "signed", outcome == "Failed");
            assert_eq!((signed, failed), expected, "{signer} {usages:?}");
        }
    }

    /// What comes of a request of node `n` for a serving certificate, and of one by a token for a client certificate, when
    /// these nodes are there, each with its addresses and whether it is Ready.
    fn beside(nodes: &[(&str, &[&str], &str)], hosts: &[&str]) -> (bool, bool) {
        let mut cluster = Cluster::new(&[CONTROLLER]);
        cluster.settings.authority = Some(Arc::new(authority()));
        let service = json!({"metadata": {"name": "kubernetes", "namespace": "default"},
            "spec": {"clusterIPs": ["10.96.0.1"], "ports": [{"port": 443}]}});
        cluster.add::<Service>(serde_json::from_value(service).unwrap());
        let ask = |name: &str, request: String, signer: &str, usage: &str, who: Value| {
            let mut value = json!({
                "metadata": {"name": name},
                "spec": {"request": ByteString(request.into_bytes()), "signerName": signer,
                    "usages": ["digital signature", usage]},
            });
            json_patch::merge(&mut value, &json!({"spec": who}));
            serde_json::from_value::<CertificateSigningRequest>(value).unwrap()
        };
        cluster.add(ask(
            "serving",
            pem("system:nodes", "system:node:n", hosts),
            "kubernetes.io/kubelet-serving",
            "server auth",
            json!({"username": "system:node:n", "groups": ["system:nodes"]}),
        ));
        cluster.settle();
        // The nodes come later: a request waits for what it is decided by.
        for (name, addresses, ready) in nodes {
            let addresses: Vec<Value> = addresses
                .iter()
                .map(|address| json!({"type": "InternalIP", "address": address}))
                .collect();
            let node = json!({"metadata": {"name": name}, "status": {"addresses": addresses,
                "conditions": [{"type": "Ready", "status": ready}]}});
            cluster.add::<Node>(serde_json::from_value(node).unwrap());
        }
        cluster.add(ask(
            "client",
            pem("system:nodes", "system:node:n", &[]),
            "kubernetes.io/kube-apiserver-client-kubelet",
            "client auth",
            json!({"username": "system:bootstrap:abcdef", "groups": ["system:bootstrappers"]}),
        ));
        cluster.settle();
        let signed = |name: &str| {
            let request = cluster.snapshot.signing_requests.get(&Key::cluster(name));
            let status = request.unwrap().status.as_ref();
            status.is_some_and(|status| status.certificate.is_some())
        };
        (signed("serving"), signed("client"))
    }

    #[test]
    fn a_node_serves_with_its_own_addresses_only() {
        let own: &[&str] = &["10.0.0.1", "n"];
        let n = ("n", own, "True");
        assert!(beside(&[n], &["10.0.0.1", "n"]).0);
        assert!(beside(&[n], &["10.0.0.1"]).0);
        assert!(!beside(&[], &["10.0.0.1"]).0, "there is no such node");
        assert!(!beside(&[n], &["10.0.0.1", "10.96.0.1"]).0);
        let other: &[&str] = &["10.0.0.1"];
        assert!(!beside(&[n, ("m", other, "True")], &["10.0.0.1"]).0);
    }

    #[test]
    fn a_node_is_not_called_what_the_cluster_or_every_machine_calls_something() {
        let (service, lives) = ("10.96.0.1", "True");
        for host in [
            service,
            "127.0.0.1",
            "::1",
            "0.0.0.0",
            "kubernetes",
            "kubernetes.default",
            "Kubernetes.default.svc",
            "hello.shop.svc.cluster.local",
            "localhost",
        ] {
            let claimed: &[&str] = &["10.0.0.1", host];
            assert!(!beside(&[("n", claimed, lives)], &[host]).0, "{host}");
            assert!(beside(&[("n", claimed, lives)], &["10.0.0.1"]).0, "{host}");
        }
    }

    #[test]
    fn a_token_does_not_take_the_place_of_a_node_that_lives() {
        let own: &[&str] = &["10.0.0.1"];
        assert!(beside(&[], own).1);
        assert!(beside(&[("n", own, "Unknown")], own).1);
        assert!(!beside(&[("n", own, "True")], own).1);
    }

    #[test]
    fn old_requests_go() {
        let mut cluster = Cluster::new(&[CONTROLLER]);
        let value = json!({"metadata": {"name": "ask"}, "spec": {"request": "", "signerName": "acme.io/own"}});
        cluster.add::<CertificateSigningRequest>(serde_json::from_value(value).unwrap());
        cluster.settle();
        cluster.advance(24 * 3600);
        cluster.settle();
        assert!(cluster.snapshot.signing_requests.is_empty());
    }
}
