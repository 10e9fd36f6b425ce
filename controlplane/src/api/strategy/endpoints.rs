//! Endpoints and EndpointSlices.

use serde_json::Value;

use super::{Errors, Strategy, immutable, one_of, required};
use crate::api::fields::Fields;
use crate::api::status::FieldError;

const ENDPOINTS_MAX: usize = 1000;
const PORTS_MAX: usize = 20_000;

pub struct Endpoints;

impl Strategy for Endpoints {
    fn default(&self, endpoints: &mut Value) {
        for subset in endpoints.items_mut("/subsets") {
            for port in subset.items_mut("/ports") {
                port.default("/protocol", "TCP");
            }
        }
    }

    fn validate(&self, endpoints: &Value, errors: &mut Errors) {
        for (at, subset) in endpoints.items("/subsets").iter().enumerate() {
            for (index, address) in subset.items("/addresses").iter().enumerate() {
                let ip = address.text("/ip");
                if ip.parse::<std::net::IpAddr>().is_err() {
                    let field = format!("subsets[{at}].addresses[{index}].ip");
                    errors.push(FieldError::invalid(
                        field,
                        ip,
                        "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
                    ));
                }
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
        required(slice, "/addressType", errors);
        one_of(slice, "/addressType", "", &["IPv4", "IPv6", "FQDN"], errors);
        for (items, most) in [("endpoints", ENDPOINTS_MAX), ("ports", PORTS_MAX)] {
            let count = slice.items(&format!("/{items}")).len();
            if count > most {
                let message = format!("Too many: {count}: must have at most {most} items");
                errors.push(FieldError {
                    field: items.to_owned(),
                    reason: "FieldValueTooMany",
                    message,
                });
            }
        }
        let family = slice.text("/addressType");
        for (at, endpoint) in slice.items("/endpoints").iter().enumerate() {
            if endpoint.items("/addresses").is_empty() {
                errors.push(FieldError::required(
                    format!("endpoints[{at}].addresses"),
                    "must contain at least 1 address",
                ));
            }
            for (index, address) in endpoint.items("/addresses").iter().enumerate() {
                let text = address.as_str().unwrap_or("");
                let wrong = match family {
                    "IPv4" => text.parse::<std::net::Ipv4Addr>().is_err(),
                    "IPv6" => text.parse::<std::net::Ipv6Addr>().is_err(),
                    _ => text.is_empty(),
                };
                if wrong {
                    let field = format!("endpoints[{at}].addresses[{index}]");
                    errors.push(FieldError::invalid(
                        field,
                        text,
                        format!("must be a valid {family} address"),
                    ));
                }
            }
        }
        for (at, port) in slice.items("/ports").iter().enumerate() {
            one_of(
                port,
                "/protocol",
                &format!("ports[{at}]"),
                &["TCP", "UDP", "SCTP"],
                errors,
            );
        }
    }

    fn validate_update(&self, slice: &Value, old: &Value, errors: &mut Errors) {
        immutable(slice, old, "/addressType", errors);
    }

    fn counts_generations(&self) -> bool {
        true
    }
}
