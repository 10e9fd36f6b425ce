//! The agent's view of the cluster for other processes of its node, so that a node watches the API server once.
//!
//! The event loop owns [`Shares`] and tells each change to whoever listens, already as frames; a thread for each listener writes them.
//! Another one hears what the listener says of its own answers.

use std::fs;
use std::io::{self, BufWriter, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use cluster_model::share::{HELLO, KINDS, Message, Offer, Versions, offer_bytes, put};
use cluster_model::{Change, Kind, Object, Snapshot};

use crate::event::Event;
use crate::socket;

/// Pieces that may wait for one listener: more than any burst of single changes. Who falls behind further is cut off, and begins again.
const WAITING_MAX: usize = 1 << 15;
/// Listeners at a time: a DNS server, another one that is about to take its place, and a few who look.
const LISTENERS_MAX: usize = 16;
/// How long a listener may take to say hello, or to read what it is told.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the event loop may take to answer.
const LOOP_PATIENCE: Duration = Duration::from_secs(15);

type Piece = Arc<[u8]>;

/// Who listens, and what is known. Part of the event loop's state.
#[derive(Debug)]
pub struct Shares {
    listeners: Vec<SyncSender<Piece>>,
    versions: Versions,
    /// Since when the watch has gone without a failure.
    well_since: Instant,
}

impl Default for Shares {
    fn default() -> Self {
        Self {
            listeners: Vec::new(),
            versions: Versions::default(),
            well_since: Instant::now(),
        }
    }
}

/// What one listener is to be told: all that is known, and then what happens.
#[derive(Debug)]
pub struct Told {
    snapshot: Snapshot,
    opening: Message,
    news: Receiver<Piece>,
}

impl Shares {
    /// One more listener; `None` while the lists are not complete, since half a cluster is of no use to anyone.
    pub fn add(&mut self, snapshot: &Snapshot) -> Option<Told> {
        if !KINDS.iter().all(|kind| snapshot.synced(*kind)) {
            return None;
        }
        let (sender, news) = sync_channel(WAITING_MAX);
        self.listeners.push(sender);
        Some(Told {
            snapshot: snapshot.clone(),
            opening: Message::Opening {
                versions: self.versions,
                well_for_s: u32::try_from(self.well_since.elapsed().as_secs()).unwrap_or(u32::MAX),
            },
            news,
        })
    }

    /// Tells of a change of the cluster.
    pub fn change(&mut self, change: &Change) {
        if self.listeners.is_empty() {
            return;
        }
        let mut piece = Vec::new();
        match change {
            Change::Upsert(object) => put(&mut piece, &Message::Upsert(object.clone())),
            Change::Remove(gone) if KINDS.contains(&gone.kind) => {
                put(&mut piece, &Message::Remove(gone.clone()));
            }
            Change::Replace(kind, objects) if KINDS.contains(kind) => {
                put_list(&mut piece, *kind, objects.iter().cloned());
            }
            Change::Remove(_) | Change::Replace(..) => {}
        }
        self.tell(piece);
    }

    /// Tells how far a kind is known.
    pub fn reached(&mut self, kind: Kind, version: u64) {
        self.versions.reached(kind, version);
        if KINDS.contains(&kind) {
            self.tell_message(&Message::Reached { kind, version });
        }
    }

    /// Tells that a kind can't be watched.
    pub fn failed(&mut self, kind: Kind, error: &str) {
        self.well_since = Instant::now();
        if KINDS.contains(&kind) {
            let error = error.to_owned();
            self.tell_message(&Message::Failed { kind, error });
        }
    }

    /// Tells that the event loop turns.
    pub fn alive(&mut self) {
        self.tell_message(&Message::Alive);
    }

    fn tell_message(&mut self, message: &Message) {
        if !self.listeners.is_empty() {
            let mut piece = Vec::new();
            put(&mut piece, message);
            self.tell(piece);
        }
    }

    fn tell(&mut self, piece: Vec<u8>) {
        if piece.is_empty() {
            return;
        }
        let piece = Piece::from(piece);
        // One that has left, or does not keep up, hears the end of its channel.
        self.listeners
            .retain(|listener| listener.try_send(piece.clone()).is_ok());
    }
}

fn put_list(out: &mut Vec<u8>, kind: Kind, objects: impl Iterator<Item = Object>) {
    for object in objects {
        put(out, &Message::Listed(object));
    }
    put(out, &Message::ListEnd(kind));
}

/// Listens at `path`, for root alone, and tells whoever connects, each on a thread of its own.
///
/// # Errors
/// When the socket can't be made.
pub fn serve(path: &Path, events: Sender<Event>) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let listener = socket::listen(path)?;
    let count = Arc::new(AtomicUsize::new(0));
    thread::Builder::new().name("share".into()).spawn(move || {
        for stream in listener.incoming() {
            let stream = match stream {
                Ok(stream) if count.load(Ordering::Relaxed) < LISTENERS_MAX => stream,
                Ok(_) => continue,
                Err(error) => {
                    tracing::warn!(%error, "share: accept");
                    thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            count.fetch_add(1, Ordering::Relaxed);
            let (events, counted) = (events.clone(), count.clone());
            let telling = thread::Builder::new().name("tell".into()).spawn(move || {
                if let Err(error) = tell(stream, &events) {
                    tracing::debug!(%error, "share: a listener is gone");
                }
                counted.fetch_sub(1, Ordering::Relaxed);
            });
            if let Err(error) = telling {
                count.fetch_sub(1, Ordering::Relaxed);
                tracing::error!(%error, "share: no thread for a listener");
            }
        }
    })?;
    Ok(())
}

/// Tells one listener for as long as it listens.
fn tell(mut stream: UnixStream, events: &Sender<Event>) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut hello = [0; HELLO.len()];
    stream.read_exact(&mut hello)?;
    if hello != HELLO {
        return Err(io::Error::other("it speaks another version"));
    }
    let (reply, answer) = sync_channel(1);
    events
        .send(Event::Share { reply })
        .map_err(io::Error::other)?;
    let told = answer
        .recv_timeout(LOOP_PATIENCE)
        .map_err(io::Error::other)?;
    let Some(Told {
        snapshot,
        opening,
        news,
    }) = told
    else {
        return Err(io::Error::other("the cluster is not known yet"));
    };
    let mut out = BufWriter::with_capacity(64 << 10, stream);
    out.write_all(&HELLO)?;
    let mut frame = Vec::new();
    put(&mut frame, &opening);
    out.write_all(&frame)?;
    for kind in KINDS {
        for object in objects(&snapshot, kind) {
            frame.clear();
            put(&mut frame, &Message::Listed(object));
            out.write_all(&frame)?;
        }
        frame.clear();
        put(&mut frame, &Message::ListEnd(kind));
        out.write_all(&frame)?;
    }
    // What was true when it began is not needed any more, and would be kept for as long as the listener stays.
    drop(snapshot);
    let _heard = hear(out.get_ref(), events)?;
    loop {
        let piece = match news.try_recv() {
            Ok(piece) => piece,
            Err(TryRecvError::Disconnected) => return out.flush(),
            Err(TryRecvError::Empty) => {
                out.flush()?;
                match news.recv() {
                    Ok(piece) => piece,
                    Err(_) => return Ok(()),
                }
            }
        };
        out.write_all(&piece)?;
    }
}

/// The connection that a listener is heard by. When it is told no more, it is not heard any more either.
struct Heard(UnixStream);

impl Drop for Heard {
    fn drop(&mut self) {
        // It fails when the other side was first.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// Hears what a listener says, on a thread of its own. It has been told of the whole cluster by now, so what it says is said of that.
fn hear(stream: &UnixStream, events: &Sender<Event>) -> io::Result<Heard> {
    static LISTENERS: AtomicU64 = AtomicU64::new(0);
    let listener = LISTENERS.fetch_add(1, Ordering::Relaxed);
    stream.set_read_timeout(None)?;
    let (heard, events) = (Heard(stream.try_clone()?), events.clone());
    let mut stream = stream.try_clone()?;
    let hearing = move || {
        let why = loop {
            match offer(&mut stream) {
                Ok(offer) => {
                    let offer = Some(offer);
                    if events.send(Event::Offer { listener, offer }).is_err() {
                        return;
                    }
                }
                Err(error) => break error,
            }
        };
        tracing::debug!(error = %why, "share: a listener is heard no more");
        // Without a loop there is nobody to tell.
        let _ = events.send(Event::Offer {
            listener,
            offer: None,
        });
    };
    thread::Builder::new().name("hear".into()).spawn(hearing)?;
    Ok(heard)
}

fn offer(stream: &mut UnixStream) -> io::Result<Offer> {
    let mut head = [0; 4];
    stream.read_exact(&mut head)?;
    let mut frame = vec![0; offer_bytes(head).map_err(io::Error::other)?];
    stream.read_exact(&mut frame)?;
    Offer::read(&frame).map_err(io::Error::other)
}

fn objects(snapshot: &Snapshot, kind: Kind) -> Box<dyn Iterator<Item = Object> + '_> {
    match kind {
        Kind::Service => Box::new(snapshot.services().cloned().map(Object::Service)),
        Kind::EndpointSlice => Box::new(snapshot.all_slices().cloned().map(Object::EndpointSlice)),
        Kind::Node | Kind::Pod => Box::new(std::iter::empty()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cluster_model::share::{frame_bytes, read};
    use cluster_model::{Dirty, ObjectKey, ObjectRef, read_manifest};

    fn messages(mut bytes: &[u8]) -> Vec<Message> {
        let mut out = Vec::new();
        while let Some((head, rest)) = bytes.split_first_chunk::<4>() {
            let (frame, rest) = rest.split_at(frame_bytes(*head).expect("a length"));
            out.push(read(frame).expect("a message"));
            bytes = rest;
        }
        out
    }

    fn service(name: &str) -> Object {
        let text = format!(
            r#"{{"kind":"Service","metadata":{{"name":"{name}","namespace":"n"}},"spec":{{}}}}"#
        );
        read_manifest(text.as_bytes()).expect("a Service").remove(0)
    }

    #[test]
    fn nobody_is_told_of_half_a_cluster_and_then_everyone_hears_every_change() {
        let (mut shares, mut snapshot) = (Shares::default(), Snapshot::default());
        let mut apply = |shares: &mut Shares, change: Change| {
            shares.change(&change);
            snapshot.apply(change, &mut Dirty::default());
            snapshot.clone()
        };
        let half = apply(
            &mut shares,
            Change::Replace(Kind::Service, vec![service("a")]),
        );
        assert!(shares.add(&half).is_none());
        let whole = apply(
            &mut shares,
            Change::Replace(Kind::EndpointSlice, Vec::new()),
        );
        shares.reached(Kind::Service, 5);
        let told = shares.add(&whole).expect("all is known");
        let mut versions = Versions::default();
        versions.reached(Kind::Service, 5);
        assert!(
            matches!(told.opening, Message::Opening { versions: known, .. } if known == versions)
        );
        let gone = ObjectRef {
            kind: Kind::Service,
            key: ObjectKey::new("n", "a"),
        };
        apply(&mut shares, Change::Upsert(service("b")));
        apply(&mut shares, Change::Remove(gone.clone()));
        apply(
            &mut shares,
            Change::Replace(Kind::Service, vec![service("c")]),
        );
        shares.alive();
        let heard: Vec<Message> = told
            .news
            .try_iter()
            .flat_map(|piece| messages(&piece))
            .collect();
        let expected = [
            Message::Upsert(service("b")),
            Message::Remove(gone),
            Message::Listed(service("c")),
            Message::ListEnd(Kind::Service),
            Message::Alive,
        ];
        assert_eq!(heard, expected);
    }

    #[test]
    fn a_listener_that_does_not_keep_up_is_cut_off() {
        let mut shares = Shares::default();
        let mut snapshot = Snapshot::default();
        for kind in KINDS {
            snapshot.apply(Change::Replace(kind, Vec::new()), &mut Dirty::default());
        }
        let told = shares.add(&snapshot).expect("all is known");
        for _ in 0..=WAITING_MAX {
            shares.alive();
        }
        assert!(shares.listeners.is_empty());
        assert_eq!(told.news.iter().count(), WAITING_MAX, "and hears the end");
    }
}
