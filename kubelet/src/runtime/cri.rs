//! CriRuntime: the `Runtime` over CRI v1 on a Unix socket.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
use hyper_util::rt::TokioIo;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::*;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status};

use super::{
    ANNOTATION_BACKOFF, ANNOTATION_IMAGE, ANNOTATION_LIMITS, ContainerPhase, ContainerView,
    ExecOutput, ExitSource, FailureKind, ImageView, KnownPod, LABEL_CONTAINER_NAME, LABEL_POD_NAME,
    LABEL_POD_NAMESPACE, LABEL_POD_UID, PodView, Runtime, RuntimeError, RuntimeStatus, SandboxView,
    StreamRequest, exits,
};

/// Where the snapshotter keeps its layers whose layers are whole copies: what is in one says nothing of what its container wrote.
const WHOLE_COPIES: &str = "io.containerd.snapshotter.v1.native";
/// Upstream's CRI timeout; sandbox creation gets twice that because a CNI plugin is part of it.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);
const SANDBOX_TIMEOUT: Duration = Duration::from_secs(240);
/// A pull ends by its own progress rules in the runtime; this only bounds a runtime that hangs.
const PULL_TIMEOUT: Duration = Duration::from_secs(3600);
/// gRPC's default of 4 MiB is too small for lists on a full node; upstream uses 16 MiB.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// A CriRuntime talks to one CRI socket. It connects lazily and again by itself after the runtime was restarted.
#[derive(Clone)]
pub struct CriRuntime {
    socket: PathBuf,
    channel: Channel,
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

impl CriRuntime {
    pub fn new(socket: &Path) -> Self {
        let path = socket.to_path_buf();
        // The authority is never looked at: the connector always opens the socket.
        let channel = Endpoint::from_static("http://localhost").connect_with_connector_lazy(
            tower::service_fn(move |_: Uri| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            }),
        );
        Self {
            socket: socket.to_path_buf(),
            runtime: RuntimeServiceClient::new(channel.clone())
                .max_decoding_message_size(MESSAGE_BYTES_MAX),
            images: ImageServiceClient::new(channel.clone())
                .max_decoding_message_size(MESSAGE_BYTES_MAX),
            channel,
        }
    }

    fn failed(&self, operation: &'static str) -> impl FnOnce(Status) -> RuntimeError {
        let socket = self.socket.display().to_string();
        move |status| {
            let kind = match status.code() {
                Code::NotFound => FailureKind::NotFound,
                Code::Unimplemented => FailureKind::Unimplemented,
                Code::DeadlineExceeded => FailureKind::DeadlineExceeded,
                Code::Unavailable => {
                    return RuntimeError::Connect {
                        socket,
                        message: status.message().to_owned(),
                    };
                }
                _ => FailureKind::Other,
            };
            RuntimeError::Call {
                operation,
                message: status.message().to_owned(),
                kind,
            }
        }
    }

    async fn sandboxes(
        &self,
        labels: HashMap<String, String>,
    ) -> Result<Vec<PodSandbox>, RuntimeError> {
        let filter = Some(PodSandboxFilter {
            label_selector: labels,
            ..Default::default()
        });
        let answer = self
            .runtime
            .clone()
            .list_pod_sandbox(timed(ListPodSandboxRequest { filter }, CALL_TIMEOUT))
            .await;
        Ok(answer
            .map_err(self.failed("ListPodSandbox"))?
            .into_inner()
            .items)
    }

    async fn containers(
        &self,
        labels: HashMap<String, String>,
    ) -> Result<Vec<Container>, RuntimeError> {
        let filter = Some(ContainerFilter {
            label_selector: labels,
            ..Default::default()
        });
        let answer = self
            .runtime
            .clone()
            .list_containers(timed(ListContainersRequest { filter }, CALL_TIMEOUT))
            .await;
        Ok(answer
            .map_err(self.failed("ListContainers"))?
            .into_inner()
            .containers)
    }

    async fn sandbox_view(&self, sandbox: PodSandbox) -> Result<SandboxView, RuntimeError> {
        let ready = sandbox.state == PodSandboxState::SandboxReady as i32;
        let mut view = SandboxView {
            attempt: sandbox.metadata.map_or(0, |m| m.attempt),
            ready,
            created_at_ns: sandbox.created_at,
            ips: Vec::new(),
            id: sandbox.id,
        };
        if ready {
            let request = PodSandboxStatusRequest {
                pod_sandbox_id: view.id.clone(),
                verbose: false,
            };
            let answer = self
                .runtime
                .clone()
                .pod_sandbox_status(timed(request, CALL_TIMEOUT))
                .await;
            let status = answer
                .map_err(self.failed("PodSandboxStatus"))?
                .into_inner()
                .status
                .unwrap_or_default();
            view.ready = status.state == PodSandboxState::SandboxReady as i32;
            let network = status.network.unwrap_or_default();
            view.ips = std::iter::once(network.ip)
                .chain(network.additional_ips.into_iter().map(|ip| ip.ip))
                .filter(|ip| !ip.is_empty())
                .collect();
        }
        Ok(view)
    }

