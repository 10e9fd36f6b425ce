//! SPDY/3.1, as far as the client of a kubelet needs it (draft-mbelshe-httpbis-spdy-00, section 2).
//!
//! A client opens all streams and reads no headers, so header blocks are only written. They are compressed as the draft wants
//! them, but in stored blocks: any zlib reads those, without the draft's dictionary and without a compressor here. Kubelets and
//! container runtimes neither send nor heed window updates, so there is no flow control but the connection's own.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};

/// Version 3 with the bit of a control frame.
const CONTROL: u16 = 0x8003;
const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const FIN: u8 = 1;
const HEAD_BYTES: usize = 8;
/// The most that is read into one chunk of data; longer frames come in pieces.
const CHUNK_BYTES_MAX: usize = 64 << 10;
/// Control frames are small; one larger than this is not from a kubelet.
const CONTROL_BYTES_MAX: usize = 64 << 10;

/// A SpdyError ends a session.
#[derive(Debug, thiserror::Error)]
pub enum SpdyError {
    #[error("the SPDY connection broke: {0}")]
    Connection(#[from] std::io::Error),
    #[error("not SPDY/3.1: {0}")]
    Malformed(&'static str),
}

/// An id of a stream; odd, since clients open them.
pub type StreamId = u32;

/// What a peer sent, as far as it matters to whoever reads streams.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// The peer has accepted a stream.
    Open(StreamId),
    Data(StreamId, Bytes),
    /// The peer sends nothing more on this stream.
    End(StreamId),
    /// The peer has given a stream up.
    Reset(StreamId),
    /// An echo that the peer wants back: to be given to [`Writer::pong`].
    Ping(u32),
    /// The connection is over.
    Closed,
}

/// A Session is a fresh connection, of which both halves start their frames.
pub struct Session<S> {
    pub reader: Reader<S>,
    pub writer: Writer<S>,
}

impl<S: AsyncRead + AsyncWrite> Session<S> {
    pub fn new(connection: S) -> Self {
        let (reading, writing) = tokio::io::split(connection);
        Self {
            reader: Reader {
                connection: reading,
                data: None,
            },
            writer: Writer {
                connection: writing,
                next: 1,
                compression_begun: false,
            },
        }
    }
}

/// The sending half: opens streams and writes to them.
pub struct Writer<S> {
    connection: WriteHalf<S>,
    next: StreamId,
    compression_begun: bool,
}

impl<S: AsyncWrite> Writer<S> {
    /// Opens a stream with one header; the peer answers with [`Event::Open`].
    pub async fn open(&mut self, header: &str, value: &str) -> Result<StreamId, SpdyError> {
        let id = self.next;
        self.next += 2;
        let mut block = BytesMut::new();
        block.put_u32(1);
        for text in [header, value] {
            block.put_u32(length(text.len())?);
            block.put_slice(text.as_bytes());
        }
        let mut frame = BytesMut::new();
        frame.put_u32(id);
        // No associated stream, highest priority, no credential slot.
        frame.put_slice(&[0; 6]);
        self.compress(&block, &mut frame);
        self.control(SYN_STREAM, &frame).await?;
        Ok(id)
    }

    /// Adds a block to the session's one zlib stream: stored, then an empty block, at which a reader hands out what it has.
    fn compress(&mut self, block: &[u8], out: &mut BytesMut) {
        if !std::mem::replace(&mut self.compression_begun, true) {
            // Deflate with a window of 32 KiB, no dictionary, fastest; the check bits make it a multiple of 31.
            out.put_slice(&[0x78, 0x01]);
        }
        // Blocks are far below the 64 KiB of a stored one: one short header each.
        let length = block.len() as u16;
        out.put_u8(0);
        out.put_u16_le(length);
        out.put_u16_le(!length);
        out.put_slice(block);
        out.put_slice(&[0, 0, 0, 0xff, 0xff]);
    }

    pub async fn send(&mut self, stream: StreamId, data: &[u8]) -> Result<(), SpdyError> {
        self.data(stream, data, 0).await
    }

    /// Says that nothing more comes on a stream.
    pub async fn end(&mut self, stream: StreamId) -> Result<(), SpdyError> {
        self.data(stream, &[], FIN).await
    }

    pub async fn pong(&mut self, echo: u32) -> Result<(), SpdyError> {
        self.control(PING, &echo.to_be_bytes()).await
    }

    /// Closes the sending direction.
    pub async fn close(&mut self) -> Result<(), SpdyError> {
        Ok(self.connection.shutdown().await?)
    }

