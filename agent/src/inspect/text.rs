//! Answers as text.

use std::io::{self, Write};

use super::conntrack::{FlowItem, FlowState};
use super::names::Owner;
use super::service::{Clients, EndpointItem, PortItem, ServiceItem, Usage};
use super::table::{Cell, Screen, Table, Tone};
use crate::monitor::EventItem;

/// Headings of [`service_row`].
pub const SERVICE_HEADINGS: [&str; 7] = [
    "NAMESPACE",
    "NAME",
    "TYPE",
    "ADDRESS",
    "PORTS",
    "BACKENDS",
    "STATE",
];

/// A Service as a row of a list.
pub fn service_row(service: &ServiceItem) -> [Cell; 7] {
    let addresses: Vec<String> = service
        .cluster_ips
        .iter()
        .chain(&service.external_ips)
        .chain(&service.load_balancer_ips)
        .map(ToString::to_string)
        .collect();
    let mut ports: Vec<String> = Vec::new();
    for port in &service.ports {
        for frontend in &port.frontends {
            let shown = short(&frontend.address);
            if !ports.contains(&shown) {
                ports.push(shown);
            }
        }
    }
    let active = service
        .ports
        .iter()
        .map(|port| port.active.len())
        .sum::<usize>();
    let terminating = service
        .ports
        .iter()
        .map(|port| port.terminating.len())
        .sum::<usize>();
    let backends = match (service.ports.is_empty(), terminating) {
        (true, _) => String::new(),
        (false, 0) => active.to_string(),
        (false, _) => format!("{active} + {terminating} terminating"),
    };
    let (state, tone) = state(service, active, terminating);
    [
        service.namespace.as_str().into(),
        service.name.as_str().into(),
        service.service_type.as_str().into(),
        addresses.join(",").into(),
        ports.join(",").into(),
        backends.into(),
        Cell::new(state, tone),
    ]
}

/// `80/TCP` of `10.96.0.7:80 TCP`.
fn short(frontend: &str) -> String {
    match frontend.rsplit_once(':') {
        Some((_, port)) => port.replace(' ', "/"),
        None => frontend.into(),
    }
}

fn state(service: &ServiceItem, active: usize, terminating: usize) -> (&'static str, Tone) {
    if !service.refused.is_empty() {
        return ("refused", Tone::Bad);
    }
    if service.not_served.is_some() {
        return ("not served", Tone::Faint);
    }
    let installed = service
        .ports
        .iter()
        .flat_map(|port| &port.frontends)
        .all(|frontend| frontend.installed);
    match (installed, active, terminating) {
        (false, _, _) => ("waiting", Tone::Warning),
        (true, 0, 0) if service.ports.is_empty() => ("no ports", Tone::Faint),
        (true, 0, 0) => ("rejecting", Tone::Warning),
        (true, 0, _) => ("draining", Tone::Warning),
        _ => ("served", Tone::Good),
    }
}

/// All about one Service.
pub fn service<W: Write>(screen: &mut Screen<W>, service: &ServiceItem) -> io::Result<()> {
    let field = |screen: &mut Screen<W>, name: &str, value: &str, tone: Tone| {
        screen.write(&format!("{:<14}", format!("{name}:")), Tone::Heading)?;
        screen.line(value, tone)
    };
    let list = |addresses: &[std::net::IpAddr]| {
        let texts: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        texts.join(", ")
    };
    field(
        screen,
        "Service",
        &format!("{}/{}", service.namespace, service.name),
        Tone::Plain,
    )?;
    field(screen, "Type", &service.service_type, Tone::Plain)?;
    for (name, addresses) in [
        ("ClusterIPs", &service.cluster_ips),
        ("External IPs", &service.external_ips),
        ("LoadBalancer", &service.load_balancer_ips),
    ] {
        if !addresses.is_empty() {
            field(screen, name, &list(addresses), Tone::Plain)?;
        }
    }
    for (name, value) in &service.policies {
        field(screen, "Policy", &format!("{name}: {value}"), Tone::Plain)?;
    }
    if let Some(why) = &service.not_served {
        field(screen, "Not served", why, Tone::Faint)?;
    }
    for why in &service.refused {
        field(screen, "Refused", why, Tone::Bad)?;
    }
    for why in &service.warnings {
        field(screen, "Warning", why, Tone::Warning)?;
    }
    for port in &service.ports {
        screen.line("", Tone::Plain)?;
        port_text(screen, port, &service.endpoints)?;
    }
    if !service.endpoints.is_empty() {
        screen.line("\nEndpoints:", Tone::Heading)?;
        let mut table = Table::new(["  ADDRESS", "USE", "NODE", "ZONE", "TARGET", "WHY"]);
        for endpoint in &service.endpoints {
            table.row(screen, endpoint_row(endpoint))?;
        }
        table.finish(screen)?;
    }
    screen.flush()
}

