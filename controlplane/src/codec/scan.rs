//! Parts of JSON text, found without decoding it: what selectors look at in stored objects.
//!
//! For text as serde_json writes it: compact, and whole. Of other text parts may not be found, and nothing worse happens.

use std::borrow::Cow;

use memchr::memchr2;

/// Raw is a value as its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Raw<'a>(&'a [u8]);

impl<'a> Raw<'a> {
    pub fn new(text: &'a [u8]) -> Self {
        Self(text)
    }

    /// The fields of an object, in the order in which they stand there; none of anything else.
    pub fn fields(self) -> RawFields<'a> {
        RawFields(self.0.strip_prefix(b"{").unwrap_or_default())
    }

    pub fn field(self, name: &str) -> Option<Self> {
        let mut fields = self.fields();
        fields.find(|(key, _)| key.is(name)).map(|(_, value)| value)
    }

    /// What is at a path of fields. Nothing is looked at that stands behind it, in the objects around it neither.
    pub fn at<'p>(self, path: impl IntoIterator<Item = &'p str>) -> Option<Self> {
        let mut text = self.0;
        for step in path {
            text = text.strip_prefix(b"{")?;
            loop {
                let (key, rest) = text.split_at_checked(string(text)?)?;
                let rest = rest.strip_prefix(b":")?;
                if Raw(key).is(step) {
                    text = rest;
                    break;
                }
                text = rest.get(value(rest)?..)?.strip_prefix(b",")?;
            }
        }
        text.get(..value(text)?).map(Self)
    }

    /// What a value that holds no others is as text: a string's content, a number's digits, `true`, `false`. None for null, objects
    /// and lists.
    pub fn text(self) -> Option<Cow<'a, str>> {
        match self.0.first()? {
            b'"' => {
                let content = self.content()?;
                if content.contains(&b'\\') {
                    return serde_json::from_slice::<String>(self.0)
                        .ok()
                        .map(Cow::Owned);
                }
                std::str::from_utf8(content).ok().map(Cow::Borrowed)
            }
            b'{' | b'[' | b'n' => None,
            _ => std::str::from_utf8(self.0).ok().map(Cow::Borrowed),
        }
    }

    pub fn is_null(self) -> bool {
        self.0 == b"null"
    }

    /// Whether it is a string of this content.
    pub fn is(self, text: &str) -> bool {
        match self.content() {
            Some(content) if content.contains(&b'\\') => self.text().is_some_and(|own| own == text),
            content => content == Some(text.as_bytes()),
        }
    }

    pub fn bytes(self) -> &'a [u8] {
        self.0
    }

    /// What stands between the quotes.
    fn content(self) -> Option<&'a [u8]> {
        self.0.strip_prefix(b"\"")?.strip_suffix(b"\"")
    }
}

/// The fields of an object that have not been looked at: its text from a key on.
pub struct RawFields<'a>(&'a [u8]);

impl<'a> Iterator for RawFields<'a> {
    type Item = (Raw<'a>, Raw<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let (key, rest) = self.0.split_at_checked(string(self.0)?)?;
        let rest = rest.strip_prefix(b":")?;
        let (value, rest) = rest.split_at_checked(value(rest)?)?;
        self.0 = rest.strip_prefix(b",").unwrap_or_default();
        Some((Raw(key), Raw(value)))
    }
}

/// How long the string is that the text begins with, both quotes included.
fn string(text: &[u8]) -> Option<usize> {
    if text.first() != Some(&b'"') {
        return None;
    }
    let mut at = 1;
    loop {
        at += memchr2(b'"', b'\\', text.get(at..)?)?;
        match text[at] {
            b'"' => return Some(at + 1),
            _ => at += 2,
        }
    }
}

