//! The cluster as the agent of this node tells of it.

use std::io;
use std::path::Path;
use std::time::Duration;

use cluster_model::share::{self, BadFrame, HELLO, Message, Offer, Versions};
use cluster_model::watch::Report;
use cluster_model::{Change, Object};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// An agent that knows the cluster opens at once.
const OPENING: Duration = Duration::from_secs(3);
/// An agent says every ten seconds that it lives.
const SILENCE: Duration = Duration::from_secs(35);

/// Why an agent is of no use.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Nobody listens there, and maybe nobody ever will.
    #[error("there is no agent")]
    Absent,
    #[error("the agent does not know the cluster yet")]
    NotReady,
    #[error("the agent speaks another version")]
    Version,
    #[error("the agent says nothing")]
    Silent,
    #[error("the agent is gone: {0}")]
    Gone(#[from] io::Error),
    #[error("the agent's words can't be read: {0}")]
    Frame(#[from] BadFrame),
}

/// An agent that tells.
pub struct Agent {
    stream: BufReader<OwnedReadHalf>,
    /// Until it is told what this server says of its answers.
    back: Option<OwnedWriteHalf>,
    telling: Option<JoinHandle<()>>,
    frame: Vec<u8>,
    list: Vec<Object>,
    /// How far it knew the cluster when it began.
    pub versions: Versions,
    /// For how long its own watch had gone well by then.
    pub well_for: Duration,
}

impl Agent {
    /// Connects and hears the opening.
    pub async fn connect(socket: &Path) -> Result<Self, AgentError> {
        let begun = async {
            let stream = match UnixStream::connect(socket).await {
                Ok(stream) => stream,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(AgentError::Absent);
                }
                Err(error) => return Err(error.into()),
            };
            let (stream, mut back) = stream.into_split();
            back.write_all(&HELLO).await?;
            let mut agent = Self {
                stream: BufReader::with_capacity(64 << 10, stream),
                back: Some(back),
                telling: None,
                frame: Vec::new(),
                list: Vec::new(),
                versions: Versions::default(),
                well_for: Duration::ZERO,
            };
            let mut hello = [0; HELLO.len()];
            match agent.stream.read_exact(&mut hello).await {
                Ok(_) if hello == HELLO => {}
                Ok(_) => return Err(AgentError::Version),
                Err(_) => return Err(AgentError::NotReady),
            }
            if let Message::Opening {
                versions,
                well_for_s,
            } = agent.message().await?
            {
                agent.versions = versions;
                agent.well_for = Duration::from_secs(well_for_s.into());
            }
            Ok(agent)
        };
        timeout(OPENING, begun)
            .await
            .unwrap_or(Err(AgentError::Silent))
    }

    /// Tells the agent of this server's answers, now and whenever it changes.
    pub fn tell(&mut self, mut offers: watch::Receiver<Offer>) {
        let Some(mut back) = self.back.take() else {
            return;
        };
        self.telling = Some(tokio::spawn(async move {
            offers.mark_changed();
            while offers.changed().await.is_ok() {
                let mut frame = Vec::new();
                offers.borrow_and_update().put(&mut frame);
                // One that does not listen is gone, which is noticed where it is listened to.
                if back.write_all(&frame).await.is_err() {
                    return;
                }
            }
        }));
    }

    async fn message(&mut self) -> Result<Message, AgentError> {
        let mut head = [0; 4];
        self.stream.read_exact(&mut head).await?;
        self.frame.resize(share::frame_bytes(head)?, 0);
        self.stream.read_exact(&mut self.frame).await?;
        Ok(share::read(&self.frame)?)
    }

    /// What happens next, with `part` taken of each object; a list only once it is complete.
    pub async fn next(&mut self, part: fn(Object) -> Object) -> Result<Report, AgentError> {
        loop {
            let message = timeout(SILENCE, self.message())
                .await
                .unwrap_or(Err(AgentError::Silent))?;
            return Ok(match message {
                Message::Opening { .. } | Message::Alive => continue,
                Message::Listed(object) => {
                    self.list.push(part(object));
                    continue;
                }
                Message::ListEnd(kind) => {
                    let mut list = std::mem::take(&mut self.list);
                    list.retain(|object| object.kind() == kind);
                    // The largest frame is not needed again for long.
                    self.frame = Vec::new();
                    Report::Change(Change::Replace(kind, list))
                }
                Message::Upsert(object) => Report::Change(Change::Upsert(part(object))),
                Message::Remove(gone) => Report::Change(Change::Remove(gone)),
                Message::Reached { kind, version } => Report::Reached { kind, version },
                Message::Failed { kind, error } => Report::Failed { kind, error },
            });
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(telling) = &self.telling {
            telling.abort();
        }
    }
}
