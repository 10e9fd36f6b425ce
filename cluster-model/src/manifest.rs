//! Objects from a file: what `kubectl get services,endpointslices,nodes -A -o json` prints.

use serde::Deserialize as _;
use serde_json::Value;

use crate::{EndpointSlice, Node, Object, Pod, Rejected, Service, wire};

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
        .iter()
        .enumerate()
        .map(|(index, item)| read_item(index, item))
        .collect()
}

fn read_item(index: usize, item: &Value) -> Result<Object, ManifestError> {
    let kind = item.get("kind").and_then(Value::as_str).unwrap_or_default();
    let failed = |source| ManifestError::Item {
        index,
        kind: kind.into(),
        source,
    };
    Ok(match kind {
        "Service" => {
            let service = wire::Service::deserialize(item).map_err(failed)?;
            Object::Service(Service::try_from(service)?.into())
        }
        "EndpointSlice" => {
            let slice = wire::EndpointSlice::deserialize(item).map_err(failed)?;
            Object::EndpointSlice(EndpointSlice::try_from(slice)?.into())
        }
        "Node" => {
            let node = wire::Node::deserialize(item).map_err(failed)?;
            Object::Node(Node::try_from(node)?.into())
        }
        "Pod" => {
            let pod = wire::Pod::deserialize(item).map_err(failed)?;
            Object::Pod(Pod::try_from(pod)?.into())
        }
        _ => {
            return Err(ManifestError::Kind {
                index,
                kind: kind.into(),
            });
        }
    })
}
