//! Wrong requests get the Status that Kubernetes gives: code, reason and words.

use http::Request;
use http_body_util::BodyExt;
use kube::client::Body;
use serde_json::{Value, json};

use crate::server::Server;

const JSON: &str = "application/json";
const MERGE: &str = "application/merge-patch+json";
const APPLY: &str = "application/apply-patch+yaml";
const MAPS: &str = "/api/v1/namespaces/default/configmaps";
const MAP: &str = "/api/v1/namespaces/default/configmaps/here";

/// A request, and the code, reason and words of its answer.
struct Row {
    method: &'static str,
    path: String,
    content: &'static str,
    accept: &'static str,
    body: String,
    expected: (u16, &'static str, &'static str),
}

fn row(
    request: (&'static str, &str),
    content: &'static str,
    body: impl ToString,
    expected: (u16, &'static str, &'static str),
) -> Row {
    Row {
        method: request.0,
        path: request.1.to_owned(),
        content,
        accept: JSON,
        body: body.to_string(),
        expected,
    }
}

/// A request without a body.
fn asked(request: (&'static str, &str), expected: (u16, &'static str, &'static str)) -> Row {
    row(request, JSON, "", expected)
}

fn map(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}})
}

fn with(mut object: Value, pointer: &str, value: &str) -> Value {
    let (parent, field) = pointer.rsplit_once('/').expect("a pointer");
    object.pointer_mut(parent).expect("its parent")[field] = value.into();
    object
}

async fn answer(client: &kube::Client, row: &Row) -> (u16, Value) {
    let request = Request::builder().method(row.method).uri(&row.path);
    let request = request
        .header("accept", row.accept)
        .header("content-type", row.content);
    let request = request
        .body(Body::from(row.body.clone().into_bytes()))
        .expect("a request");
    let answer = client.send(request).await.expect("an answer");
    let (head, body) = answer.into_parts();
    let bytes = body.collect().await.expect("a body").to_bytes();
    let status = serde_json::from_slice(&bytes)
        .unwrap_or_else(|_| panic!("{} {}: {bytes:?}", row.method, row.path));
    (head.status.as_u16(), status)
}

/// Holds every row against its answer.
async fn hold(client: &kube::Client, rows: &[Row]) {
    for row in rows {
        let (code, status) = answer(client, row).await;
        let (reason, message) = (
            status["reason"].as_str().unwrap_or(""),
            status["message"].as_str().unwrap_or(""),
        );
        let called = format!(
            "{} {} {} {}",
            row.method,
            row.path,
            row.content,
            row.body.chars().take(200).collect::<String>()
        );
        assert_eq!(
            (code, reason),
            (row.expected.0, row.expected.1),
            "{called}\n{message}"
        );
        assert!(
            message.contains(row.expected.2),
            "{called}\nexpected {:?} in {message:?}",
            row.expected.2
        );
        assert_eq!(status["code"], code, "{called}");
        assert_eq!(
            (&status["kind"], &status["status"]),
            (&json!("Status"), &json!("Failure")),
            "{called}"
        );
    }
}

