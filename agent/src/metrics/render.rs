//! A report as text.

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::report::Report;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PacketLabels {
    reason: String,
    class: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct QuestionLabels {
    outcome: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MapLabels {
    map: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct UplinkLabels {
    at: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    command: String,
    outcome: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DnsRequestLabels {
    proto: &'static str,
    r#type: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DnsResponseLabels {
    proto: &'static str,
    rcode: &'static str,
}

/// What was answered in the kernel under the names that the cluster DNS counts its own answers by: sums over both are whole.
fn as_the_server_does(report: &Report, all: &mut Registry) {
    let count = |outcome: &str| report.dns.get(outcome).copied().unwrap_or_default();
    let proto = "udp";
    let requests = Family::<DnsRequestLabels, Counter>::default();
    for (r#type, outcome) in [("A", "a"), ("AAAA", "aaaa")] {
        let labels = DnsRequestLabels { proto, r#type };
        requests.get_or_create(&labels).inc_by(count(outcome));
    }
    let responses = Family::<DnsResponseLabels, Counter>::default();
    let rcode = "NOERROR";
    responses
        .get_or_create(&DnsResponseLabels { proto, rcode })
        .inc_by(count("a") + count("aaaa"));
    let help = "Queries, by transport and type, answered in the kernel";
    all.register("coredns_dns_requests", help, requests);
    let help = "Answers, by transport and response code, given in the kernel";
    all.register("coredns_dns_responses", help, responses);
}

/// A report in the OpenMetrics text format. Counters live in the kernel and in the loop; a registry is filled per scrape.
pub(super) fn render(report: &Report) -> Result<String, std::fmt::Error> {
    let mut all = Registry::default();
    report.measures.register(&mut all);
    let registry = all.sub_registry_with_prefix("keelway");
    let gauges: [(&str, &str, i64); 15] = [
        (
            "problems",
            "Things that are wrong now, as `keelway-agent status` lists them",
            signed(report.problems.len()),
        ),
        (
            "objects_malformed",
            "Objects of the API that count as absent now, being malformed",
            signed(report.malformed.len()),
        ),
        (
            "ready",
            "Whether pods can be served",
            i64::from(report.ready),
        ),
        ("services", "Services known", signed(report.services)),
        (
            "endpoint_slices",
            "EndpointSlices known",
            signed(report.endpoint_slices),
        ),
        ("nodes", "Nodes known", signed(report.nodes)),
        (
            "dns_names",
            "Names that are answered at pods' interfaces",
            signed(report.dns_names),
        ),
        (
            "dns_services_left_out",
            "Services for whose names there is no room at pods' interfaces",
            signed(report.dns_left_out),
        ),
        (
            "node_ports_shared",
            "Node ports that a process of the node listens on too",
            signed(report.node_ports_shared),
        ),
        (
            "service_ports",
            "Service ports in the maps",
            signed(report.service_ports),
        ),
        (
            "frontends",
            "Frontends in the maps",
            signed(report.frontends),
        ),
        ("backends", "Backends in the maps", signed(report.backends)),
        (
            "routes",
            "Routes to other nodes' pods",
            signed(report.routes),
        ),
        (
            "addresses_allocated",
            "Pod addresses in use",
            signed(report.allocations.len()),
        ),
        (
            "addresses_capacity",
            "Pod addresses of this node",
            i64::try_from(report.addresses_capacity).unwrap_or(i64::MAX),
        ),
    ];
    for (name, help, value) in gauges {
        let gauge: Gauge = Gauge::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    }
    let counters = [
        (
            "batches",
            "Batches of changes applied to the maps",
            report.batches,
        ),
        (
            "batches_failed",
            "Batches that failed, to be tried again",
            report.batches_failed,
        ),
        (
            "objects_rejected",
            "Objects of the API that were malformed",
            report.rejected_objects,
        ),
        (
            "worker_restarts",
            "Workers of this agent that ended and were replaced",
            u64::from(report.restarts),
        ),
        (
            "programs_rehung",
            "Programs that somebody took off and that were hung on again",
            report.rehung,
        ),
        (
            "refusals",
            "Wishes that could not be met, such as a frontend of two Services",
            report.refusals,
        ),
    ];
    for (name, help, value) in counters {
        registry.register(name, help, counted(value));
    }
    let packets = Family::<PacketLabels, Counter>::default();
    for counter in &report.counters {
        let labels = PacketLabels {
            reason: counter.reason.clone(),
            class: counter.class.clone(),
        };
        packets.get_or_create(&labels).inc_by(counter.packets);
    }
    registry.register(
        "dataplane",
        "What became of packets and socket calls, by reason",
        packets,
    );
    let (entries, limits) = (
        Family::<MapLabels, Gauge>::default(),
        Family::<MapLabels, Gauge>::default(),
    );
    for fill in &report.maps {
        let labels = MapLabels {
            map: fill.map.clone(),
        };
        entries.get_or_create(&labels).set(i64::from(fill.entries));
        limits.get_or_create(&labels).set(i64::from(fill.limit));
    }
    registry.register("map_entries", "Entries of a map that are in use", entries);
    registry.register("map_limit", "Entries that a map can have", limits);
    if !report.xdp.is_empty() {
        let uplink = Family::<UplinkLabels, Gauge>::default();
        let at = report.xdp.clone();
        uplink.get_or_create(&UplinkLabels { at }).set(1);
        registry.register(
            "uplink",
            "Where packets of the uplink are looked at first: 1 for `native` or `generic` (XDP), or `tc`",
            uplink,
        );
    }
    let requests = Family::<RequestLabels, Counter>::default();
    for (name, count) in &report.cni_requests {
        let (command, outcome) = name.split_once(' ').unwrap_or((name, ""));
        let labels = RequestLabels {
            command: command.into(),
            outcome: outcome.into(),
        };
        requests.get_or_create(&labels).inc_by(*count);
    }
    registry.register("cni_requests", "Requests of the CNI plugin", requests);
    let questions = Family::<QuestionLabels, Counter>::default();
    for (outcome, count) in &report.dns {
        let outcome = outcome.clone();
        questions
            .get_or_create(&QuestionLabels { outcome })
            .inc_by(*count);
    }
    registry.register(
        "dns_questions",
        "Questions for the cluster DNS at pods' interfaces: answered there (a, aaaa; of both nodata), or left to the server",
        questions,
    );
    if !report.dns.is_empty() {
        as_the_server_does(report, &mut all);
    }
    let mut text = String::new();
    encode(&mut text, &all)?;
    Ok(text)
}

fn signed(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn counted(value: u64) -> impl EncodeMetric + std::fmt::Debug + Send + Sync + 'static {
    let counter: Counter = Counter::default();
    counter.inc_by(value);
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_answers_is_counted_by_the_names_of_the_servers_own_answers() {
        let mut report = Report::default();
        assert!(!render(&report).expect("metrics").contains("coredns_"));
        report.dns = [("a", 5), ("aaaa", 2), ("left", 9)]
            .map(|(outcome, count)| (outcome.to_owned(), count))
            .into();
        let text = render(&report).expect("metrics");
        for line in [
            "coredns_dns_requests_total{proto=\"udp\",type=\"A\"} 5",
            "coredns_dns_requests_total{proto=\"udp\",type=\"AAAA\"} 2",
            "coredns_dns_responses_total{proto=\"udp\",rcode=\"NOERROR\"} 7",
            "keelway_dns_questions_total{outcome=\"left\"} 9",
        ] {
            assert!(text.lines().any(|told| told == line), "{line}: {text}");
        }
    }
}
