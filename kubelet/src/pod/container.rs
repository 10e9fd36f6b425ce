//! container: what CRI is told about one container of a pod.

use std::collections::HashMap;

use k8s_cri::v1::{
    Capability, ContainerConfig, ContainerMetadata, ImageSpec, Int64Value, KeyValue,
    LinuxContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext, Mount,
    NamespaceMode, NamespaceOption,
};
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

use super::PodKey;
use super::env::expand;
use super::sandbox::{namespaces, seccomp, supplemental_groups};
use crate::resources::{CPU_PERIOD_US, container_limits, oom_score_adj};
use crate::runtime::{
    ANNOTATION_BACKOFF, ANNOTATION_IMAGE, ANNOTATION_LIMITS, ANNOTATION_TERMINATION_PATH,
    ImageView, LABEL_CONTAINER_NAME, LABEL_POD_NAME, LABEL_POD_NAMESPACE, LABEL_POD_UID,
};

/// Paths of /proc and /sys that show or change the host, hidden from unprivileged containers (upstream's list).
const MASKED_PATHS: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
];
const READONLY_PATHS: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// A ContainerError says why a container cannot be configured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ContainerError {
    #[error("container has runAsNonRoot and image will run as root")]
    Root,
    #[error(
        "container has runAsNonRoot and image has non-numeric user ({0}), cannot verify user is non-root"
    )]
    UnknownUser(String),
}

/// What a container is started with beside its spec.
#[derive(Debug, Clone)]
pub struct Start<'a> {
    pub attempt: u32,
    pub backoff_s: u64,
    pub env: &'a [(String, String)],
    pub mounts: Vec<Mount>,
    pub image: &'a ImageView,
    pub node_memory_bytes: i64,
    /// The container of whose process namespace this one becomes part.
    pub target_id: Option<String>,
}

/// The log of a container, relative to its pod's log directory.
pub fn log_path(container: &str, attempt: u32) -> String {
    format!("{container}/{attempt}.log")
}

/// The container for CRI.
pub fn container_config(
    pod: &Pod,
    container: &Container,
    start: Start<'_>,
) -> Result<ContainerConfig, ContainerError> {
    let key = PodKey::of(pod);
    let empty = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&empty);
    let expanded = |list: &Option<Vec<String>>| {
        list.iter()
            .flatten()
            .map(|text| expand(text, start.env))
            .collect()
    };
    let spec_image = container.image.clone().unwrap_or_default();
    let labels = [
        (LABEL_POD_NAME, key.name),
        (LABEL_POD_NAMESPACE, key.namespace),
        (LABEL_POD_UID, key.uid),
        (LABEL_CONTAINER_NAME, container.name.clone()),
    ];
    let annotations = [
        (ANNOTATION_BACKOFF, start.backoff_s.to_string()),
        (ANNOTATION_IMAGE, spec_image.clone()),
        (
            ANNOTATION_TERMINATION_PATH,
            termination_path(container).to_owned(),
        ),
        (
            ANNOTATION_LIMITS,
            container_limits(container.resources.as_ref()).to_string(),
        ),
    ];
    let security = security(spec, container, &start)?;
    Ok(ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: container.name.clone(),
            attempt: start.attempt,
        }),
        image: Some(ImageSpec {
            image: start.image.id.clone(),
            user_specified_image: spec_image,
            ..Default::default()
        }),
        command: expanded(&container.command),
        args: expanded(&container.args),
        working_dir: container.working_dir.clone().unwrap_or_default(),
        envs: start
            .env
            .iter()
            .map(|(key, value)| KeyValue {
                key: key.clone(),
                value: value.clone(),
            })
            .collect(),
        mounts: start.mounts,
        labels: owned(labels),
        annotations: owned(annotations),
        log_path: log_path(&container.name, start.attempt),
        stdin: container.stdin.unwrap_or(false),
        stdin_once: container.stdin_once.unwrap_or(false),
        tty: container.tty.unwrap_or(false),
        linux: Some(LinuxContainerConfig {
            resources: Some(linux_resources(pod, container, start.node_memory_bytes)),
            security_context: Some(security),
        }),
        ..Default::default()
    })
}

/// What a container may use, for CRI: when it is made, and when it is resized.
pub fn linux_resources(
    pod: &Pod,
    container: &Container,
    node_memory_bytes: i64,
) -> LinuxContainerResources {
    let limits = container_limits(container.resources.as_ref());
    LinuxContainerResources {
        cpu_period: CPU_PERIOD_US,
        cpu_quota: limits.cpu_quota_us.unwrap_or(0),
        cpu_shares: limits.cpu_shares,
        memory_limit_in_bytes: limits.memory_bytes.unwrap_or(0),
        oom_score_adj: oom_score_adj(pod, container, node_memory_bytes),
        ..Default::default()
    }
}

/// The path in the container where it may leave a last word.
pub fn termination_path(container: &Container) -> &str {
    container
        .termination_message_path
        .as_deref()
        .filter(|path| !path.is_empty())
        .unwrap_or("/dev/termination-log")
}

fn owned<const N: usize>(pairs: [(&str, String); N]) -> HashMap<String, String> {
    pairs
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
}

