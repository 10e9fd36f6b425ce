//! What is served is what Kubernetes v1.36 serves unless told otherwise.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::server::Server;

/// Stable versions of all named groups, from the published discovery document of v1.36.2: group and version, plural, kind,
/// singular, scope, short names, categories, verbs, and subresources with kind and verbs.
const PUBLISHED: &str = include_str!("kinds.tsv");
/// The core group, whose discovery document has its own place.
const CORE: [&str; 17] = [
    "bindings",
    "componentstatuses",
    "configmaps",
    "endpoints",
    "events",
    "limitranges",
    "namespaces",
    "nodes",
    "persistentvolumeclaims",
    "persistentvolumes",
    "pods",
    "podtemplates",
    "replicationcontrollers",
    "resourcequotas",
    "secrets",
    "serviceaccounts",
    "services",
];

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or("")
}

fn names(value: &Value) -> String {
    let names = value.as_array().into_iter().flatten();
    names
        .filter_map(Value::as_str)
        .collect::<Vec<_>>()
        .join(",")
}

fn aggregated(server: &Server, path: &str) -> Value {
    let accept = "Accept: application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
    let (code, _, body) = server.curl(&["-H", accept], path);
    assert_eq!(code, 200);
    serde_json::from_slice(&body).expect("JSON")
}

/// Each resource by group, version and plural, as a row of the published ones has it.
fn rows(document: &Value) -> BTreeMap<(String, String), Vec<String>> {
    let mut rows = BTreeMap::new();
    for group in document["items"].as_array().expect("groups") {
        for version in group["versions"].as_array().expect("versions") {
            let of = format!(
                "{}/{}",
                text(&group["metadata"], "name"),
                text(version, "version")
            );
            for resource in version["resources"].as_array().expect("resources") {
                let mut subresources: Vec<String> = resource["subresources"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .map(|sub| {
                        let kind = text(&sub["responseKind"], "kind");
                        format!(
                            "{}:{kind}:{}",
                            text(sub, "subresource"),
                            names(&sub["verbs"])
                        )
                    })
                    .collect();
                subresources.sort();
                let row = vec![
                    text(&resource["responseKind"], "kind").to_owned(),
                    text(resource, "singularResource").to_owned(),
                    text(resource, "scope").to_owned(),
                    names(&resource["shortNames"]),
                    names(&resource["categories"]),
                    names(&resource["verbs"]),
                    subresources.join(";"),
                ];
                rows.insert((of.clone(), text(resource, "resource").to_owned()), row);
            }
        }
    }
    rows
}

#[test]
fn every_built_in_kind_is_served_as_published() {
    let server = Server::start();
    let served = rows(&aggregated(&server, "/apis"));
    let published: BTreeMap<(String, String), Vec<String>> = PUBLISHED
        .lines()
        .map(|line| {
            let mut columns = line.split('\t').map(str::to_owned);
            let key = (
                columns.next().expect("a group"),
                columns.next().expect("a plural"),
            );
            (key, columns.collect())
        })
        .collect();
    assert_eq!(served, published);
    let core: Vec<String> = rows(&aggregated(&server, "/api"))
        .into_keys()
        .map(|(_, plural)| plural)
        .collect();
    assert_eq!(core, CORE);
    // kubectl knows them by their short names, and what `all` is.
    let said = server.kubectl("get deploy,rs,sts,ds,po,svc,cm,ns,no,pvc,pv,sc,ing,netpol,hpa,pdb,cj,rc,quota,limits,sa,ev,ep,csr,crd,pc");
    assert!(said.contains("service/kubernetes"), "{said}");
    assert!(server.kubectl("get all").contains("service/kubernetes"));
    let healthy = server.object("componentstatus etcd-0");
    assert_eq!(healthy["conditions"][0]["status"], "True");
}

#[test]
fn the_preferred_version_of_autoscaling_is_the_newer_and_both_show_the_same_object() {
    let server = Server::start();
    let (_, group) = server.raw("/apis/autoscaling");
    assert_eq!(group["preferredVersion"]["version"], "v2");
    let manifest = "---\n{apiVersion: autoscaling/v1, kind: HorizontalPodAutoscaler, metadata: {name: web}, spec: {maxReplicas: 3, \
         targetCPUUtilizationPercentage: 60, scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: web}}}";
    server.kubectl_in("create -f -", manifest);
    let path = |version: &str| {
        format!("/apis/autoscaling/{version}/namespaces/default/horizontalpodautoscalers/web")
    };
    let (_, newer) = server.raw(&path("v2"));
    let target = &newer["spec"]["metrics"][0]["resource"]["target"];
    assert_eq!(target["averageUtilization"], 60);
    let (_, older) = server.raw(&path("v1"));
    assert_eq!(older["spec"]["targetCPUUtilizationPercentage"], 60);
    assert_eq!(older["apiVersion"], "autoscaling/v1");
    assert_eq!(
        older["metadata"]["resourceVersion"],
        newer["metadata"]["resourceVersion"]
    );
}
