//! One object in every encoding, in and out, as Accept and Content-Type ask for it.

use keelway_controlplane::codec::{protobuf, transcode};
use serde_json::{Value, json};

use crate::server::Server;

const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";

fn accept(media: &str) -> String {
    format!("Accept: {media}")
}

fn decoded(body: &[u8]) -> Value {
    protobuf::decode(body, "", "").expect("Kubernetes protobuf")
}

fn parsed(body: &[u8]) -> Value {
    serde_json::from_slice(body).expect("JSON")
}

#[test]
fn every_kind_is_served_as_protobuf_as_it_is_as_json() {
    let server = Server::start();
    server.kubectl_in("apply -f -", crate::kubectl::WEB);
    let mut lists = 0;
    let (_, groups) = server.raw("/apis");
    let groups = groups["groups"].as_array().expect("groups").clone();
    let versions = groups.iter().flat_map(|group| {
        let versions = group["versions"].as_array().expect("versions").iter();
        versions.map(|version| {
            format!(
                "/apis/{}",
                version["groupVersion"].as_str().expect("a name")
            )
        })
    });
    for root in versions.chain(["/api/v1".to_owned()]) {
        let (_, resources) = server.raw(&root);
        for resource in resources["resources"].as_array().expect("resources") {
            let listed = resource["verbs"]
                .as_array()
                .is_some_and(|verbs| verbs.iter().any(|v| v == "list"));
            if !listed
                || resource["name"]
                    .as_str()
                    .is_some_and(|name| name.contains('/'))
            {
                continue;
            }
            let path = format!("{root}/{}", resource["name"].as_str().expect("a name"));
            let (code, content_type, body) = server.curl(&["-H", &accept(PROTOBUF)], &path);
            assert_eq!((code, content_type.as_str()), (200, PROTOBUF), "{path}");
            let (_, mut list) = server.raw(&path);
            let mut list_too = decoded(&body);
            for list in [&mut list, &mut list_too] {
                // Time goes on between the two; protobuf does not tell an empty list from none.
                list["metadata"] = json!({});
                let full = |_: &String, value: &mut Value| *value != json!([]);
                let items = list.get_mut("items").and_then(Value::as_array_mut);
                for item in items.into_iter().flatten() {
                    item.as_object_mut().expect("an object").retain(full);
                }
                list.as_object_mut().expect("a list").retain(full);
            }
            assert_eq!(list_too, list, "{path}");
            lists += 1;
        }
    }
    assert!(lists > 50, "{lists}");
}

#[test]
fn an_object_goes_in_and_out_in_every_encoding() {
    let server = Server::start();
    let path = "/api/v1/namespaces/default/configmaps";
    let object = |name: &str| {
        json!({"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": name},
            "data": {"a": "1", "b": "true"}, "binaryData": {"c": "AP8="}})
    };
    let sent = |media: &str, name: &str, body: &[u8]| {
        let file = server.path(name);
        std::fs::write(&file, body).expect("a file");
        let data = format!("@{}", file.display());
        let content = format!("Content-Type: {media}");
        let arguments = ["-H", &content, "-H", &accept(media), "--data-binary", &data];
        let (code, content_type, body) = server.curl(&arguments, path);
        assert_eq!(
            (code, content_type.as_str()),
            (201, media),
            "{}",
            String::from_utf8_lossy(&body)
        );
        body
    };
    let json = parsed(&sent(
        "application/json",
        "in-json",
        object("in-json").to_string().as_bytes(),
    ));
    assert_eq!(json["data"]["b"], "true");
    let bytes =
        transcode::transcode(object("in-protobuf").to_string().as_bytes()).expect("a known kind");
    let binary = decoded(&sent(PROTOBUF, "in-protobuf", &bytes));
    assert_eq!(binary["binaryData"], object("x")["binaryData"]);
    let yaml = "kind: ConfigMap\napiVersion: v1\nmetadata: {name: in-yaml}\ndata: {a: \"1\", b: \"true\"}\n";
    let said =
        String::from_utf8(sent("application/yaml", "in-yaml", yaml.as_bytes())).expect("text");
    assert!(
        said.contains("name: in-yaml") && said.contains("b: \"true\""),
        "{said}"
    );

    let one = format!("{path}/in-protobuf");
    let (_, _, as_json) = server.curl(&["-H", &accept("application/json")], &one);
    let (_, _, as_protobuf) = server.curl(&["-H", &accept(PROTOBUF)], &one);
    assert_eq!(decoded(&as_protobuf), parsed(&as_json));
    let metadata = format!("{PROTOBUF};as=PartialObjectMetadata;g=meta.k8s.io;v=v1");
    let (code, _, body) = server.curl(&["-H", &accept(&metadata)], &one);
    let partial = decoded(&body);
    assert_eq!(
        (code, partial["kind"].as_str()),
        (200, Some("PartialObjectMetadata"))
    );
    assert_eq!(partial["metadata"]["name"], "in-protobuf");
    // Failures and successes of deletion speak the same language.
    let (code, content_type, body) =
        server.curl(&["-H", &accept(PROTOBUF)], &format!("{path}/nothing"));
    assert_eq!((code, content_type.as_str()), (404, PROTOBUF));
    assert_eq!(decoded(&body)["reason"], "NotFound");
    let (_, _, body) = server.curl(&["-X", "DELETE", "-H", &accept(PROTOBUF)], &one);
    assert_eq!(decoded(&body)["status"], "Success");
}

