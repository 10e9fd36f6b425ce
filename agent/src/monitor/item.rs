//! Events with names, and choosing among them.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use dataplane_abi::{Addr, Class, FlowKey, Hook, PacketEvent, Plain as _, Reason, SocketEvent};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::decode::{Decoded, decode};
use crate::dataplane::{FlowTables, ServiceId};
use crate::event::Event;
use crate::inspect::View;
use crate::inspect::conntrack::protocol_name;
use crate::inspect::names::{Names, Owner};
use crate::inspect::serve::{self, Cut};

/// How old names may be when an address is met that has none.
const STALE: Duration = Duration::from_secs(1);
/// How old they may be at all.
const OLD: Duration = Duration::from_secs(15);

/// What a listener wants to hear; of several conditions all must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MonitorFilter {
    /// Of new flows one in 2^n; none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows: Option<u32>,
    /// `<namespace>/<name>` of a pod that sends or is sent to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// `<namespace>/<name>` of the Service that is asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// Names of reasons; any when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<String>,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EventItem {
    pub time: Timestamp,
    /// `drop`, `reject`, `flow`, or `lost` when events did not get here.
    pub class: String,
    /// A name of docs/operating.md's list.
    pub reason: String,
    /// The program that saw it.
    pub hook: String,
    /// Index of the interface; absent at the socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    /// `<address>:<port>`, or the address alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_name: Option<Owner>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_name: Option<Owner>,
    /// Of a flow: `<namespace>/<name>:<port>` and where it leads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<SocketAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend_name: Option<Owner>,
    /// At the socket: the process that called, as `<name>[<pid>]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<String>,
    /// `SYN`, `RST` and so on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flags: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub length: Option<u32>,
    /// How many were lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<u64>,
}

impl EventItem {
    /// So many events did not get here.
    pub fn lost(count: u64) -> Self {
        Self {
            lost: Some(count),
            ..Self::new("lost", "events_lost", "monitor")
        }
    }

    fn new(class: &str, reason: &str, hook: &str) -> Self {
        Self {
            time: Timestamp::now(),
            class: class.into(),
            reason: reason.into(),
            hook: hook.into(),
            interface: None,
            protocol: None,
            source: None,
            source_name: None,
            destination: None,
            destination_name: None,
            service: None,
            backend: None,
            backend_name: None,
            process: None,
            flags: None,
            length: None,
            lost: None,
        }
    }
}

impl MonitorFilter {
    /// Whether a listener wants to hear this.
    pub fn has(&self, item: &EventItem) -> bool {
        let is_pod = |owner: &Option<Owner>| matches!((owner, &self.pod), (Some(Owner::Pod(name)), Some(pod)) if name == pod);
        let pods = [
            &item.source_name,
            &item.destination_name,
            &item.backend_name,
        ];
        let pod = self.pod.is_none() || pods.into_iter().any(is_pod);
        let service = self.service.as_ref().is_none_or(|wanted| {
            let asked =
                matches!(&item.destination_name, Some(Owner::Service(name)) if name == wanted);
            let of_flow = |service: &String| {
                service
                    .strip_prefix(wanted)
                    .is_some_and(|port| port.starts_with(':'))
            };
            asked || item.service.as_ref().is_some_and(of_flow)
        });
        let reason = self.reasons.is_empty() || self.reasons.contains(&item.reason);
        pod && service && reason
    }

    /// Names of reasons that do not exist.
    pub fn unknown_reasons(&self) -> Vec<&str> {
        let known = |name: &&String| Reason::ALL.iter().any(|reason| reason.name() == **name);
        self.reasons
            .iter()
            .filter(|name| !known(name))
            .map(String::as_str)
            .collect()
    }
}

/// Gives events names, as the cluster is now.
pub struct Namer {
    events: Sender<Event>,
    view: Box<View>,
    names: Names,
    taken: Instant,
    flows: Option<FlowTables>,
    /// What is to be added to the machine's monotonic clock, in nanoseconds.
    clock_offset_ns: i128,
    /// Addresses that had no name when they were last looked for.
    strangers: HashMap<IpAddr, Instant>,
}

impl Namer {
    pub fn new(events: Sender<Event>) -> Result<Self, Cut> {
        let view = serve::view(&events)?;
        let monotonic_ns = i128::from(crate::dataplane::monotonic_ns());
        Ok(Self {
            names: Names::of(&view),
            flows: FlowTables::open(&view.pin_root).ok(),
            view,
            events,
            taken: Instant::now(),
            clock_offset_ns: Timestamp::now().as_nanosecond() - monotonic_ns,
            strangers: HashMap::new(),
        })
    }

    /// An event as it is shown.
    pub fn item(&mut self, event: &PacketEvent) -> Result<EventItem, Cut> {
        if self.taken.elapsed() > OLD {
            self.renew()?;
        }
        let reason = Reason::ALL.get(event.reason as usize);
        let class = match reason.map(|reason| reason.class()) {
            Some(Class::Drop) => "drop",
            Some(Class::Reject) => "reject",
            _ => "flow",
        };
        let hook = Hook::ALL.get(event.hook as usize);
        let mut item = EventItem::new(
            class,
            reason.map_or("unknown", |reason| reason.name()),
            hook.map_or("unknown", |hook| hook.name()),
        );
        let ns = i128::from(event.time_ns) + self.clock_offset_ns;
        item.time = Timestamp::from_nanosecond(ns).unwrap_or(item.time);
        if hook == Some(&Hook::Socket) {
            if let Some(call) = SocketEvent::read_from(event.data.as_bytes()) {
                self.call(&mut item, &call)?;
            }
            return Ok(item);
        }
        item.interface = Some(event.ifindex);
        item.length = Some(event.len);
        let captured = event.data.as_bytes();
        let captured = captured.get(..event.captured as usize).unwrap_or(captured);
        if let Some(packet) = decode(captured) {
            self.packet(&mut item, &packet)?;
        }
        Ok(item)
    }

