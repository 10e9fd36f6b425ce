//! Objects from a file: what `kubectl get services,endpointslices,nodes -A -o json` prints.

use serde_json::Value;

use crate::{Object, Rejected};

/// Why a manifest could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("not JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error("item {index}: not a {kind}: {source}")]
    Item {
        index: usize,
        kind: String,
        source: serde_json::Error,
    },
    #[error("item {index}: kind {kind:?} is not Service, EndpointSlice, Node or Pod")]
    Kind { index: usize, kind: String },
    #[error(transparent)]
    Rejected(#[from] Rejected),
}

/// Reads a `List` of the API, or one object, in JSON. One bad item rejects the whole file: a file is written by
/// hand or by a tool, and half of it is never what was meant.
pub fn read_manifest(json: &[u8]) -> Result<Vec<Object>, ManifestError> {
    let root: Value = serde_json::from_slice(json)?;
    let items = match root {
        Value::Object(mut map) if matches!(map.get("items"), Some(Value::Array(_))) => {
            match map.remove("items") {
                Some(Value::Array(items)) => items,
                _ => Vec::new(),
            }
        }
        Value::Array(items) => items,
        other => vec![other],
    };
    items
        .into_iter()
        .enumerate()
        .map(|(index, item)| read_item(index, item))
        .collect()
}

fn read_item(index: usize, item: Value) -> Result<Object, ManifestError> {
    use k8s_openapi::api::core::v1 as core;
    use k8s_openapi::api::discovery::v1 as discovery;

    fn parse<T: serde::de::DeserializeOwned>(
        index: usize,
        kind: &str,
        item: Value,
    ) -> Result<T, ManifestError> {
        serde_json::from_value(item).map_err(|source| ManifestError::Item {
            index,
            kind: kind.into(),
            source,
        })
    }

    let kind = item
        .get("kind")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    Ok(match kind.as_str() {
        "Service" => Object::Service(
            crate::Service::try_from(parse::<core::Service>(index, &kind, item)?)?.into(),
        ),
        "EndpointSlice" => {
            let slice = parse::<discovery::EndpointSlice>(index, &kind, item)?;
            Object::EndpointSlice(crate::EndpointSlice::try_from(slice)?.into())
        }
        "Node" => {
            Object::Node(crate::Node::try_from(parse::<core::Node>(index, &kind, item)?)?.into())
        }
        "Pod" => Object::Pod(crate::Pod::try_from(parse::<core::Pod>(index, &kind, item)?)?.into()),
        _ => return Err(ManifestError::Kind { index, kind }),
    })
}
