//! exec and attach: the numbered channels of a WebSocket, put as the named streams of a SPDY session.
//!
//! The first byte of every message is its channel. Version 5 adds messages that close one: [`CLOSE`] and the channel.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures::{Sink, SinkExt, Stream, StreamExt};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, frame::coding::CloseCode};
use tokio_tungstenite::tungstenite::{Error as WebSocketError, Message};

use super::spdy::{Event, Reader, Session, SpdyError, StreamId, Writer};

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;
/// A Status has few bytes; more than this is not one.
const STATUS_BYTES_MAX: usize = 1 << 20;
/// How long a client may take to close the connection after the last message.
const FAREWELL: Duration = Duration::from_secs(5);

/// A Protocol is the version of the channels that both sides speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    V4,
    V5,
}

impl Protocol {
    pub fn name(self) -> &'static str {
        match self {
            Self::V4 => "v4.channel.k8s.io",
            Self::V5 => "v5.channel.k8s.io",
        }
    }

    /// The newest version among the subprotocols that a client offers.
    pub fn choose<'a>(offered: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        let mut chosen = None;
        for name in offered {
            match name {
                "v5.channel.k8s.io" => return Some(Self::V5),
                "v4.channel.k8s.io" => chosen = Some(Self::V4),
                _ => {}
            }
        }
        chosen
    }
}

/// Channels are the streams that a command is run with. With a terminal there is no standard error of its own.
#[derive(Debug, Clone, Copy, Default)]
pub struct Channels {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

/// A RelayError is why a command's streams broke off.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    #[error(transparent)]
    Kubelet(#[from] SpdyError),
    #[error("the client's WebSocket: {0}")]
    Client(#[from] WebSocketError),
}

/// The streams that are open, by channel.
#[derive(Debug, Default)]
struct Streams(Vec<(u8, StreamId)>);

impl Streams {
    /// Opens those that the kubelet waits for before it starts the command.
    async fn open<S: AsyncWrite>(
        writer: &mut Writer<S>,
        wanted: Channels,
    ) -> Result<Self, SpdyError> {
        let streams = [
            (true, ERROR, "error"),
            (wanted.stdin, STDIN, "stdin"),
            (wanted.stdout, STDOUT, "stdout"),
            (wanted.stderr && !wanted.tty, STDERR, "stderr"),
            (wanted.tty, RESIZE, "resize"),
        ];
        let mut open = Vec::new();
        for (_, channel, name) in streams.into_iter().filter(|(wanted, ..)| *wanted) {
            open.push((channel, writer.open("streamtype", name).await?));
        }
        Ok(Self(open))
    }

    fn stream(&self, channel: u8) -> Option<StreamId> {
        self.0
            .iter()
            .find(|(known, _)| *known == channel)
            .map(|(_, stream)| *stream)
    }

    fn channel(&self, stream: StreamId) -> Option<u8> {
        self.0
            .iter()
            .find(|(_, known)| *known == stream)
            .map(|(channel, _)| *channel)
    }
}

/// Passes a command's streams between a client and a kubelet, until either ends it.
pub async fn relay<C, K>(
    client: WebSocketStream<C>,
    kubelet: Session<K>,
    wanted: Channels,
    protocol: Protocol,
) -> Result<(), RelayError>
where
    C: AsyncRead + AsyncWrite + Unpin,
    K: AsyncRead + AsyncWrite,
{
    let Session { reader, mut writer } = kubelet;
    let streams = Streams::open(&mut writer, wanted).await?;
    let (mut to_client, mut from_client) = client.split();
    let (pings, asked) = mpsc::channel(16);
    tokio::select! {
        sent = outputs(reader, &mut to_client, &streams, pings) => sent?,
        received = inputs(&mut from_client, writer, &streams, protocol, asked) => return received,
    }
    let frame = CloseFrame {
        code: CloseCode::Normal,
        reason: "".into(),
    };
    to_client.send(Message::Close(Some(frame))).await?;
    // Closing a connection on which bytes lie unread would reset it, and the last messages would be lost.
    let rest = async { while let Some(Ok(_)) = from_client.next().await {} };
    let _ = tokio::time::timeout(FAREWELL, rest).await;
    Ok(())
}

/// Kubelet to client, until every stream of output and the Status have come.
async fn outputs<K: AsyncRead>(
    mut kubelet: Reader<K>,
    client: &mut (impl Sink<Message, Error = WebSocketError> + Unpin),
    streams: &Streams,
    pings: mpsc::Sender<u32>,
) -> Result<(), RelayError> {
    let mut open: BTreeSet<StreamId> = [STDOUT, STDERR, ERROR]
        .into_iter()
        .filter_map(|channel| streams.stream(channel))
        .collect();
    let mut status = BytesMut::new();
    // Clients take a first, empty message as the sign that the command runs.
    let first = [STDOUT, STDERR, ERROR]
        .into_iter()
        .find(|channel| streams.stream(*channel).is_some());
    if let Some(channel) = first {
        client.send(message(channel, &[])).await?;
    }
    while !open.is_empty() {
        match kubelet.next().await? {
            Event::Data(stream, data) => match streams.channel(stream) {
                Some(ERROR) => {
                    let room = STATUS_BYTES_MAX - status.len();
                    status.extend_from_slice(&data[..data.len().min(room)]);
                }
                Some(channel @ (STDOUT | STDERR)) => {
                    client.send(message(channel, &data)).await?;
                }
                _ => {}
            },
            Event::End(stream) | Event::Reset(stream) => {
                open.remove(&stream);
            }
            // A kubelet that pings faster than it reads does without some answers.
            Event::Ping(echo) => drop(pings.try_send(echo)),
            Event::Open(_) => {}
            Event::Closed => break,
        }
    }
    if status.is_empty() {
        status.extend_from_slice(&lost());
    }
    client.send(message(ERROR, &status)).await?;
    Ok(())
}

/// Client to kubelet, until the client goes.
async fn inputs<K: AsyncWrite>(
    client: &mut (impl Stream<Item = Result<Message, WebSocketError>> + Unpin),
    mut kubelet: Writer<K>,
    streams: &Streams,
    protocol: Protocol,
    mut pings: mpsc::Receiver<u32>,
) -> Result<(), RelayError> {
    loop {
        let message = tokio::select! {
            Some(echo) = pings.recv() => {
                kubelet.pong(echo).await?;
                continue;
            }
            message = client.next() => message,
        };
        let data = match message {
            Some(Ok(Message::Binary(data))) => data,
            Some(Ok(Message::Text(text))) => Bytes::from(text),
            Some(Ok(Message::Close(_))) | None => return Ok(()),
            // Pings are answered by the WebSocket itself.
            Some(Ok(_)) => continue,
            Some(Err(error)) => return Err(error.into()),
        };
        match (data.first().copied(), protocol) {
            (Some(CLOSE), Protocol::V5) => {
                let closed = data.get(1).filter(|channel| **channel == STDIN);
                if let Some(stream) = closed.and_then(|channel| streams.stream(*channel)) {
                    kubelet.end(stream).await?;
                }
            }
            (Some(channel @ (STDIN | RESIZE)), _) => {
                if let Some(stream) = streams.stream(channel).filter(|_| data.len() > 1) {
                    kubelet.send(stream, &data[1..]).await?;
                }
            }
            _ => {}
        }
    }
}

fn message(channel: u8, data: &[u8]) -> Message {
    let mut message = BytesMut::with_capacity(1 + data.len());
    message.put_u8(channel);
    message.put_slice(data);
    Message::Binary(message.freeze())
}

/// The Status for a command whose end nobody has told.
fn lost() -> Vec<u8> {
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": "InternalError",
        "message": "Internal error occurred: the connection to the kubelet ended before the command did", "code": 500});
    status.to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
    use tokio_tungstenite::tungstenite::protocol::Role;

