//! Credentials of image registries, from the Secrets that a pod's `imagePullSecrets` name.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use k8s_cri::v1::AuthConfig;
use k8s_openapi::api::core::v1::Secret;
use serde::Deserialize;

/// The registry of images that name none.
const DEFAULT_REGISTRY: &str = "docker.io";

/// One registry's entry of a Docker configuration.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Entry {
    username: String,
    password: String,
    /// `username:password` in base64, in place of the two.
    auth: String,
    #[serde(rename = "identitytoken")]
    identity_token: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct DockerConfig {
    auths: BTreeMap<String, Entry>,
}

/// A CredentialsError says which Secret cannot be used; its content is not shown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CredentialsError {
    #[error("secret \"{0}\" is of no type that holds registry credentials")]
    Type(String),
    #[error("secret \"{secret}\": {key} is no Docker configuration")]
    Content { secret: String, key: &'static str },
}

/// The credentials in a Secret that fit an image, the most specific first.
pub fn credentials(secret: &Secret, image: &str) -> Result<Vec<AuthConfig>, CredentialsError> {
    let (registry, repository) = location(image);
    let mut found: Vec<(usize, AuthConfig)> = entries(secret)?
        .into_iter()
        .filter(|(key, _)| fits(key, registry, repository))
        .filter_map(|(key, entry)| Some((key.len(), auth(registry, entry)?)))
        .collect();
    found.sort_by_key(|(length, _)| std::cmp::Reverse(*length));
    Ok(found.into_iter().map(|(_, auth)| auth).collect())
}

fn entries(secret: &Secret) -> Result<BTreeMap<String, Entry>, CredentialsError> {
    let name = || secret.metadata.name.clone().unwrap_or_default();
    let content = |key: &'static str| {
        let bytes = secret.data.as_ref().and_then(|data| data.get(key));
        bytes.map(|bytes| (key, &bytes.0))
    };
    let wrong = |key| CredentialsError::Content {
        secret: name(),
        key,
    };
    match secret.type_.as_deref() {
        Some("kubernetes.io/dockerconfigjson") => {
            let (key, bytes) =
                content(".dockerconfigjson").ok_or_else(|| wrong(".dockerconfigjson"))?;
            let config: DockerConfig = serde_json::from_slice(bytes).map_err(|_| wrong(key))?;
            Ok(config.auths)
        }
        Some("kubernetes.io/dockercfg") => {
            let (key, bytes) = content(".dockercfg").ok_or_else(|| wrong(".dockercfg"))?;
            serde_json::from_slice(bytes).map_err(|_| wrong(key))
        }
        _ => Err(CredentialsError::Type(name())),
    }
}

fn auth(registry: &str, entry: Entry) -> Option<AuthConfig> {
    let decoded = STANDARD.decode(entry.auth.trim()).unwrap_or_default();
    let decoded = String::from_utf8(decoded).unwrap_or_default();
    // Docker pads what it writes with zero bytes at times.
    let (username, password) = match decoded.trim_end_matches('\0').split_once(':') {
        Some((username, password)) if entry.username.is_empty() => {
            (username.to_owned(), password.to_owned())
        }
        _ => (entry.username, entry.password),
    };
    if username.is_empty() && entry.identity_token.is_empty() {
        return None;
    }
    Some(AuthConfig {
        username,
        password,
        identity_token: entry.identity_token,
        server_address: registry.to_owned(),
        ..Default::default()
    })
}

/// Registry and repository of an image's name.
fn location(image: &str) -> (&str, &str) {
    let name = image.split('@').next().unwrap_or_default();
    let (registry, rest) = match name.split_once('/') {
        // Only what looks like a host is one: others are folders of the default registry.
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (first, rest),
        _ => (DEFAULT_REGISTRY, name),
    };
    let tag = rest.rfind(':').filter(|at| !rest[*at..].contains('/'));
    (registry, &rest[..tag.unwrap_or(rest.len())])
}

