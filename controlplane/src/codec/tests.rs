use serde_json::json;

use super::*;

fn strict(body: &Value) -> Result<Decoded, DecodeError> {
    decode(
        body.to_string().as_bytes(),
        MediaType::Json,
        "",
        "",
        FieldValidation::Strict,
    )
}

fn deployment(spec: Value) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}, "spec": spec})
}

fn refusal(body: &Value) -> String {
    strict(body).expect_err("it is refused").message
}

#[test]
fn unknown_fields_are_named_with_their_path() {
    let body = deployment(
        json!({"foo": 1, "template": {"spec": {"containers": [{"name": "a"}, {"name": "b", "imge": "x"}]}}}),
    );
    assert_eq!(
        refusal(&body),
        "Deployment in version \"v1\" cannot be handled as a Deployment: strict decoding error: \
         unknown field \"spec.foo\", unknown field \"spec.template.spec.containers[1].imge\""
    );
    let warned = decode(
        body.to_string().as_bytes(),
        MediaType::Json,
        "",
        "",
        FieldValidation::Warn,
    )
    .unwrap();
    assert_eq!(warned.warnings.len(), 2);
    assert_eq!(warned.warnings[0], "unknown field \"spec.foo\"");
    assert!(
        warned.value["spec"].get("foo").is_none(),
        "unknown fields are not kept"
    );
    let ignored = decode(
        body.to_string().as_bytes(),
        MediaType::Json,
        "",
        "",
        FieldValidation::Ignore,
    )
    .unwrap();
    assert!(ignored.warnings.is_empty());
}

#[test]
fn duplicate_fields_are_found_and_the_last_one_counts() {
    let body = br#"{"apiVersion":"v1","kind":"ConfigMap","data":{"a":"1","a":"2"},"metadata":{"name":"x","name":"y"},"immutable":true,"immutable":null}"#;
    let error = decode(body, MediaType::Json, "", "", FieldValidation::Strict)
        .unwrap_err()
        .message;
    assert!(error.ends_with("duplicate field \"data.a\", duplicate field \"metadata.name\", duplicate field \"immutable\""), "{error}");
    let value = decode(body, MediaType::Json, "", "", FieldValidation::Warn)
        .unwrap()
        .value;
    assert_eq!(
        value,
        json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"a": "2"}, "metadata": {"name": "y"}})
    );
}

#[test]
fn wrong_types_are_refused_whatever_the_validation() {
    for (spec, wanted) in [
        (
            json!({"replicas": "3"}),
            "json: cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32",
        ),
        (
            json!({"replicas": 1.5}),
            "json: cannot unmarshal number 1.5 into Go struct field DeploymentSpec.spec.replicas of type int32",
        ),
        (
            json!({"replicas": 3_000_000_000_i64}),
            "number 3000000000 into Go struct field DeploymentSpec.spec.replicas of type int32",
        ),
        (
            json!([]),
            "json: cannot unmarshal array into Go struct field Deployment.spec of type v1.DeploymentSpec",
        ),
        (
            json!({"paused": "yes"}),
            "json: cannot unmarshal string into Go struct field DeploymentSpec.spec.paused of type bool",
        ),
        (
            json!({"template": {"spec": {"containers": {"name": "a"}}}}),
            "json: cannot unmarshal object into Go struct field PodSpec.spec.template.spec.containers of type []v1.Container",
        ),
        (
            json!({"template": {"spec": {"containers": [{"env": [{"value": 1}]}]}}}),
            "json: cannot unmarshal number into Go struct field EnvVar.spec.template.spec.containers.env.value of type string",
        ),
        (
            json!({"template": {"spec": {"volumes": [{"configMap": {"name": 1}}]}}}),
            "json: cannot unmarshal number into Go struct field ConfigMapVolumeSource.spec.template.spec.volumes.VolumeSource.configMap.LocalObjectReference.name of type string",
        ),
        (
            json!({"selector": {"matchLabels": {"a": true}}}),
            "json: cannot unmarshal bool into Go struct field LabelSelector.spec.selector.matchLabels of type string",
        ),
        (
            json!({"template": {"spec": {"containers": [{"resources": {"limits": {"cpu": "lots"}}}]}}}),
            "quantities must match the regular expression",
        ),
    ] {
        let body = deployment(spec);
        let error = decode(
            body.to_string().as_bytes(),
            MediaType::Json,
            "",
            "",
            FieldValidation::Ignore,
        )
        .unwrap_err()
        .message;
        assert!(error.contains(wanted), "{error}");
    }
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "data": {"a": "not base64!"}});
    assert!(
        refusal(&secret).contains("illegal base64 data at input byte 3"),
        "{}",
        refusal(&secret)
    );
}

