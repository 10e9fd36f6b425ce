//! How one process of a node tells another about the cluster, so that a node watches it once.
//!
//! Both ends say [`HELLO`]. The teller goes on with frames: an [`Message::Opening`], a complete list of each kind that is shared, and
//! then what happens. A DNS server may answer with [`Offer`]s. A frame is its length (four bytes, little endian) and a [`Message`]. Only what names are made of is told: addresses
//! and ports of Services, addresses and conditions of endpoints.

mod object;
mod offer;

use crate::{Kind, Object, ObjectKey, ObjectRef};
use object::Reader;

pub use object::{pack_service, pack_slice, unpack_service, unpack_slice};
pub use offer::{Offer, Rules, offer_bytes};

/// What both ends say first: a name and the version of these frames. Another version is another language.
pub const HELLO: [u8; 8] = *b"KWSHARE\x01";
/// Longest frame: a slice with a thousand endpoints and all that they may be called by stays below.
pub const FRAME_BYTES_MAX: usize = 4 << 20;
/// The kinds that are shared.
pub const KINDS: [Kind; 2] = [Kind::Service, Kind::EndpointSlice];

/// How far each shared kind is known: the newest resourceVersion that was seen. 0 where there is none, as from a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Versions([u64; KINDS.len()]);

impl Versions {
    /// Takes note that a kind is known up to a version.
    pub fn reached(&mut self, kind: Kind, version: u64) {
        if let Some(at) = KINDS.iter().position(|shared| *shared == kind) {
            self.0[at] = self.0[at].max(version);
        }
    }

    /// Whether nothing that is known to `other` may be missing here.
    pub fn include(&self, other: &Self) -> bool {
        self.0
            .iter()
            .zip(other.0)
            .all(|(own, theirs)| *own >= theirs)
    }
}

/// What is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    Opening {
        versions: Versions,
        /// For how long the teller's own watch has gone without a failure.
        well_for_s: u32,
    },
    /// An object of a complete list.
    Listed(Object),
    /// The list is complete: what was not in it is gone.
    ListEnd(Kind),
    Upsert(Object),
    Remove(ObjectRef),
    Reached {
        kind: Kind,
        version: u64,
    },
    /// The teller can't watch a kind, and why.
    Failed {
        kind: Kind,
        error: String,
    },
    /// The teller lives, and nothing has happened.
    Alive,
}

/// Why a frame can't be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadFrame {
    #[error("a frame of {0} bytes; {FRAME_BYTES_MAX} are the most")]
    Long(usize),
    #[error("a frame ends too early")]
    Short,
    #[error("a frame has {0} bytes too many")]
    Rest(usize),
    #[error("no message begins with {0}")]
    Tag(u8),
    #[error("no kind has number {0}")]
    Kind(u8),
    #[error("text that is not UTF-8")]
    Text,
}

const OPENING: u8 = 1;
const LISTED: u8 = 2;
const LIST_END: u8 = 3;
const UPSERT: u8 = 4;
const REMOVE: u8 = 5;
const REACHED: u8 = 6;
const FAILED: u8 = 7;
const ALIVE: u8 = 8;

fn number(kind: Kind) -> u8 {
    match kind {
        Kind::Service => 0,
        Kind::EndpointSlice => 1,
        Kind::Node => 2,
        Kind::Pod => 3,
    }
}

fn kind(reader: &mut Reader<'_>) -> Result<Kind, BadFrame> {
    let wanted = reader.byte()?;
    let found = KINDS.into_iter().find(|kind| number(*kind) == wanted);
    found.ok_or(BadFrame::Kind(wanted))
}

/// Adds a message's frame to `out`. Objects of other kinds than the shared ones have none.
pub fn put(out: &mut Vec<u8>, message: &Message) {
    let start = out.len();
    out.extend([0; 4]);
    match message {
        Message::Opening {
            versions,
            well_for_s,
        } => {
            out.push(OPENING);
            for version in versions.0 {
                out.extend(version.to_le_bytes());
            }
            out.extend(well_for_s.to_le_bytes());
        }
        Message::Listed(object) | Message::Upsert(object) => {
            out.push(match message {
                Message::Listed(_) => LISTED,
                _ => UPSERT,
            });
            out.push(number(object.kind()));
            if !object::put(out, object) {
                out.truncate(start);
                return;
            }
        }
        Message::ListEnd(kind) => out.extend([LIST_END, number(*kind)]),
        Message::Remove(gone) => {
            out.extend([REMOVE, number(gone.kind)]);
            object::put_key(out, &gone.key);
        }
        Message::Reached { kind, version } => {
            out.extend([REACHED, number(*kind)]);
            out.extend(version.to_le_bytes());
        }
        Message::Failed { kind, error } => {
            out.extend([FAILED, number(*kind)]);
            object::put_text(out, error);
        }
        Message::Alive => out.push(ALIVE),
    }
    let bytes = out.len() - start - 4;
    if bytes > FRAME_BYTES_MAX {
        // No object of the API comes near; one that did would be refused over there, and nothing behind it read.
        out.truncate(start);
        return;
    }
    out[start..start + 4].copy_from_slice(&(bytes as u32).to_le_bytes());
}

/// The length of the frame whose first four bytes these are.
pub fn frame_bytes(head: [u8; 4]) -> Result<usize, BadFrame> {
    match u32::from_le_bytes(head) as usize {
        bytes if bytes <= FRAME_BYTES_MAX => Ok(bytes),
        bytes => Err(BadFrame::Long(bytes)),
    }
}

/// Reads what a frame holds, its length left out.
pub fn read(frame: &[u8]) -> Result<Message, BadFrame> {
    let mut reader = Reader::new(frame);
    let message = match reader.byte()? {
        OPENING => {
            let mut versions = Versions::default();
            for version in &mut versions.0 {
                *version = u64::from_le_bytes(reader.array()?);
            }
            Message::Opening {
                versions,
                well_for_s: u32::from_le_bytes(reader.array()?),
            }
        }
        LISTED => Message::Listed(object(&mut reader)?),
        UPSERT => Message::Upsert(object(&mut reader)?),
        LIST_END => Message::ListEnd(kind(&mut reader)?),
        REMOVE => Message::Remove(ObjectRef {
            kind: kind(&mut reader)?,
            key: reader.key()?,
        }),
        REACHED => Message::Reached {
            kind: kind(&mut reader)?,
            version: u64::from_le_bytes(reader.array()?),
        },
        FAILED => Message::Failed {
            kind: kind(&mut reader)?,
            error: reader.text()?.into(),
        },
        ALIVE => Message::Alive,
        other => return Err(BadFrame::Tag(other)),
    };
    reader.end()?;
    Ok(message)
}

/// Takes the first frame off bytes that were put; `None` at their end, or where they are not what was put.
pub fn next(frames: &mut &[u8]) -> Option<Message> {
    let (head, rest) = frames.split_first_chunk()?;
    let (frame, rest) = rest.split_at_checked(frame_bytes(*head).ok()?)?;
    *frames = rest;
    read(frame).ok()
}

fn object(reader: &mut Reader<'_>) -> Result<Object, BadFrame> {
    let kind = kind(reader)?;
    let key: ObjectKey = reader.key()?;
    match kind {
        Kind::Service => Ok(Object::Service(object::service(reader, key)?.into())),
        _ => Ok(Object::EndpointSlice(object::slice(reader, key)?.into())),
    }
}