    type Client = WebSocketStream<DuplexStream>;

    /// A relay between a client's WebSocket and the bare connection of a kubelet.
    async fn relayed(wanted: Channels, protocol: Protocol) -> (Client, DuplexStream) {
        let (near, far) = tokio::io::duplex(1 << 16);
        let (kubelet, runtime) = tokio::io::duplex(1 << 16);
        let client = WebSocketStream::from_raw_socket(far, Role::Client, None).await;
        let server = WebSocketStream::from_raw_socket(near, Role::Server, None).await;
        tokio::spawn(relay(server, Session::new(kubelet), wanted, protocol));
        (client, runtime)
    }

    /// A frame of the client: data, or an opening of which only the id is looked at.
    async fn frame(connection: &mut DuplexStream) -> (bool, u32, u8, Vec<u8>) {
        let (first, second) = (
            connection.read_u32().await.expect("a frame"),
            connection.read_u32().await.expect("a frame"),
        );
        let mut body = vec![0; (second & 0x00ff_ffff) as usize];
        connection.read_exact(&mut body).await.expect("its body");
        (
            first >> 31 == 1,
            first & 0x7fff_ffff,
            (second >> 24) as u8,
            body,
        )
    }

    async fn data(connection: &mut DuplexStream, stream: u32, ends: bool, data: &[u8]) {
        connection.write_u32(stream).await.expect("written");
        let head = data.len() as u32 | u32::from(ends) << 24;
        connection.write_u32(head).await.expect("written");
        connection.write_all(data).await.expect("written");
    }

