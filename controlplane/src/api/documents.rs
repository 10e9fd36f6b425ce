//! Documents about the API: version, discovery (aggregated and plain), OpenAPI. Made when first asked for.

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use http::{Method, StatusCode, header, request::Parts};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::reply::Answer;
use super::status::Status;
use super::{Api, reply};
use crate::codec;
use crate::registry::{discovery, openapi};

/// Documents that are large enough to be kept.
#[derive(Default)]
pub struct Documents {
    aggregated: [OnceLock<(Bytes, String)>; 2],
    openapi_v2: OnceLock<Bytes>,
    openapi_v2_protobuf: OnceLock<Bytes>,
    openapi_index: OnceLock<Bytes>,
    /// By group and version.
    openapi_v3: Mutex<HashMap<(String, String), Bytes>>,
}

/// The API level, as `kubectl version` shows it.
pub fn version() -> Value {
    json!({
        "major": "1", "minor": "36", "emulationMajor": "1", "emulationMinor": "36",
        "minCompatibilityMajor": "1", "minCompatibilityMinor": "35",
        "gitVersion": format!("v1.36.0+keelway-{}", env!("CARGO_PKG_VERSION")),
        "gitCommit": "", "gitTreeState": "", "buildDate": "", "goVersion": "", "compiler": "",
        "platform": format!("{}/{}", std::env::consts::OS, match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        }),
    })
}

impl Api {
    /// The document at a path; None when the path is not one of a document.
    pub(super) fn document(&self, path: &str, parts: &Parts) -> Option<Result<Answer, Status>> {
        let trimmed = path.trim_end_matches('/');
        let segments: Vec<&str> = trimmed.split('/').skip(1).collect();
        let answer = match segments.as_slice() {
            [] => Ok(self.root()),
            ["api"] => self.groups(parts, true),
            ["apis"] => self.groups(parts, false),
            ["api", "v1"] => self.found(discovery::resource_list(&self.served, "", "v1")),
            ["apis", group] => self.found(discovery::group(&self.served, group)),
            ["apis", group, version] => {
                self.found(discovery::resource_list(&self.served, group, version))
            }
            ["openapi", "v3"] => Ok(kept(&self.documents.openapi_index, parts, || {
                openapi::v3_index(&self.served)
            })),
            ["openapi", "v3", "api", "v1"] => self.openapi("", "v1", parts),
            ["openapi", "v3", "apis", group, version] => self.openapi(group, version, parts),
            ["openapi", "v2"] if asks_for_protobuf(parts) => {
                let encode =
                    || codec::openapi::encode_openapi_v2(&openapi::v2(&self.served)).into();
                let body = self.documents.openapi_v2_protobuf.get_or_init(encode);
                Ok(tagged(codec::openapi::CONTENT_TYPE, body.clone(), parts))
            }
            ["openapi", "v2"] => Ok(kept(&self.documents.openapi_v2, parts, || {
                openapi::v2(&self.served)
            })),
            [".well-known", "openid-configuration"] => Ok(self.issuer_configuration()),
            ["openid", "v1", "jwks"] => Ok(public_keys(
                "application/jwk-set+json",
                self.tokens.key_set(),
            )),
            _ => return None,
        };
        if !matches!(parts.method, Method::GET | Method::HEAD) {
            return Some(Err(Status::method_not_allowed()));
        }
        Some(answer)
    }

    fn root(&self) -> Answer {
        let mut paths = vec!["/api".to_owned(), "/api/v1".to_owned(), "/apis".to_owned()];
        for resource in &self.served {
            if !resource.group.is_empty() {
                paths.push(format!("/apis/{}", resource.group));
                paths.push(format!("/apis/{}/{}", resource.group, resource.version));
            }
        }
        let more = [
            "/.well-known/openid-configuration",
            "/healthz",
            "/livez",
            "/metrics",
            "/openapi/v2",
            "/openapi/v3",
            "/openid/v1/jwks",
            "/readyz",
            "/version",
        ];
        paths.extend(more.map(str::to_owned));
        paths.sort();
        paths.dedup();
        reply::json(StatusCode::OK, &json!({ "paths": paths }))
    }

    /// Who issues ServiceAccount tokens, for whom they are shown to (OpenID Connect Discovery 1.0, section 3).
    fn issuer_configuration(&self) -> Answer {
        let address = match self.config.advertise_address {
            std::net::IpAddr::V4(address) => address.to_string(),
            std::net::IpAddr::V6(address) => format!("[{address}]"),
        };
        let port = self.config.advertise_port;
        let document = json!({
            "issuer": self.tokens.issuer(),
            "jwks_uri": format!("https://{address}:{port}/openid/v1/jwks"),
            "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": self.tokens.algorithms(),
        });
        public_keys("application/json", document)
    }

