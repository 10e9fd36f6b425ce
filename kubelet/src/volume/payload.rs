//! payload: the files that a generated volume holds.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{
    ConfigMap, DownwardAPIVolumeFile, KeyToPath, Pod, PodSpec, Secret,
    ServiceAccountTokenProjection, Volume,
};

use super::VolumeError;
use crate::pod::env::{Objects, Place, pod_field, resource_field};

const MODE_DEFAULT: i32 = 0o644;
/// Life of a projected token when none is asked for.
pub const TOKEN_EXPIRATION_S: i64 = 3600;

/// A File of a generated volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    pub data: Vec<u8>,
    pub mode: u32,
}

/// Files by path below the volume.
pub type Payload = BTreeMap<String, File>;

/// A TokenKey is a token that a pod asks for: its audience and its life in seconds.
pub type TokenKey = (Option<String>, i64);

/// Needs are the objects that a pod's volumes and environment refer to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needs {
    pub config_maps: BTreeSet<String>,
    pub secrets: BTreeSet<String>,
    pub tokens: BTreeSet<TokenKey>,
}

/// What the volumes of a pod need.
pub fn volume_needs(spec: &PodSpec) -> Needs {
    let mut needs = Needs::default();
    for volume in spec.volumes.iter().flatten() {
        needs
            .config_maps
            .extend(volume.config_map.iter().map(|s| s.name.clone()));
        needs
            .secrets
            .extend(volume.secret.iter().filter_map(|s| s.secret_name.clone()));
        for source in volume
            .projected
            .iter()
            .flat_map(|p| p.sources.iter().flatten())
        {
            needs
                .config_maps
                .extend(source.config_map.iter().map(|s| s.name.clone()));
            needs
                .secrets
                .extend(source.secret.iter().map(|s| s.name.clone()));
            needs
                .tokens
                .extend(source.service_account_token.iter().map(token_key));
        }
    }
    needs
}

/// What the environment of a pod's container needs.
pub fn env_needs(container: &k8s_openapi::api::core::v1::Container) -> Needs {
    let mut needs = Needs::default();
    for source in container.env_from.iter().flatten() {
        needs
            .config_maps
            .extend(source.config_map_ref.iter().map(|r| r.name.clone()));
        needs
            .secrets
            .extend(source.secret_ref.iter().map(|r| r.name.clone()));
    }
    for from in container
        .env
        .iter()
        .flatten()
        .filter_map(|v| v.value_from.as_ref())
    {
        needs
            .config_maps
            .extend(from.config_map_key_ref.iter().map(|r| r.name.clone()));
        needs
            .secrets
            .extend(from.secret_key_ref.iter().map(|r| r.name.clone()));
    }
    needs
}

fn token_key(source: &ServiceAccountTokenProjection) -> TokenKey {
    (
        source.audience.clone().filter(|a| !a.is_empty()),
        source.expiration_seconds.unwrap_or(TOKEN_EXPIRATION_S),
    )
}

/// Everything a payload is made from.
#[derive(Debug, Clone, Copy)]
pub struct Sources<'a> {
    pub pod: &'a Pod,
    pub objects: &'a Objects,
    pub tokens: &'a BTreeMap<TokenKey, String>,
    pub place: &'a Place,
}

/// The files of a volume; None for kinds that the API does not fill.
pub fn payload(volume: &Volume, sources: &Sources<'_>) -> Result<Option<Payload>, VolumeError> {
    let mut filler = Filler {
        volume: &volume.name,
        sources,
        files: Payload::new(),
        default_mode: MODE_DEFAULT,
    };
    if let Some(source) = &volume.config_map {
        filler.default_mode = source.default_mode.unwrap_or(MODE_DEFAULT);
        filler.config_map(&source.name, &source.items, source.optional)?;
    } else if let Some(source) = &volume.secret {
        filler.default_mode = source.default_mode.unwrap_or(MODE_DEFAULT);
        filler.secret(
            source.secret_name.as_deref().unwrap_or_default(),
            &source.items,
            source.optional,
        )?;
    } else if let Some(source) = &volume.downward_api {
        filler.default_mode = source.default_mode.unwrap_or(MODE_DEFAULT);
        filler.downward(&source.items)?;
    } else if let Some(projected) = &volume.projected {
        filler.default_mode = projected.default_mode.unwrap_or(MODE_DEFAULT);
        for source in projected.sources.iter().flatten() {
            if let Some(map) = &source.config_map {
                filler.config_map(&map.name, &map.items, map.optional)?;
            }
            if let Some(secret) = &source.secret {
                filler.secret(&secret.name, &secret.items, secret.optional)?;
            }
            if let Some(downward) = &source.downward_api {
                filler.downward(&downward.items)?;
            }
            if let Some(token) = &source.service_account_token {
                filler.token(token)?;
            }
        }
    } else {
        return Ok(None);
    }
    Ok(Some(filler.files))
}