#[test]
fn nulls_of_known_fields_go_and_special_types_take_their_canonical_form() {
    let body = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "p", "creationTimestamp": null, "annotations": {"a": null}},
        "spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": 0.5, "memory": "1024Mi"}},
            "livenessProbe": {"httpGet": {"port": 80}}, "env": null}]},
        "status": {"startTime": "2026-01-02T03:04:05+01:00"},
    });
    let value = strict(&body).unwrap().value;
    assert_eq!(
        value["metadata"],
        json!({"name": "p", "annotations": {"a": ""}})
    );
    let container = &value["spec"]["containers"][0];
    assert_eq!(
        container["resources"]["requests"],
        json!({"cpu": "500m", "memory": "1Gi"})
    );
    assert_eq!(container["livenessProbe"]["httpGet"]["port"], 80);
    assert!(container.get("env").is_none());
    assert_eq!(value["status"]["startTime"], "2026-01-02T02:04:05Z");
}

#[test]
fn a_body_without_kind_takes_that_of_the_resource() {
    let decoded = decode(
        b"{\"gracePeriodSeconds\":0}",
        MediaType::Json,
        "apps/v1",
        "DeleteOptions",
        FieldValidation::Strict,
    )
    .unwrap();
    assert_eq!(
        decoded.value,
        json!({"apiVersion": "apps/v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0})
    );
}

#[test]
fn kinds_without_a_type_are_kept_whole() {
    let body = json!({"apiVersion": "example.com/v1", "kind": "Widget", "spec": {"anything": [null, {"a": 1}]}});
    assert_eq!(strict(&body).unwrap().value, body);
    // A type of this name is there, for what a watch sends: it has no kind.
    let event = json!({"apiVersion": "apps/v1", "kind": "WatchEvent", "metadata": {"name": "w"}});
    assert_eq!(strict(&event).unwrap().value, event);
}

#[test]
fn yaml_is_read_as_kubernetes_reads_it() {
    let body = b"apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\nspec:\n  hostNetwork: yes\n  containers:\n  - name: c\n    args: [\"a\", 'b']\n    command:\n    - sh\n    - |\n      echo hi\n  volumes:\n  - name: v\n    secret: {secretName: s, defaultMode: 0644}\n";
    let value = decode(body, MediaType::Yaml, "", "", FieldValidation::Strict)
        .unwrap()
        .value;
    assert_eq!(value["spec"]["hostNetwork"], true);
    assert_eq!(value["spec"]["volumes"][0]["secret"]["defaultMode"], 420);
    assert_eq!(value["spec"]["containers"][0]["command"][1], "echo hi\n");
    assert!(decode(b"a: [", MediaType::Yaml, "v1", "Pod", FieldValidation::Warn).is_err());
    assert!(
        decode(
            b"metadata: {name: a, name: b}",
            MediaType::Yaml,
            "v1",
            "Pod",
            FieldValidation::Warn
        )
        .is_err()
    );
}

#[test]
fn what_is_not_an_object_is_refused() {
    for body in [&b""[..], b"[]", b"3", b"{", b"null", b"\xff"] {
        assert!(decode(body, MediaType::Json, "v1", "Pod", FieldValidation::Warn).is_err());
    }
}

#[test]
fn bytes_that_are_no_text_count_as_unknown_characters() {
    let body = b"{\"apiVersion\":\"v1\",\"kind\":\"ConfigMap\",\"data\":{\"a\":\"\xff\"}}";
    let decoded = decode(body, MediaType::Json, "", "", FieldValidation::Strict).expect("taken");
    assert_eq!(decoded.value["data"]["a"], "\u{fffd}");
}

#[test]
fn content_types_are_told_apart() {
    assert_eq!(
        MediaType::from_content_type("application/json; charset=utf-8"),
        Some(MediaType::Json)
    );
    assert_eq!(
        MediaType::from_content_type("application/vnd.kubernetes.protobuf"),
        Some(MediaType::Protobuf)
    );
    assert_eq!(MediaType::from_content_type("text/plain"), None);
}

proptest::proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..100)) {
        for media in [MediaType::Json, MediaType::Yaml, MediaType::Protobuf] {
            let _ = decode(&bytes, media, "v1", "Pod", FieldValidation::Strict);
        }
    }
}

