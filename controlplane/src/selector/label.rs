//! Label selectors, in both of their forms.

use serde_json::{Map, Value};

use super::SelectorError;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    Absent,
    Greater(i64),
    Less(i64),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    test: Test,
}

/// LabelSelector is a conjunction of requirements on labels. Empty matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelSelector {
    requirements: Vec<Requirement>,
}

impl LabelSelector {
    /// The query form: `app=hello,tier in (a,b),!old`.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let mut requirements = Vec::new();
        for part in split(text) {
            let part = part.trim();
            if part.is_empty() {
                if text.trim().is_empty() {
                    continue;
                }
                return Err(unparsable(
                    text,
                    "found an empty requirement, expected a key",
                ));
            }
            requirements.push(requirement(part).map_err(|reason| unparsable(part, &reason))?);
        }
        Ok(Self { requirements })
    }

    /// The object form: `{matchLabels, matchExpressions}`. Empty or absent matches everything; who wants null to match nothing checks first.
    pub fn from_object(selector: &Value) -> Result<Self, SelectorError> {
        let mut requirements = Vec::new();
        for (key, value) in selector["matchLabels"].as_object().into_iter().flatten() {
            let value = value.as_str().unwrap_or_default();
            requirements
                .push(checked(key, Test::In(vec![value.to_owned()])).map_err(SelectorError)?);
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
            requirements.push(checked(key, test).map_err(SelectorError)?);
        }
        Ok(Self { requirements })
    }

    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }

    /// By an object's `metadata.labels`.
    pub fn matches(&self, object: &Value) -> bool {
        self.is_empty() || self.matches_labels(object["metadata"]["labels"].as_object())
    }

    pub fn matches_labels(&self, labels: Option<&Map<String, Value>>) -> bool {
        self.requirements.iter().all(|requirement| {
            let value = labels
                .and_then(|l| l.get(&requirement.key))
                .and_then(Value::as_str);
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

fn unparsable(text: &str, reason: &str) -> SelectorError {
    SelectorError(format!("unable to parse requirement {text:?}: {reason}"))
}

/// At commas outside parentheses.
fn split(text: &str) -> Vec<&str> {
    let (mut parts, mut start, mut depth) = (Vec::new(), 0, 0);
    for (i, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth <= 0 => {
                parts.push(&text[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn requirement(text: &str) -> Result<Requirement, String> {
    if let Some(key) = text.strip_prefix('!') {
        return checked(key.trim(), Test::Absent);
    }
    let end = text
        .find(|c: char| "=!<>( \t".contains(c))
        .unwrap_or(text.len());
    let (key, rest) = (&text[..end], text[end..].trim_start());
    if rest.is_empty() {
        return checked(key, Test::Exists);
    }
    for operator in ["==", "!=", "=", ">", "<"] {
        let Some(value) = rest.strip_prefix(operator) else {
            continue;
        };
        let value = value.trim();
        let bound = || {
            value
                .parse::<i64>()
                .map_err(|_| format!("for {operator:?}, {value:?} must be an integer"))
        };
        let test = match operator {
            "!=" => Test::NotIn(vec![value.to_owned()]),
            ">" => Test::Greater(bound()?),
            "<" => Test::Less(bound()?),
            _ => Test::In(vec![value.to_owned()]),
        };
        return checked(key, test);
    }
    for (word, negative) in [("notin", true), ("in", false)] {
        let Some(values) = rest.strip_prefix(word) else {
            continue;
        };
        let values = values
            .trim()
            .strip_prefix('(')
            .and_then(|v| v.strip_suffix(')'));
        let values =
            values.ok_or_else(|| format!("{word:?} needs a list of values in parentheses"))?;
        let values = values.split(',').map(|v| v.trim().to_owned()).collect();
        return checked(
            key,
            if negative {
                Test::NotIn(values)
            } else {
                Test::In(values)
            },
        );
    }
    Err(format!(
        "found {rest:?}, expected: in, notin, =, ==, !=, gt, lt"
    ))
}

fn checked(key: &str, test: Test) -> Result<Requirement, String> {
    if !is_key(key) {
        return Err(format!(
            "{key:?} is not a label key: it must be a name of up to 63 letters, digits, '-', '_' or '.', optionally after a DNS prefix and '/'"
        ));
    }
    if let Test::In(values) | Test::NotIn(values) = &test
        && let Some(bad) = values.iter().find(|v| !is_value(v))
    {
        return Err(format!(
            "{bad:?} is not a label value: it must be empty or up to 63 letters, digits, '-', '_' or '.', beginning and ending with a letter or digit"
        ));
    }
    Ok(Requirement {
        key: key.to_owned(),
        test,
    })
}

fn is_key(key: &str) -> bool {
    let (prefix, name) = key
        .split_once('/')
        .map_or((None, key), |(prefix, name)| (Some(prefix), name));
    let prefix_fits = prefix.is_none_or(|p| {
        let label = |l: &str| {
            !l.is_empty()
                && l.bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        };
        p.len() <= 253 && p.split('.').all(label)
    });
    prefix_fits && !name.is_empty() && is_value(name)
}

fn is_value(value: &str) -> bool {
    let ends = |b: Option<&u8>| b.is_none_or(u8::is_ascii_alphanumeric);
    let bytes = value.as_bytes();
    bytes.len() <= 63
        && ends(bytes.first())
        && ends(bytes.last())
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
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
        assert_eq!(selector.to_string(), "app=x,tier notin (a,b),!z,y");
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
