//! The tables of flows, for people: listing and flushing them while programs go on using them.

use std::ops::ControlFlow;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use dataplane_abi::{ABI_VERSION, Flow, FlowKey, SEEN, SEEN_REPLY, map, timeout_s};

use super::{Error, sys};

pub use super::sys::{monotonic_ns, monotonic_s};

/// The pinned tables of flows. Opened by path, so that neither a running data plane nor the event loop is needed.
pub struct FlowTables {
    replied: OwnedFd,
    unreplied: OwnedFd,
}

/// Both directions of a flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlowView {
    /// The client's tuple.
    pub client: FlowKey,
    /// The tuple of the backend's answers.
    pub backend: FlowKey,
    pub service: u32,
    /// SEEN_* bits of each direction.
    pub client_seen: u32,
    pub backend_seen: u32,
    /// Seconds of the monotonic clock when either direction was last used.
    pub last_seen_s: u32,
    pub replied: bool,
}

impl FlowView {
    fn of(key: FlowKey, flow: Flow, answers: Option<Flow>, replied: bool) -> Self {
        Self {
            client: key,
            backend: flow.other,
            service: flow.service,
            client_seen: flow.seen & SEEN,
            backend_seen: answers.map_or(0, |answers| answers.seen & SEEN),
            last_seen_s: flow
                .last_seen_s
                .max(answers.map_or(0, |answers| answers.last_seen_s)),
            replied,
        }
    }

    /// Seconds without a packet after which the flow is collected, while its table is not under pressure.
    pub fn timeout_s(&self) -> u32 {
        let reply = if self.replied { SEEN_REPLY } else { 0 };
        timeout_s(
            self.client.proto,
            self.client_seen | reply,
            self.backend_seen | reply,
            0,
        )
    }
}

fn failed(action: &'static str, map: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::Map {
        action,
        map,
        source,
    }
}

impl FlowTables {
    /// Opens what is pinned under this root.
    pub fn open(pin_root: &Path) -> Result<Self, Error> {
        let dir = pin_root.join(format!("v{ABI_VERSION}"));
        let open =
            |name: &'static str| sys::open_pinned(&dir.join(name)).map_err(failed("open", name));
        Ok(Self {
            replied: open(map::FLOWS)?,
            unreplied: open(map::FLOWS_UNREPLIED)?,
        })
    }

    /// Shows each flow once, until told to stop. A flow that is answered meanwhile changes tables and may be shown twice.
    pub fn visit(&self, mut see: impl FnMut(FlowView) -> ControlFlow<()>) -> Result<(), Error> {
        let mut stopped = false;
        for (table, name, replied) in [
            (&self.unreplied, map::FLOWS_UNREPLIED, false),
            (&self.replied, map::FLOWS, true),
        ] {
            let mut lost = None;
            sys::visit_entries(table.as_fd(), |(key, flow): (FlowKey, Flow)| {
                if flow.reply != 0 {
                    return ControlFlow::Continue(());
                }
                let answers = match sys::lookup(table.as_fd(), &flow.other) {
                    Ok(answers) => answers.filter(|found: &Flow| found.is_under(&flow.other)),
                    Err(error) => {
                        lost = Some(error);
                        return ControlFlow::Break(());
                    }
                };
                let next = see(FlowView::of(key, flow, answers, replied));
                stopped = next.is_break();
                next
            })
            .and(lost.map_or(Ok(()), Err))
            .map_err(failed("read", name))?;
            if stopped {
                break;
            }
        }
        Ok(())
    }

    /// The flow of a client's tuple.
    pub fn find(&self, client: &FlowKey) -> Result<Option<FlowView>, Error> {
        for (table, name, replied) in [
            (&self.replied, map::FLOWS, true),
            (&self.unreplied, map::FLOWS_UNREPLIED, false),
        ] {
            let found: Option<Flow> =
                sys::lookup(table.as_fd(), client).map_err(failed("read", name))?;
            let own = found.filter(|flow| flow.is_under(client) && flow.reply == 0);
            if let Some(flow) = own {
                return Ok(Some(FlowView::of(*client, flow, None, replied)));
            }
        }
        Ok(None)
    }

    /// Removes flows, both directions of each, from whichever table they are in.
    pub fn remove(&self, flows: &[FlowView]) -> Result<(), Error> {
        let keys: Vec<FlowKey> = flows
            .iter()
            .flat_map(|flow| [flow.client, flow.backend])
            .collect();
        for (table, name) in [
            (&self.unreplied, map::FLOWS_UNREPLIED),
            (&self.replied, map::FLOWS),
        ] {
            sys::delete_batch(table.as_fd(), &keys).map_err(failed("delete from", name))?;
        }
        Ok(())
    }
}
