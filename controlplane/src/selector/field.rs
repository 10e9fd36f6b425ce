//! Field selectors.

use std::borrow::Cow;

use serde_json::Value;

use super::SelectorError;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    path: String,
    equal: bool,
    value: String,
}

/// FieldSelector is a conjunction of `path=value` and `path!=value`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSelector {
    requirements: Vec<Requirement>,
}

impl FieldSelector {
    /// `metadata.name=a,spec.nodeName!=b`; backslashes keep `,`, `=` and `\` as they are.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let mut requirements = Vec::new();
        for part in split(text) {
            if part.is_empty() {
                continue;
            }
            let invalid = || {
                SelectorError(format!(
                    "invalid selector: '{text}'; can't understand '{part}'"
                ))
            };
            let at = part.find('=').ok_or_else(invalid)?;
            let (path, value) = (&part[..at], &part[at + 1..]);
            let (path, equal) = path
                .strip_suffix('!')
                .map_or((path, true), |path| (path, false));
            let value = if equal {
                value.strip_prefix('=').unwrap_or(value)
            } else {
                value
            };
            let value = unescape(value)?;
            requirements.push(Requirement {
                path: path.to_owned(),
                equal,
                value,
            });
        }
        Ok(Self { requirements })
    }

    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }

    /// The paths asked for, so that the caller can refuse those a kind does not support.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.requirements.iter().map(|r| r.path.as_str())
    }

    /// The value `path` must equal, when the selector says so (`metadata.name=x` makes a list a get).
    pub fn exact(&self, path: &str) -> Option<&str> {
        self.requirements
            .iter()
            .find(|r| r.equal && r.path == path)
            .map(|r| r.value.as_str())
    }

    /// By the object's fields; an absent one counts as the zero of its type.
    pub fn matches(&self, object: &Value) -> bool {
        self.matches_by(|path| {
            let found = path
                .split('.')
                .try_fold(object, |value, step| value.get(step));
            match found {
                None | Some(Value::Null) => Field::Absent,
                Some(Value::String(text)) => Field::Text(text.into()),
                Some(value @ (Value::Bool(_) | Value::Number(_))) => {
                    Field::Text(value.to_string().into())
                }
                Some(Value::Array(_) | Value::Object(_)) => Field::Whole,
            }
        })
    }

    /// By whoever knows what is at a path.
    pub fn matches_by<'a>(&self, field: impl Fn(&str) -> Field<'a>) -> bool {
        self.requirements.iter().all(|requirement| {
            let found = match requirement.path.as_str() {
                "source" => source(&field),
                path => field(path),
            };
            let equal = match found {
                Field::Absent => requirement.value == zero(&requirement.path),
                Field::Text(text) => text == requirement.value,
                Field::Whole => false,
            };
            equal == requirement.equal
        })
    }
}

/// Field is what an object has at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Field<'a> {
    /// Nothing, or null.
    Absent,
    /// A string, or a number or a boolean as it is written.
    Text(Cow<'a, str>),
    /// A list or an object, which is equal to no text.
    Whole,
}

/// Who an Event comes from: newer ones say it in another field.
fn source<'a>(field: impl Fn(&str) -> Field<'a>) -> Field<'a> {
    match field("source.component") {
        Field::Text(component) if !component.is_empty() => Field::Text(component),
        _ => field("reportingComponent"),
    }
}

/// What a field that an object leaves out is compared as: most are text.
fn zero(path: &str) -> &'static str {
    match path {
        "spec.unschedulable" | "spec.hostNetwork" => "false",
        "status.replicas" | "status.successful" => "0",
        _ => "",
    }
}

/// At commas that no backslash precedes.
fn split(text: &str) -> Vec<&str> {
    let (mut parts, mut start, mut escaped) = (Vec::new(), 0, false);
    for (i, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ',' => {
                parts.push(&text[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn unescape(text: &str) -> Result<String, SelectorError> {
    let invalid = |why: String| SelectorError(format!("invalid field selector: {why}"));
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some(escaped @ ('\\' | ',' | '=')) => out.push(escaped),
                other => {
                    let other = other.map(String::from).unwrap_or_default();
                    return Err(invalid(format!("invalid escape sequence: \\{other}")));
                }
            },
            '=' => return Err(invalid("unescaped character in value: =".to_owned())),
            c => out.push(c),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_match_by_their_text() {
        let object = json!({"metadata": {"name": "a,b"}, "spec": {"nodeName": "n", "hostNetwork": true, "n": 3}, "type": "x"});
        for (selector, wanted) in [
            ("", true),
            ("spec.nodeName=n", true),
            ("spec.nodeName==n,type=x", true),
            ("spec.nodeName!=n", false),
            ("spec.nodeName!=m,spec.n=3", true),
            ("spec.hostNetwork=true", true),
            ("spec.unschedulable=false", true),
            ("status.successful!=0", false),
            ("metadata.name=a\\,b", true),
            ("status.phase=", true),
            ("status.phase!=Running", true),
            ("status.phase=Running", false),
            ("spec=", false),
        ] {
            assert_eq!(
                FieldSelector::parse(selector).unwrap().matches(&object),
                wanted,
                "{selector}"
            );
        }
    }

    #[test]
    fn an_event_comes_from_its_source_or_its_reporter() {
        let older = json!({"source": {"component": "kubelet"}, "reportingComponent": "x"});
        let newer = json!({"source": {}, "reportingComponent": "scheduler"});
        let matches =
            |selector: &str, event| FieldSelector::parse(selector).unwrap().matches(event);
        assert!(matches("source=kubelet", &older) && !matches("source=x", &older));
        assert!(matches("source=scheduler", &newer) && matches("source!=kubelet", &newer));
    }

    #[test]
    fn the_exact_value_of_a_path_is_told() {
        let selector = FieldSelector::parse("metadata.name=x,a!=b").unwrap();
        assert_eq!(
            (selector.exact("metadata.name"), selector.exact("a")),
            (Some("x"), None)
        );
        assert_eq!(selector.paths().collect::<Vec<_>>(), ["metadata.name", "a"]);
    }

    #[test]
    fn nonsense_is_refused() {
        for selector in ["a", "a=b=c", "a=\\x", "a=\\"] {
            assert!(FieldSelector::parse(selector).is_err(), "{selector}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "[a-z.=!,\\\\ ü]{0,30}") {
            if let Ok(selector) = FieldSelector::parse(&text) {
                let _ = (selector.matches(&json!({"a": {"b": "c"}})), selector.paths().count());
            }
        }
    }
}
