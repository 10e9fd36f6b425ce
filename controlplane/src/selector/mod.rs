//! Label and field selectors over JSON objects.

use serde_json::{Map, Value};

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SelectorError(pub String);

/// LabelSelector is a conjunction of requirements on labels. Empty matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelSelector {
    requirements: Vec<String>,
}

impl LabelSelector {
    /// The query form: `app=hello,tier in (a,b),!old`.
    pub fn parse(s: &str) -> Result<Self, SelectorError> {
        todo!("{s}")
    }
    /// The object form: `{matchLabels, matchExpressions}`. Empty or absent matches everything; who wants null to match nothing checks first.
    pub fn from_object(selector: &Value) -> Result<Self, SelectorError> {
        todo!("{selector}")
    }
    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }
    /// By an object's `metadata.labels`.
    pub fn matches(&self, object: &Value) -> bool {
        self.matches_labels(
            object
                .pointer("/metadata/labels")
                .and_then(Value::as_object),
        )
    }
    pub fn matches_labels(&self, labels: Option<&Map<String, Value>>) -> bool {
        todo!("{labels:?}")
    }
}

/// FieldSelector is a conjunction of `path=value` and `path!=value`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSelector {
    requirements: Vec<(String, bool, String)>,
}

impl FieldSelector {
    pub fn parse(s: &str) -> Result<Self, SelectorError> {
        todo!("{s}")
    }
    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }
    /// The paths asked for, so that the caller can refuse those a kind does not support.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.requirements.iter().map(|(path, _, _)| path.as_str())
    }
    /// The value `path` must equal, when the selector says so (`metadata.name=x` makes a list a get).
    pub fn exact(&self, path: &str) -> Option<&str> {
        self.requirements
            .iter()
            .find(|(p, equal, _)| *equal && p == path)
            .map(|(_, _, v)| v.as_str())
    }
    /// By the object's fields; an absent one counts as "".
    pub fn matches(&self, object: &Value) -> bool {
        todo!("{object}")
    }
}
