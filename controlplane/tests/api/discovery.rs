//! Everything that v1.36 serves in stable versions is served here with its verbs, or docs/api.md says why not.

use std::collections::BTreeMap;

use futures::StreamExt;
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use keelway_controlplane::registry::{self, Resource};
use kube::client::Body;

use crate::server::Server;

/// The rows of the table "Not served" in docs/api.md: what, and why.
fn not_served() -> BTreeMap<String, String> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/api.md");
    let text = std::fs::read_to_string(path).expect("docs/api.md");
    let table = text
        .split("## Not served")
        .nth(1)
        .expect("its section on what is not served");
    let rows = table.lines().filter(|line| line.starts_with("| `"));
    let cells = rows.map(|row| row.trim_matches('|').split_once('|').expect("two columns"));
    cells
        .flat_map(|(names, why)| {
            let names = names.split('`').skip(1).step_by(2);
            names.map(|name| (name.to_owned(), why.trim().to_owned()))
        })
        .collect()
}

/// Whether the table leaves out a resource: by its group, or by its own name.
fn left_out(table: &BTreeMap<String, String>, resource: &Resource) -> bool {
    table.contains_key(resource.group) || table.contains_key(&qualified(resource))
}

fn qualified(resource: &Resource) -> String {
    format!("{}/{}", resource.api_version(), resource.plural)
}

fn is_stable(resource: &Resource) -> bool {
    !resource.version.contains("alpha") && !resource.version.contains("beta")
}

/// The requests of a verb: method, what follows the collection's path, and its query.
fn request_of(verb: &str) -> Option<(Method, &'static str, &'static str)> {
    Some(match verb {
        "get" => (Method::GET, "/absent", ""),
        "list" => (Method::GET, "", "?limit=1"),
        "watch" => (Method::GET, "", "?watch=true&timeoutSeconds=1"),
        "create" => (Method::POST, "", ""),
        "update" => (Method::PUT, "/absent", ""),
        "patch" => (Method::PATCH, "/absent", ""),
        "delete" => (Method::DELETE, "/absent", ""),
        "deletecollection" => (Method::DELETE, "", "?labelSelector=none%3Dsuch"),
        _ => return None,
    })
}

const VERBS: [&str; 8] = [
    "get",
    "list",
    "watch",
    "create",
    "update",
    "patch",
    "delete",
    "deletecollection",
];

struct Case {
    name: String,
    verb: &'static str,
    request: Request<Body>,
    served: bool,
}

fn request(method: Method, path: &str) -> Request<Body> {
    let content = match method {
        Method::PATCH => "application/merge-patch+json",
        _ => "application/json",
    };
    let body = match method {
        Method::POST | Method::PUT | Method::PATCH => "{}",
        _ => "",
    };
    let request = Request::builder().method(method).uri(path);
    request
        .header("content-type", content)
        .body(Body::from(body.as_bytes().to_vec()))
        .expect("a request")
}

fn cases(table: &BTreeMap<String, String>) -> Vec<Case> {
    let mut cases = Vec::new();
    for resource in registry::resources().iter().filter(|r| is_stable(r)) {
        let root = match resource.group {
            "" => format!("/api/{}", resource.version),
            group => format!("/apis/{group}/{}", resource.version),
        };
        let namespace = match resource.namespaced {
            true => "/namespaces/default",
            false => "",
        };
        let collection = format!("{root}{namespace}/{}", resource.plural);
        let out = left_out(table, resource);
        for verb in VERBS {
            let (method, name, query) = request_of(verb).expect("a verb");
            cases.push(Case {
                name: qualified(resource),
                verb,
                request: request(method, &format!("{collection}{name}{query}")),
                served: !out && resource.verbs.contains(&verb),
            });
        }
        for subresource in resource.subresources {
            for verb in ["get", "create", "update", "patch", "delete"] {
                let (method, ..) = request_of(verb).expect("a verb");
                let path = format!("{collection}/absent/{}", subresource.name);
                cases.push(Case {
                    name: format!("{}/{}", qualified(resource), subresource.name),
                    verb,
                    request: request(method, &path),
                    served: !out && subresource.verbs.contains(&verb),
                });
            }
        }
    }
    cases
}

#[tokio::test(flavor = "multi_thread")]
async fn every_stable_resource_answers_as_discovery_says() {
    let server = Server::start();
    let client = server.client().await;
    let table = not_served();
    let cases = cases(&table);
    assert!(cases.len() > 600, "the tables know all of v1.36");
    let wrong = futures::stream::iter(cases).map(|case| {
        let client = client.clone();
        async move {
            let Case {
                name,
                verb,
                request,
                served,
            } = case;
            let answer = client.send(request).await.expect("an answer");
            let code = answer.status();
            let whole = verb == "watch" && code == StatusCode::OK;
            // A watch goes on; everything else is read to its end.
            let body = match whole {
                true => Vec::new(),
                false => {
                    let body = answer.into_body().collect().await.expect("a body");
                    body.to_bytes().to_vec()
                }
            };
            let text = String::from_utf8_lossy(&body).into_owned();
            let unknown = text.contains("could not find the requested resource");
            let answered =
                code != StatusCode::METHOD_NOT_ALLOWED && !unknown && !code.is_server_error();
            (answered != served).then(|| format!("{verb} {name}: {code} {text}"))
        }
    });
    let wrong: Vec<String> = wrong
        .buffer_unordered(16)
        .filter_map(std::future::ready)
        .collect()
        .await;
    assert!(
        wrong.is_empty(),
        "{} differ:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

#[test]
fn what_is_not_served_exists_and_has_a_reason() {
    for (name, why) in not_served() {
        let known = registry::resources()
            .iter()
            .any(|resource| resource.group == name || qualified(resource) == name);
        assert!(known, "docs/api.md names {name}, which v1.36 does not have");
        assert!(
            why.len() > 10,
            "docs/api.md does not say why {name} is not served"
        );
    }
}

#[test]
fn documents_are_not_sent_again_to_those_who_have_them() {
    let server = Server::start();
    let headers = server.path("headers");
    let dumped = headers.display().to_string();
    let aggregated = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
    let protobuf = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf";
    let mut tags = BTreeMap::new();
    for (path, accept) in [
        ("/api", aggregated),
        ("/apis", aggregated),
        ("/openapi/v2", "application/json"),
        ("/openapi/v2", protobuf),
        ("/openapi/v3", "application/json"),
        ("/openapi/v3/apis/apps/v1", "application/json"),
    ] {
        let accept = format!("Accept: {accept}");
        let ask = |tag: &str| {
            let known = format!("If-None-Match: {tag}");
            let (code, _, body) = server.curl(&["-H", &accept, "-H", &known, "-D", &dumped], path);
            let told = std::fs::read_to_string(&headers).expect("headers");
            let tag = told.lines().find_map(|line| {
                let (name, value) = line.split_once(": ")?;
                name.eq_ignore_ascii_case("etag")
                    .then(|| value.trim().to_owned())
            });
            (code, body.len(), tag.expect("a tag"))
        };
        let (code, length, tag) = ask("\"of something else\"");
        assert!(code == 200 && length > 0, "{path}: {code}");
        assert_eq!(ask(&tag), (304, 0, tag.clone()), "{path}");
        if let Some(other) = tags.insert(tag, path) {
            panic!("{path} and {other} have one tag");
        }
    }
}