/// Followed to their end, some of these would take the whole stack or memory, and the test with them.
#[test]
fn hostile_documents_are_refused() {
    let nested = |open: &str, close: &str, depth: usize| {
        format!("{}1{}", open.repeat(depth), close.repeat(depth))
    };
    let inside = |text: &str| {
        format!(
            r#"{{"apiVersion":"v1","kind":"ConfigMap","metadata":{{"name":"a"}},"data":{text}}}"#
        )
    };
    // Each level refers to the one before ten times: a billion at the end.
    let mut aliases = String::from("a0: &a0 [x]\n");
    for level in 1..10 {
        let before = level - 1;
        let list = vec![format!("*a{before}"); 10].join(",");
        aliases += &format!("a{level}: &a{level} [{list}]\n");
    }
    // Less than parsers mind, and more than a list of such objects could be read with.
    let defaults = format!(
        r#"{{"apiVersion":"apps/v1","kind":"ControllerRevision","metadata":{{"name":"a"}},"revision":1,"data":{}}}"#,
        nested("[", "]", 110)
    );
    let revision: Value = serde_json::from_str(&defaults).expect("JSON");
    let bodies: Vec<(Vec<u8>, MediaType)> = vec![
        (defaults.clone().into_bytes(), MediaType::Json),
        (defaults.into_bytes(), MediaType::Yaml),
        (
            protobuf::tests::encode(&revision).expect("known"),
            MediaType::Protobuf,
        ),
        (nested("[", "]", 100_000).into_bytes(), MediaType::Json),
        (
            nested(r#"{"a":"#, "}", 100_000).into_bytes(),
            MediaType::Json,
        ),
        (
            inside(&nested(r#"{"a":"#, "}", 100_000)).into_bytes(),
            MediaType::Json,
        ),
        (nested("[", "]", 100_000).into_bytes(), MediaType::Yaml),
        (nested("- ", "", 10_000).into_bytes(), MediaType::Yaml),
        (aliases.into_bytes(), MediaType::Yaml),
        (inside("{\"a\":\"\u{0}\"").into_bytes(), MediaType::Json),
        (b"kind: \xff\xfe".to_vec(), MediaType::Yaml),
        (inside(r#"{"a":1e999}"#).into_bytes(), MediaType::Json),
    ];
    for (body, media) in bodies {
        let decoded = decode(&body, media, "v1", "ConfigMap", FieldValidation::Strict);
        let head = String::from_utf8_lossy(&body[..body.len().min(40)]).into_owned();
        assert!(decoded.is_err(), "{head}");
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(400))]

    #[test]
    fn broken_documents_never_panic(
        object in arbitrary::object(),
        at in proptest::prelude::any::<proptest::sample::Index>(),
        byte in proptest::prelude::any::<u8>(),
        cut in proptest::prelude::any::<proptest::sample::Index>(),
    ) {
        let mut body = object.to_string().into_bytes();
        let at = at.index(body.len());
        body[at] = byte;
        for media in [MediaType::Json, MediaType::Yaml] {
            let _ = decode(&body, media, "", "", FieldValidation::Strict);
        }
        let _ = transcode::transcode(&body);
        body.truncate(cut.index(body.len()));
        for media in [MediaType::Json, MediaType::Yaml] {
            let _ = decode(&body, media, "", "", FieldValidation::Warn);
        }
    }

    #[test]
    fn objects_are_the_same_by_way_of_yaml(object in arbitrary::object()) {
        let text = serde_saphyr::to_string(&object).expect("YAML");
        let decoded = decode(text.as_bytes(), MediaType::Yaml, "", "", FieldValidation::Strict);
        let decoded = decoded.map(|decoded| decoded.value);
        proptest::prop_assert_eq!(decoded.as_ref(), Ok(&object), "{}", text);
    }
}
