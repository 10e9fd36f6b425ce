//! Learning that containers end without asking again and again.
//!
//! CRI has GetContainerEvents, but containerd implements it from 1.7 on, and Debian 12 ships 1.6. All versions of
//! containerd publish task events on the same socket, so that is the second choice: a few messages of its API suffice.
//! A runtime with neither is looked at periodically by the workers.

use std::time::Duration;

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use http::uri::PathAndQuery;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{ContainerEventType, GetEventsRequest};
use prost::Message;
use tonic::client::Grpc;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use super::ExitSource;

/// containerd.services.events.v1.SubscribeRequest.
#[derive(Clone, PartialEq, Message)]
struct SubscribeRequest {
    #[prost(string, repeated, tag = "1")]
    filters: Vec<String>,
}

/// google.protobuf.Any.
#[derive(Clone, PartialEq, Message)]
struct AnyMessage {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// containerd.services.events.v1.Envelope; its timestamp (tag 1) is not needed.
#[derive(Clone, PartialEq, Message)]
struct Envelope {
    #[prost(string, tag = "2")]
    namespace: String,
    #[prost(string, tag = "3")]
    topic: String,
    #[prost(message, optional, tag = "4")]
    event: Option<AnyMessage>,
}

/// containerd.events.TaskExit, as far as it is needed. `id` differs from the container's for an exec.
#[derive(Clone, PartialEq, Message)]
struct TaskExit {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(string, tag = "2")]
    id: String,
}

/// containerd.events.TaskDelete, as far as it is needed. `id` is empty or the container's own, except for an exec.
#[derive(Clone, PartialEq, Message)]
struct TaskDelete {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(string, tag = "5")]
    id: String,
}

/// A server that streams answers a call only with its first event, but refuses one at once: what has not been refused
/// in this time is taken for established.
const REFUSAL_TIME: Duration = Duration::from_millis(300);

pub async fn subscribe(
    mut runtime: RuntimeServiceClient<Channel>,
    channel: Channel,
) -> Result<(ExitSource, BoxStream<'static, String>), Status> {
    let events = open(async move { runtime.get_container_events(GetEventsRequest {}).await }).await;
    match events {
        Ok(events) => {
            const OVER: [ContainerEventType; 2] = [
                ContainerEventType::ContainerStoppedEvent,
                ContainerEventType::ContainerDeletedEvent,
            ];
            let ids = events.filter_map(|event| {
                let over = OVER
                    .map(|kind| kind as i32)
                    .contains(&event.container_event_type);
                std::future::ready(over.then_some(event.container_id))
            });
            return Ok((ExitSource::CriEvents, ids.boxed()));
        }
        Err(status) if status.code() == Code::Unimplemented => {}
        Err(status) => return Err(status),
    }
    match open(containerd(channel)).await {
        Ok(events) => {
            let ids = events.filter_map(|envelope| std::future::ready(ended(&envelope)));
            Ok((ExitSource::ContainerdEvents, ids.boxed()))
        }
        Err(status) if status.code() == Code::Unimplemented => {
            Ok((ExitSource::Relist, stream::pending().boxed()))
        }
        Err(status) => Err(status),
    }
}

/// Opens a stream of events. One that breaks is over: the caller subscribes again and looks at everything once.
async fn open<T: Send + 'static>(
    call: impl Future<Output = Result<Response<Streaming<T>>, Status>> + Send + 'static,
) -> Result<BoxStream<'static, T>, Status> {
    let mut call = Box::pin(call);
    let events = match tokio::time::timeout(REFUSAL_TIME, &mut call).await {
        Ok(answer) => answer?.into_inner().boxed(),
        Err(_) => stream::once(call)
            .flat_map(|answer| match answer {
                Ok(answer) => answer.into_inner().boxed(),
                Err(status) => stream::iter([Err(status)]).boxed(),
            })
            .boxed(),
    };
    let sound = events.take_while(|event| std::future::ready(event.is_ok()));
    Ok(sound
        .filter_map(|event| std::future::ready(event.ok()))
        .boxed())
}

async fn containerd(channel: Channel) -> Result<Response<Streaming<Envelope>>, Status> {
    let mut grpc = Grpc::new(channel);
    grpc.ready()
        .await
        .map_err(|error| Status::unavailable(error.to_string()))?;
    let filters = ["/tasks/exit", "/tasks/delete"]
        .map(|topic| format!(r#"namespace=="k8s.io",topic=="{topic}""#))
        .to_vec();
    let path = PathAndQuery::from_static("/containerd.services.events.v1.Events/Subscribe");
    let codec: ProstCodec<SubscribeRequest, Envelope> = ProstCodec::default();
    grpc.server_streaming(Request::new(SubscribeRequest { filters }), path, codec)
        .await
}

fn ended(envelope: &Envelope) -> Option<String> {
    let bytes = envelope.event.as_ref()?.value.as_slice();
    let (container_id, process) = if envelope.topic == "/tasks/delete" {
        let end = TaskDelete::decode(bytes).ok()?;
        (end.container_id, end.id)
    } else {
        let end = TaskExit::decode(bytes).ok()?;
        (end.container_id, end.id)
    };
    (process.is_empty() || process == container_id).then_some(container_id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_of_a_container_counts_not_that_of_a_command_in_it() {
        let envelope = |topic: &str, value: Vec<u8>| Envelope {
            namespace: "k8s.io".to_owned(),
            topic: topic.to_owned(),
            event: Some(AnyMessage {
                type_url: String::new(),
                value,
            }),
        };
        let exit = |id: &str| {
            TaskExit {
                container_id: "c1".to_owned(),
                id: id.to_owned(),
            }
            .encode_to_vec()
        };
        let delete = |id: &str| {
            TaskDelete {
                container_id: "c1".to_owned(),
                id: id.to_owned(),
            }
            .encode_to_vec()
        };
        assert_eq!(
            ended(&envelope("/tasks/exit", exit("c1"))),
            Some("c1".to_owned())
        );
        assert_eq!(ended(&envelope("/tasks/exit", exit("exec-1"))), None);
        assert_eq!(
            ended(&envelope("/tasks/delete", delete(""))),
            Some("c1".to_owned())
        );
        assert_eq!(ended(&envelope("/tasks/delete", delete("exec-1"))), None);
        assert_eq!(ended(&envelope("/tasks/exit", vec![0xff])), None);
    }
}
