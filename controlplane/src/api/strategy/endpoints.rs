//! Endpoints and EndpointSlices.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::Value;

use super::metadata::{dns_label, dns_subdomain, qualified_name};
use super::place::Place;
use super::{Errors, Strategy};
use crate::api::fields::{self, Fields};

const ENDPOINTS_MAX: usize = 1000;
const PORTS_MAX: usize = 20_000;
const ADDRESSES_MAX: usize = 100;
const ZONES_MAX: usize = 8;
const PROTOCOLS: [&str; 3] = ["SCTP", "TCP", "UDP"];

/// Whether these are the API server's own endpoints: they are where it was told that it is reached, whatever that is.
fn is_own(object: &Value) -> bool {
    fields::namespace(object) == "default" && fields::name(object) == "kubernetes"
}

/// Refuses addresses that mean something else to everyone who reads them.
fn usable(address: &Place<'_>, errors: &mut Errors) {
    let Ok(ip) = address.text().parse::<IpAddr>() else {
        return address.address(errors);
    };
    let (link_local, multicast) = match ip {
        IpAddr::V4(ip) => (ip.is_link_local(), ip.octets()[..3] == [224, 0, 0]),
        IpAddr::V6(ip) => (ip.is_unicast_link_local(), ip.segments()[0] == 0xff02),
    };
    if ip.is_unspecified() {
        address.invalid(format!("may not be unspecified ({ip})"), errors);
    } else if ip.is_loopback() {
        let why = "may not be in the loopback range (127.0.0.0/8, ::1/128)";
        address.invalid(why, errors);
    } else if link_local {
        let why = "may not be in the link-local range (169.254.0.0/16, fe80::/10)";
        address.invalid(why, errors);
    } else if multicast {
        let why = "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)";
        address.invalid(why, errors);
    }
}

pub struct Endpoints;

impl Strategy for Endpoints {
    fn creates_on_update(&self) -> bool {
        true
    }

    fn default(&self, endpoints: &mut Value) {
        for subset in endpoints.items_mut("/subsets") {
            for port in subset.items_mut("/ports") {
                port.default("/protocol", "TCP");
            }
        }
    }

    fn validate(&self, endpoints: &Value, errors: &mut Errors) {
        for subset in Place::root(endpoints).field("subsets").items() {
            let lists = [subset.field("addresses"), subset.field("notReadyAddresses")];
            if lists.iter().all(Place::is_empty) {
                subset.missing("must specify `addresses` or `notReadyAddresses`", errors);
            }
            for address in lists.iter().flat_map(Place::items) {
                if is_own(endpoints) {
                    address.field("ip").address(errors);
                } else {
                    usable(&address.field("ip"), errors);
                }
                address.field("hostname").keep_to(dns_label, errors);
                address.field("nodeName").keep_to(dns_subdomain, errors);
            }
            let ports = subset.field("ports");
            for port in ports.items() {
                if ports.len() > 1 && port.field("name").is_empty() {
                    port.field("name").missing("", errors);
                }
                port.field("name").keep_to(dns_label, errors);
                port.field("port").port(errors);
                port.field("protocol").require_one_of(&PROTOCOLS, errors);
                port.field("appProtocol").keep_to(qualified_name, errors);
            }
        }
    }
}

pub struct EndpointSlice;

impl Strategy for EndpointSlice {
    fn default(&self, slice: &mut Value) {
        if slice.pointer("/endpoints").is_none_or(Value::is_null) {
            slice.set("/endpoints", Value::Array(Vec::new()));
        }
        for port in slice.items_mut("/ports") {
            port.default("/name", "");
            port.default("/protocol", "TCP");
        }
    }

    fn validate(&self, slice: &Value, errors: &mut Errors) {
        let root = Place::root(slice);
        let family = root.field("addressType");
        family.require_one_of(&["FQDN", "IPv4", "IPv6"], errors);
        let (endpoints, ports) = (root.field("endpoints"), root.field("ports"));
        endpoints.at_most(ENDPOINTS_MAX, errors);
        for endpoint in endpoints.items() {
            validate_endpoint(&endpoint, family.text(), errors);
            for address in endpoint.field("addresses").items() {
                if family.text() != "FQDN" && !is_own(slice) && is_address(&address) {
                    usable(&address, errors);
                }
            }
        }
        ports.at_most(PORTS_MAX, errors);
        let mut names: BTreeSet<&str> = BTreeSet::new();
        for port in ports.items() {
            let name = port.field("name");
            name.keep_to(dns_label, errors);
            if !names.insert(name.text()) {
                name.duplicate(errors);
            }
            port.field("protocol").require_one_of(&PROTOCOLS, errors);
            port.field("appProtocol").keep_to(qualified_name, errors);
        }
    }

