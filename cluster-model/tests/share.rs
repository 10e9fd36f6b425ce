//! What is told to another process arrives as it was, as far as names go; bytes that nobody told are refused, whatever they are.

use cluster_model::share::{FRAME_BYTES_MAX, Message, Versions, frame_bytes, put, read};
use cluster_model::{Kind, Object, ObjectKey, ObjectRef, read_manifest};
use proptest::prelude::*;

fn told(message: &Message) -> Message {
    let mut out = vec![7; 3];
    put(&mut out, message);
    let frame = &out[3..];
    let head = frame[..4].try_into().expect("four bytes");
    assert_eq!(frame_bytes(head), Ok(frame.len() - 4));
    read(&frame[4..]).expect("a message")
}

/// Objects in whose text there is nothing but what names are made of.
fn objects() -> Vec<Object> {
    let text = r#"{"items":[
      {"kind":"Service","metadata":{"name":"plain","namespace":"a"},"spec":{"clusterIP":"10.96.0.1",
        "clusterIPs":["10.96.0.1","fd00::1"],"ports":[{"name":"dns","port":53,"protocol":"UDP"},{"name":"s","port":9,"protocol":"SCTP"}]}},
      {"kind":"Service","metadata":{"name":"less","namespace":"a"},"spec":{"clusterIP":"None","clusterIPs":["None"],
        "publishNotReadyAddresses":true}},
      {"kind":"Service","metadata":{"name":"ext","namespace":"a"},"spec":{"type":"ExternalName","externalName":"Some.Example."}},
      {"kind":"Service","metadata":{"name":"none","namespace":"a"},"spec":{}},
      {"kind":"EndpointSlice","addressType":"IPv6","metadata":{"name":"e","namespace":"a","labels":{"kubernetes.io/service-name":"less"}},
        "ports":[{"name":"a","port":53,"protocol":"UDP"},{"port":80}],
        "endpoints":[{"addresses":["fd00::1"],"hostname":"h","conditions":{"ready":false,"serving":true,"terminating":true}},
          {"addresses":["fd00::2"],"targetRef":{"kind":"Pod","namespace":"a","name":"p"}}]},
      {"kind":"EndpointSlice","addressType":"IPv4","metadata":{"name":"alone","namespace":"a"},"endpoints":[{"addresses":["10.0.0.1"]}]}
    ]}"#;
    read_manifest(text.as_bytes()).expect("objects")
}

#[test]
fn every_message_arrives_as_it_was_told() {
    let mut versions = Versions::default();
    versions.reached(Kind::EndpointSlice, 1 << 40);
    let gone = ObjectRef {
        kind: Kind::Service,
        key: ObjectKey::new("a", "b"),
    };
    let mut messages = vec![
        Message::Opening {
            versions,
            well_for_s: 9,
        },
        Message::ListEnd(Kind::EndpointSlice),
        Message::Remove(gone),
        Message::Reached {
            kind: Kind::Service,
            version: 77,
        },
        Message::Failed {
            kind: Kind::Service,
            error: "away".into(),
        },
        Message::Alive,
    ];
    for object in objects() {
        messages.push(Message::Listed(object.clone()));
        messages.push(Message::Upsert(object));
    }
    for message in messages {
        assert_eq!(told(&message), message);
    }
}

#[test]
fn kinds_that_are_not_shared_are_not_told_and_long_texts_are_cut_at_a_character() {
    let node = r#"{"kind":"Node","metadata":{"name":"n"}}"#;
    let node = read_manifest(node.as_bytes()).expect("a node").remove(0);
    let mut out = Vec::new();
    put(&mut out, &Message::Upsert(node));
    assert!(out.is_empty());
    let long = Message::Failed {
        kind: Kind::Service,
        error: "€".repeat(100),
    };
    let Message::Failed { error, .. } = told(&long) else {
        panic!("another message")
    };
    assert_eq!(error, "€".repeat(85));
}

#[test]
fn versions_include_what_is_older_in_every_kind() {
    let at = |service, slice| {
        let mut versions = Versions::default();
        versions.reached(Kind::Service, service);
        versions.reached(Kind::EndpointSlice, slice);
        versions.reached(Kind::Pod, 99);
        versions
    };
    assert!(at(3, 3).include(&at(3, 2)) && at(0, 0).include(&at(0, 0)));
    assert!(!at(3, 3).include(&at(2, 4)) && !at(3, 3).include(&at(4, 0)));
}

#[test]
fn a_frame_is_bounded() {
    assert!(frame_bytes((FRAME_BYTES_MAX as u32 + 1).to_le_bytes()).is_err());
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), tag in 0_u8..10) {
        let _ = read(&bytes);
        let mut tagged = bytes;
        tagged.insert(0, tag);
        if let Ok(message) = read(&tagged) {
            prop_assert_eq!(told(&message), message);
        }
    }

    #[test]
    fn a_cut_or_changed_frame_never_panics(which in 0_usize..6, cut in 0_usize..200, at in 0_usize..200, value in any::<u8>()) {
        let mut out = Vec::new();
        put(&mut out, &Message::Upsert(objects()[which].clone()));
        let mut frame = out.split_off(4);
        let at = at % frame.len();
        frame[at] = value;
        frame.truncate(cut);
        let _ = read(&frame);
    }
}
