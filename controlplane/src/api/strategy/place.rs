//! Places in an object: a value with the path to it, and the checks that many fields share. What is wrong with a value is
//! told at its place, in the words that users know.

use std::ops::RangeInclusive;

use serde_json::Value;

use super::Errors;
use crate::api::status::FieldError;
use crate::codec::quantity::{self, Quantity};

static ABSENT: Value = Value::Null;

/// A value in an object, with the path to it (`spec.ports[0].name`). An absent one is null.
#[derive(Clone, Debug)]
pub struct Place<'a> {
    value: &'a Value,
    path: String,
}

impl<'a> Place<'a> {
    pub fn root(object: &'a Value) -> Self {
        Self {
            value: object,
            path: String::new(),
        }
    }

    pub fn at(value: &'a Value, path: impl Into<String>) -> Self {
        Self {
            value,
            path: path.into(),
        }
    }

    /// The place of a field, or of a field of a field (`a.b`).
    pub fn field(&self, names: &str) -> Self {
        let value = names
            .split('.')
            .fold(self.value, |value, name| value.get(name).unwrap_or(&ABSENT));
        let path = if self.path.is_empty() {
            names.to_owned()
        } else {
            format!("{}.{names}", self.path)
        };
        Self { value, path }
    }

    /// The items of a list; none of anything else.
    pub fn items(&self) -> impl Iterator<Item = Self> + use<'a> {
        let path = self.path.clone();
        let items = self.value.as_array().map_or(&[][..], Vec::as_slice);
        items
            .iter()
            .enumerate()
            .map(move |(at, value)| Self::at(value, format!("{path}[{at}]")))
    }

    /// The entries of a map; none of anything else.
    pub fn entries(&self) -> impl Iterator<Item = (&'a str, Self)> + use<'a> {
        let path = self.path.clone();
        let entries = self.value.as_object().into_iter().flatten();
        entries.map(move |(key, value)| (key.as_str(), Self::at(value, format!("{path}[{key}]"))))
    }

    pub fn value(&self) -> &'a Value {
        self.value
    }

    pub fn path(&self) -> &str {
        &self.path
    }

    pub fn text(&self) -> &'a str {
        self.value.as_str().unwrap_or("")
    }

    pub fn int(&self) -> i64 {
        self.value.as_i64().unwrap_or(0)
    }

    pub fn flag(&self) -> bool {
        self.value.as_bool().unwrap_or(false)
    }

    pub fn is_there(&self) -> bool {
        !self.value.is_null()
    }

    /// Absent, or empty text, list or map.
    pub fn is_empty(&self) -> bool {
        match self.value {
            Value::Null => true,
            Value::String(text) => text.is_empty(),
            Value::Array(items) => items.is_empty(),
            Value::Object(fields) => fields.is_empty(),
            Value::Bool(_) | Value::Number(_) => false,
        }
    }

    pub fn len(&self) -> usize {
        self.value.as_array().map_or(0, Vec::len)
    }

    pub fn missing(&self, why: &str, errors: &mut Errors) {
        errors.push(FieldError::required(&self.path, why));
    }

    pub fn invalid(&self, why: impl AsRef<str>, errors: &mut Errors) {
        // An absent text is shown as Go has it: most that rules look at are texts.
        let shown = match self.value {
            Value::Null => "".into(),
            value => value.clone(),
        };
        errors.push(FieldError::invalid(&self.path, shown, why));
    }

    /// As [`Place::invalid`], of a number: an absent one is zero.
    fn invalid_number(&self, why: impl AsRef<str>, errors: &mut Errors) {
        let shown = match self.value {
            Value::Null => 0.into(),
            value => value.clone(),
        };
        errors.push(FieldError::invalid(&self.path, shown, why));
    }

    /// As [`Place::invalid`], of a list or map, which is nothing when it is absent or empty.
    pub fn invalid_set(&self, why: impl AsRef<str>, errors: &mut Errors) {
        let shown = match self.is_empty() {
            true => Value::Null,
            false => self.value.clone(),
        };
        errors.push(FieldError::invalid(&self.path, shown, why));
    }

    /// Requires a key of labels; all that is wrong with it is told.
    pub fn label_key(&self, errors: &mut Errors) {
        for why in crate::selector::key_faults(self.text()) {
            self.invalid(why, errors);
        }
    }

    pub fn forbidden(&self, why: &str, errors: &mut Errors) {
        errors.push(FieldError::forbidden(&self.path, why));
    }

    pub fn duplicate(&self, errors: &mut Errors) {
        errors.push(FieldError::duplicate(&self.path, self.value.clone()));
    }

    pub fn not_found(&self, errors: &mut Errors) {
        let shown = match self.value {
            Value::Null => "".into(),
            value => value.clone(),
        };
        errors.push(FieldError::not_found(&self.path, shown));
    }

    /// Requires a value; true when there is one.
    pub fn require(&self, errors: &mut Errors) -> bool {
        if self.is_empty() {
            self.missing("", errors);
        }
        !self.is_empty()
    }

    /// Requires one of some texts, which a message lists in this order.
    pub fn require_one_as_listed(&self, allowed: &[&str], errors: &mut Errors) {
        if self.require(errors) && !allowed.contains(&self.text()) {
            let error = FieldError::unsupported_as_listed(&self.path, self.text(), allowed);
            errors.push(error);
        }
    }

    /// Requires one of some texts, where there is a text. An empty one is Go's way to have none.
    pub fn one_of(&self, allowed: &[&str], errors: &mut Errors) {
        let given = self.value.as_str().filter(|text| !text.is_empty());
        if let Some(text) = given.filter(|text| !allowed.contains(text)) {
            errors.push(FieldError::unsupported(&self.path, text, allowed));
        }
    }

    /// As [`Place::exactly_one_of`], for lists that a message does not sort.
    pub fn exactly_one_as_listed(&self, allowed: &[&str], errors: &mut Errors) {
        if let Some(text) = self.value.as_str().filter(|text| !allowed.contains(text)) {
            let error = FieldError::unsupported_as_listed(&self.path, text, allowed);
            errors.push(error);
        }
    }

    /// Requires one of some texts, where there is one; an empty one is none of them.
    pub fn exactly_one_of(&self, allowed: &[&str], errors: &mut Errors) {
        if let Some(text) = self.value.as_str().filter(|text| !allowed.contains(text)) {
            errors.push(FieldError::unsupported(&self.path, text, allowed));
        }
    }

    /// Requires one of some texts.
    pub fn require_one_of(&self, allowed: &[&str], errors: &mut Errors) {
        if self.require(errors) {
            self.one_of(allowed, errors);
        }
    }

    /// Holds a text, where there is one, to a rule, which says what is wrong.
    pub fn keep_to(&self, rule: impl Fn(&str) -> Option<String>, errors: &mut Errors) {
        if let Some(why) = self
            .value
            .as_str()
            .filter(|text| !text.is_empty())
            .and_then(rule)
        {
            self.invalid(why, errors);
        }
    }

    /// Holds a text, where there is one, to a rule that an empty one breaks too.
    pub fn hold_to(&self, rule: impl Fn(&str) -> Option<String>, errors: &mut Errors) {
        if let Some(why) = self.value.as_str().and_then(rule) {
            self.invalid(why, errors);
        }
    }

    /// Requires a text that keeps to a rule.
    pub fn require_name(&self, rule: impl Fn(&str) -> Option<String>, errors: &mut Errors) {
        if self.require(errors) {
            self.keep_to(rule, errors);
        }
    }

    /// Requires an RFC 1123 subdomain; none at all is a wrong one.
    pub fn require_subdomain(&self, errors: &mut Errors) {
        if let Some(why) = super::metadata::dns_subdomain(self.text()) {
            self.invalid(why, errors);
        }
    }

    pub fn not_negative(&self, errors: &mut Errors) {
        if self.int() < 0 {
            self.invalid("must be greater than or equal to 0", errors);
        }
    }

    pub fn positive(&self, errors: &mut Errors) {
        if self.is_there() && self.int() <= 0 {
            self.invalid("must be greater than 0", errors);
        }
    }

    /// Requires a number, where there is one, to be within bounds.
    pub fn within(&self, bounds: RangeInclusive<i64>, errors: &mut Errors) {
        if self.is_there() && !bounds.contains(&self.int()) {
            let (least, most) = bounds.into_inner();
            self.invalid(
                format!("must be between {least} and {most}, inclusive"),
                errors,
            );
        }
    }

    /// Requires a port number.
    pub fn port(&self, errors: &mut Errors) {
        if !(1..=65535).contains(&self.int()) {
            self.invalid_number("must be between 1 and 65535, inclusive", errors);
        }
    }

    /// Requires a port number, or the name of one.
    pub fn port_or_name(&self, errors: &mut Errors) {
        match self.value {
            Value::String(name) => {
                for why in super::metadata::port_name(name) {
                    self.invalid(why, errors);
                }
            }
            _ => self.port(errors),
        }
    }

    /// Requires an IP address of either family.
    pub fn address(&self, errors: &mut Errors) {
        if self.text().parse::<std::net::IpAddr>().is_err() {
            let why = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
            self.invalid(why, errors);
        }
    }

    /// Requires an IP prefix of either family.
    pub fn cidr(&self, errors: &mut Errors) {
        let network = self.text().parse::<ipnetwork::IpNetwork>();
        if network.is_err() || !self.text().contains('/') {
            let why = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
            self.invalid(why, errors);
        }
    }

    /// The quantity, where there is one that is not negative.
    pub fn quantity(&self, errors: &mut Errors) -> Option<Quantity> {
        if !self.is_there() {
            return None;
        }
        match Quantity::of(self.value) {
            Some(quantity) if quantity.is_negative() => {
                self.invalid("must be greater than or equal to 0", errors);
                None
            }
            Some(quantity) => Some(quantity),
            None => {
                self.invalid(quantity::INVALID, errors);
                None
            }
        }
    }

    /// Requires a count or a percentage, where there is one.
    pub fn share(&self, errors: &mut Errors) {
        match self.value {
            Value::Number(_) => self.not_negative(errors),
            Value::String(text) if percent(text).is_none() => {
                let why = "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')";
                self.invalid(why, errors);
            }
            _ => {}
        }
    }

    /// Refuses a percentage over 100.
    pub fn at_most_all(&self, errors: &mut Errors) {
        if percent(self.text()).is_some_and(|percent| percent > 100) {
            self.invalid("must not be greater than 100%", errors);
        }
    }

    /// Refuses a change of what is fixed once the object exists.
    pub fn unchanged(&self, old: &Self, errors: &mut Errors) {
        if self.value != old.value {
            self.invalid("field is immutable", errors);
        }
    }

    pub fn too_long(&self, bytes_max: usize, errors: &mut Errors) {
        errors.push(FieldError::too_long(&self.path, bytes_max));
    }

    /// Refuses more items than there may be.
    pub fn at_most(&self, most: usize, errors: &mut Errors) {
        if self.len() > most {
            errors.push(FieldError {
                field: self.path.clone(),
                reason: "FieldValueTooMany",
                message: format!("Too many: {}: must have at most {most} items", self.len()),
            });
        }
    }
}

