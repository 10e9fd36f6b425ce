//! Node ports: those of a service's ports, and the one at which nodes tell of a balancer's local backends.

use std::collections::BTreeSet;

use rand::RngExt;
use serde_json::Value;

use crate::api::config::NODE_PORTS;
use crate::api::fields::Fields;
use crate::api::status::FieldError;
use crate::api::strategy;

/// Gives a service the node ports that it asks for or lacks.
pub fn give(
    service: &mut Value,
    old: Option<&Value>,
    book: &mut Book<'_>,
    errors: &mut Vec<FieldError>,
) {
    let wanted = strategy::wants_node_ports(service);
    let asked: Vec<(i64, i64)> = service
        .items("/spec/ports")
        .iter()
        .map(|port| (port.int("/port"), port.int("/nodePort")))
        .collect();
    let mut given: Vec<(i64, u16)> = Vec::new();
    for (at, port) in service.items_mut("/spec/ports").iter_mut().enumerate() {
        let field = format!("spec.ports[{at}].nodePort");
        let number = port.int("/port");
        match port.int("/nodePort") {
            0 if !wanted => {}
            0 => {
                // One port by two protocols of a new service has one number; a given one, where there is one.
                let shared = asked
                    .iter()
                    .find(|(port, node)| old.is_none() && *port == number && *node != 0)
                    .and_then(|(_, node)| u16::try_from(*node).ok())
                    .or_else(|| {
                        let same = |(port, _): &&(i64, u16)| old.is_none() && *port == number;
                        given.iter().find(same).map(|(_, node)| *node)
                    });
                match shared.or_else(|| book.any()) {
                    Some(node) => {
                        given.push((number, node));
                        port.set("/nodePort", node);
                    }
                    None => errors.push(FieldError::invalid(field, 0, "range is full")),
                }
            }
            asked => {
                if let Err(why) = book.take(asked) {
                    errors.push(FieldError::invalid(field, asked, why));
                }
            }
        }
    }
    health_check(service, book, errors);
}

/// A balancer that leads to local backends only has a port at which its nodes say whether they have any.
fn health_check(service: &mut Value, book: &mut Book<'_>, errors: &mut Vec<FieldError>) {
    if !strategy::tells_of_health(service) {
        return;
    }
    let (path, field) = ("/spec/healthCheckNodePort", "spec.healthCheckNodePort");
    match service.int(path) {
        0 => match book.any() {
            Some(number) => service.set(path, number),
            None => errors.push(FieldError::invalid(field, 0, "range is full")),
        },
        asked => {
            if let Err(why) = book.take(asked) {
                let why =
                    format!("failed to allocate requested HealthCheck NodePort {asked}: {why}");
                errors.push(FieldError::invalid(field, asked, why));
            }
        }
    }
}

/// What one service has, and what all have.
pub struct Book<'a> {
    /// What the service has had.
    pub held: &'a BTreeSet<u16>,
    pub taken: &'a dyn Fn(u16) -> bool,
    /// What it gets now.
    pub new: &'a mut BTreeSet<u16>,
}

impl Book<'_> {
    fn is_free(&self, port: u16) -> bool {
        !self.new.contains(&port) && !(self.taken)(port)
    }

    /// A free port.
    fn any(&mut self) -> Option<u16> {
        let start = rand::rng().random_range(NODE_PORTS);
        let free = (start..=*NODE_PORTS.end())
            .chain(*NODE_PORTS.start()..start)
            .find(|port| self.is_free(*port))?;
        self.new.insert(free);
        Some(free)
    }

    /// The port that is asked for; the same number may serve two protocols of one service.
    fn take(&mut self, asked: i64) -> Result<(), String> {
        let number = u16::try_from(asked).ok();
        let Some(number) = number.filter(|number| NODE_PORTS.contains(number)) else {
            let (first, last) = (NODE_PORTS.start(), NODE_PORTS.end());
            return Err(format!(
                "provided port is not in the valid range. The range of valid ports is {first}-{last}"
            ));
        };
        if self.held.contains(&number) || self.new.contains(&number) {
            return Ok(());
        }
        if !self.is_free(number) {
            return Err("provided port is already allocated".to_owned());
        }
        self.new.insert(number);
        Ok(())
    }
}