    fn call(&mut self, item: &mut EventItem, call: &SocketEvent) -> Result<(), Cut> {
        let at = |addr: Addr, port: u16| SocketAddr::new(addr.into(), u16::from_be(port));
        let frontend = at(call.peer.frontend, call.peer.frontend_port);
        let backend = at(call.peer.backend, call.peer.backend_port);
        item.protocol = u8::try_from(call.proto).ok().map(protocol_name);
        item.destination = Some(frontend.to_string());
        item.destination_name = self.name(frontend.ip())?;
        item.service = self.port(call.peer.service);
        item.backend = Some(backend);
        item.backend_name = self.name(backend.ip())?;
        let name = call
            .comm
            .split(|byte| *byte == 0)
            .next()
            .unwrap_or_default();
        item.process = Some(format!("{}[{}]", String::from_utf8_lossy(name), call.pid));
        Ok(())
    }

    fn packet(&mut self, item: &mut EventItem, packet: &Decoded) -> Result<(), Cut> {
        let end = |ip: IpAddr, port: Option<u16>| match port {
            Some(port) => SocketAddr::new(ip, port).to_string(),
            None => ip.to_string(),
        };
        let (sport, dport) = packet.ports.unzip();
        item.protocol = Some(match packet.protocol {
            1 => "ICMP".into(),
            58 => "ICMPv6".into(),
            other => protocol_name(other),
        });
        item.source = Some(end(packet.source, sport));
        item.destination = Some(end(packet.destination, dport));
        item.source_name = self.name(packet.source)?;
        item.destination_name = self.name(packet.destination)?;
        item.flags = match (packet.tcp_flags, packet.icmp) {
            (Some(flags), _) => Some(tcp_flags(flags)),
            (_, Some((kind, code))) => Some(format!("type {kind} code {code}")),
            _ if packet.fragment => Some("fragment".into()),
            _ => None,
        };
        // A new flow is in the tables by now, with its backend.
        if item.class == "flow"
            && let (Some((sport, dport)), Some(flows)) = (packet.ports, &self.flows)
        {
            let key = FlowKey::new(
                packet.source.into(),
                packet.destination.into(),
                sport.to_be(),
                dport.to_be(),
                packet.protocol,
            );
            if let Ok(Some(flow)) = flows.find(&key) {
                let backend =
                    SocketAddr::new(flow.backend.src.into(), u16::from_be(flow.backend.sport));
                item.service = self.port(flow.service);
                item.backend = Some(backend);
                item.backend_name = self.name(backend.ip())?;
            }
        }
        Ok(())
    }

    fn port(&self, id: u32) -> Option<String> {
        let port = self.view.owners.get(&ServiceId(id))?;
        Some(port.to_string())
    }

    /// Whose an address is. One without a name may have got one meanwhile; strangers are not looked up again at once.
    fn name(&mut self, ip: IpAddr) -> Result<Option<Owner>, Cut> {
        if let Some(owner) = self.names.get(ip) {
            return Ok(Some(owner.clone()));
        }
        let known_stranger = self
            .strangers
            .get(&ip)
            .is_some_and(|since| since.elapsed() < OLD);
        if !known_stranger && self.taken.elapsed() > STALE {
            self.renew()?;
            if self.names.get(ip).is_none() {
                self.strangers.insert(ip, Instant::now());
            }
        }
        Ok(self.names.get(ip).cloned())
    }

    fn renew(&mut self) -> Result<(), Cut> {
        self.view = serve::view(&self.events)?;
        self.names = Names::of(&self.view);
        self.taken = Instant::now();
        self.strangers.retain(|_, since| since.elapsed() < OLD);
        Ok(())
    }
}

fn tcp_flags(flags: u8) -> String {
    let names = ["FIN", "SYN", "RST", "PSH", "ACK", "URG"];
    let set: Vec<&str> = names
        .into_iter()
        .enumerate()
        .filter(|(bit, _)| flags & (1 << bit) != 0)
        .map(|(_, name)| name)
        .collect();
    set.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow() -> EventItem {
        EventItem {
            source_name: Some(Owner::Pod("default/a".into())),
            destination_name: Some(Owner::Service("default/web".into())),
            service: Some("default/web:http".into()),
            ..EventItem::new("flow", "flow_created", "pod_ingress")
        }
    }

    #[test]
    fn conditions_hold_together() {
        let filter = |pod: &str, service: &str, reasons: &[&str]| MonitorFilter {
            flows: None,
            pod: Some(pod.into()).filter(|pod: &String| !pod.is_empty()),
            service: Some(service.into()).filter(|service: &String| !service.is_empty()),
            reasons: reasons.iter().map(|one| (*one).into()).collect(),
        };
        for (pod, service, reasons, heard) in [
            ("", "", &[][..], true),
            ("default/a", "default/web", &["flow_created"], true),
            ("default/b", "", &[], false),
            ("default/web", "", &[], false),
            ("", "default/we", &[], false),
            ("default/a", "default/other", &[], false),
            ("", "", &["malformed"], false),
        ] {
            let filter = filter(pod, service, reasons);
            assert_eq!(filter.has(&flow()), heard, "{filter:?}");
        }
        assert_eq!(
            filter("", "", &["no_such", "malformed"]).unknown_reasons(),
            ["no_such"]
        );
    }

    #[test]
    fn flags_have_names() {
        assert_eq!(tcp_flags(0x12), "SYN,ACK");
        assert_eq!(tcp_flags(0), "");
    }
}