/// A document that is deeper than parsers go.
fn nested(open: &str, close: &str) -> String {
    let inside = format!("{}{}", open.repeat(20_000), close.repeat(20_000));
    format!(r#"{{"apiVersion":"v1","kind":"ConfigMap","metadata":{{"name":"a"}},"x":{inside}}}"#)
}

/// A patch whose operations each add some levels inside what the one before added.
fn deepening() -> Value {
    let levels = json!({"a": {"a": {"a": {"a": {}}}}});
    let operation = |at: usize| json!({"op": "add", "path": format!("/x{}", "/a".repeat(4 * at)), "value": levels});
    (0..100).map(operation).collect()
}

/// A patch whose operations each double the object.
fn doubling() -> Value {
    let operation = |at: usize| json!({"op": "copy", "from": "", "path": format!("/x{at}")});
    (0..40).map(operation).collect()
}

async fn client_with_a_map(server: &Server) -> kube::Client {
    let client = server.client().await;
    let created = answer(
        &client,
        &row(("POST", MAPS), JSON, map("here"), (0, "", "")),
    )
    .await;
    assert_eq!(created.0, 201);
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_and_content_types() {
    let server = Server::start();
    let client = client_with_a_map(&server).await;
    let create = ("POST", MAPS);
    let mut html = asked(
        ("GET", MAP),
        (
            406,
            "NotAcceptable",
            "406: Not Acceptable\n\nAvailable representations: application/json, application/yaml",
        ),
    );
    html.accept = "text/html";
    let large = "x".repeat(4 << 20);
    hold(&client, &[
        html,
        row(create, "text/plain", map("a"), (415, "UnsupportedMediaType", "accepted media types include: application/json")),
        row(("PATCH", MAP), JSON, "{}", (415, "UnsupportedMediaType", "415: Unsupported Media Type")),
        row(create, JSON, json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"a": 1}}), (400, "BadRequest", "json: cannot unmarshal number into Go struct field ConfigMap.data of type string")),
        row(create, "application/yaml", "a: [", (400, "BadRequest", "the object provided is unrecognized (must be of type ConfigMap): yaml: line 1: ")),
        row(("PUT", MAP), JSON, json!({"apiVersion": "v1", "kind": "ConfigMap"}), (400, "BadRequest", "the name of the object (here based on URL) was undeterminable: name must be provided")),
        row(("PATCH", MAP), MERGE, json!({"metadata": {"uid": "q"}}), (422, "Invalid", "ConfigMap \"here\" is invalid: metadata.uid: Invalid value: \"q\": field is immutable")),
        row(("PATCH", MAP), MERGE, json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}), (422, "Invalid", "metadata.deletionTimestamp: Invalid value: \"2026-01-01T00:00:00Z\": field is immutable")),
        row(("PATCH", &format!("{MAP}?fieldManager=m")), APPLY, "data: {a: b}", (400, "BadRequest", "invalid object type: /, Kind=")),
        row(("PATCH", &format!("{MAP}?fieldManager=m")), APPLY, "{apiVersion: v1, kind: Secret}", (400, "BadRequest", "invalid object type: /v1, Kind=Secret")),
        row(("PATCH", &format!("{MAP}?fieldManager=m&fieldValidation=Ignore")), APPLY, "{apiVersion: v1, kind: ConfigMap, zzz: 1}", (500, "", "failed to create typed patch object (/; /v1, Kind=ConfigMap): .zzz: field not declared in schema")),
        row(create, JSON, "{", (400, "BadRequest", "")),
        row(create, JSON, "", (400, "BadRequest", "")),
        row(create, JSON, "[]", (400, "BadRequest", "")),
        row(create, JSON, "{", (400, "BadRequest", "the object provided is unrecognized (must be of type ConfigMap): couldn't get version/kind; json parse error: unexpected end of JSON input ({)")),
        row(create, JSON, "[]", (400, "BadRequest", "json: cannot unmarshal array into Go value of type struct")),
        row(create, JSON, nested("[", "]"), (400, "BadRequest", "exceeded max depth")),
        row(create, JSON, with(map("a"), "/kind", "Secret"), (400, "BadRequest", "Secret in version \"v1\" cannot be handled as a ConfigMap: converting (v1.Secret) to (core.ConfigMap): unknown conversion")),
        row(create, JSON, with(map("a"), "/kind", "Nothing"), (400, "BadRequest", "no kind \"Nothing\" is registered for version \"v1\"")),
        row(create, JSON, with(map("a"), "/apiVersion", "v2"), (400, "BadRequest", "no kind \"ConfigMap\" is registered for version \"v2\"")),
        row(create, JSON, json!({"apiVersion": "v1", "kind": "ConfigMap", "data": 7}), (400, "BadRequest", "cannot unmarshal number")),
        row(create, JSON, with(map("a"), "/metadata/namespace", "other"), (400, "BadRequest", "does not match the namespace sent on the request")),
        row(create, JSON, json!({"apiVersion": "v1", "kind": "ConfigMap"}), (422, "Invalid", "name or generateName is required")),
        row(create, JSON, map("Upper"), (422, "Invalid", "metadata.name: Invalid value: \"Upper\"")),
        row(create, JSON, json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "l"}, "data": {"x": large}}), (413, "RequestEntityTooLarge", "Request entity too large")),
        row(("PUT", MAP), JSON, map("there"), (400, "BadRequest", "does not match the name on the URL")),
        row(("PATCH", MAP), MERGE, "{", (400, "BadRequest", "")),
        row(("PATCH", MAP), "application/json-patch+json", "{}", (400, "BadRequest", "error decoding patch: json: cannot unmarshal object into Go value of type []handlers.jsonPatchOp")),
        row(("PATCH", MAP), "application/json-patch+json", json!(vec![json!({"op": "test", "path": "", "value": 1}); 10_001]), (413, "RequestEntityTooLarge", "The allowed maximum operations in a JSON patch is 10000, got 10001")),
        row(("PATCH", MAP), "application/json-patch+json", deepening(), (422, "Invalid", "exceeded max depth")),
        row(("PATCH", MAP), "application/json-patch+json", doubling(), (422, "Invalid", "Unable to complete the copy")),
        row(("PATCH", MAP), MERGE, "[]", (400, "BadRequest", "error decoding patch: json: cannot unmarshal array into Go value of type map[string]interface {}")),
        row(("PATCH", MAP), MERGE, json!({"data": {"a": 1}}), (422, "Invalid", " \"\" is invalid: patch: Invalid value: ")),
        row(("PATCH", &format!("{MAP}?fieldValidation=Strict")), MERGE, json!({"dat": {}}), (422, "Invalid", "strict decoding error: unknown field \"dat\"")),
        row(("PATCH", &format!("{MAP}?fieldValidation=Strict")), MERGE, r#"{"data":{"a":"1","a":"2"}}"#, (422, "Invalid", "strict decoding error: duplicate field \"data.a\"")),
        row(("PATCH", &format!("{MAP}?fieldValidation=Strict")), "application/strategic-merge-patch+json", json!({"dat": {"x": [1, "y"]}}), (422, "Invalid", "Invalid value: \"map[dat:map[x:[1 y]]]\": strict decoding error: unknown field \"dat\"")),
        row(("PATCH", MAP), MERGE, json!({"kind": "Secret"}), (400, "BadRequest", "unknown conversion")),
        row(("PATCH", MAP), "application/json-patch+json", r#"[{"op":"test","path":"/data","value":1}]"#, (422, "Invalid", "")),
    ]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn options_selectors_and_tokens() {
    let server = Server::start();
    let client = client_with_a_map(&server).await;
    let list = |query: &str, expected| asked(("GET", &format!("{MAPS}?{query}")), expected);
    let create = |query: &str, expected| {
        row(
            ("POST", &format!("{MAPS}?{query}")),
            JSON,
            map("a"),
            expected,
        )
    };
    let patch = |query: &str, content, expected| {
        row(
            ("PATCH", &format!("{MAP}?{query}")),
            content,
            map("here"),
            expected,
        )
    };
    let long = "m".repeat(129);
    hold(
        &client,
        &[
            list(
                "labelSelector=a%3Db%3Dc",
                (
                    400,
                    "BadRequest",
                    "found '=', expected: ',' or 'end of string'",
                ),
            ),
            list(
                "labelSelector=a+in",
                (
                    400,
                    "BadRequest",
                    "unable to parse requirement: found '' expected: '('",
                ),
            ),
            list(
                "fieldSelector=spec.color%3Dred",
                (
                    400,
                    "BadRequest",
                    "\"spec.color\" is not a known field selector: only \"metadata.name\", \"metadata.namespace\"",
                ),
            ),
            asked(
                ("GET", "/api/v1/pods?fieldSelector=spec.color%3Dred"),
                (400, "BadRequest", "field label not supported: spec.color"),
            ),
            list(
                "fieldSelector=metadata.name",
                (
                    400,
                    "BadRequest",
                    "invalid selector: 'metadata.name'; can't understand 'metadata.name'",
                ),
            ),
            list(
                "limit=1&continue=rubbish",
                (
                    400,
                    "BadRequest",
                    "invalid continue token: continue key is not valid",
                ),
            ),
            list(
                "limit=1&continue=eyJ2IjoibWV0YS5rOHMuaW8vdjEiLCJydiI6MSwic3RhcnQiOiIuLi9hIn0",
                (400, "BadRequest", "continue key is not valid: ../a"),
            ),
            list(
                "limit=many",
                (
                    400,
                    "BadRequest",
                    "strconv.ParseInt: parsing \"many\": invalid syntax",
                ),
            ),
            list(
                "resourceVersion=new",
                (
                    400,
                    "BadRequest",
                    "invalid resource version: resourceVersion: Invalid value: \"new\": strconv.ParseUint: parsing \"new\": invalid syntax",
                ),
            ),
            list(
                "resourceVersionMatch=Exact",
                (
                    422,
                    "Invalid",
                    "resourceVersionMatch is forbidden unless resourceVersion is provided",
                ),
            ),
            list(
                "resourceVersionMatch=Sometimes&resourceVersion=1",
                (422, "Invalid", "resourceVersionMatch"),
            ),
            list(
                "resourceVersionMatch=Exact&resourceVersion=0",
                (422, "Invalid", "is forbidden for resourceVersion \"0\""),
            ),
            list(
                "sendInitialEvents=true",
                (422, "Invalid", "sendInitialEvents is forbidden for list"),
            ),
            list(
                "watch=true&sendInitialEvents=true",
                (
                    422,
                    "Invalid",
                    "requires setting resourceVersionMatch to NotOlderThan",
                ),
            ),
            list(
                "watch=true&resourceVersionMatch=NotOlderThan&resourceVersion=1",
                (
                    422,
                    "Invalid",
                    "is forbidden for watch unless sendInitialEvents is provided",
                ),
            ),
            create(
                "dryRun=Some",
                (
                    422,
                    "Invalid",
                    "dryRun: Unsupported value: [\"Some\"]: supported values: \"All\"",
                ),
            ),
            create(
                "fieldValidation=Never",
                (
                    422,
                    "Invalid",
                    "fieldValidation: Unsupported value: \"Never\"",
                ),
            ),
            create(
                "fieldManager=a%0Ab",
                (422, "Invalid", "invalid character U+000A (at position 1)"),
            ),
            create(
                &format!("fieldManager={long}"),
                (
                    422,
                    "Invalid",
                    "fieldManager: Too long: may not be more than 128 bytes",
                ),
            ),
            patch(
                "",
                APPLY,
                (
                    422,
                    "Invalid",
                    "fieldManager: Required value: is required for apply patch",
                ),
            ),
            patch(
                "force=true",
                MERGE,
                (
                    422,
                    "Invalid",
                    "force: Forbidden: may not be specified for non-apply patch",
                ),
            ),
            asked(
                ("DELETE", &format!("{MAP}?propagationPolicy=Sideways")),
                (
                    422,
                    "Invalid",
                    "propagationPolicy: Unsupported value: \"Sideways\"",
                ),
            ),
        ],
    )
    .await;
    // The client would ask this again and again.
    let (code, status) = server.raw(&format!("{MAPS}?resourceVersion=99999999"));
    assert_eq!((code, &status["reason"]), (504, &json!("Timeout")));
    let details = &status["details"];
    assert_eq!(details["retryAfterSeconds"], 1);
    assert_eq!(details["causes"][0]["reason"], "ResourceVersionTooLarge");
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_names_and_preconditions() {
    let server = Server::start();
    let client = client_with_a_map(&server).await;
    let absent = "/api/v1/namespaces/default/configmaps/absent";
    let stale = with(map("here"), "/metadata/resourceVersion", "1");
    let other = with(map("here"), "/metadata/uid", "another");
    let class = json!({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "rc"}, "handler": "h"});
    let created = ("POST", "/apis/node.k8s.io/v1/runtimeclasses");
    let created = answer(&client, &row(created, JSON, class, (0, "", ""))).await;
    assert_eq!(created.0, 201);
    let precondition =
        json!({"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": "another"}});
    hold(&client, &[
        asked(("GET", absent), (404, "NotFound", "configmaps \"absent\" not found")),
        asked(("DELETE", absent), (404, "NotFound", "configmaps \"absent\" not found")),
        row(("PATCH", absent), MERGE, "{}", (404, "NotFound", "configmaps \"absent\" not found")),
        row(("PUT", absent), JSON, map("absent"), (404, "NotFound", "configmaps \"absent\" not found")),
        asked(("GET", "/apis/apps/v1/namespaces/default/deployments/absent"), (404, "NotFound", "deployments.apps \"absent\" not found")),
        asked(("GET", "/api/v1/namespaces/default/nothings"), (404, "NotFound", "the server could not find the requested resource")),
        asked(("GET", "/apis/nowhere.io/v1/things"), (404, "NotFound", "the server could not find the requested resource")),
        asked(("GET", &format!("{MAP}/scale")), (404, "NotFound", "the server could not find the requested resource")),
        asked(("GET", &format!("{MAP}/status/more")), (404, "NotFound", "the server could not find the requested resource")),
        row(("POST", MAP), JSON, map("here"), (405, "MethodNotAllowed", "the server does not allow this method on the requested resource")),
        row(("PUT", MAPS), JSON, map("here"), (405, "MethodNotAllowed", "")),
        asked(("DELETE", "/api/v1/namespaces"), (405, "MethodNotAllowed", "")),
        row(("POST", MAPS), JSON, map("here"), (409, "AlreadyExists", "configmaps \"here\" already exists")),
        row(("PUT", MAP), JSON, stale, (409, "Conflict", "the object has been modified; please apply your changes to the latest version")),
        row(("PUT", MAP), JSON, other, (409, "Conflict", "Precondition failed: UID in precondition: another")),
        row(("DELETE", MAP), JSON, precondition, (409, "Conflict", "Operation cannot be fulfilled on ConfigMap \"here\": the UID in the precondition (another) does not match the UID in record (")),
        row(("DELETE", MAP), JSON, json!({"apiVersion": "v1", "kind": "Pod"}), (400, "BadRequest", "no kind \"Pod\" is registered for version \"v1\"")),
        row(("POST", MAPS), JSON, with(map("here"), "/metadata/generateName", "he"), (409, "AlreadyExists", "already exists, the server was not able to generate a unique name for the object")),
        row(("POST", "/api/v1/configmaps"), JSON, map("a"), (405, "MethodNotAllowed", "")),
        row(("PUT", "/apis/node.k8s.io/v1/runtimeclasses/rc"), JSON,
            json!({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "rc"}, "handler": "h"}),
            (422, "Invalid", "runtimeclasses.node.k8s.io \"rc\" is invalid: metadata.resourceVersion: Invalid value: 0: must be specified for an update")),
        row(("POST", "/version"), JSON, "{}", (405, "MethodNotAllowed", "")),
        asked(("GET", "/api/v1/namespaces/default/configmaps/%2e%2e"), (400, "BadRequest", "Name parameter invalid: \"..\": may not be '..'")),
        asked(("GET", "/api/v1//configmaps"), (404, "NotFound", "")),
        row(("POST", "/api/v1/namespaces/default/pods/a/binding"), JSON,
            json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "a"}, "target": {"kind": "Pod", "name": "n"}}),
            (422, "Invalid", "target.kind: Unsupported value: \"Pod\": supported values: \"Node\", \"<empty>\"")),
        row(("POST", "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews"), JSON, json!({"spec": {}}), (400, "BadRequest", "no namespace on request")),
        row(("PUT", "/api/v1/namespaces/default/finalize"), JSON,
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}, "spec": {"finalizers": ["bad"]}}),
            (422, "Invalid", "spec.finalizers[0]: Invalid value: \"bad\": name is neither a standard finalizer name nor is it fully qualified")),
        row(("POST", "/api/v1/namespaces/default/serviceaccounts/absent/token"), JSON,
            json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": []}}),
            (404, "NotFound", "serviceaccounts \"absent\" not found")),
        row(("POST", "/api/v1/namespaces/default/pods/a/eviction"), JSON,
            json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "b"}}),
            (400, "BadRequest", "name in URL does not match name in Eviction object")),
        asked(("GET", "/api/v1/namespaces/default/services/http:web:80:x/proxy/"), (400, "BadRequest", "invalid service request \"http:web:80:x\"")),
        asked(("GET", "/api/v1/namespaces/default/services/absent/proxy/"), (404, "NotFound", "services \"absent\" not found")),
    ]).await;
    let (_, status) = answer(&client, &asked(("GET", absent), (0, "", ""))).await;
    assert_eq!(
        status["details"],
        json!({"name": "absent", "kind": "configmaps"})
    );
}
