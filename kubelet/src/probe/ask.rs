//! ask: one question to a container: an HTTP request, a TCP connection, a command, a gRPC health check.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http::uri::PathAndQuery;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{
    Container, ExecAction, GRPCAction, HTTPGetAction, LifecycleHandler, Probe,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use prost::Message;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::{DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tonic_prost::ProstCodec;

use crate::runtime::{FailureKind, Runtime};
use crate::task::Scoped;

/// What an HTTP probe reads of an answer at most (upstream's figure).
const BODY_BYTES_MAX: usize = 10 << 10;
/// What of an answer goes into an event.
const SHOWN_BYTES_MAX: usize = 256;

/// A Target is the container that is asked, and how to get at it.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    pub runtime: &'a dyn Runtime,
    pub container_id: &'a str,
    pub container: &'a Container,
    pub pod_ip: &'a str,
}

/// Asks once. The error is what an event shows.
pub async fn check(target: &Target<'_>, probe: &Probe, timeout: Duration) -> Result<(), String> {
    let within = |what: &str| format!("{what} timed out after {}s", timeout.as_secs());
    if let Some(action) = &probe.exec {
        return exec(target, action, timeout).await;
    }
    if let Some(action) = &probe.http_get {
        return tokio::time::timeout(timeout, http_get(target, action))
            .await
            .unwrap_or_else(|_| Err(within("HTTP probe")));
    }
    if let Some(action) = &probe.tcp_socket {
        let port = port_number(&action.port, target.container)?;
        let host = action
            .host
            .as_deref()
            .filter(|h| !h.is_empty())
            .unwrap_or(target.pod_ip);
        let connect = TcpStream::connect((host, port));
        return match tokio::time::timeout(timeout, connect).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(format!("dial tcp {host}:{port}: {error}")),
            Err(_) => Err(within("TCP probe")),
        };
    }
    if let Some(action) = &probe.grpc {
        return tokio::time::timeout(timeout, grpc(target, action))
            .await
            .unwrap_or_else(|_| Err(within("gRPC probe")));
    }
    Err("the probe has no action".to_owned())
}

/// Runs a lifecycle hook to its end.
pub async fn run_handler(
    target: &Target<'_>,
    handler: &LifecycleHandler,
    timeout: Duration,
) -> Result<(), String> {
    if let Some(action) = &handler.exec {
        return exec(target, action, timeout).await;
    }
    if let Some(action) = &handler.http_get {
        let late = |_| Err(format!("HTTP hook timed out after {}s", timeout.as_secs()));
        return tokio::time::timeout(timeout, http_get(target, action))
            .await
            .unwrap_or_else(late);
    }
    if let Some(action) = &handler.sleep {
        let asked = Duration::from_secs(u64::try_from(action.seconds).unwrap_or(0));
        tokio::time::sleep(asked.min(timeout)).await;
    }
    Ok(())
}

async fn exec(target: &Target<'_>, action: &ExecAction, timeout: Duration) -> Result<(), String> {
    let command = action.command.clone().unwrap_or_default();
    let seconds = i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX).max(1);
    match target
        .runtime
        .exec(target.container_id, command, seconds)
        .await
    {
        Ok(answer) if answer.exit_code == 0 => Ok(()),
        Ok(answer) => Err(format!(
            "exit code {}: {}",
            answer.exit_code,
            shown(&answer.output)
        )),
        Err(error) if error.kind() == FailureKind::DeadlineExceeded => {
            Err(format!("command timed out after {seconds}s"))
        }
        Err(error) => Err(error.to_string()),
    }
}

fn shown(text: &str) -> String {
    text.trim().chars().take(SHOWN_BYTES_MAX).collect()
}

/// The number of a port that may be named.
fn port_number(port: &IntOrString, container: &Container) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => {
            let named = container
                .ports
                .iter()
                .flatten()
                .find(|p| p.name.as_ref() == Some(name));
            named
                .map(|p| p.container_port)
                .or_else(|| name.parse().ok())
        }
    };
    number
        .and_then(|n| u16::try_from(n).ok())
        .filter(|n| *n > 0)
        .ok_or_else(|| format!("container has no port {port:?}"))
}

