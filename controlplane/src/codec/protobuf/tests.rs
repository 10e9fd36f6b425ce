use proptest::prelude::*;

use super::*;
use crate::codec::arbitrary::object;
use crate::codec::transcode::{List, message, transcode, watch_frame};
use crate::codec::{FieldValidation, MediaType};
use crate::registry::resources;

/// The object with its envelope, from a tree; None when the tables do not know its kind, or a value does not fit its type.
pub fn encode(object: &Value) -> Option<Vec<u8>> {
    let (api_version, kind) = (object["apiVersion"].as_str()?, object["kind"].as_str()?);
    let (group, version) = split_api_version(api_version);
    let ty = type_of(group, version, kind)?;
    let mut raw = Writer::default();
    write_message(object.as_object()?, ty, &mut raw)?;
    let mut out = Writer {
        out: MAGIC.to_vec(),
    };
    out.message(1, |meta| {
        meta.bytes(1, api_version.as_bytes());
        meta.bytes(2, kind.as_bytes());
    });
    out.bytes(2, &raw.out);
    out.bytes(3, b"");
    out.bytes(4, b"");
    Some(out.out)
}

/// A body made field by field, as a Go client makes it.
fn body(api_version: &str, kind: &str, raw: Writer) -> Vec<u8> {
    let mut out = Writer {
        out: MAGIC.to_vec(),
    };
    out.message(1, |w| {
        w.bytes(1, api_version.as_bytes());
        w.bytes(2, kind.as_bytes());
    });
    out.bytes(2, &raw.out);
    out.bytes(3, b"");
    out.bytes(4, b"");
    out.out
}

fn metadata(w: &mut Writer, name: &str) {
    w.message(1, |w| {
        for (tag, text) in [
            (1, name),
            (2, ""),
            (3, "default"),
            (4, ""),
            (5, ""),
            (6, ""),
        ] {
            w.bytes(tag, text.as_bytes());
        }
        w.varint(7, 0);
        w.message(8, |_| {});
        w.message(11, |w| {
            w.bytes(1, b"app");
            w.bytes(2, b"hello");
        });
    });
}

#[test]
fn a_config_map_as_kubectl_posts_it() {
    let mut raw = Writer::default();
    metadata(&mut raw, "settings");
    for (key, value) in [("a", "1"), ("empty", "")] {
        raw.message(2, |w| {
            w.bytes(1, key.as_bytes());
            w.bytes(2, value.as_bytes());
        });
    }
    raw.message(3, |w| {
        w.bytes(1, b"blob");
        w.bytes(2, &[0, 255, 1]);
    });
    let decoded = decode(&body("v1", "ConfigMap", raw), "", "").unwrap();
    assert_eq!(
        decoded,
        json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "settings", "namespace": "default", "labels": {"app": "hello"}},
            "data": {"a": "1", "empty": ""},
            "binaryData": {"blob": "AP8B"},
        })
    );
}

