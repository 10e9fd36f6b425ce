//! What is answered where the query is read: all that is known here, which is nearly everything.

use std::net::IpAddr;
use std::time::Instant;

use crate::answer::{Policy, Rcode, Transport, Verdict, Writer, accept, answer};
use crate::autopath;
use crate::cache::{Found, Key, may_be_kept};
use crate::metrics::Caching;
use crate::name::Name;
use crate::query::{Query, rtype};
use crate::rewrite::rewrite;
use crate::rules::Rules;
use crate::zone::Zone;

/// The largest UDP answer; more is what TCP is for.
pub const REPLY_BYTES_MAX: usize = 4096;

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Send this many bytes of the buffer.
    Reply {
        bytes: usize,
        rcode: Rcode,
        /// It came from a cache entry that is worth renewing.
        renew: bool,
    },
    /// Others have to be asked, or more than one answer put together.
    Slow,
    /// Say nothing.
    Ignore,
}

/// One moment's view of everything that answers come from.
pub struct View<'a> {
    pub zone: &'a Zone,
    pub rules: &'a Rules,
    /// For what no block is about.
    pub bare: &'a Policy,
    pub caching: &'a Caching,
    pub now: Instant,
}

/// Answers a message if that can be done without waiting. Allocates nothing for names of the cluster and of the cache.
pub fn at_once(
    view: &View<'_>,
    message: &[u8],
    client: IpAddr,
    transport: Transport,
    turn: usize,
    out: &mut [u8],
) -> Outcome {
    let reply = |bytes, rcode| Outcome::Reply {
        bytes,
        rcode,
        renew: false,
    };
    let query = match accept(message, view.bare, out) {
        Ok(query) => query,
        Err(Verdict::Reply { bytes, rcode }) => return reply(bytes, rcode),
        Err(_) => return Outcome::Ignore,
    };
    let Some((_, block)) = view.rules.find(query.name()) else {
        return refused(view, &query, out);
    };
    if !block.spec.rewrites.is_empty()
        && rewrite(&block.spec.rewrites, &Name::from_wire(query.name())).is_some()
    {
        return Outcome::Slow;
    }
    if query.rtype == rtype::AXFR {
        return match transport {
            // A zone does not fit into a datagram.
            Transport::Udp => refused(view, &query, out),
            Transport::Tcp => Outcome::Slow,
        };
    }
    if let Some(hosts) = &block.spec.hosts
        && let Verdict::Reply { bytes, rcode } = hosts.answer(&block.policy, &query, transport, out)
    {
        return reply(bytes, rcode);
    }
    if block.spec.cluster.is_some() {
        match answer(view.zone, &block.policy, &query, transport, turn, out) {
            Verdict::Reply {
                rcode: Rcode::NxDomain,
                ..
            } if let Some(autopath) = &block.spec.autopath
                && autopath.is_about(query.name())
                && autopath::rest(view.zone, query.name(), query.rtype, client).is_some() =>
            {
                return Outcome::Slow;
            }
            Verdict::Reply { bytes, rcode } => return reply(bytes, rcode),
            Verdict::Chase { .. } => return Outcome::Slow,
            Verdict::Ignore => return Outcome::Ignore,
            Verdict::Elsewhere => {}
        }
    }
    if block.route(query.name()).is_none() || !may_be_kept(query.rtype) {
        return refused(view, &query, out);
    }
    let Some(cache) = &block.cache else {
        return Outcome::Slow;
    };
    match cache.get(&Key::of(&query), view.now) {
        Found::Fresh { entry, renew } => {
            view.caching.hit(entry.rcode());
            match entry.compose(&query, &block.policy, transport, view.now, turn, out) {
                Verdict::Reply { bytes, rcode } => Outcome::Reply {
                    bytes,
                    rcode,
                    renew,
                },
                _ => Outcome::Ignore,
            }
        }
        _ => Outcome::Slow,
    }
}

fn refused(view: &View<'_>, query: &Query<'_>, out: &mut [u8]) -> Outcome {
    let writer = Writer::start(query, view.bare, out);
    match writer.finish(Rcode::Refused) {
        Verdict::Reply { bytes, rcode } => Outcome::Reply {
            bytes,
            rcode,
            renew: false,
        },
        _ => Outcome::Ignore,
    }
}
