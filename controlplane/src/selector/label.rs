//! Label selectors, in both of their forms.

use std::borrow::Cow;

use serde_json::{Map, Value};

use super::names::{key_faults, value_faults};
use super::{SelectorError, parse};

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Test {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    Absent,
    Greater(i64),
    Less(i64),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Requirement {
    pub key: String,
    pub test: Test,
}

/// LabelSelector is a conjunction of requirements on labels. Empty matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelSelector {
    requirements: Vec<Requirement>,
}

impl LabelSelector {
    /// The query form: `app=hello,tier in (a,b),!old`.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        Self::of(parse::requirements(text)?)
    }

    /// In order of their keys, as upstream shows them.
    fn of(mut requirements: Vec<Requirement>) -> Result<Self, SelectorError> {
        requirements.sort_by(|one, other| one.key.cmp(&other.key));
        Ok(Self { requirements })
    }

    /// The object form: `{matchLabels, matchExpressions}`. Empty or absent matches everything; who wants null to match nothing checks first.
    pub fn from_object(selector: &Value) -> Result<Self, SelectorError> {
        let mut requirements = Vec::new();
        for (key, value) in selector["matchLabels"].as_object().into_iter().flatten() {
            let value = value.as_str().unwrap_or_default();
            requirements.push(checked(key, Test::In(vec![value.to_owned()]))?);
        }
        for expression in selector["matchExpressions"]
            .as_array()
            .into_iter()
            .flatten()
        {
            let key = expression["key"].as_str().unwrap_or_default();
            let values: Vec<String> = expression["values"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|v| v.as_str().map(str::to_owned))
                .collect();
            let operator = expression["operator"].as_str().unwrap_or_default();
            let test = match (operator, values.is_empty()) {
                ("In", false) => Test::In(values),
                ("NotIn", false) => Test::NotIn(values),
                ("Exists", true) => Test::Exists,
                ("DoesNotExist", true) => Test::Absent,
                ("In" | "NotIn", true) => {
                    return Err(SelectorError(format!(
                        "for '{operator}' operator of key {key:?}, values set can't be empty"
                    )));
                }
                ("Exists" | "DoesNotExist", false) => {
                    return Err(SelectorError(format!(
                        "values set of key {key:?} must be empty for '{operator}'"
                    )));
                }
                _ => {
                    return Err(SelectorError(format!(
                        "{operator:?} is not a valid label selector operator"
                    )));
                }
            };
            requirements.push(checked(key, test)?);
        }
        Self::of(requirements)
    }

    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }

    /// By an object's `metadata.labels`.
    pub fn matches(&self, object: &Value) -> bool {
        self.is_empty() || self.matches_labels(object["metadata"]["labels"].as_object())
    }

    pub fn matches_labels(&self, labels: Option<&Map<String, Value>>) -> bool {
        self.matches_by(|key| labels?.get(key)?.as_str().map(Cow::Borrowed))
    }

    /// By whoever knows the value of a label.
    pub fn matches_by<'a>(&self, label: impl Fn(&str) -> Option<Cow<'a, str>>) -> bool {
        self.requirements.iter().all(|requirement| {
            let value = label(&requirement.key);
            let value = value.as_deref();
            let number = || value.and_then(|v| v.parse::<i64>().ok());
            match &requirement.test {
                Test::In(values) => value.is_some_and(|v| values.iter().any(|w| w == v)),
                Test::NotIn(values) => value.is_none_or(|v| values.iter().all(|w| w != v)),
                Test::Exists => value.is_some(),
                Test::Absent => value.is_none(),
                Test::Greater(bound) => number().is_some_and(|n| n > *bound),
                Test::Less(bound) => number().is_some_and(|n| n < *bound),
            }
        })
    }
}