#[test]
fn a_watch_sends_frames_of_protobuf() {
    let server = Server::start();
    server.kubectl("create configmap first --from-literal=a=1");
    let path = "/api/v1/namespaces/default/configmaps?watch=true&timeoutSeconds=1&allowWatchBookmarks=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan";
    let media = format!("{PROTOBUF};stream=watch");
    let (code, content_type, mut body) = server.curl(
        &["-H", &accept(&format!("{PROTOBUF},application/json"))],
        path,
    );
    assert_eq!((code, content_type), (200, media));
    let mut seen = Vec::new();
    while body.len() > 4 {
        let length = u32::from_be_bytes(body[..4].try_into().expect("four bytes")) as usize;
        let frame: Vec<u8> = body.drain(..4 + length).skip(4).collect();
        // {1: type, 2: {1: object}}, each with a length that fits in one or two bytes.
        let kind_length = usize::from(frame[1]);
        let kind = String::from_utf8(frame[2..2 + kind_length].to_vec()).expect("text");
        let at = frame
            .windows(4)
            .position(|bytes| bytes == b"k8s\0")
            .expect("an object");
        seen.push((kind, decoded(&frame[at..])));
    }
    assert!(body.is_empty());
    let added: Vec<&str> = seen
        .iter()
        .filter(|(kind, _)| kind == "ADDED")
        .filter_map(|(_, object)| object["metadata"]["name"].as_str())
        .collect();
    assert!(added.contains(&"first"), "{seen:?}");
    let (_, bookmark) = seen
        .iter()
        .find(|(kind, _)| kind == "BOOKMARK")
        .expect("the end of the initial events");
    assert_eq!(
        bookmark["metadata"]["annotations"]["k8s.io/initial-events-end"],
        "true"
    );
}

#[test]
fn what_cannot_be_given_or_taken_is_said() {
    let server = Server::start();
    let refused = |arguments: &[&str], path: &str| {
        let (code, _, body) = server.curl(arguments, path);
        // A failure may be told in YAML.
        let status: Value = serde_json::from_slice(&body).unwrap_or_default();
        (code, status["message"].as_str().unwrap_or("").to_owned())
    };
    let path = "/api/v1/namespaces/default/configmaps";
    let (code, said) = refused(&["-H", "Accept: text/html"], path);
    assert_eq!(code, 406);
    assert_eq!(
        said,
        "406: Not Acceptable\n\nAvailable representations: application/json, application/yaml, application/vnd.kubernetes.protobuf"
    );
    let (code, _) = refused(
        &["-H", "Accept: application/yaml"],
        &format!("{path}?watch=true&timeoutSeconds=1"),
    );
    assert_eq!(code, 406);
    let (code, said) = refused(&["-H", "Content-Type: text/plain", "-d", "x"], path);
    assert_eq!(code, 415);
    assert_eq!(
        said,
        "the body of the request was in an unknown format - accepted media types include: application/json, application/yaml, application/vnd.kubernetes.protobuf"
    );
    let (code, said) = refused(
        &["-H", &format!("Content-Type: {PROTOBUF}"), "-d", "{}"],
        path,
    );
    assert_eq!(code, 400);
    assert!(
        said.contains("does not appear to be a protobuf message"),
        "{said}"
    );
}