#[test]
fn a_deployment_keeps_zeroes_that_mean_something_and_drops_those_that_do_not() {
    let mut raw = Writer::default();
    metadata(&mut raw, "web");
    raw.message(2, |spec| {
        spec.varint(1, 0); // replicas: 0 is a value
        spec.varint(5, 0); // minReadySeconds: 0 is absence
        spec.varint(7, 0); // paused: false is absence
        spec.message(3, |template| {
            template.message(2, |pod| {
                pod.bytes(3, b""); // restartPolicy
                pod.varint(4, 0); // terminationGracePeriodSeconds: 0 is a value
                pod.varint(11, 0); // hostNetwork: false is absence
                pod.varint(21, 0); // automountServiceAccountToken: false is a value
                pod.message(1, |volume| {
                    volume.bytes(1, b"cache");
                    volume.message(2, |source| {
                        source.message(2, |empty_dir| empty_dir.bytes(1, b""))
                    });
                });
                pod.message(2, |container| {
                    container.bytes(1, b"web");
                    container.bytes(2, b"nginx");
                    container.message(6, |port| {
                        port.bytes(1, b"");
                        port.varint(2, 0);
                        port.varint(3, 80);
                        port.bytes(4, b""); // protocol: "" is absence, though its default is not ""
                    });
                    container.message(8, |resources| {
                        resources.message(1, |entry| {
                            entry.bytes(1, b"cpu");
                            entry.message(2, |q| q.bytes(1, b"0.5"));
                        });
                    });
                    container.message(11, |probe| {
                        probe.message(1, |handler| {
                            handler.message(2, |http| {
                                http.bytes(1, b"/");
                                http.message(2, |port| {
                                    port.varint(1, 1);
                                    port.varint(2, 0);
                                    port.bytes(3, b"http");
                                });
                            });
                        });
                        probe.varint(2, 0);
                        probe.varint(4, 10);
                    });
                });
            });
        });
        spec.message(4, |strategy| {
            strategy.bytes(1, b"RollingUpdate");
            strategy.message(2, |rolling| {
                rolling.message(1, |n| {
                    n.varint(1, 0);
                    n.varint(2, 0);
                    n.bytes(3, b"");
                });
            });
        });
    });
    let decoded = decode(&body("apps/v1", "Deployment", raw), "", "").unwrap();
    let spec = &decoded["spec"];
    assert_eq!(spec["replicas"], 0);
    assert!(spec.get("minReadySeconds").is_none() && spec.get("paused").is_none());
    assert_eq!(
        spec["strategy"],
        json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0}})
    );
    let pod = &spec["template"]["spec"];
    assert!(pod.get("restartPolicy").is_none() && pod.get("hostNetwork").is_none());
    assert_eq!(
        (
            &pod["terminationGracePeriodSeconds"],
            &pod["automountServiceAccountToken"]
        ),
        (&json!(0), &json!(false))
    );
    assert_eq!(pod["volumes"], json!([{"name": "cache", "emptyDir": {}}]));
    let container = &pod["containers"][0];
    assert_eq!(container["ports"], json!([{"containerPort": 80}]));
    assert_eq!(container["resources"]["limits"]["cpu"], "500m");
    assert_eq!(
        container["readinessProbe"],
        json!({"httpGet": {"path": "/", "port": "http"}, "periodSeconds": 10})
    );
}

#[test]
fn times_extras_and_raw_json_have_their_json_forms() {
    let lease = json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": "n", "creationTimestamp": "2026-01-02T03:04:05Z",
            "managedFields": [{"manager": "m", "fieldsV1": {"f:spec": {}}, "time": "2026-01-02T03:04:05Z"}]},
        "spec": {"renewTime": "2026-01-02T03:04:05.000007Z", "leaseDurationSeconds": 0},
    });
    assert_eq!(decode(&encode(&lease).unwrap(), "", "").unwrap(), lease);
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "metadata": {},
        "spec": {"user": "u", "extra": {"scopes": ["a", "b"], "none": []}}, "status": {"allowed": false},
    });
    assert_eq!(decode(&encode(&review).unwrap(), "", "").unwrap(), review);
    let crd = json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": "c"},
        "spec": {"group": "g", "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {
            "type": "object", "x-kubernetes-preserve-unknown-fields": true, "default": {"a": [1, null]},
            "properties": {"l": {"type": "array", "items": {"type": "string"}}, "m": {"additionalProperties": false},
                "n": {"additionalProperties": {"type": "integer"}}}}}}]},
    });
    let back = decode(&encode(&crd).unwrap(), "", "").unwrap();
    assert_eq!(
        back["spec"]["versions"][0]["schema"],
        crd["spec"]["versions"][0]["schema"]
    );
}

#[test]
fn what_is_not_a_known_message_is_refused_with_the_reason() {
    assert_eq!(decode(b"{}", "v1", "Pod"), Err(ProtobufError::Magic));
    let unknown = decode(&body("v1", "Nonsense", Writer::default()), "", "").unwrap_err();
    assert_eq!(
        unknown.to_string(),
        "no kind \"Nonsense\" is registered for version \"v1\""
    );
    let mut truncated = body("v1", "Pod", {
        let mut w = Writer::default();
        metadata(&mut w, "p");
        w
    });
    truncated.truncate(20);
    assert!(matches!(
        decode(&truncated, "", ""),
        Err(ProtobufError::Malformed(_))
    ));
    assert_eq!(
        decode(&body("", "", Writer::default()), "v1", "Pod").unwrap()["kind"],
        "Pod"
    );
}

