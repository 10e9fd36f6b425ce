//! `proxy` of pods, services and nodes: requests that go on to what listens there.
//!
//! The connection is made by this server, so whatever it can reach may be asked for; addresses that only have meaning on this
//! machine are refused. Certificates of pods are signed by nobody we know and are not checked, as upstream.

mod links;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http::request::Parts;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use rand::seq::IndexedRandom;
use rustls::pki_types::ServerName;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use links::Links;

use super::fields::{self, Fields};
use super::reply::{self, Answer};
use super::request::Target;
use super::status::Status;
use super::unverified::any_certificate;
use super::{Api, Call, forward, object};
use crate::registry;
use crate::selector::LabelSelector;
use crate::store::Range;

/// The largest page of which links are rewritten; a larger one is an error, as it could not be passed on unchanged either.
const PAGE_BYTES_MAX: usize = 32 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Any connection that bytes can be read from and written to.
trait Connection: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Connection for T {}

/// What a path names between `services/` and `/proxy`: `[http:|https:]name[:port]`.
#[derive(Debug, PartialEq, Eq)]
struct Named<'a> {
    tls: bool,
    name: &'a str,
    /// A number, a name, or nothing.
    port: &'a str,
}

impl<'a> Named<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let parts: Vec<&str> = text.split(':').collect();
        let (scheme, name, port) = match parts[..] {
            [name] => ("", name, ""),
            [name, port] => ("", name, port),
            [scheme, name, port] => (scheme, name, port),
            _ => return None,
        };
        let tls = match scheme {
            "" | "http" => false,
            "https" => true,
            _ => return None,
        };
        (!name.is_empty()).then_some(Self { tls, name, port })
    }
}

impl Api {
    pub(super) async fn proxy(
        &self,
        call: Call,
        parts: Parts,
        upgrade: Option<OnUpgrade>,
        body: Incoming,
    ) -> Result<Answer, Status> {
        let target = &call.target;
        let plural = target.resource.plural;
        let upgrades = forward::asks_for_upgrade(&parts.headers);
        let reads = matches!(parts.method, Method::GET | Method::HEAD);
        if target.rest.is_empty() && !upgrades && reads {
            return Ok(with_slash(&parts.uri));
        }
        let named = Named::parse(target.object_name()?).ok_or_else(|| {
            let kind = plural.trim_end_matches('s');
            let name = target.name.as_deref().unwrap_or_default();
            Status::bad_request(format!("invalid {kind} request {name:?}"))
        })?;
        let target = Target {
            name: Some(named.name.to_owned()),
            ..target.clone()
        };
        let object = target.decode(&self.record(&target).await?)?;
        let (connection, peer): (Box<dyn Connection>, String) = match plural {
            "pods" => {
                self.dial(pod_address(&object, named.port)?, named.tls)
                    .await?
            }
            "services" => {
                let slices = self.slices(&target).await?;
                let address = service_address(&object, &slices, named.port)?;
                self.dial(address, named.tls).await?
            }
            "nodes" => {
                let kubelet = self.kubelet_address(named.name).await?;
                let port = port_number(named.port)?;
                if port.is_none_or(|port| port == kubelet.port) {
                    let connection = self.kubelets.connect(kubelet, true).await?;
                    (Box::new(connection), format!("the kubelet at {kubelet}"))
                } else {
                    let address = (kubelet.address, port.unwrap_or_default()).into();
                    self.dial(address, named.tls).await?
                }
            }
            _ => return Err(Status::method_not_allowed()),
        };
        let prefix = parts.uri.path().strip_suffix(target.rest.as_str());
        let prefix = prefix.unwrap_or_default().to_owned();
        let request = onward(parts, body, &target.rest, upgrades)?;
        let host = request.headers().get(header::HOST);
        let authority = host.and_then(|host| host.to_str().ok()).unwrap_or("");
        let links = Links {
            prefix,
            authority: authority.to_owned(),
        };
        let response = forward::exchange(connection, request, &peer).await?;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return forward::pass_back(response, upgrade, &self.stop);
        }
        let mut answer = lead_back(response, &links).await?;
        forward::strip_connection(answer.headers_mut());
        Ok(answer)
    }

    async fn dial(
        &self,
        address: SocketAddr,
        tls: bool,
    ) -> Result<(Box<dyn Connection>, String), Status> {
        if !is_proxyable(address.ip()) {
            return Err(Status::bad_request(format!(
                "address not allowed: {}",
                address.ip()
            )));
        }
        let failed = |why: &dyn std::fmt::Display| {
            Status::unavailable(format!("error trying to reach service: {address}: {why}"))
        };
        let connecting = async {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let connection: Box<dyn Connection> = if tls {
                let name = ServerName::IpAddress(address.ip().into());
                let connector =
                    TlsConnector::from(Arc::new(any_certificate().with_no_client_auth()));
                Box::new(connector.connect(name, stream).await?)
            } else {
                Box::new(stream)
            };
            Ok::<_, std::io::Error>(connection)
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(connection)) => Ok((connection, address.to_string())),
            Ok(Err(error)) => Err(failed(&error)),
            Err(_) => Err(failed(&"it does not answer")),
        }
    }

    /// The EndpointSlices of a service.
    async fn slices(&self, service: &Target) -> Result<Vec<Value>, Status> {
        let resource = registry::resource("discovery.k8s.io", "v1", "endpointslices")
            .ok_or_else(|| Status::internal("EndpointSlices are not known"))?;
        let name = service.object_name()?;
        let selector = LabelSelector::parse(&format!("kubernetes.io/service-name={name}"))
            .map_err(Status::internal)?;
        let prefix = object::prefix(resource, service.namespace.as_deref());
        let page = self.store.list(Range::all(&prefix)).await?;
        let mut slices = Vec::new();
        for record in &page.records {
            let slice = object::decode(record, resource.kind, &resource.api_version())?;
            if selector.matches(&slice) {
                slices.push(slice);
            }
        }
        Ok(slices)
    }
}

