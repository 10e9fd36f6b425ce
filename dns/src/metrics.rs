//! Counters, under CoreDNS's names where they mean the same.

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use crate::answer::Rcode;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Labels {
    proto: &'static str,
    rcode: Code,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct Code(Rcode);

impl EncodeLabelValue for Code {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        self.0.name().encode(encoder)
    }
}

/// Answers of one transport, by response code: look-ups in a family take a lock, these do not.
pub struct Answers([Counter; Rcode::ALL.len()]);

impl Answers {
    pub fn count(&self, rcode: Rcode) {
        if let Some(at) = Rcode::ALL.iter().position(|other| *other == rcode) {
            self.0[at].inc();
        }
    }
}

pub struct Metrics {
    registry: Registry,
    pub udp: Answers,
    pub tcp: Answers,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::default();
        let answers = Family::<Labels, Counter>::default();
        registry.register(
            "coredns_dns_responses",
            "Answers given from the zone, by response code",
            answers.clone(),
        );
        let of = |proto| {
            let counter = |rcode| {
                answers
                    .get_or_create(&Labels {
                        proto,
                        rcode: Code(rcode),
                    })
                    .clone()
            };
            Answers(Rcode::ALL.map(counter))
        };
        let (udp, tcp) = (of("udp"), of("tcp"));
        Self { registry, udp, tcp }
    }
}

impl Metrics {
    /// All metrics in the text format of Prometheus.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String can't fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
