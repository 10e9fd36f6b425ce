//! Connections to an API server, each as lean as can be: what the load costs is taken from the processors that it shares with what
//! is measured, and a general client costs more than our server.

use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use http::{HeaderValue, Request, Response, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use kube::Config;
use kube::client::ConfigExt as _;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// What can be sent on a connection.
pub type Connection = SendRequest<Full<Bytes>>;

/// Where a server is, and as whom it is asked: by a certificate, or by a token.
pub struct Connector {
    tls: TlsConnector,
    name: ServerName<'static>,
    address: (String, u16),
    authority: HeaderValue,
    token: Option<HeaderValue>,
}

impl Connector {
    pub fn new(config: &Config) -> Result<Self> {
        let user = &config.auth_info;
        ensure!(
            user.exec.is_none() && user.auth_provider.is_none() && user.token_file.is_none(),
            "the kubeconfig's user is to have a certificate or a token of its own"
        );
        let (url, mut tls) = (&config.cluster_url, config.rustls_client_config()?);
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        let host = url.host().context("the server's address has no host")?;
        let host = host.trim_matches(['[', ']']);
        let name = config.tls_server_name.as_deref().unwrap_or(host).to_owned();
        let authority = url
            .authority()
            .context("the server's address has no host")?;
        // The only way at it that needs no type of another crate.
        let user = serde_json::to_value(user)?;
        let token = user["token"]
            .as_str()
            .map(|token| format!("Bearer {token}"));
        Ok(Self {
            tls: TlsConnector::from(Arc::new(tls)),
            name: ServerName::try_from(name)?,
            address: (host.to_owned(), url.port_u16().unwrap_or(443)),
            authority: authority.as_str().parse()?,
            token: token.map(|token| token.parse()).transpose()?,
        })
    }

    pub async fn open(&self) -> Result<Connection> {
        let (host, port) = (self.address.0.as_str(), self.address.1);
        let stream = TcpStream::connect((host, port)).await?;
        stream.set_nodelay(true)?;
        let stream = self.tls.connect(self.name.clone(), stream).await?;
        let (connection, driver) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(async move {
            // Whoever waits for an answer is told of the error.
            let _ = driver.await;
        });
        Ok(connection)
    }

    /// Asks on a connection; the connection is of use again when the answer has been read.
    pub async fn ask(
        &self,
        connection: &mut Connection,
        mut request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>> {
        let headers = request.headers_mut();
        headers.insert(header::HOST, self.authority.clone());
        if let Some(token) = &self.token {
            headers.insert(header::AUTHORIZATION, token.clone());
        }
        Ok(connection.send_request(request).await?)
    }
}
