//! What the fuzz targets hold the parsers of the API and the cluster DNS to: no input makes them panic, hang or take memory without end, and what
//! they accept means the same when it is written down and read again.
//!
//! The modules under test are built from their sources, without the rest of the control plane and of the DNS server: an
//! instrumented build takes seconds, and it shows that they know nothing of HTTP, of the store or of sockets.

#[path = "../../controlplane/src/codec/mod.rs"]
pub mod codec;
#[path = "../../controlplane/src/page.rs"]
pub mod page;
#[path = "../../controlplane/src/patch/mod.rs"]
pub mod patch;
#[path = "../../controlplane/src/registry/mod.rs"]
pub mod registry;
#[path = "../../controlplane/src/selector/mod.rs"]
pub mod selector;

#[expect(
    unused_imports,
    reason = "the parts of an answer are also those of a zone's transfer"
)]
#[path = "../../dns/src/answer/mod.rs"]
pub mod answer;
#[path = "../../dns/src/autopath.rs"]
pub mod autopath;
#[path = "../../dns/src/bytemap.rs"]
mod bytemap;
#[path = "../../dns/src/cache.rs"]
pub mod cache;
#[path = "../../dns/src/config"]
pub mod config {
    pub mod corefile;
    pub mod files;
    mod forwarding;
    mod names;
    mod plugins;
    pub mod spec;

    pub use plugins::{read_spec, read_spec_of, read_spec_on};
}
#[path = "../../dns/src/forward"]
pub mod forward {
    mod rules;

    pub use rules::{ForwardRules, Order};
}
#[path = "../../dns/src/hosts.rs"]
pub mod hosts;
#[path = "../../dns/src/log.rs"]
pub mod log;
#[path = "../../dns/src/message.rs"]
pub mod message;
#[path = "../../dns/src/metrics.rs"]
pub mod metrics;
#[path = "../../dns/src/name.rs"]
pub mod name;
#[path = "../../dns/src/offer.rs"]
pub mod offer;
#[path = "../../dns/src/plan.rs"]
mod plan;
#[path = "../../dns/src/query.rs"]
pub mod query;
#[path = "../../dns/src/rewrite.rs"]
pub mod rewrite;
#[path = "../../dns/src/rules.rs"]
pub mod rules;
#[path = "../../dns/src/server"]
pub mod server {
    pub mod at_once;
    pub mod looked;
}
#[path = "../../dns/src/zone/mod.rs"]
pub mod zone;

mod documents;
mod names;
mod patches;
mod words;

pub use documents::{document, protobuf};
pub use names::{corefile, dns_query, dns_reply};
pub use patches::{applies, patches};
pub use words::{selectors, tokens};
