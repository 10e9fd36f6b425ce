//! The agent's side: a question in, lines out.

use std::io::{self, BufWriter, Write};
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Sender, sync_channel};
use std::time::{Duration, Instant};

use cluster_model::ServiceKey;
use dataplane_abi::Reason;
use keelway_cni::{CniError, Code};
use serde::Serialize;
use serde_json::Value;

use super::conntrack::{self, Chosen, FlowFilter};
use super::{Line, Names, Query, ServiceItem, View};
use crate::dataplane::{FlowTables, FlowView, monotonic_s};
use crate::event::{Event, Reply};
use crate::monitor::{EventItem, Heard, MonitorFilter, Namer};
use crate::worker::reason;

/// Services asked of the loop at a time: a page takes it well under a millisecond.
const PAGE: usize = 200;
/// Flows removed at a time.
const FLUSH_BATCH: usize = 1000;
/// The pause after which a listener is told that nothing happened; how a listener that left is noticed.
const ALIVE: Duration = Duration::from_secs(5);
/// How long the loop may take to answer.
const PATIENCE: Duration = Duration::from_secs(15);

/// Why an answer ends early.
#[derive(Debug, thiserror::Error)]
pub enum Cut {
    /// The client does not read any more: nobody is left to be told.
    #[error("the client is gone: {0}")]
    Client(#[from] io::Error),
    #[error("{0}")]
    Told(#[from] CniError),
}

fn told(code: Code, what: &str, error: &dyn std::error::Error) -> Cut {
    Cut::Told(CniError::new(code, what).with_details(reason(error)))
}

/// Answers one question and closes.
pub fn serve(stream: UnixStream, query: Value, events: &Sender<Event>) -> io::Result<()> {
    let mut out = BufWriter::new(stream);
    let outcome = serde_json::from_value(query)
        .map_err(|error| {
            told(
                Code::Decode,
                "the agent does not know this question",
                &error,
            )
        })
        .and_then(|query| answer(&mut out, query, events));
    let last = match outcome {
        Ok(()) => Line::End,
        Err(Cut::Told(error)) => Line::Error(error),
        Err(Cut::Client(error)) => return Err(error),
    };
    line(&mut out, &last)?;
    out.flush()
}

fn line(out: &mut impl Write, line: &Line) -> io::Result<()> {
    serde_json::to_writer(&mut *out, line)?;
    out.write_all(b"\n")
}

fn item(out: &mut impl Write, item: &impl Serialize) -> io::Result<()> {
    line(out, &Line::Item(serde_json::to_value(item)?))
}

fn answer(out: &mut impl Write, query: Query, events: &Sender<Event>) -> Result<(), Cut> {
    match query {
        Query::Services { namespace } => services(out, namespace.as_deref(), events),
        Query::Service { namespace, name } => {
            let keys = vec![ServiceKey::new(namespace, name)];
            let named = keys[0].to_string();
            let found: Vec<ServiceItem> = ask(events, |reply| Event::Services { keys, reply })?;
            match found.first() {
                Some(service) => Ok(item(out, service)?),
                None => Err(Cut::Told(CniError::new(
                    Code::Failed,
                    format!("there is no Service {named}"),
                ))),
            }
        }
        Query::Flows { filter } => flows(out, &filter, events, false),
        Query::FlushFlows { filter } => flows(out, &filter, events, true),
        Query::Monitor { filter } => monitor(out, &filter, events),
    }
}

/// Asks the event loop.
fn ask<T>(events: &Sender<Event>, question: impl FnOnce(Reply<T>) -> Event) -> Result<T, Cut> {
    let (reply, answer) = sync_channel(1);
    let stopping = || CniError::new(Code::TryAgain, "the agent is stopping");
    events.send(question(reply)).map_err(|_| stopping())?;
    answer
        .recv_timeout(PATIENCE)
        .map_err(|_| CniError::new(Code::TryAgain, "the agent is too busy to answer").into())
}

pub(crate) fn view(events: &Sender<Event>) -> Result<Box<View>, Cut> {
    ask(events, |reply| Event::View { reply })
}

fn services(
    out: &mut impl Write,
    namespace: Option<&str>,
    events: &Sender<Event>,
) -> Result<(), Cut> {
    let view = view(events)?;
    let wanted: Vec<ServiceKey> = view
        .services
        .into_iter()
        .filter(|key| namespace.is_none_or(|namespace| *key.namespace == *namespace))
        .collect();
    for page in wanted.chunks(PAGE) {
        let keys = page.to_vec();
        for service in ask(events, |reply| Event::Services { keys, reply })? {
            item(out, &service)?;
        }
    }
    Ok(())
}

fn flows(
    out: &mut impl Write,
    filter: &FlowFilter,
    events: &Sender<Event>,
    flush: bool,
) -> Result<(), Cut> {
    let view = view(events)?;
    let names = Names::of(&view);
    let chosen = Chosen::new(filter, &view, &names)
        .map_err(|error| Cut::Told(CniError::new(Code::Failed, error.to_string())))?;
    let broken = |error: crate::dataplane::Error| told(Code::Io, "the tables of flows", &error);
    let tables = FlowTables::open(&view.pin_root).map_err(broken)?;
    let now_s = monotonic_s();
    let mut cut = None;
    let mut doomed: Vec<FlowView> = Vec::new();
    tables
        .visit(|flow| {
            if !chosen.has(&flow) {
                return ControlFlow::Continue(());
            }
            // What is removed is removed after the walk: a walk that deletes what it stands on may skip others.
            if flush {
                doomed.push(flow);
            }
            match item(out, &conntrack::item(&flow, &view, &names, now_s)) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    cut = Some(error);
                    ControlFlow::Break(())
                }
            }
        })
        .map_err(broken)?;
    // Whoever asked to flush is told what went, or nothing went.
    if let Some(error) = cut {
        return Err(error.into());
    }
    for batch in doomed.chunks(FLUSH_BATCH) {
        tables.remove(batch).map_err(broken)?;
    }
    Ok(())
}

