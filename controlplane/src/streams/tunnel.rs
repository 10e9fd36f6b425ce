//! port-forward: a SPDY connection whose bytes travel in the messages of a WebSocket (KEP-4006).

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

/// The most that goes into one message.
const CHUNK_BYTES: usize = 32 << 10;

/// Passes bytes both ways, until either side ends.
pub async fn tunnel<C, K>(client: WebSocketStream<C>, kubelet: K)
where
    C: AsyncRead + AsyncWrite + Unpin,
    K: AsyncRead + AsyncWrite,
{
    let (mut to_client, mut from_client) = client.split();
    let (mut from_kubelet, mut to_kubelet) = tokio::io::split(kubelet);
    let outward = async {
        let mut chunk = vec![0; CHUNK_BYTES];
        while let Ok(read @ 1..) = from_kubelet.read(&mut chunk).await {
            let message = Message::Binary(Bytes::copy_from_slice(&chunk[..read]));
            if to_client.send(message).await.is_err() {
                return;
            }
        }
        let _ = to_client.send(Message::Close(None)).await;
    };
    let inward = async {
        while let Some(Ok(message)) = from_client.next().await {
            let sent = match message {
                Message::Binary(data) => to_kubelet.write_all(&data).await,
                Message::Close(_) => break,
                _ => Ok(()),
            };
            if sent.is_err() || to_kubelet.flush().await.is_err() {
                return;
            }
        }
        let _ = to_kubelet.shutdown().await;
    };
    // Either end that closes is the normal way for a tunnel to stop.
    tokio::select! {
        () = outward => {}
        () = inward => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_tungstenite::tungstenite::protocol::Role;

    #[tokio::test]
    async fn bytes_pass_both_ways_and_either_end_closes_the_other() {
        let (near, far) = tokio::io::duplex(4096);
        let (kubelet, mut runtime) = tokio::io::duplex(4096);
        let mut client = WebSocketStream::from_raw_socket(far, Role::Client, None).await;
        let server = WebSocketStream::from_raw_socket(near, Role::Server, None).await;
        let tunnel = tokio::spawn(tunnel(server, kubelet));
        client
            .send(Message::Binary(Bytes::from_static(b"there")))
            .await
            .expect("sent");
        let mut heard = [0; 5];
        runtime.read_exact(&mut heard).await.expect("received");
        assert_eq!(&heard, b"there");
        runtime.write_all(b"back").await.expect("sent");
        let message = client.next().await.expect("a message").expect("a good one");
        assert_eq!(message, Message::Binary(Bytes::from_static(b"back")));
        drop(runtime);
        assert!(matches!(client.next().await, Some(Ok(Message::Close(_)))));
        tunnel.await.expect("over");
    }
}