    fn validate_update(&self, slice: &Value, old: &Value, errors: &mut Errors) {
        let family = |slice| Place::root(slice).field("addressType");
        family(slice).unchanged(&family(old), errors);
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

fn is_address(place: &Place<'_>) -> bool {
    place.text().parse::<IpAddr>().is_ok()
}

fn validate_endpoint(endpoint: &Place<'_>, family: &str, errors: &mut Errors) {
    let addresses = endpoint.field("addresses");
    if addresses.is_empty() {
        addresses.missing("must contain at least 1 address", errors);
    }
    addresses.at_most(ADDRESSES_MAX, errors);
    for address in addresses.items() {
        let text = address.text();
        match family {
            "IPv4" if text.parse::<Ipv4Addr>().is_err() => {
                address.invalid("must be a valid IPv4 address", errors);
            }
            "IPv6" if text.parse::<Ipv6Addr>().is_err() => {
                address.invalid("must be a valid IPv6 address", errors);
            }
            "IPv4" | "IPv6" => {}
            _ => address.keep_to(dns_subdomain, errors),
        }
    }
    endpoint.field("hostname").keep_to(dns_label, errors);
    endpoint.field("nodeName").keep_to(dns_subdomain, errors);
    for hints in ["hints.forZones", "hints.forNodes"] {
        let hints = endpoint.field(hints);
        hints.at_most(ZONES_MAX, errors);
        let mut names: BTreeSet<&str> = BTreeSet::new();
        for hint in hints.items() {
            let name = hint.field("name");
            if !names.insert(name.text()) {
                name.duplicate(errors);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::told_with_defaults as told;
    use super::*;
    use serde_json::json;

    #[test]
    fn a_slice_stays_in_its_family_and_within_bounds() {
        let slice = |family: &str, count: usize| {
            let endpoints = vec![json!({"addresses": ["10.0.0.1"]}); count];
            json!({"addressType": family, "endpoints": endpoints})
        };
        let whole = slice("IPv4", ENDPOINTS_MAX);
        assert_eq!(told(&EndpointSlice, whole.clone()), Vec::<String>::new());
        let faults = told(&EndpointSlice, slice("IPv4", ENDPOINTS_MAX + 1));
        assert_eq!(
            faults,
            ["endpoints: Too many: 1001: must have at most 1000 items"]
        );
        let mut errors = Vec::new();
        EndpointSlice.validate_update(&slice("IPv6", 1), &whole, &mut errors);
        let fault = errors.iter().map(ToString::to_string).collect::<String>();
        assert!(
            fault.starts_with("addressType: Invalid value: \"IPv6\": field is immutable"),
            "{fault}"
        );
    }

    #[test]
    fn slices_hold_addresses_of_their_family() {
        let slice = |endpoints: Value| json!({"addressType": "IPv4", "endpoints": endpoints, "ports": [{"port": 80}]});
        assert_eq!(
            told(&EndpointSlice, slice(json!([{"addresses": ["10.0.0.1"]}]))),
            Vec::<String>::new()
        );
        assert_eq!(
            told(
                &EndpointSlice,
                slice(
                    json!([{"addresses": ["fd00::1"]}, {"addresses": []}, {"addresses": ["127.0.0.1"]}])
                )
            ),
            [
                r#"endpoints[0].addresses[0]: Invalid value: "fd00::1": must be a valid IPv4 address"#,
                "endpoints[1].addresses: Required value: must contain at least 1 address",
                r#"endpoints[2].addresses[0]: Invalid value: "127.0.0.1": may not be in the loopback range (127.0.0.0/8, ::1/128)"#,
            ]
        );
    }

    #[test]
    fn endpoints_have_addresses_and_named_ports() {
        assert_eq!(
            told(
                &Endpoints,
                json!({"subsets": [{"ports": [{"port": 1}, {"port": 0, "name": "b"}]}]})
            ),
            [
                "subsets[0]: Required value: must specify `addresses` or `notReadyAddresses`",
                "subsets[0].ports[0].name: Required value",
                "subsets[0].ports[1].port: Invalid value: 0: must be between 1 and 65535, inclusive",
            ]
        );
    }
}