#[test]
fn a_watch_frame_holds_the_event_and_its_object() {
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}});
    let frame = watch_frame("ADDED", pod.to_string().as_bytes()).unwrap();
    let (length, event) = frame.split_at(4);
    assert_eq!(
        u32::from_be_bytes(length.try_into().unwrap()) as usize,
        event.len()
    );
    let mut reader = Reader::new(event);
    assert_eq!(reader.next().unwrap().unwrap().1.text(), Ok("ADDED"));
    let extension = reader.next().unwrap().unwrap().1.bytes().unwrap();
    let object = Reader::new(extension)
        .next()
        .unwrap()
        .unwrap()
        .1
        .bytes()
        .unwrap();
    assert_eq!(decode(object, "", "").unwrap(), pod);
    assert!(watch_frame("ADDED", br#"{"kind":"Nonsense","apiVersion":"v1"}"#).is_none());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_kind_survives_the_way_to_protobuf_and_back(object in object()) {
        let encoded = encode(&object).expect("the tables know the kind");
        prop_assert_eq!(decode(&encoded, "", "").unwrap(), object);
    }

    #[test]
    fn text_and_tree_become_the_same_protobuf(object in object()) {
        let encoded = transcode(object.to_string().as_bytes()).expect("the tables know the kind");
        prop_assert_eq!(decode(&encoded, "", "").unwrap(), object);
    }

    #[test]
    fn a_list_is_the_same_item_by_item_as_whole(object in object(), count in 0..4usize) {
        let (api_version, kind) = (object["apiVersion"].as_str().unwrap(), object["kind"].as_str().unwrap());
        let list_kind = format!("{kind}List");
        let (group, version) = split_api_version(api_version);
        let mut item = object.clone();
        for field in ["kind", "apiVersion"] {
            item.as_object_mut().unwrap().remove(field);
        }
        let metadata = json!({"resourceVersion": "7", "continue": "x"});
        let whole = json!({"kind": list_kind, "apiVersion": api_version, "metadata": metadata, "items": vec![item.clone(); count]});
        let ty = type_of(group, version, kind).unwrap();
        let text = item.to_string();
        let message = message(ty, text.as_bytes()).expect("the tables know the kind");
        let lengths = std::iter::repeat_n(message.len(), count);
        let list = List::new(api_version, &list_kind, metadata.to_string().as_bytes(), lengths);
        let list = list.map(|list| {
            let mut out = list.head.clone();
            for _ in 0..count {
                list.write_item(&mut out, &message);
            }
            out.extend_from_slice(List::TAIL);
            assert_eq!(out.len(), list.length);
            out
        });
        prop_assert_eq!(list, transcode(whole.to_string().as_bytes()));
    }

    #[test]
    fn what_protobuf_decodes_to_passes_the_check_of_json(object in object()) {
        let text = object.to_string();
        let decoded = crate::codec::decode(text.as_bytes(), MediaType::Json, "", "", FieldValidation::Strict).unwrap();
        prop_assert_eq!(decoded.value, object);
    }

    #[test]
    fn random_bytes_never_panic(kind in 0..197usize, bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let resource = &resources()[kind % resources().len()];
        let body = body(&resource.api_version(), resource.kind, Writer { out: bytes });
        let _ = decode(&body, "", "");
    }

    #[test]
    fn broken_bodies_never_panic(object in object(), at in any::<prop::sample::Index>(), bit in 0..8u8, cut in any::<prop::sample::Index>()) {
        let mut bytes = encode(&object).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let _ = decode(&bytes, "", "");
        bytes.truncate(cut.index(bytes.len()));
        let _ = decode(&bytes, "", "");
    }
}