    async fn data(&mut self, stream: StreamId, data: &[u8], flags: u8) -> Result<(), SpdyError> {
        let mut head = [0; HEAD_BYTES];
        head[..4].copy_from_slice(&stream.to_be_bytes());
        head[4..].copy_from_slice(&length(data.len())?.to_be_bytes());
        head[4] = flags;
        self.connection.write_all(&head).await?;
        self.connection.write_all(data).await?;
        Ok(self.connection.flush().await?)
    }

    async fn control(&mut self, kind: u16, body: &[u8]) -> Result<(), SpdyError> {
        let mut frame = BytesMut::with_capacity(HEAD_BYTES + body.len());
        frame.put_u16(CONTROL);
        frame.put_u16(kind);
        frame.put_u32(length(body.len())?);
        frame.put_slice(body);
        self.connection.write_all(&frame).await?;
        Ok(self.connection.flush().await?)
    }
}

/// A length of a frame: 24 bits, below 8 bits of flags.
fn length(bytes: usize) -> Result<u32, SpdyError> {
    u32::try_from(bytes)
        .ok()
        .filter(|bytes| *bytes < 1 << 24)
        .ok_or(SpdyError::Malformed("a frame of more than 16 MiB"))
}

/// The receiving half.
pub struct Reader<S> {
    connection: ReadHalf<S>,
    /// The data frame that is being read: its stream, what is left of it, and whether the stream ends with it.
    data: Option<(StreamId, usize, bool)>,
}

impl<S: AsyncRead> Reader<S> {
    /// What comes next. Frames that do not concern a client are skipped.
    pub async fn next(&mut self) -> Result<Event, SpdyError> {
        loop {
            if let Some((stream, left, ends)) = self.data.take() {
                if left == 0 {
                    if ends {
                        return Ok(Event::End(stream));
                    }
                    continue;
                }
                let mut chunk = BytesMut::zeroed(left.min(CHUNK_BYTES_MAX));
                let read = self.connection.read(&mut chunk).await?;
                if read == 0 {
                    return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
                }
                chunk.truncate(read);
                self.data = Some((stream, left - read, ends));
                return Ok(Event::Data(stream, chunk.freeze()));
            }
            let mut head = [0; HEAD_BYTES];
            match self.connection.read_exact(&mut head).await {
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                    return Ok(Event::Closed);
                }
                Err(error) => return Err(error.into()),
            }
            let mut head = &head[..];
            let first = head.get_u32();
            let flags_and_length = head.get_u32();
            let ends = flags_and_length >> 24 & u32::from(FIN) != 0;
            let length = (flags_and_length & 0x00ff_ffff) as usize;
            if first >> 31 == 0 {
                self.data = Some((first, length, ends));
                continue;
            }
            if (first >> 16) as u16 != CONTROL {
                return Err(SpdyError::Malformed("a control frame of another version"));
            }
            if length > CONTROL_BYTES_MAX {
                return Err(SpdyError::Malformed("a control frame of more than 64 KiB"));
            }
            let mut body = vec![0; length];
            self.connection.read_exact(&mut body).await?;
            if let Some(event) = control_event(first as u16, &body)? {
                if let (Event::Open(stream), true) = (&event, ends) {
                    self.data = Some((*stream, 0, true));
                }
                return Ok(event);
            }
        }
    }
}

