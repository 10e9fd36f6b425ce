//! The sandboxes of this node's container runtimes: who is alive, as far as addresses go.
//!
//! A runtime that dies while it makes a sandbox forgets it, and never deletes its network (containerd 1.6 writes a sandbox down after its
//! network is there); the namespace stays, so nothing on the node tells. So runtimes are asked what they have.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use k8s_cri::v1::ListPodSandboxRequest;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::event::Event;

/// The pause between two looks.
const LOOK: Duration = Duration::from_secs(30);
/// How long a runtime may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// gRPC's default of 4 MiB is too small for lists on a full node; upstream uses 16 MiB.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// Why a runtime's sandboxes are not known.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("{}: {source}", socket.display())]
    Socket { socket: PathBuf, source: io::Error },
    #[error("{}: {message}", socket.display())]
    Call { socket: PathBuf, message: String },
}

/// Tells the event loop, again and again, of the sandboxes that the runtimes have; of none, when one of them cannot be asked, since
/// what is not known to be dead lives. Sockets that are not there are of runtimes that this node does not have.
pub async fn follow(sockets: Vec<PathBuf>, events: Sender<Event>) {
    loop {
        let sandboxes = list_all(&sockets).await;
        if let Err(error) = &sandboxes {
            tracing::debug!(%error, "the runtime's sandboxes are not known");
        }
        let sandboxes = sandboxes.map_err(|error| error.to_string());
        if events.send(Event::Sandboxes(sandboxes)).is_err() {
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// The ids of all sandboxes; nothing, when there is no runtime at all.
async fn list_all(sockets: &[PathBuf]) -> Result<Option<HashSet<String>>, SandboxError> {
    let mut all = None;
    for socket in sockets {
        match tokio::fs::try_exists(socket).await {
            Ok(true) => {
                let listed = list(socket).await?;
                all.get_or_insert_with(HashSet::new).extend(listed);
            }
            Ok(false) => {}
            Err(source) => {
                return Err(SandboxError::Socket {
                    socket: socket.clone(),
                    source,
                });
            }
        }
    }
    Ok(all)
}

async fn list(socket: &Path) -> Result<Vec<String>, SandboxError> {
    let failed = |message: String| SandboxError::Call {
        socket: socket.into(),
        message,
    };
    let asking = async {
        let answer = client(socket)
            .list_pod_sandbox(ListPodSandboxRequest { filter: None })
            .await
            .map_err(|status| failed(status.message().to_owned()))?;
        let sandboxes = answer.into_inner().items.into_iter();
        Ok(sandboxes.map(|sandbox| sandbox.id).collect())
    };
    tokio::time::timeout(PATIENCE, asking)
        .await
        .unwrap_or_else(|_| Err(failed(format!("no answer within {PATIENCE:?}"))))
}

fn client(socket: &Path) -> RuntimeServiceClient<Channel> {
    let path = socket.to_path_buf();
    // The authority is never looked at: the connector always opens the socket.
    let channel = Endpoint::from_static("http://localhost").connect_with_connector_lazy(
        tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        }),
    );
    RuntimeServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime
            .enable_all()
            .build()
            .expect("a runtime")
            .block_on(future)
    }

    #[test]
    fn a_runtime_that_is_not_there_has_nothing_and_one_that_does_not_answer_is_an_error() {
        let dir = tempfile::tempdir().expect("a folder");
        let absent = dir.path().join("absent.sock");
        assert!(
            block_on(list_all(std::slice::from_ref(&absent)))
                .expect("no runtime")
                .is_none()
        );
        let silent = dir.path().join("silent.sock");
        let listener = std::os::unix::net::UnixListener::bind(&silent).expect("a socket");
        let answering = std::thread::spawn(move || {
            // Hangs up on whoever comes, as a runtime that dies does.
            drop(listener.accept());
            drop(listener);
        });
        let error = block_on(list_all(&[absent, silent])).expect_err("it hung up");
        assert!(error.to_string().contains("silent.sock"), "{error}");
        answering.join().expect("no panic");
    }
}
