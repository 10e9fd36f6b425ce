//! The agent's Unix socket: requests of the CNI plugin, of `status`, and of the commands that look into the agent.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Sender, sync_channel};
use std::thread;
use std::time::Duration;

use keelway_cni::protocol::{Request, Response, answer, receive};
use keelway_cni::{CniError, Code};

use crate::event::Event;
use crate::inspect::serve;

/// How long a client may take to send its request.
const RECEIVE_TIMEOUT: Duration = Duration::from_secs(5);
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

/// Serves requests, each on a thread of its own: they are few, and mostly wait.
pub fn serve(listener: UnixListener, events: Sender<Event>) -> io::Result<()> {
    thread::Builder::new()
        .name("socket".into())
        .spawn(move || {
            for stream in listener.incoming() {
                match stream {
                    Ok(stream) => {
                        let events = events.clone();
                        let serving = thread::Builder::new()
                            .name("request".into())
                            .spawn(move || one(stream, &events));
                        if let Err(error) = serving {
                            tracing::error!(%error, "socket: no thread for a request");
                        }
                    }
                    Err(error) => {
                        tracing::warn!(%error, "socket: accept");
                        thread::sleep(Duration::from_millis(100));
                    }
                }
            }
        })?;
    Ok(())
}

fn one(mut stream: UnixStream, events: &Sender<Event>) {
    let outcome = match take(&mut stream) {
        Ok((Request::Inspect { query }, _)) => serve::serve(stream, query, events),
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