impl std::fmt::Display for LabelSelector {
    /// The query form, as `status.selector` of `/scale` has it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, Requirement { key, test }) in self.requirements.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            match test {
                Test::In(values) if values.len() == 1 => write!(f, "{key}={}", values[0])?,
                Test::NotIn(values) if values.len() == 1 => write!(f, "{key}!={}", values[0])?,
                Test::In(values) => write!(f, "{key} in ({})", values.join(","))?,
                Test::NotIn(values) => write!(f, "{key} notin ({})", values.join(","))?,
                Test::Exists => f.write_str(key)?,
                Test::Absent => write!(f, "!{key}")?,
                Test::Greater(bound) => write!(f, "{key}>{bound}")?,
                Test::Less(bound) => write!(f, "{key}<{bound}")?,
            }
        }
        Ok(())
    }
}

fn checked(key: &str, test: Test) -> Result<Requirement, SelectorError> {
    let mut faults = Vec::new();
    let mut told = |path: &str, given: &str, why: Vec<String>| {
        if !why.is_empty() {
            faults.push(format!(
                "{path}: Invalid value: {given:?}: {}",
                why.join("; ")
            ));
        }
    };
    told("key", key, key_faults(key));
    if let Test::In(values) | Test::NotIn(values) = &test {
        for (at, value) in values.iter().enumerate() {
            told(&format!("values[{at}][{key}]"), value, value_faults(value));
        }
    }
    match faults.as_slice() {
        [] => Ok(Requirement {
            key: key.to_owned(),
            test,
        }),
        [fault] => Err(SelectorError(fault.clone())),
        faults => Err(SelectorError(format!("[{}]", faults.join(", ")))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn matches(selector: &str, labels: Value) -> bool {
        LabelSelector::parse(selector)
            .unwrap()
            .matches(&json!({"metadata": {"labels": labels}}))
    }

    #[test]
    fn requirements_match_as_upstream() {
        let labels = json!({"app": "hello", "tier": "a", "n": "5", "example.com/x": ""});
        for (selector, wanted) in [
            ("", true),
            ("app=hello", true),
            ("app==hello", true),
            ("app = hello , tier", true),
            ("app!=hello", false),
            ("missing!=x", true),
            ("app in (x, hello)", true),
            ("app in (x,y)", false),
            ("app notin (x,y),tier in (a)", true),
            ("missing notin (x)", true),
            ("!missing", true),
            ("!app", false),
            ("missing", false),
            ("n>4,n<6", true),
            ("n>5", false),
            ("app>1", false),
            ("example.com/x=", true),
            ("example.com/x", true),
        ] {
            assert_eq!(matches(selector, labels.clone()), wanted, "{selector}");
        }
        assert!(matches("!a", Value::Null) && !matches("a", Value::Null));
    }

    #[test]
    fn nonsense_is_refused() {
        for selector in [
            "=x",
            "a=b=c",
            "a in",
            "a in (b",
            "a,,b",
            ",",
            "-a",
            "a=-b",
            "a b",
            "a>x",
            "UPPER.com/x",
            "a/b/c",
            "!",
        ] {
            assert!(LabelSelector::parse(selector).is_err(), "{selector}");
        }
        assert!(LabelSelector::parse(&format!("a={}", "x".repeat(64))).is_err());
        for bad in [
            json!({"matchExpressions": [{"key": "a", "operator": "In"}]}),
            json!({"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["x"]}]}),
            json!({"matchExpressions": [{"key": "a", "operator": "Near", "values": ["x"]}]}),
            json!({"matchLabels": {"a b": "c"}}),
        ] {
            assert!(LabelSelector::from_object(&bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn both_forms_agree_and_the_query_form_round_trips() {
        let object = json!({"matchLabels": {"app": "x"}, "matchExpressions": [
            {"key": "tier", "operator": "NotIn", "values": ["a", "b"]}, {"key": "z", "operator": "DoesNotExist"},
            {"key": "y", "operator": "Exists"}]});
        let selector = LabelSelector::from_object(&object).unwrap();
        assert_eq!(selector.to_string(), "app=x,tier notin (a,b),y,!z");
        assert_eq!(
            LabelSelector::parse(&selector.to_string()).unwrap(),
            selector
        );
        assert!(LabelSelector::from_object(&Value::Null).unwrap().is_empty());
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_taken_or_refused_without_panic(text in "[a-z=!<>(), é/.]{0,30}") {
            let _ = LabelSelector::parse(&text);
        }
    }
}
