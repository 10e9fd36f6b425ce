//! The agent's Unix socket: requests of the CNI plugin, of `status`, and of the commands that look into the agent.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, sync_channel};
use std::thread;
use std::time::Duration;

use keelway_cni::protocol::{Request, Response, answer, receive};
use keelway_cni::{CniError, Code};

use crate::event::Event;
use crate::inspect::serve;

/// How long a client may take to send its request.
const RECEIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Threads that wait for requests: a burst's threads beyond these end with it.
const WAITING_MAX: usize = 4;
/// How long a request may take: less than a plugin waits, so that it hears why.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

/// Listens at `path`, for root alone. The caller has made sure that no other agent does.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves requests. A thread takes a connection and stays with it to its end; before it does, it sees to it that another one waits for
/// the next. So a request mostly finds a thread that waits already.
pub fn serve(listener: UnixListener, events: Sender<Event>) -> io::Result<()> {
    let door = Arc::new(Door {
        listener,
        events,
        waiting: AtomicUsize::new(0),
    });
    door.wait()
}

/// Where requests come in.
struct Door {
    listener: UnixListener,
    events: Sender<Event>,
    /// Threads that wait, or are about to.
    waiting: AtomicUsize,
}

impl Door {
    /// Has one more thread wait.
    fn wait(self: &Arc<Self>) -> io::Result<()> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let door = Arc::clone(self);
        let started = thread::Builder::new()
            .name("request".into())
            .spawn(move || door.serve());
        if started.is_err() {
            self.waiting.fetch_sub(1, Ordering::SeqCst);
        }
        started.map(drop)
    }

    fn serve(self: Arc<Self>) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "socket: accept");
                    thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            if self.waiting.fetch_sub(1, Ordering::SeqCst) == 1
                && let Err(error) = self.wait()
            {
                // The next request waits until this one is done.
                tracing::error!(%error, "socket: no thread for a request");
            }
            one(stream, &self.events);
            if self.waiting.fetch_add(1, Ordering::SeqCst) >= WAITING_MAX {
                self.waiting.fetch_sub(1, Ordering::SeqCst);
                return;
            }
        }
    }
}

fn one(mut stream: UnixStream, events: &Sender<Event>) {
    let outcome = match take(&mut stream) {
        // Whoever asked may read it by the page, or stop for a while.
        Ok((Request::Inspect { query }, _)) => stream
            .set_write_timeout(None)
            .and_then(|()| serve::serve(stream, query, events)),
        Ok((request, netns)) => {
            let response = exchange(request, netns, events).unwrap_or_else(Response::Error);
            answer(stream, &response)
        }
        Err(refused) => answer(stream, &Response::Error(refused)),
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, "socket: the client did not wait for its answer");
    }
}

/// Takes the request of a connection.
fn take(stream: &mut UnixStream) -> Result<(Request, Option<OwnedFd>), CniError> {
    let refuse = |code, what: &str, error: &dyn std::fmt::Display| {
        CniError::new(code, what).with_details(error)
    };
    stream
        .set_read_timeout(Some(RECEIVE_TIMEOUT))
        .and_then(|()| stream.set_write_timeout(Some(RECEIVE_TIMEOUT)))
        .map_err(|error| refuse(Code::Io, "the agent's socket", &error))?;
    receive(stream)
        .map_err(|error| refuse(Code::Decode, "the agent cannot read the request", &error))
}

fn exchange(
    request: Request,
    netns: Option<OwnedFd>,
    events: &Sender<Event>,
) -> Result<Response, CniError> {
    let (reply, answer) = sync_channel(1);
    events
        .send(Event::Request {
            request,
            netns,
            reply,
        })
        .map_err(|_| CniError::new(Code::TryAgain, "the agent is stopping"))?;
    answer
        .recv_timeout(ANSWER_TIMEOUT)
        .map_err(|_| CniError::new(Code::TryAgain, "the agent is too busy to answer"))
}
