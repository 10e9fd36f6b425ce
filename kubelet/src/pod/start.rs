//! start: the operation that gets one container running: image, environment, mounts, and the postStart hook.

use std::path::Path;
use std::time::Duration;

use k8s_cri::v1::Mount;
use k8s_openapi::api::core::v1::{Container, LifecycleHandler};

use super::container::{Start, container_config, termination_path};
use super::env::environment;
use super::operations::{Done, Failed, Job, failed};
use super::sandbox::{host_aliases, hosts_file};
use super::worker::Signal;
use super::{find_container, host_network};
use crate::cluster::EventKind;
use crate::probe::{Target, run_handler};
use crate::volume::payload::env_needs;
use crate::volume::{VolumeError, container_mounts};

impl Job {
    pub(super) async fn start_container(
        &self,
        name: &str,
        attempt: u32,
        sandbox_id: &str,
        backoff_s: u64,
        target_id: Option<String>,
    ) -> Result<Done, Failed> {
        let container = find_container(&self.pod, name).ok_or_else(|| {
            failed(
                "CreateContainerConfigError",
                format!("the pod has no container {name}"),
                (10, 300),
            )
        })?;
        let container = &container;
        let sandbox = self.sandbox_config(0);
        let sandbox = sandbox.map_err(|e| failed("CreateContainerConfigError", e, (10, 300)))?;
        let image = self.image(container, &sandbox).await?;
        let bad = |message: String| {
            self.event(
                Some(name),
                EventKind::Warning,
                "Failed",
                format!("Error: {message}"),
            );
            failed("CreateContainerConfigError", message, (1, 30))
        };
        let mut objects = self
            .objects(&env_needs(container))
            .await
            .map_err(|e| bad(e.to_string()))?;
        objects.services = self.context.cluster.services().await;
        let env = environment(&self.pod, container, &objects, &self.place())
            .map_err(|e| bad(e.to_string()))?;
        let mounts = self
            .mounts(container, attempt, &env)
            .map_err(|e| bad(e.to_string()))?;
        let node_memory_bytes = self.context.memory_bytes;
        let start = Start {
            attempt,
            backoff_s,
            env: &env,
            mounts,
            image: &image,
            node_memory_bytes,
            target_id,
        };
        let config =
            container_config(&self.pod, container, start).map_err(|e| bad(e.to_string()))?;
        let unable = |reason: &'static str, message: String| {
            self.event(
                Some(name),
                EventKind::Warning,
                "Failed",
                format!("Error: {message}"),
            );
            failed(reason, message, (10, 300))
        };
        let runtime = &self.context.runtime;
        let created = runtime.create_container(sandbox_id, config, sandbox).await;
        let id = created.map_err(|e| unable("CreateContainerError", e.to_string()))?;
        self.event(
            Some(name),
            EventKind::Normal,
            "Created",
            format!("Created container: {name}"),
        );
        let hook = container
            .lifecycle
            .as_ref()
            .and_then(|l| l.post_start.as_ref());
        if hook.is_some() {
            let _ = self.signals.send(Signal::HookBegins {
                container_id: id.clone(),
            });
        }
        runtime
            .start_container(&id)
            .await
            .map_err(|e| unable("RunContainerError", e.to_string()))?;
        self.event(
            Some(name),
            EventKind::Normal,
            "Started",
            format!("Started container {name}"),
        );
        if let Some(hook) = hook {
            self.post_start(container, &id, hook).await;
        }
        Ok(Done::default())
    }

    async fn post_start(&self, container: &Container, id: &str, hook: &LifecycleHandler) {
        let _ = self.signals.send(Signal::Look);
        let pod_ip = self.place().pod_ips.first().cloned().unwrap_or_default();
        let target = Target {
            runtime: self.context.runtime.as_ref(),
            container_id: id,
            container,
            pod_ip: &pod_ip,
        };
        // A hook has no time limit of its own; the pod's end bounds it, since that stops the container.
        let answer = run_handler(&target, hook, Duration::from_secs(24 * 3600)).await;
        if let Err(message) = answer {
            self.event(
                Some(&container.name),
                EventKind::Warning,
                "FailedPostStartHook",
                format!("PostStartHook failed: {message}"),
            );
            let grace_s = super::spec_grace_s(&self.pod);
            if let Err(error) = self.context.runtime.stop_container(id, grace_s).await {
                tracing::warn!(pod = %self.key(), container = container.name, %error, "cannot stop a container whose postStart hook failed");
            }
        }
        let _ = self.signals.send(Signal::HookEnds {
            container_id: id.to_owned(),
        });
    }

    fn mounts(
        &self,
        container: &Container,
        attempt: u32,
        env: &[(String, String)],
    ) -> Result<Vec<Mount>, VolumeError> {
        let folder = self.folder();
        let mut mounts = container_mounts(&self.pod, container, &folder, env)?;
        let taken = |mounts: &[Mount], path: &str| {
            mounts
                .iter()
                .any(|m| m.container_path.trim_end_matches('/') == path)
        };
        let io = |operation: &'static str, path: &Path| {
            let path = path.display().to_string();
            move |error: std::io::Error| VolumeError::Io {
                volume: "the pod's own files".to_owned(),
                operation,
                path,
                message: error.to_string(),
            }
        };
        if !taken(&mounts, "/etc/hosts") {
            let path = folder.hosts_file();
            let text = if host_network(&self.pod) {
                std::fs::read_to_string("/etc/hosts").unwrap_or_default() + &host_aliases(&self.pod)
            } else {
                hosts_file(
                    &self.pod,
                    &self.pod_ips,
                    &self.context.config.cluster_domain,
                )
            };
            std::fs::create_dir_all(&folder.0).map_err(io("make", &folder.0))?;
            if std::fs::read_to_string(&path).ok().as_ref() != Some(&text) {
                std::fs::write(&path, text).map_err(io("write", &path))?;
            }
            mounts.push(bind("/etc/hosts", &path));
        }
        let path = folder.termination_log(&container.name, attempt);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(io("make", parent))?;
        }
        std::fs::write(&path, "").map_err(io("write", &path))?;
        let anyone = std::os::unix::fs::PermissionsExt::from_mode(0o666);
        std::fs::set_permissions(&path, anyone).map_err(io("chmod", &path))?;
        mounts.push(bind(termination_path(container), &path));
        Ok(mounts)
    }
}

fn bind(container_path: &str, host_path: &Path) -> Mount {
    Mount {
        container_path: container_path.to_owned(),
        host_path: host_path.to_string_lossy().into_owned(),
        ..Default::default()
    }
}