/// A path without its last slash leads to one with it: links in what is served there are relative to it.
fn with_slash(uri: &Uri) -> Answer {
    let query = uri
        .query()
        .map_or(String::new(), |query| format!("?{query}"));
    let mut answer = reply::text(StatusCode::MOVED_PERMANENTLY, "");
    if let Ok(location) = format!("{}/{query}", uri.path()).parse() {
        answer.headers_mut().insert(header::LOCATION, location);
    }
    answer
}

fn port_number(port: &str) -> Result<Option<u16>, Status> {
    if port.is_empty() {
        return Ok(None);
    }
    let number = port.parse().ok().filter(|number| *number > 0);
    number
        .map(Some)
        .ok_or_else(|| Status::bad_request(format!("invalid port {port:?}")))
}

/// Where a pod is asked: at its first port, unless one is named or numbered.
fn pod_address(pod: &Value, port: &str) -> Result<SocketAddr, Status> {
    let address = pod.text("/status/podIP").parse::<IpAddr>().map_err(|_| {
        let name = fields::name(pod);
        Status::unavailable(format!("pod {name:?} has no address yet"))
    })?;
    let containers = pod.items("/spec/containers").iter();
    let mut ports = containers.flat_map(|container| container.items("/ports"));
    let declared = if port.is_empty() {
        ports.next()
    } else {
        ports.find(|declared| declared.text("/name") == port)
    };
    let declared = declared.and_then(|port| u16::try_from(port.int("/containerPort")).ok());
    let number = match declared {
        Some(number) => number,
        None => port_number(port)?.unwrap_or(80),
    };
    Ok((address, number).into())
}

/// Where a service is asked: at one of its ready endpoints. The port may be left out when there is but one without a name.
fn service_address(service: &Value, slices: &[Value], port: &str) -> Result<SocketAddr, Status> {
    let name = fields::name(service);
    let none = || Status::unavailable(format!("no endpoints available for service {name:?}"));
    let port_name = match port.parse::<i64>() {
        Ok(number) => {
            let ports = service.items("/spec/ports").iter();
            let mut matching = ports.filter(|declared| declared.int("/port") == number);
            let declared = matching.next().ok_or_else(|| {
                Status::unavailable(format!(
                    "no service port {number} found for service {name:?}"
                ))
            })?;
            declared.text("/name")
        }
        Err(_) => port,
    };
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for slice in slices {
        let ports = slice.items("/ports").iter();
        let mut matching = ports.filter(|port| port.text("/name") == port_name);
        let Some(port) = matching.next().map(|port| port.int("/port")) else {
            continue;
        };
        let Ok(port) = u16::try_from(port) else {
            continue;
        };
        for endpoint in slice.items("/endpoints") {
            // An endpoint that does not say is ready (EndpointConditions).
            let ready = endpoint.pointer("/conditions/ready");
            if ready.and_then(Value::as_bool) == Some(false) {
                continue;
            }
            let first = endpoint.items("/addresses").first();
            let address = first
                .and_then(Value::as_str)
                .and_then(|text| text.parse::<IpAddr>().ok());
            addresses.extend(address.map(|address| SocketAddr::new(address, port)));
        }
    }
    addresses.choose(&mut rand::rng()).copied().ok_or_else(none)
}

/// Whether an address means the same to everybody.
fn is_proxyable(address: IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    !(address.is_loopback() || address.is_unspecified() || address.is_multicast() || link_local)
}