    /// The kinds of streams in the order they are opened.
    async fn opened(connection: &mut DuplexStream, count: usize) -> Vec<String> {
        let mut names = Vec::new();
        for _ in 0..count {
            let (control, kind, _, body) = frame(connection).await;
            assert!(control && kind & 0xffff == 1, "an opening");
            let text = String::from_utf8_lossy(&body).into_owned();
            let known = ["error", "stdin", "stdout", "stderr", "resize"];
            names.extend(
                known
                    .iter()
                    .filter(|name| text.contains(*name))
                    .map(|name| (*name).to_owned()),
            );
        }
        names
    }

    async fn heard(client: &mut Client) -> Vec<u8> {
        match client.next().await.expect("a message").expect("a good one") {
            Message::Binary(data) => data.to_vec(),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn input_ends_output_comes_back_and_the_status_is_last() {
        let wanted = Channels {
            stdin: true,
            stdout: true,
            stderr: true,
            tty: false,
        };
        let (mut client, mut kubelet) = relayed(wanted, Protocol::V5).await;
        assert_eq!(
            opened(&mut kubelet, 4).await,
            ["error", "stdin", "stdout", "stderr"]
        );
        assert_eq!(heard(&mut client).await, [STDOUT], "the command runs");
        client.send(message(STDIN, b"hello")).await.expect("sent");
        client.send(message(CLOSE, &[STDIN])).await.expect("sent");
        assert_eq!(frame(&mut kubelet).await, (false, 3, 0, b"hello".to_vec()));
        assert_eq!(frame(&mut kubelet).await, (false, 3, 1, Vec::new()));
        // The Status comes before the end of the output here, and must not be told before it.
        data(&mut kubelet, 1, true, br#"{"status":"Success"}"#).await;
        data(&mut kubelet, 5, true, b"out").await;
        data(&mut kubelet, 7, true, b"err").await;
        assert_eq!(heard(&mut client).await, [&[STDOUT], &b"out"[..]].concat());
        assert_eq!(heard(&mut client).await, [&[STDERR], &b"err"[..]].concat());
        assert_eq!(
            heard(&mut client).await,
            [&[ERROR], &br#"{"status":"Success"}"#[..]].concat()
        );
        let last = client.next().await.expect("a message").expect("a good one");
        assert!(matches!(last, Message::Close(Some(frame)) if frame.code == CloseCode::Normal));
    }

    #[tokio::test]
    async fn a_terminal_has_sizes_and_no_stderr_and_version_4_has_no_close() {
        let wanted = Channels {
            stdin: true,
            stdout: true,
            stderr: true,
            tty: true,
        };
        let (mut client, mut kubelet) = relayed(wanted, Protocol::V4).await;
        assert_eq!(
            opened(&mut kubelet, 4).await,
            ["error", "stdin", "stdout", "resize"]
        );
        assert_eq!(heard(&mut client).await, [STDOUT]);
        client.send(message(CLOSE, &[STDIN])).await.expect("sent");
        client
            .send(message(RESIZE, br#"{"Width":80,"Height":24}"#))
            .await
            .expect("sent");
        assert_eq!(
            frame(&mut kubelet).await,
            (false, 7, 0, br#"{"Width":80,"Height":24}"#.to_vec())
        );
    }

    #[tokio::test]
    async fn a_kubelet_that_goes_away_is_told_as_a_status() {
        let wanted = Channels {
            stdout: true,
            ..Channels::default()
        };
        let (mut client, mut kubelet) = relayed(wanted, Protocol::V5).await;
        opened(&mut kubelet, 2).await;
        data(&mut kubelet, 3, false, b"half").await;
        drop(kubelet);
        assert_eq!(heard(&mut client).await, [STDOUT]);
        assert_eq!(heard(&mut client).await, [&[STDOUT], &b"half"[..]].concat());
        let status = heard(&mut client).await;
        assert_eq!(status[0], ERROR);
        let status: serde_json::Value = serde_json::from_slice(&status[1..]).expect("a Status");
        assert_eq!(
            (status["kind"].as_str(), status["code"].as_u64()),
            (Some("Status"), Some(500))
        );
    }

    #[tokio::test]
    async fn a_client_that_goes_away_ends_the_connection_to_the_kubelet() {
        let (client, mut kubelet) = relayed(
            Channels {
                stdin: true,
                ..Channels::default()
            },
            Protocol::V5,
        )
        .await;
        opened(&mut kubelet, 2).await;
        drop(client);
        assert!(kubelet.read_u8().await.is_err(), "the connection is over");
    }

    #[test]
    fn the_newest_offered_version_is_chosen() {
        assert_eq!(
            Protocol::choose(["v4.channel.k8s.io", "v5.channel.k8s.io"]),
            Some(Protocol::V5)
        );
        assert_eq!(
            Protocol::choose(["channel.k8s.io", "v4.channel.k8s.io"]),
            Some(Protocol::V4)
        );
        assert_eq!(Protocol::choose(["base64.channel.k8s.io"]), None);
    }
}
