//! Label and field selectors over JSON objects.

mod field;
mod label;
mod names;
mod parse;

pub use field::{Field, FieldSelector};
pub use label::LabelSelector;
pub use names::{key_faults, value_faults};

/// SelectorError is a selector that does not parse: a 400.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SelectorError(pub String);