    fn found(&self, document: Option<Value>) -> Result<Answer, Status> {
        document
            .map(|document| reply::json(StatusCode::OK, &document))
            .ok_or_else(Status::no_such_path)
    }

    /// The OpenAPI v3 document of a group and version. Clients that name its hash, as the index does, may keep it.
    fn openapi(&self, group: &str, version: &str, parts: &Parts) -> Result<Answer, Status> {
        let key = (group.to_owned(), version.to_owned());
        let known = self
            .documents
            .openapi_v3
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&key)
            .cloned();
        let body = match known {
            Some(body) => body,
            None => {
                let document =
                    openapi::v3(&self.served, group, version).ok_or_else(Status::no_such_path)?;
                let body = Bytes::from(document.to_string());
                let mut all = self
                    .documents
                    .openapi_v3
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                all.entry(key).or_insert(body).clone()
            }
        };
        let mut answer = tagged("application/json", body, parts);
        if parts
            .uri
            .query()
            .is_some_and(|query| query.contains("hash="))
        {
            let forever = header::HeaderValue::from_static("public, immutable, max-age=31536000");
            answer.headers_mut().insert(header::CACHE_CONTROL, forever);
        }
        Ok(answer)
    }

    fn groups(&self, parts: &Parts, core: bool) -> Result<Answer, Status> {
        let accept = parts
            .headers
            .get(header::ACCEPT)
            .and_then(|accept| accept.to_str().ok())
            .unwrap_or("");
        let aggregated = accept
            .split(',')
            .take_while(|offer| offer.trim() != "application/json")
            .any(|offer| {
                offer.contains("as=APIGroupDiscoveryList")
                    && offer.contains("v=v2")
                    && !offer.contains("v=v2beta1")
            });
        if aggregated {
            let (body, tag) = self.documents.aggregated[usize::from(core)].get_or_init(|| {
                let body = Bytes::from(discovery::aggregated(&self.served, core).to_string());
                let tag = etag(&body);
                (body, tag)
            });
            let content = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
            let mut answer = tagged_as(content, body.clone(), tag, parts);
            answer
                .headers_mut()
                .insert(header::VARY, header::HeaderValue::from_static("Accept"));
            return Ok(answer);
        }
        let document = if core {
            let address = format!(
                "{}:{}",
                self.config.advertise_address, self.config.advertise_port
            );
            discovery::core_versions(&address)
        } else {
            discovery::group_list(&self.served)
        };
        Ok(reply::json(StatusCode::OK, &document))
    }
}

/// What verifiers of tokens may keep for an hour.
fn public_keys(content_type: &str, document: Value) -> Answer {
    let mut answer = reply::bytes(StatusCode::OK, content_type, document.to_string());
    let hour = header::HeaderValue::from_static("public, max-age=3600");
    answer.headers_mut().insert(header::CACHE_CONTROL, hour);
    answer
}

/// Whether OpenAPI v2 is asked for as protobuf. Clients write `@` before the version, which no media type may have in an
/// answer.
fn asks_for_protobuf(parts: &Parts) -> bool {
    let accept = parts
        .headers
        .get(header::ACCEPT)
        .and_then(|accept| accept.to_str().ok())
        .unwrap_or("");
    accept.starts_with(codec::openapi::MEDIA_TYPE)
}

fn kept(place: &OnceLock<Bytes>, parts: &Parts, make: impl FnOnce() -> Value) -> Answer {
    let body = place
        .get_or_init(|| Bytes::from(make().to_string()))
        .clone();
    tagged("application/json", body, parts)
}

fn etag(body: &[u8]) -> String {
    format!("\"{}\"", hex::encode_upper(Sha256::digest(body)))
}

/// A document with its tag; without its body for a client that has it already.
fn tagged(content_type: &str, body: Bytes, parts: &Parts) -> Answer {
    let tag = etag(&body);
    tagged_as(content_type, body, &tag, parts)
}

fn tagged_as(content_type: &str, body: Bytes, tag: &str, parts: &Parts) -> Answer {
    let known = parts.headers.get(header::IF_NONE_MATCH);
    let unchanged = known.is_some_and(|known| known.as_bytes() == tag.as_bytes());
    let (code, body) = match unchanged {
        true => (StatusCode::NOT_MODIFIED, Bytes::new()),
        false => (StatusCode::OK, body),
    };
    let mut answer = reply::bytes(code, content_type, body);
    if let Ok(tag) = tag.parse() {
        answer.headers_mut().insert(header::ETAG, tag);
    }
    answer
}