fn port_text<W: Write>(
    screen: &mut Screen<W>,
    port: &PortItem,
    endpoints: &[EndpointItem],
) -> io::Result<()> {
    let name = if port.name.is_empty() {
        "(unnamed)"
    } else {
        &port.name
    };
    let id = port.id.map_or("no id".into(), |id| format!("id {id}"));
    screen.write(&format!("Port {name}"), Tone::Heading)?;
    let only = if port.local {
        ", this node's endpoints only"
    } else {
        ""
    };
    screen.line(&format!(", {}, {id}{only}", port.family), Tone::Plain)?;
    for frontend in &port.frontends {
        let clients = match frontend.clients {
            Clients::All => "",
            Clients::Internal => "   for clients on this node",
            Clients::External => "   for clients elsewhere",
        };
        let guarded = if frontend.guarded {
            "   from source ranges only"
        } else {
            ""
        };
        let address = frontend.address.as_str();
        screen.write(
            &format!("  frontend  {address}{clients}{guarded}"),
            Tone::Plain,
        )?;
        let (text, tone) = match frontend.installed {
            true => ("", Tone::Plain),
            false => ("   not in the maps", Tone::Bad),
        };
        screen.line(text, tone)?;
    }
    let all = port
        .active
        .iter()
        .map(|at| (at, Usage::Active))
        .chain(port.terminating.iter().map(|at| (at, Usage::Terminating)));
    let mut any = false;
    for (at, usage) in all {
        any = true;
        let about = endpoints
            .iter()
            .find(|endpoint| endpoint.address == at.ip())
            .and_then(|endpoint| endpoint.target.as_deref())
            .unwrap_or("");
        let tone = if usage == Usage::Active {
            Tone::Good
        } else {
            Tone::Warning
        };
        screen.write(&format!("  backend   {at}   "), Tone::Plain)?;
        screen.write(usage.name(), tone)?;
        screen.line(
            &if about.is_empty() {
                String::new()
            } else {
                format!("   {about}")
            },
            Tone::Plain,
        )?;
    }
    if !any {
        let what = match port.silent {
            true => "  no backend on this node: clients get no answer",
            false => "  no backend: clients are rejected",
        };
        screen.line(what, Tone::Warning)?;
    }
    if port.left_out > 0 {
        screen.line(&format!("  {} backends left out", port.left_out), Tone::Bad)?;
    }
    Ok(())
}

fn endpoint_row(endpoint: &EndpointItem) -> [Cell; 6] {
    let tone = match endpoint.usage {
        Usage::Active => Tone::Good,
        Usage::Terminating => Tone::Warning,
        Usage::Unused => Tone::Faint,
    };
    let node = match (&endpoint.node, endpoint.local) {
        (Some(node), true) => format!("{node} (this)"),
        (Some(node), false) => node.clone(),
        (None, _) => String::new(),
    };
    [
        format!("  {}", endpoint.address).into(),
        Cell::new(endpoint.usage.name(), tone),
        node.into(),
        endpoint.zone.clone().unwrap_or_default().into(),
        endpoint.target.clone().unwrap_or_default().into(),
        endpoint.why.clone().unwrap_or_default().into(),
    ]
}