struct Filler<'a> {
    volume: &'a str,
    sources: &'a Sources<'a>,
    files: Payload,
    default_mode: i32,
}

impl Filler<'_> {
    fn put(&mut self, path: &str, data: Vec<u8>, mode: Option<i32>) -> Result<(), VolumeError> {
        let inside = !path.is_empty()
            && !path.starts_with('/')
            && path
                .split('/')
                .all(|part| !part.is_empty() && part != ".." && part != ".");
        if !inside || path.starts_with("..") {
            return Err(VolumeError::Escapes {
                volume: self.volume.to_owned(),
                path: path.to_owned(),
            });
        }
        let mode = u32::try_from(mode.unwrap_or(self.default_mode)).unwrap_or(0) & 0o777;
        self.files.insert(path.to_owned(), File { data, mode });
        Ok(())
    }

    fn keys(
        &mut self,
        kind: &'static str,
        name: &str,
        all: BTreeMap<String, Vec<u8>>,
        items: &Option<Vec<KeyToPath>>,
        optional: Option<bool>,
    ) -> Result<(), VolumeError> {
        let Some(items) = items.as_ref().filter(|items| !items.is_empty()) else {
            return all
                .into_iter()
                .try_for_each(|(key, data)| self.put(&key, data, None));
        };
        for item in items {
            match all.get(&item.key) {
                Some(data) => self.put(&item.path, data.clone(), item.mode)?,
                None if optional == Some(true) => {}
                None => {
                    let (volume, name, key) =
                        (self.volume.to_owned(), name.to_owned(), item.key.clone());
                    return Err(VolumeError::MissingKey {
                        volume,
                        kind,
                        name,
                        key,
                    });
                }
            }
        }
        Ok(())
    }

    fn config_map(
        &mut self,
        name: &str,
        items: &Option<Vec<KeyToPath>>,
        optional: Option<bool>,
    ) -> Result<(), VolumeError> {
        match self.sources.objects.config_maps.get(name) {
            Some(map) => self.keys("configmap", name, config_map_data(map), items, optional),
            None => self.absent("configmap", name, optional),
        }
    }

    fn secret(
        &mut self,
        name: &str,
        items: &Option<Vec<KeyToPath>>,
        optional: Option<bool>,
    ) -> Result<(), VolumeError> {
        match self.sources.objects.secrets.get(name) {
            Some(secret) => self.keys("secret", name, secret_data(secret), items, optional),
            None => self.absent("secret", name, optional),
        }
    }

    fn absent(
        &self,
        kind: &'static str,
        name: &str,
        optional: Option<bool>,
    ) -> Result<(), VolumeError> {
        match optional {
            Some(true) => Ok(()),
            _ => Err(VolumeError::Missing {
                volume: self.volume.to_owned(),
                kind,
                name: name.to_owned(),
            }),
        }
    }

    fn downward(&mut self, items: &Option<Vec<DownwardAPIVolumeFile>>) -> Result<(), VolumeError> {
        let Sources { pod, place, .. } = *self.sources;
        for item in items.iter().flatten() {
            let value = match (&item.field_ref, &item.resource_field_ref) {
                (Some(field), _) => pod_field(pod, place, &field.field_path),
                (None, Some(resource)) => {
                    let container = pod
                        .spec
                        .iter()
                        .flat_map(|s| &s.containers)
                        .next()
                        .cloned()
                        .unwrap_or_default();
                    resource_field(pod, &container, place, resource)
                }
                (None, None) => Ok(String::new()),
            };
            let value = value.map_err(|source| VolumeError::Content {
                volume: self.volume.to_owned(),
                source,
            })?;
            self.put(&item.path, value.into_bytes(), item.mode)?;
        }
        Ok(())
    }

    fn token(&mut self, token: &ServiceAccountTokenProjection) -> Result<(), VolumeError> {
        let missing = || VolumeError::Token {
            volume: self.volume.to_owned(),
            message: "not asked for".to_owned(),
        };
        let value = self
            .sources
            .tokens
            .get(&token_key(token))
            .ok_or_else(missing)?;
        let security = self
            .sources
            .pod
            .spec
            .as_ref()
            .and_then(|s| s.security_context.as_ref());
        // A token is for its pod's processes only: group-readable if a group owns the volumes, else world-readable inside
        // the pod's own tmpfs, since the user that the image runs as need not be known (upstream's rule).
        let mode = if security.is_some_and(|s| s.fs_group.is_some()) {
            0o640
        } else {
            self.default_mode
        };
        self.put(&token.path, value.clone().into_bytes(), Some(mode))
    }
}

