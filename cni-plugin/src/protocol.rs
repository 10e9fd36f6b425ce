//! What plugin (or `keelway-agent status`) and agent say to each other over the agent's Unix socket.
//!
//! A connection carries one exchange: the client sends a [`Request`] as JSON, for ADD and CHECK with the open network
//! namespace attached to the first byte, and closes its sending side; the agent answers with a [`Response`] as JSON and
//! closes. Descriptors travel because a path of a namespace need not mean the same to both sides.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{AddResult, Attachment, Capabilities, CniError, sys};

/// Longest request or response, in bytes. Requests hold a few names; responses a status.
pub const MESSAGE_LEN_MAX: usize = 1 << 20;
/// The longest answer that is read: a report names every way to every node.
const ANSWER_LEN_MAX: u64 = 64 << 20;

/// What is asked of the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "UPPERCASE")]
pub enum Request {
    Add(Wish),
    Check(Wish),
    Del {
        attachment: Attachment,
    },
    /// Removes the attachments of a network that are not among these.
    Gc {
        network: String,
        valid: Vec<Attachment>,
    },
    /// Whether an ADD would be served.
    Status,
    /// What the agent knows of itself, for people and scripts.
    Report,
    /// A question of one of the agent's own commands, in its words. The answer is a line of JSON for each thing found.
    Inspect {
        query: Value,
    },
}

/// An attachment that shall be (ADD) or shall have been made (CHECK).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    pub attachment: Attachment,
    /// The runtime's path of the network namespace, for the result only.
    pub netns: String,
    /// CNI_ARGS: the pod's namespace and name, among others.
    pub args: BTreeMap<String, String>,
    /// CHECK: the addresses that the ADD's result had, as CIDRs.
    #[serde(default)]
    pub addresses: Vec<String>,
    /// Name of the network configuration.
    #[serde(default)]
    pub network: String,
    #[serde(default)]
    pub capabilities: Capabilities,
}

/// The agent's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Response {
    Added(AddResult),
    Done,
    Report(Value),
    Error(CniError),
}

/// Why an exchange failed.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    #[error("connect to the agent at {path}: {source}")]
    Connect { path: String, source: io::Error },
    #[error("exchange with the agent: {0}")]
    Io(#[from] io::Error),
    #[error("the agent's answer cannot be read: {0}")]
    Answer(#[source] serde_json::Error),
    #[error("the agent closed the connection without an answer")]
    NoAnswer,
}

/// Asks the agent, and waits at most `timeout` for each step.
pub fn ask(
    socket: &Path,
    request: &Request,
    netns: Option<BorrowedFd<'_>>,
    timeout: Duration,
) -> Result<Response, ExchangeError> {
    let mut stream = UnixStream::connect(socket).map_err(|source| ExchangeError::Connect {
        path: socket.display().to_string(),
        source,
    })?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    let bytes = serde_json::to_vec(request).map_err(io::Error::from)?;
    let sent = sys::send_with_fd(stream.as_fd(), &bytes, netns)?;
    stream.write_all(&bytes[sent..])?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.take(ANSWER_LEN_MAX).read_to_end(&mut answer)?;
    if answer.is_empty() {
        return Err(ExchangeError::NoAnswer);
    }
    serde_json::from_slice(&answer).map_err(ExchangeError::Answer)
}

/// Why a request could not be taken from a connection.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    #[error("read: {0}")]
    Io(#[from] io::Error),
    #[error("not a request: {0}")]
    Json(#[from] serde_json::Error),
    #[error("longer than {MESSAGE_LEN_MAX} bytes")]
    TooLong,
}

/// The agent's side: takes one request and the descriptor that came with it.
pub fn receive(stream: &mut UnixStream) -> Result<(Request, Option<OwnedFd>), ReceiveError> {
    let mut bytes = vec![0; 64 * 1024];
    let (len, netns) = sys::receive_with_fd(stream.as_fd(), &mut bytes)?;
    bytes.truncate(len);
    if len > 0 {
        stream
            .take((MESSAGE_LEN_MAX - len + 1) as u64)
            .read_to_end(&mut bytes)?;
    }
    if bytes.len() > MESSAGE_LEN_MAX {
        return Err(ReceiveError::TooLong);
    }
    Ok((serde_json::from_slice(&bytes)?, netns))
}

/// The agent's side: answers and closes.
pub fn answer(mut stream: UnixStream, response: &Response) -> io::Result<()> {
    stream.write_all(&serde_json::to_vec(response)?)
}