/// A GET that succeeds with a status from 200 to 399. Certificates are not verified: a probe asks whether something
/// answers, and has no way to know which name and authority it should have.
pub async fn http_get(target: &Target<'_>, action: &HTTPGetAction) -> Result<(), String> {
    let port = port_number(&action.port, target.container)?;
    let host = action
        .host
        .as_deref()
        .filter(|h| !h.is_empty())
        .unwrap_or(target.pod_ip);
    let path = action
        .path
        .as_deref()
        .filter(|p| !p.is_empty())
        .unwrap_or("/");
    let path = if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("/{path}")
    };
    let mut request = Request::get(&path);
    let mut named = false;
    for header in action.http_headers.iter().flatten() {
        named |= header.name.eq_ignore_ascii_case("host");
        request = request.header(&header.name, &header.value);
    }
    if !named {
        let authority = if host.contains(':') {
            format!("[{host}]:{port}")
        } else {
            format!("{host}:{port}")
        };
        request = request.header("Host", authority);
    }
    let request = request
        .header("User-Agent", "kube-probe/1.36")
        .header("Accept", "*/*")
        .header("Connection", "close");
    let request = request
        .body(Empty::<Bytes>::new())
        .map_err(|error| format!("cannot make a request: {error}"))?;
    let failed = |error: std::io::Error| format!("Get \"{path}\": dial tcp {host}:{port}: {error}");
    let stream = TcpStream::connect((host, port)).await.map_err(failed)?;
    if action
        .scheme
        .as_deref()
        .is_some_and(|s| s.eq_ignore_ascii_case("https"))
    {
        let name =
            ServerName::try_from(host.to_owned()).map_err(|error| format!("{host}: {error}"))?;
        let stream = tokio_rustls::TlsConnector::from(Arc::new(unverified()))
            .connect(name, stream)
            .await
            .map_err(failed)?;
        ask_http(stream, request).await
    } else {
        ask_http(stream, request).await
    }
}

async fn ask_http(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Empty<Bytes>>,
) -> Result<(), String> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| e.to_string())?;
    // Ends with this function: no connection outlives its probe.
    let _connection = Scoped::spawn(async move {
        let _ = connection.await;
    });
    let answer = sender
        .send_request(request)
        .await
        .map_err(|e| e.to_string())?;
    let status = answer.status();
    if status.is_success() || status.is_redirection() {
        return Ok(());
    }
    let body = Limited::new(answer.into_body(), BODY_BYTES_MAX)
        .collect()
        .await;
    let body = body
        .map(|b| String::from_utf8_lossy(&b.to_bytes()).into_owned())
        .unwrap_or_default();
    Err(format!(
        "HTTP probe failed with statuscode: {} {}",
        status.as_u16(),
        shown(&body)
    )
    .trim_end()
    .to_owned())
}

fn unverified() -> rustls::ClientConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions();
    #[expect(
        clippy::expect_used,
        reason = "the ring provider supports TLS 1.2 and 1.3; nothing at run time changes that"
    )]
    let builder = builder.expect("ring supports the default protocol versions");
    builder
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth()
}

/// Takes any certificate, but checks that its owner holds the key.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            cert,
            dss,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// grpc.health.v1.HealthCheckRequest and -Response.
#[derive(Clone, PartialEq, Message)]
struct HealthRequest {
    #[prost(string, tag = "1")]
    service: String,
}

#[derive(Clone, PartialEq, Message)]
struct HealthResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

const SERVING: i32 = 1;

async fn grpc(target: &Target<'_>, action: &GRPCAction) -> Result<(), String> {
    let host = if target.pod_ip.contains(':') {
        format!("[{}]", target.pod_ip)
    } else {
        target.pod_ip.to_owned()
    };
    let endpoint = tonic::transport::Endpoint::try_from(format!("http://{host}:{}", action.port))
        .map_err(|e| e.to_string())?;
    let channel = endpoint
        .connect()
        .await
        .map_err(|e| format!("cannot connect to {host}:{}: {e}", action.port))?;
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.map_err(|e| e.to_string())?;
    let request = tonic::Request::new(HealthRequest {
        service: action.service.clone().unwrap_or_default(),
    });
    let codec: ProstCodec<HealthRequest, HealthResponse> = ProstCodec::default();
    let answer = client
        .unary(
            request,
            PathAndQuery::from_static("/grpc.health.v1.Health/Check"),
            codec,
        )
        .await;
    match answer.map(|a| a.into_inner().status) {
        Ok(SERVING) => Ok(()),
        Ok(status) => Err(format!(
            "service unhealthy (responded with status {status})"
        )),
        Err(status) => Err(status.message().to_owned()),
    }
}
