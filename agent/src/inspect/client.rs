//! The command's side: asks, and takes lines as they come.

use std::io::{self, BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use keelway_cni::CniError;
use keelway_cni::protocol::{Request, Response};
use serde_json::Value;

use super::{Line, Query};

/// Why a question has no whole answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("no agent answers at {path}: {source} (is it running here, and is --socket right?)")]
    Connect { path: String, source: io::Error },
    #[error("ask the agent: {0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Refused(CniError),
    #[error("the agent's answer cannot be read: {0}")]
    Answer(#[from] serde_json::Error),
    #[error("the agent went away before its answer was complete")]
    CutOff,
    /// Whoever reads what is printed has seen enough.
    #[error("write: {0}")]
    Output(#[source] io::Error),
}

impl ClientError {
    /// Whether it is the pipe that the output goes into which has closed: no error, for `| head`.
    pub fn is_closed_pipe(&self) -> bool {
        matches!(self, ClientError::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// Asks, and hands each item to `take`. `patience` is how long the agent may be silent; None is for ever.
pub fn ask(
    socket: &Path,
    query: &Query,
    patience: Option<Duration>,
    mut take: impl FnMut(Value) -> io::Result<()>,
) -> Result<(), ClientError> {
    let mut stream = UnixStream::connect(socket).map_err(|source| ClientError::Connect {
        path: socket.display().to_string(),
        source,
    })?;
    stream.set_read_timeout(patience)?;
    let query = serde_json::to_value(query)?;
    stream.write_all(&serde_json::to_vec(&Request::Inspect { query })?)?;
    stream.shutdown(Shutdown::Write)?;
    for line in BufReader::new(stream).lines() {
        let line = line?;
        match serde_json::from_str(&line) {
            Ok(Line::Item(item)) => take(item).map_err(ClientError::Output)?,
            Ok(Line::Alive) => {}
            Ok(Line::End) => return Ok(()),
            Ok(Line::Error(error)) => return Err(ClientError::Refused(error)),
            // An agent of another version, or one that could not read the question, answers as it does to a plugin.
            Err(error) => match serde_json::from_str(&line) {
                Ok(Response::Error(refused)) => return Err(ClientError::Refused(refused)),
                _ => return Err(error.into()),
            },
        }
    }
    Err(ClientError::CutOff)
}