/// Headings of [`flow_row`].
pub const FLOW_HEADINGS: [&str; 8] = [
    "PROTO", "STATE", "CLIENT", "FRONTEND", "SERVICE", "BACKEND", "IDLE", "EXPIRES",
];

/// A flow as a row of a list.
pub fn flow_row(flow: &FlowItem) -> [Cell; 8] {
    let tone = match flow.state {
        FlowState::Established | FlowState::Replied => Tone::Good,
        FlowState::Unreplied => Tone::Warning,
        _ => Tone::Faint,
    };
    let mut client = named(&flow.client.to_string(), flow.client_name.as_ref());
    if let Some(seen_as) = &flow.translated_client {
        client.push_str(&format!(" as {seen_as}"));
    }
    [
        flow.protocol.as_str().into(),
        Cell::new(flow.state.name(), tone),
        client.into(),
        flow.frontend.to_string().into(),
        match &flow.service {
            Some(service) => service.as_str().into(),
            None => Cell::new(format!("gone (id {})", flow.service_id), Tone::Faint),
        },
        named(&flow.backend.to_string(), flow.backend_name.as_ref()).into(),
        seconds(flow.idle_seconds).into(),
        seconds(flow.expires_seconds).into(),
    ]
}

/// An address with whose it is.
pub fn named(address: &str, owner: Option<&Owner>) -> String {
    match owner {
        Some(owner) => format!("{address} ({owner})"),
        None => address.into(),
    }
}

/// An event as a line.
pub fn event<W: Write>(screen: &mut Screen<W>, event: &EventItem) -> io::Result<()> {
    let time = event.time.to_zoned(jiff::tz::TimeZone::UTC);
    screen.write(&time.strftime("%H:%M:%S%.6f  ").to_string(), Tone::Faint)?;
    if let Some(lost) = event.lost {
        return screen.line(&format!("{lost} events were lost"), Tone::Warning);
    }
    let tone = match event.class.as_str() {
        "drop" => Tone::Bad,
        "reject" => Tone::Warning,
        _ => Tone::Good,
    };
    screen.write(&format!("{:<6}  ", event.class.to_uppercase()), tone)?;
    screen.write(&format!("{:<18}  ", event.reason), tone)?;
    screen.write(
        &format!("{:<4} ", event.protocol.as_deref().unwrap_or("?")),
        Tone::Plain,
    )?;
    let source = event.source.as_ref().or(event.process.as_ref());
    let mut text = named(
        source.map_or("not IP", String::as_str),
        event.source_name.as_ref(),
    );
    if let Some(destination) = &event.destination {
        text.push_str(" -> ");
        text.push_str(&named(destination, event.destination_name.as_ref()));
    }
    if let Some(backend) = &event.backend {
        text.push_str(" -> ");
        text.push_str(&named(&backend.to_string(), event.backend_name.as_ref()));
    }
    screen.write(&text, Tone::Plain)?;
    if let Some(flags) = event.flags.as_ref().filter(|flags| !flags.is_empty()) {
        screen.write(&format!("  {flags}"), Tone::Plain)?;
    }
    screen.line(&format!("  at {}", event.hook), Tone::Faint)?;
    screen.flush()
}

/// As kubectl writes ages: the two largest units.
fn seconds(total: u32) -> String {
    let (hours, minutes, seconds) = (total / 3600, total / 60 % 60, total % 60);
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m{seconds}s"),
        _ => format!("{hours}h{minutes}m"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_the_two_largest_units() {
        assert_eq!(seconds(0), "0s");
        assert_eq!(seconds(61), "1m1s");
        assert_eq!(seconds(86_400), "24h0m");
    }

    #[test]
    fn ports_are_shown_without_their_address() {
        assert_eq!(short("10.96.0.7:80 TCP"), "80/TCP");
        assert_eq!(short("[fd00::1]:53 UDP"), "53/UDP");
    }
}
