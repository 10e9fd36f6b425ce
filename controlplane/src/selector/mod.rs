//! Label and field selectors over JSON objects.

mod field;
mod label;

pub use field::FieldSelector;
pub use label::LabelSelector;

/// SelectorError is a selector that does not parse: a 400.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SelectorError(pub String);
