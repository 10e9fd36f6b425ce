//! Why a name resolves to what it does: which block and zone it belongs to, which rule decides, and where the records come from.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use crate::answer::Transport;
use crate::autopath;
use crate::cache::Key;
use crate::log::type_name;
use crate::name::Name;
use crate::query::{HEADER_BYTES, class};
use crate::rewrite::rewrite;
use crate::server::at_once::{Outcome, at_once};
use crate::server::{Shared, renew_entry};
use crate::settings::Block;
use crate::zone::{Place, PodName, Zone};

/// A text for people about a question, as `client` would be answered.
pub fn explain(shared: &Arc<Shared>, name: &Name, rtype: u16, client: IpAddr) -> String {
    let state = shared.state();
    let (zone, settings) = (&state.zone, &state.settings);
    let mut text = format!("question   {name} {}\n", type_name(rtype));
    let mut name = name.clone();
    let Some(block) = settings.block(name.wire()) else {
        return text + "rule       no block of the configuration is about this name: REFUSED\n";
    };
    let _ = writeln!(text, "block      {}", list(&block.spec.zones));
    if let Some(new) = rewrite(&block.spec.rewrites, &name) {
        let _ = writeln!(
            text,
            "rewritten  to {new}; records get the name that was asked for"
        );
        name = new;
    }
    decide(&mut text, shared, zone, block, &name, rtype, client);
    let mut message = vec![0; HEADER_BYTES];
    message[5] = 1;
    message.extend_from_slice(name.wire());
    message.extend(rtype.to_be_bytes());
    message.extend(class::IN.to_be_bytes());
    let view = shared.view(&state, Instant::now());
    let mut out = vec![0; usize::from(u16::MAX)];
    match at_once(&view, &message, client, Transport::Tcp, 0, &mut out) {
        Outcome::Reply {
            bytes,
            rcode,
            renew,
        } => {
            // Who is told so does it.
            if renew {
                renew_entry(shared, &message);
            }
            let _ = writeln!(
                text,
                "answer     {}, {bytes} bytes, without asking anyone",
                rcode.name()
            );
            if let Ok(message) = hickory_proto::op::Message::from_vec(&out[..bytes]) {
                for record in message.answers.iter().chain(&message.authorities) {
                    let _ = writeln!(text, "           {record}");
                }
            }
        }
        Outcome::Slow => {
            text.push_str("answer     has to be asked for; see the answer to a query\n")
        }
        Outcome::Ignore => text.push_str("answer     none\n"),
    }
    text
}

fn decide(
    text: &mut String,
    shared: &Shared,
    zone: &Zone,
    block: &Arc<Block>,
    name: &Name,
    rtype: u16,
    client: IpAddr,
) {
    let place = zone
        .place(name.wire())
        .filter(|_| block.spec.cluster.is_some());
    if let Some(place) = place {
        let _ = writeln!(
            text,
            "zone       {}, of the cluster, serial {}",
            place.apex,
            zone.serial()
        );
        if !zone.may_deny(&place) {
            text.push_str("rule       the zone is not complete yet: SERVFAIL\n");
            return;
        }
        of_cluster(text, zone, &place);
        if let Some((rest, origin)) = autopath::rest(zone, name.wire(), rtype, client)
            && let Some(autopath) = &block.spec.autopath
            && autopath.is_about(name.wire())
        {
            let names = autopath::candidates(rest, origin, &autopath.search);
            let _ = writeln!(
                text,
                "autopath   {client} would go on with {}",
                list(&names)
            );
        }
        let missing = zone
            .node(&place)
            .is_none_or(|node| place.reverse && node.is_empty());
        if !missing || zone.pod(&place) != PodName::No {
            return;
        }
        if !block.policy.recursion || block.policy.fallthrough.is_empty() {
            return;
        }
    }
    match block.route(name.wire()) {
        None => text.push_str("elsewhere  no upstream is configured for this name\n"),
        Some(route) => {
            let servers = route.forwarder.upstreams().iter();
            let servers: Vec<String> = servers
                .map(|upstream| {
                    let down = upstream.is_down(route.spec.rules.failures_max);
                    let state = if upstream.leads_back() {
                        " (leads back here)"
                    } else if down {
                        " (down)"
                    } else {
                        ""
                    };
                    format!("{}{state}", upstream.address)
                })
                .collect();
            let _ = writeln!(
                text,
                "elsewhere  names in {} are forwarded to {}",
                route.spec.zone,
                servers.join(", ")
            );
        }
    }
    let key = Key::new(name.wire(), rtype, false, false);
    let now = Instant::now();
    match &block.cache {
        None => text.push_str("cache      none\n"),
        Some(cache) => match cache
            .peek(&key, now)
            .filter(|entry| cache.may_serve(entry, now))
        {
            None => text.push_str("cache      has nothing\n"),
            Some(entry) if entry.left(now).is_zero() => {
                text.push_str("cache      has a stale answer\n");
            }
            Some(entry) => {
                let left_s = entry.left(now).as_secs();
                let what = if entry.is_failure() {
                    "a failure"
                } else {
                    "an answer"
                };
                let _ = writeln!(text, "cache      has {what} for {left_s} s more");
            }
        },
    }
    let _ = writeln!(text, "in flight  {}", block.in_flight());
    if shared.is_stopping() {
        text.push_str("server     is stopping\n");
    }
}

fn of_cluster(text: &mut String, zone: &Zone, place: &Place<'_>) {
    match zone.node(place) {
        Some(node) if node.is_empty() => {
            text.push_str("rule       the name has no records; there are names below it\n");
        }
        Some(node) => {
            for (by, record) in zone.sources(node) {
                let _ = writeln!(text, "record     {record:?}, from {by}");
            }
        }
        None => match zone.pod(place) {
            PodName::Address(address) => {
                let _ = writeln!(
                    text,
                    "rule       the name spells {address}, and pods are believed unseen"
                );
            }
            PodName::Parent => text.push_str("rule       pods may be below this name\n"),
            PodName::No => {
                let _ = writeln!(
                    text,
                    "rule       there is no such name in the zone (names of pods: {:?})",
                    zone.settings().pods
                );
            }
        },
    }
}

fn list(names: &[Name]) -> String {
    let texts: Vec<String> = names.iter().map(ToString::to_string).collect();
    texts.join(" ")
}