fn config_map_data(map: &ConfigMap) -> BTreeMap<String, Vec<u8>> {
    let text = map
        .data
        .iter()
        .flatten()
        .map(|(key, value)| (key.clone(), value.clone().into_bytes()));
    let binary = map
        .binary_data
        .iter()
        .flatten()
        .map(|(key, value)| (key.clone(), value.0.clone()));
    text.chain(binary).collect()
}

fn secret_data(secret: &Secret) -> BTreeMap<String, Vec<u8>> {
    secret
        .data
        .iter()
        .flatten()
        .map(|(key, value)| (key.clone(), value.0.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fill(volume: serde_json::Value) -> Result<Option<Payload>, VolumeError> {
        let volume: Volume = serde_json::from_value(volume).unwrap();
        let pod = serde_json::from_value(json!({"metadata": {"name": "p", "labels": {"a": "b"}}, "spec": {"containers": [{"name": "c"}]}})).unwrap();
        let objects = Objects {
            config_maps: BTreeMap::from([(
                "cm".to_owned(),
                serde_json::from_value(json!({"data": {"k": "v"}, "binaryData": {"b": "AAE="}}))
                    .unwrap(),
            )]),
            secrets: BTreeMap::from([(
                "s".to_owned(),
                serde_json::from_value(json!({"data": {"pw": "aHVudGVyMg=="}})).unwrap(),
            )]),
            services: Vec::new(),
        };
        let tokens = BTreeMap::from([((Some("vault".to_owned()), 600), "tok".to_owned())]);
        payload(
            &volume,
            &Sources {
                pod: &pod,
                objects: &objects,
                tokens: &tokens,
                place: &Place::default(),
            },
        )
    }

    fn text(payload: &Payload, path: &str) -> Option<(String, u32)> {
        payload
            .get(path)
            .map(|file| (String::from_utf8_lossy(&file.data).into_owned(), file.mode))
    }

    #[test]
    fn a_projected_volume_merges_all_its_sources() {
        let files = fill(json!({"name": "v", "projected": {"defaultMode": 0o600, "sources": [
            {"configMap": {"name": "cm", "items": [{"key": "k", "path": "conf/k.txt", "mode": 0o400}]}},
            {"secret": {"name": "s"}},
            {"secret": {"name": "none", "optional": true}},
            {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
            {"serviceAccountToken": {"path": "token", "audience": "vault", "expirationSeconds": 600}},
        ]}}))
        .unwrap()
        .unwrap();
        assert_eq!(text(&files, "conf/k.txt"), Some(("v".to_owned(), 0o400)));
        assert_eq!(text(&files, "pw"), Some(("hunter2".to_owned(), 0o600)));
        assert_eq!(text(&files, "labels"), Some(("a=\"b\"".to_owned(), 0o600)));
        assert_eq!(text(&files, "token"), Some(("tok".to_owned(), 0o600)));
    }

    #[test]
    fn a_config_map_gives_text_and_binary_keys() {
        let files = fill(json!({"name": "v", "configMap": {"name": "cm"}}))
            .unwrap()
            .unwrap();
        assert_eq!(files["b"].data, [0, 1]);
        assert_eq!(files["k"].data, b"v");
    }

    #[test]
    fn missing_objects_and_paths_that_leave_the_volume_are_refused() {
        for (volume, message) in [
            (
                json!({"name": "v", "configMap": {"name": "gone"}}),
                "volume \"v\": configmap \"gone\" not found",
            ),
            (
                json!({"name": "v", "configMap": {"name": "cm", "items": [{"key": "z", "path": "z"}]}}),
                "volume \"v\": references non-existent key z of configmap \"cm\"",
            ),
            (
                json!({"name": "v", "configMap": {"name": "cm", "items": [{"key": "k", "path": "../k"}]}}),
                "volume \"v\": path ../k leads out of the volume",
            ),
            (
                json!({"name": "v", "configMap": {"name": "cm", "items": [{"key": "k", "path": "/etc/passwd"}]}}),
                "volume \"v\": path /etc/passwd leads out of the volume",
            ),
        ] {
            assert_eq!(fill(volume).unwrap_err().to_string(), message);
        }
        assert_eq!(fill(json!({"name": "v", "emptyDir": {}})).unwrap(), None);
    }
}
