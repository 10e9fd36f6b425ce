//! What a Service keeps and what it loses when it is changed. Clients leave out what the server has given, and carry along what the
//! new type cannot have; what they set anew stays, to be validated.

use std::collections::{BTreeSet, HashMap};

use serde_json::{Value, json};

use super::{has_node_ports, is_exposed, kind, tells_of_health};
use crate::api::fields::Fields;

/// Puts back the numbers that the server has given, where the client left them out.
pub fn keep(service: &mut Value, old: &Value) {
    if has_node_ports(service) && has_node_ports(old) {
        keep_node_ports(service, old);
    }
    let check = "/spec/healthCheckNodePort";
    let given = old.int(check);
    if tells_of_health(service) && tells_of_health(old) && service.int(check) == 0 && given != 0 {
        service.set(check, given);
    }
}

/// A port keeps its node port by its name, whatever else of it changes, unless the client gives that number to another one.
fn keep_node_ports(service: &mut Value, old: &Value) {
    let used = &node_ports(service) & &node_ports(old);
    let known: HashMap<&str, i64> = old
        .items("/spec/ports")
        .iter()
        .map(|port| (port.text("/name"), port.int("/nodePort")))
        .collect();
    for port in service.items_mut("/spec/ports") {
        let number = known.get(port.text("/name")).copied().unwrap_or(0);
        if port.int("/nodePort") == 0 && number != 0 && !used.contains(&number) {
            port.set("/nodePort", number);
        }
    }
}

fn node_ports(service: &Value) -> BTreeSet<i64> {
    let ports = service.items("/spec/ports").iter();
    let numbers = ports.map(|port| port.int("/nodePort"));
    numbers.filter(|number| *number != 0).collect()
}

/// Takes away what the new type cannot have, as far as the client only carried it along.
pub fn leave(service: &mut Value, old: &Value) {
    let no_new_ones = node_ports(service).is_subset(&node_ports(old));
    if has_node_ports(old) && !has_node_ports(service) && no_new_ones {
        for port in service.items_mut("/spec/ports") {
            port.remove("/nodePort");
        }
    }
    let was_balanced = kind(old) == "LoadBalancer" && kind(service) != "LoadBalancer";
    for (field, ends) in [
        (
            "/spec/healthCheckNodePort",
            tells_of_health(old) && !tells_of_health(service),
        ),
        ("/spec/allocateLoadBalancerNodePorts", was_balanced),
        ("/spec/loadBalancerClass", was_balanced),
        (
            "/spec/externalTrafficPolicy",
            is_exposed(old) && !is_exposed(service),
        ),
    ] {
        if ends && service.pointer(field) == old.pointer(field) {
            service.remove(field);
        }
    }
    // The balancer's addresses are not the Service's any more, however long a balancer takes to let go of them.
    if kind(service) != "LoadBalancer" {
        service.set("/status/loadBalancer", json!({}));
    }
}
