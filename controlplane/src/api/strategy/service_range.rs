//! ServiceCIDRs and IPAddresses.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde_json::Value;

use super::families::Family;
use super::metadata::{dns_subdomain, path_segment};
use super::place::Place;
use super::{Errors, NameRule, Strategy};
use crate::api::fields::Fields;
use crate::api::status::FieldError;

pub struct IpAddress;

impl Strategy for IpAddress {
    fn validate(&self, address: &Value, errors: &mut Errors) {
        let root = Place::root(address);
        let name = root.field("metadata.name");
        match parsed(name.text()) {
            Parsed::Address(ip) if ip.to_string() == name.text() => {}
            Parsed::Address(ip) => name.invalid(not_canonical(ip), errors),
            Parsed::Mapped => name.invalid("must not be an IPv4-mapped IPv6 address", errors),
            Parsed::Zeroes => name.invalid("must not have leading 0s", errors),
            Parsed::Nothing => name.address(errors),
        }
        let parent = root.field("spec.parentRef");
        if !parent.is_there() {
            return parent.missing("", errors);
        }
        parent.field("group").keep_to(dns_subdomain, errors);
        parent.field("resource").require_name(path_segment, errors);
        parent.field("name").require_name(path_segment, errors);
        parent.field("namespace").keep_to(path_segment, errors);
    }

    fn validate_update(&self, address: &Value, old: &Value, errors: &mut Errors) {
        let parent = |address| Place::root(address).field("spec.parentRef");
        parent(address).unchanged(&parent(old), errors);
    }

    fn name_rule(&self) -> NameRule {
        NameRule::PathSegment
    }
}

pub struct ServiceCidr;

impl Strategy for ServiceCidr {
    fn validate(&self, ranges: &Value, errors: &mut Errors) {
        // What is stored was valid once, and stays.
        if !ranges.has("/metadata/uid") {
            validate_cidrs(&cidrs(ranges), errors);
        }
    }

    fn validate_update(&self, ranges: &Value, old: &Value, errors: &mut Errors) {
        let (now, before) = (cidrs(ranges), cidrs(old));
        let grows = before.len() == 1 && now.len() == 2;
        if now.len() != before.len() && !grows {
            return now.invalid_set("field is immutable", errors);
        }
        for (now, before) in now.items().zip(before.items()) {
            now.unchanged(&before, errors);
        }
        // A second family may come.
        if grows {
            validate_cidrs(&now, errors);
        }
    }
}

fn cidrs(ranges: &Value) -> Place<'_> {
    Place::root(ranges).field("spec.cidrs")
}

fn validate_cidrs(cidrs: &Place<'_>, errors: &mut Errors) {
    if cidrs.is_empty() {
        return cidrs.missing("at least one CIDR required", errors);
    }
    if cidrs.len() > 2 {
        return cidrs.invalid("may only hold up to 2 values", errors);
    }
    let mut families = Vec::new();
    for cidr in cidrs.items() {
        families.extend(validate_cidr(&cidr, errors));
    }
    if families.len() == 2 && families[0] == families[1] {
        let why = "may specify no more than one IP for each IP family, i.e 192.168.0.0/24 and 2001:db8::/64";
        cidrs.invalid(why, errors);
    }
}

/// Checks one range as strictly as upstream does for what is new; its family, where it has one.
fn validate_cidr(cidr: &Place<'_>, errors: &mut Errors) -> Option<Family> {
    let text = cidr.text();
    let mut invalid = |why: &str| errors.push(FieldError::invalid(cidr.path(), text, why));
    let not_a_cidr = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
    let Some((address, length)) = text.split_once('/') else {
        invalid(not_a_cidr);
        return None;
    };
    let digits = !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit());
    let number = length.parse::<u8>().ok().filter(|_| digits);
    let (parsed, zeroes) = (parsed(address), length.len() > 1 && length.starts_with('0'));
    let network = match (&parsed, number) {
        (Parsed::Address(ip), Some(number)) => IpNetwork::new(*ip, number).ok(),
        (Parsed::Zeroes, Some(0..=32)) => {
            invalid("must not have leading 0s in IP or prefix length");
            return Some(Family::V4);
        }
        (Parsed::Mapped, Some(0..=128)) => {
            invalid("must not have an IPv4-mapped IPv6 address");
            return None;
        }
        _ => None,
    };
    let Some(network) = network else {
        invalid(not_a_cidr);
        return None;
    };
    let canonical = format!("{}/{}", network.network(), network.prefix());
    if zeroes {
        invalid("must not have leading 0s in IP or prefix length");
    } else if network.ip() != network.network() {
        invalid("must not have bits set beyond the prefix length");
    } else if canonical != text {
        invalid(&not_canonical(canonical));
    }
    Some(Family::of(network.ip()))
}

fn not_canonical(canonical: impl ToString) -> String {
    format!("must be in canonical form ({:?})", canonical.to_string())
}

/// A text that may be an address.
enum Parsed {
    Address(IpAddr),
    /// IPv4 in IPv6's clothes, which some read as the one and some as the other.
    Mapped,
    /// IPv4 with zeroes before numbers, which some read as octal.
    Zeroes,
    Nothing,
}

