//! Volumes of pods: what they hold (`payload`, pure), how they get onto disk (`tree`), and where containers see them.

pub mod payload;
pub mod place;
pub mod tree;

use std::path::{Path, PathBuf};

use k8s_cri::v1::{Mount, MountPropagation};
use k8s_openapi::api::core::v1::{Container, Pod, Volume, VolumeMount};

use crate::pod::env::{EnvError, expand};

/// A VolumeError names the volume and what is wrong with it; the pod shows it as FailedMount.
#[derive(Debug, Clone, thiserror::Error)]
pub enum VolumeError {
    #[error("volume \"{volume}\": {source}")]
    Content { volume: String, source: EnvError },
    #[error("volume \"{volume}\": {kind} \"{name}\" not found")]
    Missing {
        volume: String,
        kind: &'static str,
        name: String,
    },
    #[error("volume \"{volume}\": references non-existent key {key} of {kind} \"{name}\"")]
    MissingKey {
        volume: String,
        kind: &'static str,
        name: String,
        key: String,
    },
    #[error("volume \"{volume}\": path {path} leads out of the volume")]
    Escapes { volume: String, path: String },
    #[error(
        "volume \"{volume}\": this kind of volume is not supported; supported are emptyDir, hostPath, configMap, secret, downwardAPI, projected"
    )]
    Unsupported { volume: String },
    #[error("volume \"{volume}\": hostPath {path} is not a {expected}")]
    HostPath {
        volume: String,
        path: String,
        expected: &'static str,
    },
    #[error("volume \"{volume}\": cannot {operation} {path}: {message}")]
    Io {
        volume: String,
        operation: &'static str,
        path: String,
        message: String,
    },
    #[error("volume \"{volume}\": no token: {message}")]
    Token { volume: String, message: String },
    #[error("container mounts volume \"{volume}\", which the pod does not have")]
    Unknown { volume: String },
    #[error("cannot read {object}: {message}")]
    Api { object: String, message: String },
}

/// The kind of a volume, which names its folder on disk as upstream's does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VolumeKind {
    EmptyDir { memory: bool },
    HostPath,
    ConfigMap,
    Secret,
    DownwardApi,
    Projected,
}

impl VolumeKind {
    pub fn of(volume: &Volume) -> Option<Self> {
        Some(match volume {
            Volume {
                empty_dir: Some(dir),
                ..
            } => Self::EmptyDir {
                memory: dir.medium.as_deref() == Some("Memory"),
            },
            Volume {
                host_path: Some(_), ..
            } => Self::HostPath,
            Volume {
                config_map: Some(_),
                ..
            } => Self::ConfigMap,
            Volume {
                secret: Some(_), ..
            } => Self::Secret,
            Volume {
                downward_api: Some(_),
                ..
            } => Self::DownwardApi,
            Volume {
                projected: Some(_), ..
            } => Self::Projected,
            _ => return None,
        })
    }

    fn folder(self) -> &'static str {
        match self {
            Self::EmptyDir { .. } => "kubernetes.io~empty-dir",
            Self::HostPath => "kubernetes.io~host-path",
            Self::ConfigMap => "kubernetes.io~configmap",
            Self::Secret => "kubernetes.io~secret",
            Self::DownwardApi => "kubernetes.io~downward-api",
            Self::Projected => "kubernetes.io~projected",
        }
    }

    /// Whether the content comes from the API and follows it.
    pub fn is_generated(self) -> bool {
        matches!(
            self,
            Self::ConfigMap | Self::Secret | Self::DownwardApi | Self::Projected
        )
    }

    /// Whether the content must never reach a disk.
    pub fn in_memory(self) -> bool {
        matches!(
            self,
            Self::EmptyDir { memory: true } | Self::Secret | Self::Projected
        )
    }
}

/// PodFolder is where the kubelet keeps a pod's files: `<root-dir>/pods/<uid>`.
#[derive(Debug, Clone)]
pub struct PodFolder(pub PathBuf);

impl PodFolder {
    pub fn new(root_dir: &Path, uid: &str) -> Self {
        Self(root_dir.join("pods").join(uid))
    }

    /// Where a volume's content is on the node.
    pub fn volume(&self, volume: &Volume) -> Option<PathBuf> {
        let kind = VolumeKind::of(volume)?;
        match &volume.host_path {
            Some(host) => Some(PathBuf::from(&host.path)),
            None => Some(
                self.0
                    .join("volumes")
                    .join(kind.folder())
                    .join(&volume.name),
            ),
        }
    }

    pub fn hosts_file(&self) -> PathBuf {
        self.0.join("etc-hosts")
    }

    /// Where a container leaves its last word.
    pub fn termination_log(&self, container: &str, attempt: u32) -> PathBuf {
        self.0
            .join("containers")
            .join(container)
            .join(attempt.to_string())
    }
}

/// The mounts of a container's volumes. `env` serves subPathExpr. Missing subPaths are made, in the volume and not outside.
pub fn container_mounts(
    pod: &Pod,
    container: &Container,
    folder: &PodFolder,
    env: &[(String, String)],
) -> Result<Vec<Mount>, VolumeError> {
    let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
    let volumes: Vec<&Volume> = volumes.collect();
    container
        .volume_mounts
        .iter()
        .flatten()
        .map(|mount| container_mount(mount, &volumes, folder, env))
        .collect()
}

fn container_mount(
    mount: &VolumeMount,
    volumes: &[&Volume],
    folder: &PodFolder,
    env: &[(String, String)],
) -> Result<Mount, VolumeError> {
    let unknown = || VolumeError::Unknown {
        volume: mount.name.clone(),
    };
    let volume = volumes
        .iter()
        .find(|v| v.name == mount.name)
        .ok_or_else(unknown)?;
    let root = folder
        .volume(volume)
        .ok_or_else(|| VolumeError::Unsupported {
            volume: mount.name.clone(),
        })?;
    let sub_path = match (&mount.sub_path, &mount.sub_path_expr) {
        (_, Some(expression)) if !expression.is_empty() => expand(expression, env),
        (Some(path), _) => path.clone(),
        _ => String::new(),
    };
    let host_path = if sub_path.is_empty() {
        root
    } else {
        tree::resolve_below(&root, &sub_path, &mount.name)?
    };
    let kind = VolumeKind::of(volume);
    let container_path = if mount.mount_path.starts_with('/') {
        mount.mount_path.clone()
    } else {
        format!("/{}", mount.mount_path)
    };
    Ok(Mount {
        container_path,
        host_path: host_path.to_string_lossy().into_owned(),
        // What the API wrote is the API's: a container that changes it would see its change vanish.
        readonly: mount.read_only.unwrap_or(false) || kind.is_some_and(VolumeKind::is_generated),
        propagation: match mount.mount_propagation.as_deref() {
            Some("Bidirectional") => MountPropagation::PropagationBidirectional,
            Some("HostToContainer") => MountPropagation::PropagationHostToContainer,
            _ => MountPropagation::PropagationPrivate,
        } as i32,
        ..Default::default()
    })
}