fn control_event(kind: u16, mut body: &[u8]) -> Result<Option<Event>, SpdyError> {
    let mut number = || {
        if body.remaining() < 4 {
            return Err(SpdyError::Malformed("a control frame that is too short"));
        }
        Ok(body.get_u32() & 0x7fff_ffff)
    };
    Ok(match kind {
        SYN_REPLY => Some(Event::Open(number()?)),
        RST_STREAM => Some(Event::Reset(number()?)),
        // A peer numbers its own pings evenly.
        PING => Some(number()?).filter(|id| id % 2 == 0).map(Event::Ping),
        // Open streams go on after a GOAWAY, and no others are opened here.
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    async fn events(bytes: &[u8]) -> Vec<Result<Event, SpdyError>> {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        far.write_all(bytes).await.expect("written");
        drop(far);
        let mut reader = Session::new(near).reader;
        let mut seen = Vec::new();
        loop {
            let event = reader.next().await;
            let over = matches!(event, Ok(Event::Closed) | Err(_));
            seen.push(event);
            if over {
                return seen;
            }
        }
    }

    #[tokio::test]
    async fn a_stream_is_opened_written_and_ended_in_the_drafts_frames() {
        let (near, mut far) = tokio::io::duplex(4096);
        let mut writer = Session::new(near).writer;
        let first = writer.open("streamtype", "stdin").await.expect("opened");
        let second = writer.open("streamtype", "error").await.expect("opened");
        assert_eq!((first, second), (1, 3));
        writer.send(first, b"hi").await.expect("sent");
        writer.end(first).await.expect("ended");
        writer.pong(2).await.expect("answered");
        drop(writer);
        let mut sent = Vec::new();
        far.read_to_end(&mut sent).await.expect("read");
        let block = |value: &[u8]| [b"\0\0\0\x01\0\0\0\x0astreamtype\0\0\0\x05", value].concat();
        let stored = |value: &[u8]| {
            let block = block(value);
            let length = block.len() as u16;
            [
                &[0],
                &length.to_le_bytes()[..],
                &(!length).to_le_bytes()[..],
                &block,
                &[0, 0, 0, 0xff, 0xff],
            ]
            .concat()
        };
        let opening = |id: u8, begun: &[u8], value: &[u8]| {
            let body = [&[0, 0, 0, id, 0, 0, 0, 0, 0, 0], begun, &stored(value)].concat();
            [&[0x80, 3, 0, 1, 0, 0, 0, body.len() as u8], &body[..]].concat()
        };
        let expected = [
            opening(1, &[0x78, 0x01], b"stdin"),
            opening(3, &[], b"error"),
            vec![0, 0, 0, 1, 0, 0, 0, 2, b'h', b'i'],
            vec![0, 0, 0, 1, 1, 0, 0, 0],
            vec![0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 2],
        ];
        assert_eq!(sent, expected.concat());
    }

    #[tokio::test]
    async fn frames_become_events_and_what_a_client_does_not_need_is_skipped() {
        let bytes = [
            // SETTINGS and WINDOW_UPDATE.
            &[0x80, 3, 0, 4, 0, 0, 0, 4, 0, 0, 0, 0][..],
            &[0x80, 3, 0, 9, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 9],
            &[0x80, 3, 0, 2, 0, 0, 0, 6, 0, 0, 0, 1, 7, 7],
            &[0, 0, 0, 1, 1, 0, 0, 3, b'o', b'u', b't'],
            &[0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 8],
            &[0x80, 3, 0, 3, 0, 0, 0, 8, 0, 0, 0, 3, 0, 0, 0, 5],
        ]
        .concat();
        let seen: Vec<Event> = events(&bytes)
            .await
            .into_iter()
            .map(|event| event.expect("SPDY"))
            .collect();
        let expected = [
            Event::Open(1),
            Event::Data(1, Bytes::from_static(b"out")),
            Event::End(1),
            Event::Ping(8),
            Event::Reset(3),
            Event::Closed,
        ];
        assert_eq!(seen, expected);
    }

    #[tokio::test]
    async fn what_is_not_spdy_is_an_error() {
        for bytes in [
            &b"HTTP/1.1 200 OK\r\n\r\n"[..],
            &[0x80, 2, 0, 1, 0, 0, 0, 0],
            &[0x80, 3, 0, 2, 0, 0xff, 0, 0],
            &[0x80, 3, 0, 3, 0, 0, 0, 1, 9],
            &[0, 0, 0, 1, 0, 0, 0, 9, 1],
        ] {
            assert!(
                events(bytes).await.pop().expect("one").is_err(),
                "{bytes:?}"
            );
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_bytes_make_the_reader_panic_or_wait_for_ever(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
            let seen = runtime.block_on(events(&bytes));
            prop_assert!(!seen.is_empty());
        }

        #[test]
        fn data_comes_out_as_it_went_in(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..100_000), 1..3)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
            let heard = runtime.block_on(async {
                let (near, far) = tokio::io::duplex(1 << 16);
                let (mut writer, mut reader) = (Session::new(near).writer, Session::new(far).reader);
                let writing = async {
                    for chunk in &chunks {
                        writer.send(5, chunk).await.expect("sent");
                    }
                    writer.end(5).await.expect("ended");
                };
                let reading = async {
                    let mut heard = Vec::new();
                    loop {
                        match reader.next().await.expect("SPDY") {
                            Event::Data(5, chunk) => heard.extend_from_slice(&chunk),
                            Event::End(5) => return heard,
                            other => panic!("{other:?}"),
                        }
                    }
                };
                tokio::join!(writing, reading).1
            });
            prop_assert_eq!(heard, chunks.concat());
        }
    }
}
