//! certificates: what the kubelet shows as a client and serves with, asked of the cluster by CertificateSigningRequests and
//! renewed before it expires (Kubernetes' TLS bootstrap).

mod held;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequest, CertificateSigningRequestSpec,
};
use kube::api::{ObjectMeta, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::wait::await_condition;
use kube::{Api, Client};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};

pub use held::{Held, Life, write_private};

use crate::authorities::Authorities;
use crate::backoff::Quick;
use crate::config::Config;

const CLIENT_SIGNER: &str = "kubernetes.io/kube-apiserver-client-kubelet";
const SERVING_SIGNER: &str = "kubernetes.io/kubelet-serving";
/// A request that nobody has decided about by then is made anew.
const DECISION_TIMEOUT: Duration = Duration::from_secs(15 * 60);
/// How often it is looked whether a certificate is due, or its file was taken away.
const LOOK_PERIOD: Duration = Duration::from_secs(30);

/// A CertificateError is why there is no new certificate.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("the certificate is not usable: {0}")]
    Unusable(String),
    #[error("cannot write {path}: {source}")]
    Write {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot use {path}: {reason}")]
    Kubeconfig { path: PathBuf, reason: String },
    #[error("cannot make a request for a certificate: {0}")]
    Make(#[from] rcgen::Error),
    #[error("cannot ask for a certificate: {0}")]
    Ask(Box<kube::Error>),
    #[error("the request {name} for a certificate was {how}: {reason}")]
    Refused {
        name: String,
        how: String,
        reason: String,
    },
    #[error("nobody has decided about the request {0} for a certificate")]
    Undecided(String),
}

/// The Certificates of one node.
#[derive(Debug, Clone)]
pub struct Certificates {
    pub client: Arc<Held>,
    pub serving: Arc<Held>,
    node: String,
    hosts: Vec<SanType>,
}

/// What one certificate is for.
struct Purpose {
    signer: &'static str,
    usage: &'static str,
}

const AS_CLIENT: Purpose = Purpose {
    signer: CLIENT_SIGNER,
    usage: "client auth",
};
const AS_SERVER: Purpose = Purpose {
    signer: SERVING_SIGNER,
    usage: "server auth",
};

impl Certificates {
    /// Reads what is kept in `dir`, which is made.
    ///
    /// # Errors
    /// When the folder cannot be made, or the node's name cannot be in a certificate.
    pub fn read(dir: &Path, config: &Config) -> Result<Self, CertificateError> {
        std::fs::create_dir_all(dir).map_err(|source| CertificateError::Write {
            path: dir.to_owned(),
            source,
        })?;
        let name = SanType::DnsName(config.node_name.as_str().try_into()?);
        let addresses = config.node_ips.iter().copied().map(SanType::IpAddress);
        Ok(Self {
            client: Arc::new(Held::read(dir.join("kubelet-client.pem"))),
            serving: Arc::new(Held::read(dir.join("kubelet-serving.pem"))),
            node: config.node_name.clone(),
            hosts: [name].into_iter().chain(addresses).collect(),
        })
    }

    /// Gets the first client certificate by the token of the kubeconfig `bootstrap`, and writes the kubeconfig of the node.
    /// Tries for as long as it takes.
    ///
    /// # Errors
    /// When the file is not usable; what the server says is tried again.
    pub async fn bootstrap(
        &self,
        bootstrap: &Path,
        kubeconfig: &Path,
    ) -> Result<(), CertificateError> {
        let unusable = |reason: String| CertificateError::Kubeconfig {
            path: bootstrap.to_owned(),
            reason,
        };
        let shown = Kubeconfig::read_from(bootstrap).map_err(|e| unusable(e.to_string()))?;
        let options = KubeConfigOptions::default();
        let config = kube::Config::from_custom_kubeconfig(shown.clone(), &options).await;
        let config = config.map_err(|error| unusable(error.to_string()))?;
        let client = Client::try_from(config).map_err(|error| unusable(error.to_string()))?;
        tracing::info!("asking for the node's first certificate");
        let mut retry = Quick::default();
        while let Err(error) = self.renew(&client, &self.client, &AS_CLIENT).await {
            tracing::warn!(%error, "no certificate for this node yet; trying again");
            tokio::time::sleep(retry.wait()).await;
        }
        let own = own_kubeconfig(shown, &self.client.path).map_err(unusable)?;
        let written = write_private(kubeconfig, own.as_bytes());
        written.map_err(|source| CertificateError::Write {
            path: kubeconfig.to_owned(),
            source,
        })
    }

    /// Renews both certificates for ever, each before it expires; the first for serving is asked for at once. When the cluster says that
    /// another authority signs now, that is a reason too.
    pub async fn keep(self, client: Client, authorities: Option<Arc<Authorities>>) {
        let of_cluster = authorities.as_deref();
        let both = [&*self.client, &*self.serving];
        let follow = async {
            if let Some(authorities) = of_cluster {
                tokio::join!(authorities.follow(client.clone()), authorities.settle(both));
            }
        };
        tokio::join!(
            self.keep_one(&client, &self.client, &AS_CLIENT, of_cluster),
            self.keep_one(&client, &self.serving, &AS_SERVER, of_cluster),
            follow,
        );
    }

    async fn keep_one(
        &self,
        client: &Client,
        held: &Held,
        purpose: &Purpose,
        authorities: Option<&Authorities>,
    ) {
        let mut retry = Quick::default();
        let mut changes = authorities.map(Authorities::changes);
        loop {
            let is_of_before = authorities.zip(held.leaf());
            let is_of_before = is_of_before.is_some_and(|(now, leaf)| !now.has_signed(&leaf));
            let rest = held.rest(&self.node, Timestamp::now());
            if !rest.is_zero() && !is_of_before {
                retry.clear();
                let changed = async {
                    match &mut changes {
                        Some(changes) => drop(changes.changed().await),
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    () = tokio::time::sleep(rest.min(LOOK_PERIOD)) => {}
                    () = changed => {}
                }
                continue;
            }
            match self.renew(client, held, purpose).await {
                Ok(()) => {
                    tracing::info!(signer = purpose.signer, "a new certificate is used");
                    let signed = authorities.zip(held.leaf());
                    if signed.is_some_and(|(now, leaf)| !now.has_signed(&leaf)) {
                        // Whoever signs has yet to hear of it.
                        tokio::time::sleep(retry.wait()).await;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "no new certificate; trying again");
                    tokio::time::sleep(retry.wait()).await;
                }
            }
        }
    }

    async fn renew(
        &self,
        client: &Client,
        held: &Held,
        purpose: &Purpose,
    ) -> Result<(), CertificateError> {
        let key = KeyPair::generate()?;
        let request = self.request(&key, purpose)?;
        let api: Api<CertificateSigningRequest> = Api::all(client.clone());
        let failed = |error: kube::Error| CertificateError::Ask(Box::new(error));
        let made = api.create(&PostParams::default(), &request).await;
        let name = made.map_err(failed)?.metadata.name.unwrap_or_default();
        let decided = await_condition(api, &name, |request: Option<&CertificateSigningRequest>| {
            request.is_none_or(|request| outcome(request).is_some())
        });
        let decided = tokio::time::timeout(DECISION_TIMEOUT, decided).await;
        let request = match decided {
            Ok(Ok(Some(request))) => request,
            Ok(Err(error)) => {
                return Err(CertificateError::Unusable(format!(
                    "watching {name}: {error}"
                )));
            }
            Ok(Ok(None)) | Err(_) => return Err(CertificateError::Undecided(name)),
        };
        match outcome(&request) {
            Some(Ok(certificate)) => held.replace(&certificate, &key.serialize_pem()),
            Some(Err((how, reason))) => Err(CertificateError::Refused { name, how, reason }),
            None => Err(CertificateError::Undecided(name)),
        }
    }

    fn request(
        &self,
        key: &KeyPair,
        purpose: &Purpose,
    ) -> Result<CertificateSigningRequest, CertificateError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::OrganizationName, "system:nodes");
        let user = format!("system:node:{}", self.node);
        params.distinguished_name.push(DnType::CommonName, user);
        if purpose.signer == SERVING_SIGNER {
            params.subject_alt_names = self.hosts.clone();
        }
        let pem = params.serialize_request(key)?.pem()?;
        Ok(CertificateSigningRequest {
            metadata: ObjectMeta {
                generate_name: Some("csr-".to_owned()),
                ..Default::default()
            },
            spec: CertificateSigningRequestSpec {
                request: ByteString(pem.into_bytes()),
                signer_name: purpose.signer.to_owned(),
                usages: Some(vec![
                    "digital signature".to_owned(),
                    purpose.usage.to_owned(),
                ]),
                ..Default::default()
            },
            status: None,
        })
    }
}

