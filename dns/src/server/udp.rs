//! One thread's UDP: a batch is read, answered in place and sent; what has to wait goes to the runtime.

use std::io;
use std::net::UdpSocket;
use std::sync::Arc;
use std::time::Instant;

use super::Shared;
use super::at_once::{Outcome, at_once};
use super::crowd::{Crowd, Order};
use super::rates::Rates;
use super::slow::Slow;
use crate::answer::{Rcode, Transport, Verdict, cut, failure};
use crate::fetch::renew;
use crate::forward::Question;
use crate::metrics::Queries;
use crate::query::Query;
use crate::sys::{self, BATCH, Batch};

/// Serves until the server is drained or the socket is broken.
pub(super) fn serve(
    shared: &Arc<Shared>,
    socket: &Arc<UdpSocket>,
    runtime: &tokio::runtime::Handle,
) {
    let _runtime = runtime.enter();
    let counters = shared.metrics.queries();
    let mut batch = Batch::new();
    let mut turn = 0_usize;
    let mut answered = [(0_u16, Rcode::NoError, [0; 2]); BATCH];
    let (mut rates, mut crowd) = (Rates::new(shared.amplified_s), Crowd::default());
    loop {
        let count = match batch.receive(socket) {
            Ok(count) => count,
            // Nothing came for a while.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if *shared.draining.borrow() {
                    return;
                }
                continue;
            }
            // ICMP errors of earlier replies arrive here; a socket that is broken for good says so each time.
            Err(error) => {
                tracing::debug!(%error, "receiving");
                continue;
            }
        };
        let state = shared.state();
        let settings = &state.settings;
        let view = shared.view(&state, Instant::now());
        let mut answers = 0;
        keep_room(shared, socket, &mut crowd, count == BATCH, view.now);
        for i in 0..count {
            turn = turn.wrapping_add(1);
            let Some(peer) = batch.peer(i) else { continue };
            if let Some(order) = crowd.saw(peer.ip(), view.now) {
                obey(shared, socket, order);
            }
            let (query, out) = batch.exchange(i);
            match at_once(&view, query, peer.ip(), Transport::Udp, turn, out) {
                Outcome::Reply {
                    bytes,
                    rcode,
                    renew,
                } => {
                    let may = rates
                        .as_mut()
                        .is_none_or(|rates| rates.may(peer.ip(), query.len(), bytes, view.now));
                    let bytes = if may {
                        bytes
                    } else {
                        shared.metrics.limited.inc();
                        cut(query, &mut out[..bytes])
                    };
                    answered[answers] = (type_of(query), rcode, [query.len(), bytes]);
                    answers += 1;
                    if renew {
                        renew_entry(shared, query);
                    }
                    batch.reply(i, bytes);
                }
                Outcome::Ignore => {
                    shared.metrics.dropped.inc();
                }
                Outcome::Slow => match shared.limits.slow(peer.ip()) {
                    Some(place) => {
                        let (query, socket) = (query.to_vec(), batch.reply_socket(i, socket));
                        let slow = Slow::of(shared, peer, Transport::Udp);
                        let (counters, begun) = (counters.clone(), view.now);
                        runtime.spawn(async move {
                            if let Some(mut reply) = slow.resolve(&query).await {
                                slow.shared.limit_slow(peer.ip(), &query, &mut reply);
                                let _ = socket.send(&reply);
                                count_slow(&counters, &slow, &query, &reply, begun);
                            }
                            drop(place);
                        });
                    }
                    None => {
                        if let Verdict::Reply { bytes, rcode } =
                            failure(&shared.bare, query, Rcode::Refused, out)
                        {
                            answered[answers] = (type_of(query), rcode, [query.len(), bytes]);
                            answers += 1;
                            batch.reply(i, bytes);
                        }
                    }
                },
            }
        }
        let took = view.now.elapsed();
        for (kind, rcode, bytes) in &answered[..answers] {
            counters.count(Transport::Udp, *kind, *rcode, *bytes, took);
        }
        if settings.logs() {
            log(shared, settings, &mut batch, count, took);
        }
        if let Err(error) = batch.send(socket, count) {
            tracing::error!(%error, "sending; this socket is given up");
            return;
        }
    }
}

/// Sees to it that the socket's queue has room for everyone, where one client fills it.
fn keep_room(shared: &Shared, socket: &UdpSocket, crowd: &mut Crowd, full: bool, now: Instant) {
    if let Some(order) = crowd.release(now) {
        obey(shared, socket, order);
    }
    if crowd.wants_drops(full)
        && let Ok(dropped) = sys::drops(socket)
    {
        shared
            .metrics
            .queue_drops
            .inc_by(crowd.drops(dropped).into());
    }
}

fn obey(shared: &Shared, socket: &UdpSocket, order: Order) {
    let done = match order {
        Order::Hold(client, share) => {
            shared.metrics.held_back.inc();
            tracing::warn!(%client, share, "a client sends more than can be answered: part of it is not heard for a second");
            sys::hold(socket, client, share)
        }
        Order::Release => sys::release(socket),
    };
    if let Err(error) = done {
        tracing::warn!(%error, "the socket's queue");
    }
}

/// The type that a message with one uncompressed question asks for; 0 where there is none.
pub(super) fn type_of(message: &[u8]) -> u16 {
    let mut at = crate::query::HEADER_BYTES;
    while let Some(&length) = message.get(at) {
        if length == 0 {
            let kind = message.get(at + 1..at + 3);
            return kind.map_or(0, |kind| u16::from_be_bytes([kind[0], kind[1]]));
        }
        at += 1 + usize::from(length);
    }
    0
}

pub(super) fn count_slow(
    counters: &Queries,
    slow: &Slow,
    query: &[u8],
    reply: &[u8],
    begun: Instant,
) {
    let bytes = [query.len(), reply.len()];
    let took = begun.elapsed();
    counters.count(
        slow.transport,
        type_of(query),
        Rcode::of(reply),
        bytes,
        took,
    );
    let name = Query::parse(query).ok();
    if let Some(block) = name.and_then(|query| slow.state.settings.block(query.name()).cloned())
        && block.spec.log.is_on()
    {
        let unlogged = &slow.shared.metrics.unlogged;
        let rules = &block.spec.log;
        rules.line(slow.client, slow.transport, query, reply, took, unlogged);
    }
}

/// Lines of the query log for what was answered at once.
fn log(
    shared: &Shared,
    settings: &crate::settings::Settings,
    batch: &mut Batch,
    count: usize,
    took: std::time::Duration,
) {
    for i in 0..count {
        let bytes = batch.reply_bytes(i);
        let Some(peer) = batch.peer(i).filter(|_| bytes > 0) else {
            continue;
        };
        let (query, out) = batch.exchange(i);
        let Ok(parsed) = Query::parse(query) else {
            continue;
        };
        if let Some(block) = settings.block(parsed.name()) {
            let unlogged = &shared.metrics.unlogged;
            let rules = &block.spec.log;
            rules.line(peer, Transport::Udp, query, &out[..bytes], took, unlogged);
        }
    }
}

/// Has the entry renewed that a message was answered from.
pub(crate) fn renew_entry(shared: &Arc<Shared>, message: &[u8]) {
    let Ok(query) = Query::parse(message) else {
        return;
    };
    if let Some(block) = shared.state().settings.block(query.name()) {
        let question = Question {
            name: query.name().to_vec(),
            rtype: query.rtype,
            dnssec_ok: query.dnssec_ok(),
            checking_disabled: query.checking_disabled,
        };
        renew(block, &shared.metrics, question);
    }
}
