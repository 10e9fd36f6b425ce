//! Bodies in the messages of a WebSocket, in one direction: logs and watches.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::{SinkExt, Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

/// How the parts of a body become messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    Binary,
    /// As text, in base64.
    Base64,
    /// A message of text per line.
    Lines,
}

impl Framing {
    /// The framing of the first subprotocol that is known, with its name; binary where none is asked for.
    pub fn choose(offered: &[&str]) -> Option<(Self, Option<&'static str>)> {
        let known = |name: &&str| match *name {
            "binary.k8s.io" => Some((Self::Binary, Some("binary.k8s.io"))),
            "base64.binary.k8s.io" => Some((Self::Base64, Some("base64.binary.k8s.io"))),
            _ => None,
        };
        match offered {
            [] => Some((Self::Binary, None)),
            offered => offered.iter().find_map(known),
        }
    }

    fn messages(self, part: Bytes) -> Vec<Message> {
        match self {
            Self::Binary => vec![Message::Binary(part)],
            Self::Base64 => vec![Message::text(STANDARD.encode(&part))],
            Self::Lines => part
                .split_inclusive(|byte| *byte == b'\n')
                .map(|line| Message::text(String::from_utf8_lossy(line).into_owned()))
                .collect(),
        }
    }
}

/// Sends a body until it ends or the client closes the connection; what the client says is not listened to.
pub async fn send<S, E>(
    client: WebSocketStream<S>,
    body: impl Stream<Item = Result<Bytes, E>> + Send,
    framing: Framing,
) where
    S: AsyncRead + AsyncWrite + Unpin,
    E: std::fmt::Display,
{
    let (mut sink, mut heard) = client.split();
    let mut body = std::pin::pin!(body);
    loop {
        let part = tokio::select! {
            part = body.next() => part,
            // Reading also answers pings.
            message = heard.next() => match message {
                Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                Some(Ok(_)) => continue,
            },
        };
        let part = match part {
            Some(Ok(part)) => part,
            Some(Err(error)) => {
                tracing::debug!(%error, "a body broke off");
                break;
            }
            None => break,
        };
        for message in framing.messages(part) {
            if sink.send(message).await.is_err() {
                return;
            }
        }
    }
    // A client that is gone needs no farewell.
    let _ = sink.close().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_known_subprotocol_says_how_parts_are_sent() {
        assert_eq!(Framing::choose(&[]), Some((Framing::Binary, None)));
        let both = ["v4.channel.k8s.io", "base64.binary.k8s.io"];
        let name = Some("base64.binary.k8s.io");
        assert_eq!(Framing::choose(&both), Some((Framing::Base64, name)));
        assert_eq!(Framing::choose(&["v4.channel.k8s.io"]), None);
        let part = Bytes::from_static(b"{}\n{}\n");
        assert_eq!(Framing::Lines.messages(part.clone()).len(), 2);
        assert_eq!(Framing::Base64.messages(part), [Message::text("e30Ke30K")]);
    }
}