    async fn container_view(
        &self,
        container: Container,
    ) -> Result<Option<ContainerView>, RuntimeError> {
        let request = ContainerStatusRequest {
            container_id: container.id.clone(),
            verbose: false,
        };
        let status = match self
            .runtime
            .clone()
            .container_status(timed(request, CALL_TIMEOUT))
            .await
        {
            Ok(answer) => answer.into_inner().status.unwrap_or_default(),
            Err(status) if status.code() == Code::NotFound => return Ok(None),
            Err(status) => return Err(self.failed("ContainerStatus")(status)),
        };
        let phase = match ContainerState::try_from(status.state) {
            Ok(ContainerState::ContainerCreated) => ContainerPhase::Created,
            Ok(ContainerState::ContainerRunning) => ContainerPhase::Running,
            // A container of unknown state cannot be trusted to run: it is replaced.
            _ => ContainerPhase::Exited,
        };
        Ok(Some(ContainerView {
            id: container.id,
            name: status
                .labels
                .get(LABEL_CONTAINER_NAME)
                .cloned()
                .unwrap_or_default(),
            attempt: status.metadata.map_or(0, |m| m.attempt),
            sandbox_id: container.pod_sandbox_id,
            phase,
            created_at_ns: status.created_at,
            started_at_ns: status.started_at,
            finished_at_ns: status.finished_at,
            exit_code: status.exit_code,
            reason: status.reason,
            message: status.message,
            image: status.image.map(|i| i.image).unwrap_or_default(),
            image_id: status.image_ref,
            spec_image: status
                .annotations
                .get(ANNOTATION_IMAGE)
                .cloned()
                .unwrap_or_default(),
            backoff_s: status
                .annotations
                .get(ANNOTATION_BACKOFF)
                .and_then(|s| s.parse().ok())
                .unwrap_or(0),
            limits: status
                .annotations
                .get(ANNOTATION_LIMITS)
                .cloned()
                .unwrap_or_default(),
            log_path: status.log_path,
        }))
    }
}

fn timed<T>(message: T, timeout: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request
}

fn of_pod(uid: &str) -> HashMap<String, String> {
    HashMap::from([(LABEL_POD_UID.to_owned(), uid.to_owned())])
}

fn gone_is_fine<T>(answer: Result<T, Status>) -> Result<(), Status> {
    match answer {
        Err(status) if status.code() == Code::NotFound => Ok(()),
        answer => answer.map(drop),
    }
}

fn image_view(image: Image) -> ImageView {
    ImageView {
        tags: image
            .repo_tags
            .into_iter()
            .chain(image.repo_digests)
            .collect(),
        size_bytes: image.size,
        uid: image.uid.map(|uid| uid.value),
        user: image.username,
        id: image.id,
    }
}

#[async_trait]
impl Runtime for CriRuntime {
    async fn version(&self) -> Result<String, RuntimeError> {
        let request = timed(
            VersionRequest {
                version: "v1".to_owned(),
            },
            CALL_TIMEOUT,
        );
        let answer = self
            .runtime
            .clone()
            .version(request)
            .await
            .map_err(self.failed("Version"))?
            .into_inner();
        Ok(format!(
            "{}://{}",
            answer.runtime_name, answer.runtime_version
        ))
    }

