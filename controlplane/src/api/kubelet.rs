//! How kubelets are reached: where a node's listens, and over TLS with the API server's own client certificate.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::Api;
use super::fields::Fields;
use super::listener::{self, TlsError};
use super::status::{Status, Subject};
use super::unverified::any_certificate;
use crate::pki::{Following, Reloading, Source};

const KUBELET_PORT: i64 = 10250;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The API server's credentials towards kubelets.
pub struct Kubelets {
    verified: Arc<Following<ClientConfig>>,
    unverified: TlsConnector,
}

/// Where a node's kubelet listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KubeletAddress {
    pub address: IpAddr,
    pub port: u16,
}

impl std::fmt::Display for KubeletAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::net::SocketAddr::new(self.address, self.port).fmt(f)
    }
}

impl Kubelets {
    pub fn new(pki_dir: &Path) -> Result<Self, TlsError> {
        let own = Reloading::new(Source::files(pki_dir, "apiserver-kubelet-client"))?;
        let unverified = any_certificate().with_client_cert_resolver(own.clone());
        let ca = pki_dir.join("ca.crt");
        let verified = Following::new(vec![ca.clone()], move || {
            let verified = ClientConfig::builder().with_root_certificates(listener::roots(&ca)?);
            Ok::<_, TlsError>(verified.with_client_cert_resolver(own.clone()))
        })?;
        Ok(Self {
            verified,
            unverified: TlsConnector::from(Arc::new(unverified)),
        })
    }

    /// Connects to a kubelet. Not to verify its certificate is for a caller who says so (`insecureSkipTLSVerifyBackend`).
    pub async fn connect(
        &self,
        kubelet: KubeletAddress,
        verify: bool,
    ) -> Result<TlsStream<TcpStream>, Status> {
        let tls = match verify {
            true => TlsConnector::from(self.verified.current()),
            false => self.unverified.clone(),
        };
        let failed = |why: String| {
            Status::new(
                StatusCode::BAD_GATEWAY,
                "ServiceUnavailable",
                format!("cannot reach the kubelet at {kubelet}: {why}"),
            )
        };
        let connecting = async {
            let stream = TcpStream::connect((kubelet.address, kubelet.port)).await?;
            stream.set_nodelay(true)?;
            tls.connect(ServerName::IpAddress(kubelet.address.into()), stream)
                .await
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(_) => Err(failed("it does not answer".to_owned())),
        }
    }
}

impl Api {
    /// Where the kubelet of a node listens.
    pub(super) async fn kubelet_address(&self, node: &str) -> Result<KubeletAddress, Status> {
        let found = self.lookup("", "nodes", None, node).await?;
        let subject = Subject {
            group: "",
            resource: "nodes",
            name: node,
        };
        let found = found.ok_or_else(|| Status::not_found(subject))?;
        let address = found
            .items("/status/addresses")
            .iter()
            .find(|address| address.text("/type") == "InternalIP")
            .and_then(|address| address.text("/address").parse().ok())
            .ok_or_else(|| Status::internal(format!("node {node} has no internal address yet")))?;
        let port = match found.int("/status/daemonEndpoints/kubeletEndpoint/Port") {
            0 => KUBELET_PORT,
            port => port,
        };
        let port = u16::try_from(port).map_err(Status::internal)?;
        Ok(KubeletAddress { address, port })
    }
}
