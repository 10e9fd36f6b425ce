//! TCP: queries one after another or many at once on a connection, answered as they are ready (RFC 7766).

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::tcp::OwnedWriteHalf;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, Semaphore};
use tokio::time::timeout;

use super::Shared;
use super::at_once::{Outcome, at_once};
use super::slow::Slow;
use super::transfer;
use super::udp::{count_slow, renew_entry, type_of};
use crate::answer::Transport;
use crate::metrics::Queries;
use crate::query::rtype;

/// How long a connection may stay silent, and how long a client may take over one message (RFC 7766, 6.2.3).
const IDLE: Duration = Duration::from_secs(10);
/// How long a connection may stay silent once the server ends: what was sent before is there by then.
const LAST_WORDS: Duration = Duration::from_millis(100);
/// Slow queries of one connection at once; above it nothing more is read of it.
const PIPELINE_MAX: usize = 64;

/// Serves until the server is drained.
pub(super) async fn serve(shared: Arc<Shared>, listener: TcpListener) {
    let counters = shared.metrics.queries();
    let mut draining = shared.draining.subscribe();
    loop {
        let accepted = tokio::select! {
            // What has come already is answered still.
            biased;
            accepted = listener.accept() => accepted,
            _ = draining.wait_for(|draining| *draining) => break,
        };
        match accepted {
            Ok((stream, client)) => {
                let Some(place) = shared.limits.connection(client.ip()) else {
                    // Closed at once: it may try again, and has not waited for nothing.
                    continue;
                };
                let connection = Connection {
                    shared: shared.clone(),
                    counters: counters.clone(),
                    client,
                };
                tokio::spawn(async move {
                    if let Err(error) = connection.serve(stream).await {
                        tracing::debug!(%error, "TCP connection");
                    }
                    drop(place);
                });
            }
            // Out of descriptors, say: others are being served and will give some back.
            Err(error) => {
                tracing::warn!(%error, "accepting");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    drop(listener);
    shared.serving.fetch_sub(1, Ordering::Relaxed);
}

struct Connection {
    shared: Arc<Shared>,
    counters: Arc<Queries>,
    client: SocketAddr,
}

pub(super) async fn send(stream: &Mutex<OwnedWriteHalf>, framed: &[u8]) -> io::Result<()> {
    let mut stream = stream.lock().await;
    timeout(IDLE, stream.write_all(framed)).await?
}

pub(super) fn framed(message: &[u8]) -> Vec<u8> {
    let mut framed = Vec::with_capacity(2 + message.len());
    framed.extend((message.len() as u16).to_be_bytes());
    framed.extend_from_slice(message);
    framed
}

impl Connection {
    async fn serve(&self, stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let (reader, writer) = stream.into_split();
        let mut reader = BufReader::new(reader);
        let writer = Arc::new(Mutex::new(writer));
        let pipeline = Arc::new(Semaphore::new(PIPELINE_MAX));
        let mut out = vec![0; 2 + usize::from(u16::MAX)];
        let mut query = Vec::new();
        let mut draining = self.shared.draining.subscribe();
        let mut ending = false;
        loop {
            // What a client has begun to send is heard to its end, and answered. At the end of the server, whoever is silent is closed.
            let patience = if ending { LAST_WORDS } else { IDLE };
            let begun = tokio::select! {
                biased;
                begun = timeout(patience, reader.fill_buf()) => begun,
                _ = draining.wait_for(|draining| *draining), if !ending => {
                    ending = true;
                    continue;
                }
            };
            match begun {
                Ok(Ok([])) => break,
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(error),
                // Silent, unless it waits for an answer of ours.
                Err(_) if pipeline.available_permits() < PIPELINE_MAX && !ending => continue,
                Err(_) => break,
            }
            let length = timeout(IDLE, reader.read_u16()).await??;
            query.resize(usize::from(length), 0);
            timeout(IDLE, reader.read_exact(&mut query)).await??;
            let begun = Instant::now();
            let outcome = {
                let state = self.shared.state();
                let view = self.shared.view(&state, begun);
                let turn = self.shared.turn();
                let client = self.client.ip();
                let out = &mut out[2..];
                at_once(&view, &query, client, Transport::Tcp, turn, out)
            };
            match outcome {
                Outcome::Ignore => break,
                Outcome::Reply { bytes, renew, .. } => {
                    if renew {
                        renew_entry(&self.shared, &query);
                    }
                    out[..2].copy_from_slice(&(bytes as u16).to_be_bytes());
                    send(&writer, &out[..2 + bytes]).await?;
                    let slow = Slow::of(&self.shared, self.client, Transport::Tcp);
                    count_slow(&self.counters, &slow, &query, &out[2..2 + bytes], begun);
                }
                Outcome::Slow if type_of(&query) == rtype::AXFR => {
                    transfer::send(&self.shared, &query, self.client.ip(), &writer).await?;
                }
                Outcome::Slow => {
                    let Ok(permit) = pipeline.clone().acquire_owned().await else {
                        break;
                    };
                    let Some(place) = self.shared.limits.slow(self.client.ip()) else {
                        break;
                    };
                    let slow = Slow::of(&self.shared, self.client, Transport::Tcp);
                    let (writer, counters, query) =
                        (writer.clone(), self.counters.clone(), query.clone());
                    tokio::spawn(async move {
                        if let Some(reply) = slow.resolve(&query).await {
                            // The client may be gone; then there is nobody to tell.
                            let _ = send(&writer, &framed(&reply)).await;
                            count_slow(&counters, &slow, &query, &reply, begun);
                        }
                        drop((permit, place));
                    });
                }
            }
        }
        // What is being asked is still answered, for clients that close their own side early.
        let _ = timeout(IDLE, pipeline.acquire_many(PIPELINE_MAX as u32)).await;
        Ok(())
    }
}
