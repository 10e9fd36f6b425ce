//! Starts nodes and follows what they report; `up`'s side of the control channel.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{Mutex, watch};

use super::{Event, NodeSpec, Order};
use crate::process::Process;

/// A service that fails this often while the cluster comes up will not get better.
const FAILURES_MAX: u32 = 5;

#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("cannot start node {node}: {source}")]
    Start { node: String, source: io::Error },
    #[error("node {node}: {reason}")]
    Node { node: String, reason: String },
}

/// What the nodes have reported so far.
#[derive(Debug, Default)]
pub struct Board {
    inits: BTreeMap<String, Process>,
    booted: BTreeSet<String>,
    ready: BTreeSet<(String, String)>,
    failure: Option<(String, String)>,
}

impl Board {
    /// The PID 1 of a node, once it has been started.
    pub fn init(&self, node: &str) -> Option<Process> {
        self.inits.get(node).copied()
    }

    pub fn is_booted(&self, node: &str) -> bool {
        self.booted.contains(node)
    }

    pub fn is_ready(&self, node: &str, service: &str) -> bool {
        self.ready
            .iter()
            .any(|(on, name)| on == node && name == service)
    }

    fn take(&mut self, node: &str, event: Event) {
        match event {
            Event::Init { pid } => match Process::now(pid) {
                Some(process) => drop(self.inits.insert(node.to_owned(), process)),
                None => self.fail(node, "its PID 1 ended at once".into()),
            },
            Event::Booted => drop(self.booted.insert(node.to_owned())),
            Event::Ready { service } => drop(self.ready.insert((node.to_owned(), service))),
            Event::Exited {
                service,
                status,
                restarts,
            } if restarts >= FAILURES_MAX => {
                self.fail(
                    node,
                    format!("{service} has failed {restarts} times, last with: {status}"),
                );
            }
            Event::Exited { .. } => {}
            Event::Failed { reason } => self.fail(node, reason),
        }
    }

    /// The first failure counts: those after it usually follow from it.
    fn fail(&mut self, node: &str, reason: String) {
        self.failure.get_or_insert((node.to_owned(), reason));
    }
}

/// The nodes of a cluster that is coming up. They end with this value, unless [`Nodes::detach`] lets them go on.
#[derive(Debug)]
pub struct Nodes {
    board: watch::Sender<Board>,
    orders: Mutex<BTreeMap<String, OwnedWriteHalf>>,
}

impl Default for Nodes {
    fn default() -> Self {
        Nodes {
            board: watch::Sender::new(Board::default()),
            orders: Mutex::default(),
        }
    }
}

impl Nodes {
    /// Starts a node with `program` (the `keelway` binary). Its description has been written to `spec_file`.
    /// `listener` is handed to the service that listens. What PID 1 itself has to say goes to `init.log` in its folder.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start(
        &mut self,
        program: &Path,
        spec: &NodeSpec,
        spec_file: &Path,
        listener: Option<OwnedFd>,
    ) -> Result<(), LaunchError> {
        let failed = |source| LaunchError::Start {
            node: spec.name.clone(),
            source,
        };
        let (ours, theirs) = StdUnixStream::pair().map_err(failed)?;
        ours.set_nonblocking(true).map_err(failed)?;
        let log = std::fs::File::create(spec.dir.join("init.log")).map_err(failed)?;

        let mut command = Command::new(program);
        command
            .arg("node-init")
            .arg("--spec")
            .arg(spec_file)
            .arg("--parent")
            .arg(std::process::id().to_string());
        let output = match listener {
            Some(listener) => {
                command.arg("--listener");
                Stdio::from(listener)
            }
            None => Stdio::null(),
        };
        let mut child = command
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(output)
            .stderr(log)
            .spawn()
            .map_err(failed)?;
        drop(command);

        let (events, orders) = UnixStream::from_std(ours).map_err(failed)?.into_split();
        self.orders.get_mut().insert(spec.name.clone(), orders);
        let (board, node) = (self.board.clone(), spec.name.clone());
        tokio::spawn(async move {
            let mut lines = BufReader::new(events).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                match serde_json::from_str(&line) {
                    Ok(event) => board.send_modify(|board| board.take(&node, event)),
                    Err(error) => board.send_modify(|board| {
                        board.fail(&node, format!("says what is no event: {error}"))
                    }),
                }
            }
            board.send_modify(|board| board.fail(&node, "its PID 1 has ended".into()));
            // The first process; it ended when PID 1 had started.
            drop(child.wait());
        });
        Ok(())
    }

    /// Waits until what is reported satisfies `reached`.
    ///
    /// # Errors
    /// As soon as any node fails.
    pub async fn wait<T>(
        &self,
        mut reached: impl FnMut(&Board) -> Option<T>,
    ) -> Result<T, LaunchError> {
        let mut board = self.board.subscribe();
        loop {
            {
                let board = board.borrow_and_update();
                if let Some((node, reason)) = &board.failure {
                    return Err(LaunchError::Node {
                        node: node.clone(),
                        reason: reason.clone(),
                    });
                }
                if let Some(result) = reached(&board) {
                    return Ok(result);
                }
            }
            // We hold the sender ourselves, so this cannot fail.
            if board.changed().await.is_err() {
                return Err(LaunchError::Node {
                    node: "all".into(),
                    reason: "nobody reports".into(),
                });
            }
        }
    }

    /// Runs `task`, but not past the failure of a node.
    ///
    /// # Errors
    /// What the task returns, or the failure.
    pub async fn while_well<T, E: From<LaunchError>>(
        &self,
        task: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        tokio::select! {
            outcome = task => outcome,
            failure = self.wait::<std::convert::Infallible>(|_| None) => match failure {
                Ok(never) => match never {},
                Err(error) => Err(error.into()),
            },
        }
    }

    /// Tells every node that something has happened that services may wait for.
    ///
    /// # Errors
    /// When a node is gone.
    pub async fn tell(&self, happened: &str) -> Result<(), LaunchError> {
        self.order(&Order::Happened {
            name: happened.to_owned(),
        })
        .await
    }

    /// Lets the nodes go on when this process ends.
    ///
    /// # Errors
    /// When a node is gone.
    pub async fn detach(self) -> Result<(), LaunchError> {
        self.order(&Order::Detach).await
    }

    /// Ends the nodes: their services are asked to end, and have some seconds for it.
    ///
    /// # Errors
    /// When a node is gone already.
    pub async fn stop(self) -> Result<(), LaunchError> {
        self.order(&Order::Stop).await?;
        // That is how its end shows; a PID 1 waits for no service for ever.
        let ended = self.wait::<std::convert::Infallible>(|_| None).await;
        drop(ended);
        Ok(())
    }

    async fn order(&self, order: &Order) -> Result<(), LaunchError> {
        for (node, channel) in self.orders.lock().await.iter_mut() {
            let failed = |source| LaunchError::Start {
                node: node.clone(),
                source,
            };
            let mut line = serde_json::to_vec(order).map_err(|error| failed(error.into()))?;
            line.push(b'\n');
            channel.write_all(&line).await.map_err(failed)?;
        }
        Ok(())
    }
}