/// Whether an entry of a Docker configuration is meant for an image. A `*` stands for part of a host's label.
fn fits(key: &str, registry: &str, repository: &str) -> bool {
    let key = key.split_once("://").map_or(key, |(_, rest)| rest);
    let (host, path) = key.split_once('/').unwrap_or((key, ""));
    let host = match host {
        "index.docker.io" | "registry-1.docker.io" => DEFAULT_REGISTRY,
        host => host,
    };
    // Docker writes its API's version into the key of its own registry.
    let path = path.trim_end_matches('/');
    let path = if matches!(path, "v1" | "v2") {
        ""
    } else {
        path
    };
    let (labels, wanted) = (registry.split('.'), host.split('.'));
    let same_host = labels.clone().count() == wanted.clone().count()
        && labels
            .zip(wanted)
            .all(|(label, pattern)| glob(pattern, label));
    let below = repository.strip_prefix(path);
    same_host && (path.is_empty() || below.is_some_and(|r| r.is_empty() || r.starts_with('/')))
}

fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else {
        return rest.is_empty();
    };
    for part in middle {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::ByteString;
    use serde_json::{Value, json};

    fn secret(type_: &str, key: &str, content: &str) -> Secret {
        Secret {
            metadata: serde_json::from_value(json!({"name": "s"})).unwrap(),
            type_: Some(type_.to_owned()),
            data: Some([(key.to_owned(), ByteString(content.as_bytes().to_vec()))].into()),
            ..Default::default()
        }
    }

    fn docker(auths: Value) -> Secret {
        let content = json!({"auths": auths}).to_string();
        secret(
            "kubernetes.io/dockerconfigjson",
            ".dockerconfigjson",
            &content,
        )
    }

    #[test]
    fn an_entry_fits_images_of_its_registry_and_below_its_path() {
        for (key, image, expected) in [
            ("registry.example", "registry.example/a/b:1", true),
            (
                "https://registry.example/v2/",
                "registry.example/a/b@sha256:0",
                true,
            ),
            ("registry.example:5000", "registry.example:5000/a", true),
            ("registry.example", "registry.example:5000/a", false),
            ("registry.example/a", "registry.example/a/b", true),
            ("registry.example/a", "registry.example/a:1", true),
            ("registry.example/a", "registry.example/ab", false),
            ("*.example", "registry.example/a", true),
            ("*.example", "eu.registry.example/a", false),
            ("r*y.*", "registry.example/a", true),
            ("https://index.docker.io/v1/", "busybox", true),
            ("docker.io", "team/app:1", true),
            ("localhost", "localhost/app", true),
            ("registry.example", "busybox", false),
        ] {
            let found = credentials(
                &docker(json!({key: {"username": "u", "password": "p"}})),
                image,
            );
            assert_eq!(found.unwrap().len(), usize::from(expected), "{key} {image}");
        }
    }

    #[test]
    fn the_most_specific_entry_comes_first_and_both_forms_are_read() {
        let coded = STANDARD.encode("x:y:z");
        let both = docker(json!({
            "registry.example": {"username": "u", "password": "p"},
            "registry.example/team": {"auth": coded},
            "registry.example/team/app": {},
        }));
        let found = credentials(&both, "registry.example/team/app:1").unwrap();
        let users: Vec<_> = found
            .iter()
            .map(|a| (a.username.as_str(), a.password.as_str()))
            .collect();
        assert_eq!(users, [("x", "y:z"), ("u", "p")]);
        let old = secret(
            "kubernetes.io/dockercfg",
            ".dockercfg",
            &json!({"registry.example": {"username": "u", "password": "p"}}).to_string(),
        );
        assert_eq!(credentials(&old, "registry.example/a").unwrap().len(), 1);
    }

    #[test]
    fn what_holds_no_credentials_is_named_and_not_shown() {
        let opaque = secret("Opaque", "password", "hidden");
        assert_eq!(
            credentials(&opaque, "a").unwrap_err(),
            CredentialsError::Type("s".to_owned())
        );
        let broken = secret(
            "kubernetes.io/dockerconfigjson",
            ".dockerconfigjson",
            "{hidden",
        );
        let message = credentials(&broken, "a").unwrap_err().to_string();
        assert!(
            message.contains("secret \"s\"") && !message.contains("hidden"),
            "{message}"
        );
    }
}