    async fn status(&self) -> Result<RuntimeStatus, RuntimeError> {
        let request = timed(StatusRequest { verbose: false }, CALL_TIMEOUT);
        let answer = self
            .runtime
            .clone()
            .status(request)
            .await
            .map_err(self.failed("Status"))?
            .into_inner();
        let mut status = RuntimeStatus::default();
        for condition in answer.status.unwrap_or_default().conditions {
            match condition.r#type.as_str() {
                "RuntimeReady" => {
                    (status.ready, status.message) = (condition.status, condition.message)
                }
                "NetworkReady" => {
                    (status.network_ready, status.network_message) =
                        (condition.status, condition.message)
                }
                _ => {}
            }
        }
        Ok(status)
    }

    async fn known_pods(&self) -> Result<Vec<KnownPod>, RuntimeError> {
        let sandboxes = self
            .sandboxes(HashMap::new())
            .await?
            .into_iter()
            .map(|s| s.labels);
        let containers = self
            .containers(HashMap::new())
            .await?
            .into_iter()
            .map(|c| c.labels);
        let mut pods: Vec<KnownPod> = sandboxes
            .chain(containers)
            .filter_map(|labels| {
                Some(KnownPod {
                    uid: labels.get(LABEL_POD_UID)?.clone(),
                    namespace: labels.get(LABEL_POD_NAMESPACE)?.clone(),
                    name: labels.get(LABEL_POD_NAME)?.clone(),
                })
            })
            .collect();
        pods.sort();
        pods.dedup();
        Ok(pods)
    }

    async fn observe(&self, pod_uid: &str) -> Result<PodView, RuntimeError> {
        let mut view = PodView::default();
        for sandbox in self.sandboxes(of_pod(pod_uid)).await? {
            match self.sandbox_view(sandbox).await {
                Ok(sandbox) => view.sandboxes.push(sandbox),
                Err(error) if error.kind() == FailureKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        for container in self.containers(of_pod(pod_uid)).await? {
            view.containers
                .extend(self.container_view(container).await?);
        }
        view.sandboxes
            .sort_by_key(|s| std::cmp::Reverse((s.attempt, s.created_at_ns)));
        view.containers
            .sort_by_key(|c| std::cmp::Reverse((c.attempt, c.created_at_ns)));
        Ok(view)
    }

    async fn run_sandbox(
        &self,
        config: PodSandboxConfig,
        handler: &str,
    ) -> Result<String, RuntimeError> {
        let request = RunPodSandboxRequest {
            config: Some(config),
            runtime_handler: handler.to_owned(),
        };
        let answer = self
            .runtime
            .clone()
            .run_pod_sandbox(timed(request, SANDBOX_TIMEOUT))
            .await;
        Ok(answer
            .map_err(self.failed("RunPodSandbox"))?
            .into_inner()
            .pod_sandbox_id)
    }

    async fn stop_sandbox(&self, id: &str) -> Result<(), RuntimeError> {
        let request = timed(
            StopPodSandboxRequest {
                pod_sandbox_id: id.to_owned(),
            },
            CALL_TIMEOUT,
        );
        gone_is_fine(self.runtime.clone().stop_pod_sandbox(request).await)
            .map_err(self.failed("StopPodSandbox"))
    }

    async fn remove_sandbox(&self, id: &str) -> Result<(), RuntimeError> {
        let request = timed(
            RemovePodSandboxRequest {
                pod_sandbox_id: id.to_owned(),
            },
            CALL_TIMEOUT,
        );
        gone_is_fine(self.runtime.clone().remove_pod_sandbox(request).await)
            .map_err(self.failed("RemovePodSandbox"))
    }

    async fn images(&self) -> Result<Vec<ImageView>, RuntimeError> {
        let request = timed(ListImagesRequest { filter: None }, CALL_TIMEOUT);
        let answer = self
            .images
            .clone()
            .list_images(request)
            .await
            .map_err(self.failed("ListImages"))?;
        Ok(answer
            .into_inner()
            .images
            .into_iter()
            .map(image_view)
            .collect())
    }

    async fn image(&self, name: &str) -> Result<Option<ImageView>, RuntimeError> {
        let image = Some(ImageSpec {
            image: name.to_owned(),
            ..Default::default()
        });
        let request = timed(
            ImageStatusRequest {
                image,
                verbose: false,
            },
            CALL_TIMEOUT,
        );
        let answer = self
            .images
            .clone()
            .image_status(request)
            .await
            .map_err(self.failed("ImageStatus"))?;
        Ok(answer.into_inner().image.map(image_view))
    }

    async fn pull(
        &self,
        name: &str,
        auth: Option<AuthConfig>,
        sandbox: PodSandboxConfig,
    ) -> Result<(), RuntimeError> {
        let image = Some(ImageSpec {
            image: name.to_owned(),
            ..Default::default()
        });
        let request = timed(
            PullImageRequest {
                image,
                auth,
                sandbox_config: Some(sandbox),
            },
            PULL_TIMEOUT,
        );
        self.images
            .clone()
            .pull_image(request)
            .await
            .map(drop)
            .map_err(self.failed("PullImage"))
    }

    async fn create_container(
        &self,
        sandbox_id: &str,
        config: ContainerConfig,
        sandbox: PodSandboxConfig,
    ) -> Result<String, RuntimeError> {
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox_id.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox),
        };
        let answer = self
            .runtime
            .clone()
            .create_container(timed(request, CALL_TIMEOUT))
            .await;
        Ok(answer
            .map_err(self.failed("CreateContainer"))?
            .into_inner()
            .container_id)
    }

    async fn start_container(&self, id: &str) -> Result<(), RuntimeError> {
        let request = timed(
            StartContainerRequest {
                container_id: id.to_owned(),
            },
            CALL_TIMEOUT,
        );
        self.runtime
            .clone()
            .start_container(request)
            .await
            .map(drop)
            .map_err(self.failed("StartContainer"))
    }

    async fn stop_container(&self, id: &str, grace_s: i64) -> Result<(), RuntimeError> {
        let timeout = CALL_TIMEOUT + Duration::from_secs(u64::try_from(grace_s).unwrap_or(0));
        let request = timed(
            StopContainerRequest {
                container_id: id.to_owned(),
                timeout: grace_s,
            },
            timeout,
        );
        gone_is_fine(self.runtime.clone().stop_container(request).await)
            .map_err(self.failed("StopContainer"))
    }

    async fn remove_container(&self, id: &str) -> Result<(), RuntimeError> {
        let request = timed(
            RemoveContainerRequest {
                container_id: id.to_owned(),
            },
            CALL_TIMEOUT,
        );
        gone_is_fine(self.runtime.clone().remove_container(request).await)
            .map_err(self.failed("RemoveContainer"))
    }

    async fn resize_container(
        &self,
        id: &str,
        resources: LinuxContainerResources,
    ) -> Result<(), RuntimeError> {
        let request = UpdateContainerResourcesRequest {
            container_id: id.to_owned(),
            linux: Some(resources),
            ..Default::default()
        };
        let request = timed(request, CALL_TIMEOUT);
        self.runtime
            .clone()
            .update_container_resources(request)
            .await
            .map(drop)
            .map_err(self.failed("UpdateContainerResources"))
    }

    async fn exec(
        &self,
        id: &str,
        command: Vec<String>,
        timeout_s: i64,
    ) -> Result<ExecOutput, RuntimeError> {
        let timeout = CALL_TIMEOUT + Duration::from_secs(u64::try_from(timeout_s).unwrap_or(0));
        let request = ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command,
            timeout: timeout_s,
        };
        let answer = self
            .runtime
            .clone()
            .exec_sync(timed(request, timeout))
            .await;
        let answer = answer.map_err(self.failed("ExecSync"))?.into_inner();
        let output = [answer.stdout, answer.stderr].concat();
        Ok(ExecOutput {
            exit_code: answer.exit_code,
            output: String::from_utf8_lossy(&output).into_owned(),
        })
    }

    async fn written_bytes(&self, id: &str) -> Result<u64, RuntimeError> {
        let request = ContainerStatsRequest {
            container_id: id.to_owned(),
        };
        let answer = self
            .runtime
            .clone()
            .container_stats(timed(request, CALL_TIMEOUT))
            .await;
        let answer = answer.map_err(self.failed("ContainerStats"))?.into_inner();
        let layer = answer.stats.and_then(|stats| stats.writable_layer);
        let own = layer.filter(|layer| {
            let place = layer.fs_id.as_ref().map(|fs| fs.mountpoint.as_str());
            !place.is_some_and(|place| place.ends_with(WHOLE_COPIES))
        });
        Ok(own
            .and_then(|layer| layer.used_bytes)
            .map_or(0, |used| used.value))
    }

    async fn reopen_log(&self, id: &str) -> Result<(), RuntimeError> {
        let request = timed(
            ReopenContainerLogRequest {
                container_id: id.to_owned(),
            },
            CALL_TIMEOUT,
        );
        self.runtime
            .clone()
            .reopen_container_log(request)
            .await
            .map(drop)
            .map_err(self.failed("ReopenContainerLog"))
    }

    async fn stream_url(&self, request: StreamRequest) -> Result<String, RuntimeError> {
        let mut runtime = self.runtime.clone();
        match request {
            StreamRequest::Exec {
                container_id,
                command,
                tty,
                stdin,
                stdout,
                stderr,
            } => {
                let request = ExecRequest {
                    container_id,
                    cmd: command,
                    tty,
                    stdin,
                    stdout,
                    stderr,
                };
                let answer = runtime
                    .exec(timed(request, CALL_TIMEOUT))
                    .await
                    .map_err(self.failed("Exec"))?;
                Ok(answer.into_inner().url)
            }
            StreamRequest::Attach {
                container_id,
                tty,
                stdin,
                stdout,
                stderr,
            } => {
                let request = AttachRequest {
                    container_id,
                    stdin,
                    tty,
                    stdout,
                    stderr,
                };
                let answer = runtime
                    .attach(timed(request, CALL_TIMEOUT))
                    .await
                    .map_err(self.failed("Attach"))?;
                Ok(answer.into_inner().url)
            }
            StreamRequest::PortForward { sandbox_id, ports } => {
                let request = PortForwardRequest {
                    pod_sandbox_id: sandbox_id,
                    port: ports,
                };
                let answer = runtime.port_forward(timed(request, CALL_TIMEOUT)).await;
                Ok(answer.map_err(self.failed("PortForward"))?.into_inner().url)
            }
        }
    }

    async fn changes(&self) -> Result<(ExitSource, BoxStream<'static, String>), RuntimeError> {
        exits::subscribe(self.runtime.clone(), self.channel.clone())
            .await
            .map_err(self.failed("GetContainerEvents"))
    }
}
