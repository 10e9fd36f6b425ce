//! Threads for netlink that takes milliseconds.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::Sender;
use std::thread;

use crate::event::Event;
use crate::net::NetlinkError;
use crate::node::NodeError;

/// Does work on a thread of its own, and sends what came of it. Something is sent whatever happens: the attachment would
/// stay busy else.
pub(super) fn in_background<T: 'static>(
    name: &str,
    events: &Sender<Event>,
    work: impl FnOnce() -> Result<T, NodeError> + Send + 'static,
    event: impl FnOnce(Result<T, NodeError>) -> Event + Clone + Send + 'static,
) {
    let (tell, of) = (events.clone(), event.clone());
    let working = thread::Builder::new().name(name.into()).spawn(move || {
        let outcome = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
            Err(NetlinkError::new(
                "work on an interface",
                io::Error::other("the thread panicked"),
            )
            .into())
        });
        // The loop has ended when this fails, and the next agent finds what was made.
        let _ = tell.send(of(outcome));
    });
    if let Err(error) = working {
        let failed = NetlinkError::new("start a thread", error);
        let _ = events.send(event(Err(failed.into())));
    }
}
