//! Arbitrary objects of every kind, made from the tables: what property tests of codec, patches and rules begin with.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::time;
use crate::registry::{FieldType, Resource, Shape, Type, resources};

/// An arbitrary value of a type, without nulls and with canonical specials.
fn arbitrary(ty: &'static Type, depth: u32) -> BoxedStrategy<Value> {
    match ty.shape {
        Shape::Struct => {
            let fields: Vec<_> = ty
                .fields
                .iter()
                .filter(|f| f.name != "apiVersion" && f.name != "kind")
                .collect();
            if depth == 0 || fields.is_empty() {
                return Just(json!({})).boxed();
            }
            let (required, optional): (Vec<_>, Vec<_>) =
                fields.into_iter().partition(|field| field.required);
            let most = optional.len().min(5);
            prop::sample::subsequence(optional, 0..=most)
                .prop_flat_map(move |mut chosen| {
                    chosen.extend(&required);
                    let values: Vec<_> = chosen
                        .iter()
                        .map(|f| arbitrary_field(&f.ty, depth - 1).boxed())
                        .collect();
                    let names: Vec<_> = chosen.iter().map(|f| f.name.to_owned()).collect();
                    values.prop_map(move |values| {
                        Value::Object(names.iter().cloned().zip(values).collect())
                    })
                })
                .boxed()
        }
        Shape::Time => (1i64..4_000_000_000)
            .prop_map(|s| time::render_seconds(Timestamp::from_second(s).unwrap()).into())
            .boxed(),
        Shape::MicroTime => (1i64..4_000_000_000_000_000)
            .prop_map(|s| time::render_micros(Timestamp::from_microsecond(s).unwrap()).into())
            .boxed(),
        Shape::Quantity => prop::sample::select(vec!["1", "500m", "2Gi", "0", "7k"])
            .prop_map(Value::from)
            .boxed(),
        Shape::IntOrString => prop_oneof![
            (1..65535i32).prop_map(Value::from),
            "[a-z]{1,5}%?".prop_map(Value::from)
        ]
        .boxed(),
        Shape::RawExtension | Shape::FieldsV1 | Shape::Json => {
            Just(json!({"f:a": {"x": [1, "b"]}})).boxed()
        }
        Shape::SchemaOrArray => Just(json!([{"type": "string"}])).boxed(),
        Shape::SchemaOrBool => Just(json!(false)).boxed(),
        Shape::SchemaOrStringArray => Just(json!(["a"])).boxed(),
    }
}

fn arbitrary_field(ty: &'static FieldType, depth: u32) -> BoxedStrategy<Value> {
    match ty {
        FieldType::String => "[a-z]{1,8}".prop_map(Value::from).boxed(),
        FieldType::Bytes => prop::collection::vec(any::<u8>(), 1..6)
            .prop_map(|b| STANDARD.encode(b).into())
            .boxed(),
        FieldType::Bool => Just(json!(true)).boxed(),
        FieldType::Int32 => prop_oneof![1..i32::MAX, i32::MIN..0]
            .prop_map(Value::from)
            .boxed(),
        FieldType::Int64 => prop_oneof![1..i64::MAX, i64::MIN..0]
            .prop_map(Value::from)
            .boxed(),
        FieldType::Double => (1..100i32)
            .prop_map(|n| (f64::from(n) / 4.0).into())
            .boxed(),
        FieldType::Ref(id) => arbitrary(id.get(), depth),
        FieldType::List(inner) => prop::collection::vec(arbitrary_field(inner, depth), 1..3)
            .prop_map(Value::Array)
            .boxed(),
        FieldType::Map(inner) => {
            let entries =
                prop::collection::btree_map("[a-z]{1,4}", arbitrary_field(inner, depth), 1..3);
            entries
                .prop_map(|m| Value::Object(m.into_iter().collect()))
                .boxed()
        }
    }
}

/// An object of any kind of the tables.
pub fn object() -> impl Strategy<Value = Value> {
    (0..resources().len()).prop_flat_map(|i| object_of(&resources()[i]))
}

/// An object of a resource's kind.
pub fn object_of(resource: &'static Resource) -> impl Strategy<Value = Value> {
    arbitrary(resource.ty.get(), 5).prop_map(move |mut value| {
        value["apiVersion"] = resource.api_version().into();
        value["kind"] = resource.kind.into();
        value
    })
}