/// Sends events until the client leaves.
fn monitor(
    out: &mut impl Write,
    filter: &MonitorFilter,
    events: &Sender<Event>,
) -> Result<(), Cut> {
    let unknown = filter.unknown_reasons();
    if !unknown.is_empty() {
        let names: Vec<&str> = Reason::ALL.iter().map(|reason| reason.name()).collect();
        let what = format!(
            "there is no reason {}; there are {}",
            unknown.join(", "),
            names.join(", ")
        );
        return Err(Cut::Told(CniError::new(Code::Failed, what)));
    }
    let mut namer = Namer::new(events.clone())?;
    let subscription = view(events)?
        .monitor
        .subscribe(filter.flows)
        .map_err(|error| told(Code::NotAvailable, "events cannot be read", &error))?;
    // The client knows by this that it hears all that happens from now on.
    line(out, &Line::Alive)?;
    out.flush()?;
    let mut said = Instant::now();
    loop {
        // Written as it comes when little happens, and in large pieces when much does.
        let heard = match subscription.heard.try_recv() {
            Ok(heard) => heard,
            Err(_) => {
                out.flush()?;
                match subscription.heard.recv() {
                    Ok(heard) => heard,
                    Err(_) => return Ok(()),
                }
            }
        };
        match heard {
            Heard::Event(event) => {
                let shown = namer.item(&event)?;
                if !filter.has(&shown) {
                    continue;
                }
                item(out, &shown)?;
            }
            Heard::Lost(count) => item(out, &EventItem::lost(count))?,
            Heard::Nothing if said.elapsed() < ALIVE => continue,
            Heard::Nothing => line(out, &Line::Alive)?,
        }
        said = Instant::now();
    }
}