fn security(
    spec: &PodSpec,
    container: &Container,
    start: &Start<'_>,
) -> Result<LinuxContainerSecurityContext, ContainerError> {
    let image = start.image;
    let of_pod = spec.security_context.as_ref();
    let own = container.security_context.as_ref();
    let user = own
        .and_then(|s| s.run_as_user)
        .or(of_pod.and_then(|s| s.run_as_user));
    let group = own
        .and_then(|s| s.run_as_group)
        .or(of_pod.and_then(|s| s.run_as_group));
    if own
        .and_then(|s| s.run_as_non_root)
        .or(of_pod.and_then(|s| s.run_as_non_root))
        == Some(true)
    {
        match (user, image.uid, image.user.as_str()) {
            (Some(0), ..) | (None, Some(0), _) | (None, None, "") => {
                return Err(ContainerError::Root);
            }
            (None, None, name) => return Err(ContainerError::UnknownUser(name.to_owned())),
            _ => {}
        }
    }
    let privileged = own.and_then(|s| s.privileged).unwrap_or(false);
    let unmasked = privileged || own.and_then(|s| s.proc_mount.as_deref()) == Some("Unmasked");
    let paths = |list: &[&str]| {
        if unmasked {
            Vec::new()
        } else {
            list.iter().map(|path| (*path).to_owned()).collect()
        }
    };
    let capabilities = own.and_then(|s| s.capabilities.as_ref());
    let profile = own
        .and_then(|s| s.seccomp_profile.as_ref())
        .or(of_pod.and_then(|s| s.seccomp_profile.as_ref()));
    // CRI asks for a user when a group is set; without one the image's own is used, which must be given then.
    let implied = user.is_none() && group.is_some();
    let by_image = image.uid.unwrap_or(0);
    Ok(LinuxContainerSecurityContext {
        capabilities: capabilities.map(|c| Capability {
            add_capabilities: c.add.clone().unwrap_or_default(),
            drop_capabilities: c.drop.clone().unwrap_or_default(),
            add_ambient_capabilities: Vec::new(),
        }),
        privileged,
        namespace_options: Some(match &start.target_id {
            Some(target) => NamespaceOption {
                pid: NamespaceMode::Target as i32,
                target_id: target.clone(),
                ..namespaces(spec)
            },
            None => namespaces(spec),
        }),
        run_as_user: user
            .or(implied.then_some(by_image))
            .or(image.uid)
            .map(|value| Int64Value { value }),
        run_as_group: group.map(|value| Int64Value { value }),
        run_as_username: if user.is_none() && !implied && image.uid.is_none() {
            image.user.clone()
        } else {
            String::new()
        },
        readonly_rootfs: own
            .and_then(|s| s.read_only_root_filesystem)
            .unwrap_or(false),
        supplemental_groups: supplemental_groups(spec),
        no_new_privs: own.and_then(|s| s.allow_privilege_escalation) == Some(false),
        masked_paths: paths(&MASKED_PATHS),
        readonly_paths: paths(&READONLY_PATHS),
        seccomp: Some(if privileged {
            seccomp(None)
        } else {
            seccomp(profile)
        }),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(
        container: serde_json::Value,
        image: ImageView,
    ) -> Result<ContainerConfig, ContainerError> {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "u"}, "spec": {"containers": [container]},
        }))
        .unwrap();
        let env = [("A".to_owned(), "1".to_owned())];
        let start = Start {
            attempt: 3,
            backoff_s: 40,
            env: &env,
            mounts: Vec::new(),
            image: &image,
            node_memory_bytes: 1 << 30,
            target_id: None,
        };
        container_config(&pod, &pod.spec.as_ref().unwrap().containers[0], start)
    }

    #[test]
    fn a_container_carries_what_a_restarted_kubelet_needs_to_know() {
        let got = config(
            json!({"name": "c", "image": "img:1", "args": ["$(A)"]}),
            ImageView::default(),
        )
        .unwrap();
        assert_eq!(got.args, ["1"]);
        assert_eq!(got.log_path, "c/3.log");
        assert_eq!(got.annotations[ANNOTATION_BACKOFF], "40");
        assert_eq!(got.annotations[ANNOTATION_IMAGE], "img:1");
        assert_eq!(got.labels[LABEL_POD_UID], "u");
        assert_eq!(got.metadata.unwrap().attempt, 3);
    }

    #[test]
    fn privileged_containers_see_all_of_proc_and_others_do_not() {
        let masked = |privileged: bool| {
            let container = json!({"name": "c", "securityContext": {"privileged": privileged}});
            config(container, ImageView::default())
                .unwrap()
                .linux
                .unwrap()
                .security_context
                .unwrap()
                .masked_paths
                .is_empty()
        };
        assert_eq!((masked(true), masked(false)), (true, false));
    }

    #[test]
    fn run_as_non_root_refuses_root_and_unknown_users() {
        let nonroot = |extra: serde_json::Value, image: ImageView| {
            let mut security = json!({"runAsNonRoot": true});
            security
                .as_object_mut()
                .unwrap()
                .extend(extra.as_object().unwrap().clone());
            config(json!({"name": "c", "securityContext": security}), image).err()
        };
        let image = |uid: Option<i64>, user: &str| ImageView {
            uid,
            user: user.to_owned(),
            ..Default::default()
        };
        assert_eq!(
            nonroot(json!({}), image(None, "")),
            Some(ContainerError::Root)
        );
        assert_eq!(
            nonroot(json!({}), image(Some(0), "")),
            Some(ContainerError::Root)
        );
        assert_eq!(
            nonroot(json!({"runAsUser": 0}), image(Some(5), "")),
            Some(ContainerError::Root)
        );
        assert_eq!(
            nonroot(json!({}), image(None, "web")),
            Some(ContainerError::UnknownUser("web".to_owned()))
        );
        assert_eq!(nonroot(json!({}), image(Some(5), "")), None);
        assert_eq!(nonroot(json!({"runAsUser": 7}), image(None, "web")), None);
    }
}