/// The request as the other side gets it.
fn onward(
    parts: Parts,
    body: Incoming,
    rest: &str,
    upgrades: bool,
) -> Result<Request<Incoming>, Status> {
    let path = if rest.is_empty() { "/" } else { rest };
    let path = match parts.uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    let mut headers = forward::request_headers(&parts.headers, upgrades);
    // Links are rewritten in pages that come as they are.
    headers.remove(header::ACCEPT_ENCODING);
    let host = parts.headers.get(header::HOST).cloned().or_else(|| {
        // HTTP/2 has it in the address.
        HeaderValue::from_str(parts.uri.authority()?.as_str()).ok()
    });
    if let Some(host) = host {
        headers.insert(header::HOST, host.clone());
        headers.insert("x-forwarded-host", host);
    }
    headers.insert("x-forwarded-proto", HeaderValue::from_static("https"));
    if let Ok(uri) = parts.uri.path().parse() {
        headers.insert("x-forwarded-uri", uri);
    }
    let uri = path
        .parse::<Uri>()
        .map_err(|error| Status::bad_request(format!("the path cannot be passed on: {error}")))?;
    let mut request = Request::new(body);
    *request.method_mut() = parts.method;
    *request.uri_mut() = uri;
    *request.headers_mut() = headers;
    Ok(request)
}

/// The answer with its links led through the proxy: its redirection, and those of an HTML page.
async fn lead_back(response: Response<Incoming>, links: &Links) -> Result<Answer, Status> {
    let (mut head, body) = response.into_parts();
    let text = |name: HeaderName| {
        let value = head.headers.get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or("").to_owned()
    };
    let below = links.below(&text(header::LOCATION));
    let is_page = text(header::CONTENT_TYPE).starts_with("text/html")
        && !head.headers.contains_key(header::CONTENT_ENCODING);
    if let Some(value) = below.and_then(|below| below.parse().ok()) {
        head.headers.insert(header::LOCATION, value);
    }
    if !is_page {
        let body = body.map_err(Into::into).boxed_unsync();
        return Ok(Response::from_parts(head, body));
    }
    let page = Limited::new(body, PAGE_BYTES_MAX).collect().await;
    let page = page.map_err(|error| Status::internal(format!("reading a page: {error}")))?;
    let page = links.rewrite(&page.to_bytes());
    // A HEAD has the length of what a GET would bring, which is not known without it.
    head.headers.remove(header::CONTENT_LENGTH);
    Ok(Response::from_parts(head, reply::full(page)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn names_may_have_a_scheme_and_a_port() {
        let named = |tls, name, port| Some(Named { tls, name, port });
        for (text, expected) in [
            ("web", named(false, "web", "")),
            ("web:8080", named(false, "web", "8080")),
            ("https:web:", named(true, "web", "")),
            ("http:web:www", named(false, "web", "www")),
            ("ftp:web:21", None),
            (":80", None),
            ("a:b:c:d", None),
        ] {
            assert_eq!(Named::parse(text), expected, "{text}");
        }
    }

    #[test]
    fn a_pod_is_asked_at_its_first_port_or_the_one_given() {
        let pod = json!({"metadata": {"name": "p"}, "status": {"podIP": "10.0.0.7"}, "spec": {"containers": [
            {"name": "quiet"}, {"name": "c", "ports": [{"containerPort": 8080}, {"name": "www", "containerPort": 8081}]}]}});
        for (port, expected) in [
            ("", "10.0.0.7:8080"),
            ("www", "10.0.0.7:8081"),
            ("9", "10.0.0.7:9"),
        ] {
            let address = pod_address(&pod, port).expect("an address");
            assert_eq!(address.to_string(), expected, "{port}");
        }
        assert_eq!(pod_address(&pod, "no").expect_err("unknown").code, 400);
        let unplaced = json!({"metadata": {"name": "p"}});
        assert_eq!(pod_address(&unplaced, "").expect_err("nowhere").code, 503);
    }

    #[test]
    fn a_service_is_asked_at_a_ready_endpoint_of_the_port() {
        let service = json!({"metadata": {"name": "web"}, "spec": {"ports": [
            {"name": "www", "port": 80, "targetPort": 8080}, {"name": "tls", "port": 443}]}});
        let slices = [
            json!({"ports": [{"name": "www", "port": 8080}, {"name": "tls", "port": 8443}], "endpoints": [
            {"addresses": ["10.0.0.1"], "conditions": {"ready": false}}, {"addresses": ["10.0.0.2"]}]}),
        ];
        for (port, expected) in [
            ("80", "10.0.0.2:8080"),
            ("www", "10.0.0.2:8080"),
            ("tls", "10.0.0.2:8443"),
        ] {
            let address = service_address(&service, &slices, port).expect("an address");
            assert_eq!(address.to_string(), expected, "{port}");
        }
        for (port, message) in [
            ("81", r#"no service port 81 found for service "web""#),
            ("", r#"no endpoints available for service "web""#),
        ] {
            let refused = service_address(&service, &slices, port).expect_err("unknown");
            assert_eq!(
                (refused.code.as_u16(), refused.message.as_str()),
                (503, message)
            );
        }
    }

    #[test]
    fn addresses_of_this_machine_alone_are_refused() {
        for address in [
            "127.0.0.1",
            "::1",
            "169.254.1.1",
            "fe80::1",
            "224.0.0.1",
            "0.0.0.0",
        ] {
            assert!(
                !is_proxyable(address.parse().expect("an address")),
                "{address}"
            );
        }
        assert!(is_proxyable("10.0.0.1".parse().expect("an address")));
    }
}
