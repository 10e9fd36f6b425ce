//! image: getting the image of a container, with the credentials that its pod names.

use k8s_cri::v1::PodSandboxConfig;
use k8s_openapi::api::core::v1::Container;

use super::credentials::credentials;
use super::operations::{Failed, Job, failed};
use crate::cluster::EventKind;
use crate::runtime::{ImageView, RuntimeError};

impl Job {
    /// The image of a container, pulled if its policy asks for that.
    pub(super) async fn image(
        &self,
        container: &Container,
        sandbox: &PodSandboxConfig,
    ) -> Result<ImageView, Failed> {
        let name = container.image.clone().unwrap_or_default();
        let event = |kind, reason, message: String| {
            self.event(Some(&container.name), kind, reason, message)
        };
        let inspect = |e: RuntimeError| failed("ImageInspectError", e, (10, 300));
        let policy =
            container
                .image_pull_policy
                .as_deref()
                .unwrap_or_else(|| match name.rsplit_once(':') {
                    Some((_, tag)) if tag != "latest" && !tag.contains('/') => "IfNotPresent",
                    _ => "Always",
                });
        let present = self.context.runtime.image(&name).await.map_err(inspect)?;
        match (policy, present) {
            ("Never", None) => {
                let message =
                    format!("Container image \"{name}\" is not present with pull policy of Never");
                event(EventKind::Warning, "ErrImageNeverPull", message.clone());
                // Only an import can help, and that is looked for often: it costs one local call.
                return Err(failed("ErrImageNeverPull", message, (2, 10)));
            }
            ("Never" | "IfNotPresent", Some(image)) => {
                event(
                    EventKind::Normal,
                    "Pulled",
                    format!("Container image \"{name}\" already present on machine"),
                );
                return Ok(image);
            }
            _ => {}
        }
        event(
            EventKind::Normal,
            "Pulling",
            format!("Pulling image \"{name}\""),
        );
        let started = tokio::time::Instant::now();
        if let Err(error) = self.pull(&name, sandbox).await {
            let message = format!("Failed to pull image \"{name}\": {error}");
            event(EventKind::Warning, "Failed", message.clone());
            return Err(failed("ErrImagePull", message, (10, 300)));
        }
        event(
            EventKind::Normal,
            "Pulled",
            format!(
                "Successfully pulled image \"{name}\" in {} ms",
                started.elapsed().as_millis()
            ),
        );
        let present = self.context.runtime.image(&name).await.map_err(inspect)?;
        present.ok_or_else(|| {
            failed(
                "ImageInspectError",
                format!("image \"{name}\" is not there after its pull"),
                (10, 300),
            )
        })
    }

    /// Pulls with each of the pod's credentials that fit, until one is taken; without, if there is none.
    async fn pull(&self, image: &str, sandbox: &PodSandboxConfig) -> Result<(), RuntimeError> {
        let namespace = self.key().namespace;
        let secrets = self.pod.spec.iter();
        let secrets = secrets.flat_map(|s| s.image_pull_secrets.iter().flatten());
        let mut fitting = Vec::new();
        for reference in secrets {
            // A Secret that is no use does not hold up an image that may be had without.
            let found = match self
                .context
                .cluster
                .secret(&namespace, &reference.name)
                .await
            {
                Ok(Some(secret)) => credentials(&secret, image).map_err(|e| e.to_string()),
                Ok(None) => Err(format!("secret \"{}\" not found", reference.name)),
                Err(error) => Err(error.to_string()),
            };
            match found {
                Ok(found) => fitting.extend(found.into_iter().map(Some)),
                Err(message) => self.event(
                    None,
                    EventKind::Warning,
                    "FailedToRetrieveImagePullSecret",
                    format!(
                        "Unable to use an image pull secret, the pull may not succeed: {message}"
                    ),
                ),
            }
        }
        if fitting.is_empty() {
            fitting.push(None);
        }
        let mut answer = Ok(());
        for auth in fitting {
            answer = self
                .context
                .runtime
                .pull(image, auth, sandbox.clone())
                .await;
            if answer.is_ok() {
                break;
            }
        }
        answer
    }
}