/// The certificate, or how it was refused and why; None while nothing is decided.
fn outcome(request: &CertificateSigningRequest) -> Option<Result<String, (String, String)>> {
    let status = request.status.as_ref()?;
    let refused = status.conditions.iter().flatten();
    let refused = refused
        .into_iter()
        .find(|condition| matches!(condition.type_.as_str(), "Denied" | "Failed"));
    if let Some(condition) = refused {
        let reason = condition.message.clone().unwrap_or_default();
        return Some(Err((condition.type_.to_lowercase(), reason)));
    }
    let pem = status
        .certificate
        .as_ref()
        .filter(|pem| !pem.0.is_empty())?;
    Some(Ok(String::from_utf8_lossy(&pem.0).into_owned()))
}

/// The kubeconfig `bootstrap` with the certificate in place of its token.
fn own_kubeconfig(bootstrap: Kubeconfig, pem: &Path) -> Result<String, String> {
    let cluster = bootstrap.clusters.into_iter().next();
    let cluster = cluster.and_then(|named| named.cluster);
    let cluster = cluster.ok_or("it names no cluster")?;
    let server = cluster.server.ok_or("it names no server")?;
    let ca = match (
        cluster.certificate_authority_data,
        cluster.certificate_authority,
    ) {
        (Some(data), _) => data,
        (None, Some(path)) => {
            let pem = std::fs::read(&path).map_err(|error| format!("{path}: {error}"))?;
            BASE64_STANDARD.encode(pem)
        }
        (None, None) => return Err("it names no authority".to_owned()),
    };
    let name = "keelway";
    let own = serde_json::json!({
        "apiVersion": "v1", "kind": "Config", "current-context": name,
        "clusters": [{"name": name, "cluster": {"server": server, "certificate-authority-data": ca}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        "users": [{"name": name, "user": {"client-certificate": pem, "client-key": pem}}],
    });
    // JSON is YAML, which kubeconfigs are read as.
    Ok(format!("{own:#}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nodes_kubeconfig_leads_to_the_same_server_without_the_token() {
        let bootstrap = serde_json::json!({
            "clusters": [{"name": "c", "cluster": {"server": "https://10.0.0.1:6443", "certificate-authority-data": "Y2E="}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "users": [{"name": "u", "user": {"token": "abcdef.0123456789abcdef"}}],
            "current-context": "c",
        });
        let bootstrap: Kubeconfig = serde_json::from_value(bootstrap).unwrap();
        let text = own_kubeconfig(bootstrap, Path::new("/pki/client.pem")).unwrap();
        assert!(!text.contains("0123456789abcdef"));
        let own = Kubeconfig::from_yaml(&text).unwrap();
        let cluster = own.clusters[0].cluster.clone().unwrap();
        assert_eq!(cluster.server.as_deref(), Some("https://10.0.0.1:6443"));
        let user = own.auth_infos[0].auth_info.clone().unwrap();
        assert_eq!(user.client_key.as_deref(), Some("/pki/client.pem"));
    }
}