/// How long the value is that the text begins with.
fn value(text: &[u8]) -> Option<usize> {
    let (mut at, mut depth) = (0, 0_usize);
    loop {
        match *text.get(at)? {
            b'"' => at += string(&text[at..])?,
            b'{' | b'[' => {
                depth += 1;
                at += 1;
            }
            b'}' | b']' => {
                depth = depth.checked_sub(1)?;
                at += 1;
            }
            // Between values, and inside of numbers and words.
            _ if depth > 0 => at += 1,
            _ => {
                let rest = text[at..].iter();
                let end = rest.take_while(|byte| !matches!(byte, b',' | b'}' | b']'));
                return Some(at + end.count()).filter(|end| *end > at);
            }
        }
        if depth == 0 {
            return Some(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn fields_are_found_whatever_stands_before_them() {
        let object = json!({"a": "}\\\"{", "b": {"c": [1, {"d": "]"}], "e": null}, "f": -1.5e3, "g\"": true, "h": ""});
        let text = object.to_string();
        let raw = Raw::new(text.as_bytes());
        let text = |path: &[&str]| {
            let found = path.iter().try_fold(raw, |raw, name| raw.field(name));
            assert_eq!(raw.at(path.iter().copied()), found);
            found.and_then(Raw::text).map(Cow::into_owned)
        };
        assert_eq!(text(&["a"]).as_deref(), Some("}\\\"{"));
        assert_eq!(text(&["f"]).as_deref(), Some("-1500.0"));
        assert_eq!(text(&["g\""]).as_deref(), Some("true"));
        assert_eq!(text(&["h"]).as_deref(), Some(""));
        for none in [&["b"][..], &["b", "e"], &["b", "c"], &["x"], &["f", "x"]] {
            assert_eq!(text(none), None, "{none:?}");
        }
        assert!(
            raw.field("b")
                .and_then(|b| b.field("e"))
                .is_some_and(Raw::is_null)
        );
    }

    /// Any JSON, with keys and texts that look like JSON themselves.
    fn document() -> impl Strategy<Value = Value> {
        let text = "[a\"\\\\{}\\[\\],:é\n]{0,6}";
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            // As precise as reading them is.
            any::<i16>().prop_map(|n| Value::from(f64::from(n) / 4.0)),
            text.prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 5, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map(text, inner, 0..5)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_found_is_what_decoding_finds(document in document()) {
            let text = document.to_string();
            let raw = Raw::new(text.as_bytes());
            prop_assert_eq!(value(text.as_bytes()), Some(text.len()));
            let found: Vec<(String, Value)> = raw
                .fields()
                .map(|(key, value)| (serde_json::from_slice(key.0).unwrap(), serde_json::from_slice(value.0).unwrap()))
                .collect();
            let fields = document.as_object().cloned().unwrap_or_default();
            for (name, value) in &fields {
                let field = raw.field(name).expect("a field that is there");
                prop_assert_eq!(raw.at([name.as_str()]), Some(field));
                for (inner, _) in value.as_object().into_iter().flatten() {
                    prop_assert_eq!(raw.at([name.as_str(), inner.as_str()]), field.field(inner));
                }
                prop_assert_eq!(raw.at([name.as_str(), "none of them"]), None);
                prop_assert_eq!(&serde_json::from_slice::<Value>(field.0).unwrap(), value);
                let text = match value {
                    Value::String(text) => Some(text.clone()),
                    Value::Bool(_) | Value::Number(_) => Some(value.to_string()),
                    _ => None,
                };
                prop_assert_eq!(field.text().map(Cow::into_owned), text);
            }
            prop_assert_eq!(found, fields.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn broken_text_is_no_worse_than_empty(text in "[a\"\\\\{}\\[\\],:1n]{0,40}", name in "[a\"]{0,3}") {
            let raw = Raw::new(text.as_bytes());
            let _ = (raw.field(&name).and_then(Raw::text), raw.fields().count(), raw.text());
            let _ = (raw.at([name.as_str(), name.as_str()]), raw.at([]));
        }
    }
}