fn parsed(text: &str) -> Parsed {
    match text.parse::<IpAddr>() {
        Ok(IpAddr::V6(ip)) if ip.to_ipv4_mapped().is_some() => Parsed::Mapped,
        Ok(ip) => Parsed::Address(ip),
        Err(_) => {
            let parts: Vec<&str> = text.split('.').collect();
            let number = |part: &&str| {
                let digits = part.bytes().all(|byte| byte.is_ascii_digit());
                digits && part.trim_start_matches('0').len() <= 3 && !part.is_empty() && {
                    let short = part.trim_start_matches('0');
                    short.is_empty() || short.parse::<u8>().is_ok()
                }
            };
            match parts.len() == 4 && parts.iter().all(number) {
                true => Parsed::Zeroes,
                false => Parsed::Nothing,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::told;
    use super::*;

    fn of(cidrs: &[&str]) -> Value {
        json!({"metadata": {"name": "a"}, "spec": {"cidrs": cidrs}})
    }

    #[test]
    fn ranges_are_one_of_each_family_and_canonical() {
        for good in [
            &["10.0.0.0/8"][..],
            &["203.0.113.0/32"],
            &["2001:db8::/64"],
            &["2001:db8::/64", "203.0.113.0/24"],
        ] {
            assert_eq!(told(&ServiceCidr, &of(good)), Vec::<String>::new());
        }
        let no = |at: usize, cidr: &str, why: &str| {
            format!("spec.cidrs[{at}]: Invalid value: {cidr:?}: {why}")
        };
        for (cidr, why) in [
            (
                "192.168.0.1/24",
                "must not have bits set beyond the prefix length",
            ),
            (
                "192.168.000.0/24",
                "must not have leading 0s in IP or prefix length",
            ),
            (
                "192.168.0.0/024",
                "must not have leading 0s in IP or prefix length",
            ),
            (
                "2001:0db8::/64",
                r#"must be in canonical form ("2001:db8::/64")"#,
            ),
            (
                "::ffff:192.168.0.0/120",
                "must not have an IPv4-mapped IPv6 address",
            ),
            (
                "192.168.0.0",
                "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
            ),
            (
                "192.168.0.0/33",
                "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
            ),
            (
                "192.168.0.0/+8",
                "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
            ),
        ] {
            assert_eq!(told(&ServiceCidr, &of(&[cidr])), [no(0, cidr, why)]);
        }
        assert_eq!(
            told(&ServiceCidr, &of(&[])),
            ["spec.cidrs: Required value: at least one CIDR required"]
        );
        let two = told(&ServiceCidr, &of(&["10.0.0.0/8", "11.0.0.0/8"]));
        assert!(two[0].contains("no more than one IP for each IP family"));
        let three = of(&["10.0.0.0/8", "fd00::/64", "fd01::/64"]);
        assert!(told(&ServiceCidr, &three)[0].contains("may only hold up to 2 values"));
    }

    #[test]
    fn ranges_stay_but_for_a_second_family() {
        let changed = |old: &[&str], new: &[&str]| {
            let mut errors = Vec::new();
            ServiceCidr.validate_update(&of(new), &of(old), &mut errors);
            let told = errors.iter().map(ToString::to_string);
            told.collect::<Vec<_>>()
        };
        let none: [&str; 0] = [];
        assert_eq!(changed(&["10.0.0.0/8"], &["10.0.0.0/8"]), none);
        assert_eq!(changed(&["10.0.0.0/8"], &["10.0.0.0/8", "fd00::/64"]), none);
        assert_eq!(
            changed(&["10.0.0.0/8"], &["11.0.0.0/8"]),
            [r#"spec.cidrs[0]: Invalid value: "11.0.0.0/8": field is immutable"#]
        );
        assert_eq!(
            changed(&["10.0.0.0/8"], &["fd00::/64", "10.0.0.0/8"]),
            [r#"spec.cidrs[0]: Invalid value: "fd00::/64": field is immutable"#]
        );
        assert_eq!(
            changed(&["10.0.0.0/8", "fd00::/64"], &["10.0.0.0/8"]),
            [r#"spec.cidrs: Invalid value: ["10.0.0.0/8"]: field is immutable"#]
        );
        let two = changed(&["10.0.0.0/8"], &["10.0.0.0/8", "11.0.0.0/8"]);
        assert!(two[0].contains("no more than one IP for each IP family"));
    }

    #[test]
    fn an_address_is_named_as_it_is_written_and_has_a_parent() {
        let parent = json!({"resource": "services", "namespace": "a", "name": "b"});
        let named = |name: &str| json!({"metadata": {"name": name}, "spec": {"parentRef": parent}});
        for good in ["192.168.1.1", "fe80::42:1dff:fe84:f9e2"] {
            assert_eq!(told(&IpAddress, &named(good)), Vec::<String>::new());
        }
        for (name, why) in [
            (
                "2001:0db8::1",
                r#"must be in canonical form ("2001:db8::1")"#,
            ),
            ("FE80::1", r#"must be in canonical form ("fe80::1")"#),
            ("192.168.01.1", "must not have leading 0s"),
            ("::ffff:1.2.3.4", "must not be an IPv4-mapped IPv6 address"),
            (
                "192.168.1",
                "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
            ),
        ] {
            let expected = format!("metadata.name: Invalid value: {name:?}: {why}");
            assert_eq!(told(&IpAddress, &named(name)), [expected]);
        }
        let of = |parent: Value| {
            let object = json!({"metadata": {"name": "1.2.3.4"}, "spec": {"parentRef": parent}});
            told(&IpAddress, &object)
        };
        assert_eq!(of(Value::Null), ["spec.parentRef: Required value"]);
        assert_eq!(
            of(json!({})),
            [
                "spec.parentRef.resource: Required value",
                "spec.parentRef.name: Required value"
            ]
        );
        let wrong = json!({"group": "a_b", "resource": "a/b", "name": "..", "namespace": "a%"});
        let fields = ["group", "resource", "name", "namespace"];
        let told = of(wrong);
        assert_eq!(told.len(), 4, "{told:?}");
        for (told, field) in told.iter().zip(fields) {
            let place = format!("spec.parentRef.{field}: Invalid value");
            assert!(told.starts_with(&place), "{told}");
        }
    }
}