/// The number of a percentage.
pub fn percent(text: &str) -> Option<u32> {
    let digits = text.strip_suffix('%')?;
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| digits.parse().unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn faults_are_told_at_the_place_of_their_value() {
        let object = json!({"spec": {"ports": [{"port": 80}, {"port": 0}], "hard": {"cpu": "-1"}}});
        let root = Place::root(&object);
        let mut errors = Vec::new();
        for port in root.field("spec.ports").items() {
            port.field("port").port(&mut errors);
            port.field("name").require(&mut errors);
        }
        for (_, quantity) in root.field("spec.hard").entries() {
            quantity.quantity(&mut errors);
        }
        let told: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            [
                "spec.ports[0].name: Required value",
                "spec.ports[1].port: Invalid value: 0: must be between 1 and 65535, inclusive",
                "spec.ports[1].name: Required value",
                r#"spec.hard[cpu]: Invalid value: "-1": must be greater than or equal to 0"#,
            ]
        );
    }

    #[test]
    fn shares_are_counts_or_percentages() {
        let check = |value: Value| {
            let mut errors = Vec::new();
            let place = Place::at(&value, "x");
            place.share(&mut errors);
            place.at_most_all(&mut errors);
            errors.len()
        };
        for good in [json!(0), json!(3), json!("0%"), json!("100%"), json!(null)] {
            assert_eq!(check(good.clone()), 0, "{good}");
        }
        for bad in [
            json!(-1),
            json!("x"),
            json!("%"),
            json!("-1%"),
            json!("101%"),
            json!("+5%"),
        ] {
            assert_eq!(check(bad.clone()), 1, "{bad}");
        }
    }
}
