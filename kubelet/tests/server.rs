//! Attempts to get into a node by its kubelet: each is refused, and those with the right are let in.

mod fake;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use keelway_kubelet::pods::Registry;
use keelway_kubelet::server::{self, Authority, AuthorityError, Caller, Gate, Right, Server, Tls};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast;
use tokio_rustls::TlsConnector;

const API_SERVER: &str = "kube-apiserver-kubelet-client";

/// Rules as a cluster would have them, and how often they were asked for.
#[derive(Clone, Default)]
struct Rules(Arc<AtomicUsize>);

#[async_trait]
impl Authority for Rules {
    async fn caller(&self, token: &str) -> Result<Option<Caller>, AuthorityError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        let user = match token {
            "of-the-scraper" => "system:serviceaccount:monitoring:scraper",
            "of-a-pod" => "system:serviceaccount:shop:default",
            "unasked" => {
                let reason = "it is away".to_owned();
                let question = "whose a token is";
                return Err(AuthorityError { question, reason });
            }
            _ => return Ok(None),
        };
        Ok(Some(Caller {
            user: user.to_owned(),
            ..Caller::default()
        }))
    }

    async fn allows(&self, caller: &Caller, right: Right) -> Result<bool, AuthorityError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(match caller.user.as_str() {
            API_SERVER => true,
            "system:serviceaccount:monitoring:scraper" => {
                right.verb == "get" && matches!(right.part, "metrics" | "pods")
            }
            "looker" => right.verb == "get" && right.part == "proxy",
            _ => caller.groups.iter().any(|group| group == "system:masters"),
        })
    }
}

/// An authority, and what it signs.
struct Issued {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Issued {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let pem = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        Self { issuer, pem }
    }

    fn leaf(&self, user: &str, group: &str, usage: ExtendedKeyUsagePurpose) -> (String, String) {
        self.leaf_until(user, group, usage, 2096)
    }

    fn leaf_until(
        &self,
        user: &str,
        group: &str,
        usage: ExtendedKeyUsagePurpose,
        year: i32,
    ) -> (String, String) {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        if !group.is_empty() {
            params
                .distinguished_name
                .push(DnType::OrganizationName, group);
        }
        if !user.is_empty() {
            params.distinguished_name.push(DnType::CommonName, user);
        }
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(year, 1, 1);
        params.extended_key_usages = vec![usage];
        let loopback = std::net::Ipv4Addr::LOCALHOST.into();
        params.subject_alt_names.push(SanType::IpAddress(loopback));
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }
}

struct Kubelet {
    address: SocketAddr,
    authority: Issued,
    asked: Arc<AtomicUsize>,
    files: tempfile::TempDir,
}

async fn kubelet() -> Kubelet {
    let authority = Issued::new();
    let files = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = files.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let (certificate, key) = authority.leaf("node-1", "", ExtendedKeyUsagePurpose::ServerAuth);
    let given = server::given(
        &write("kubelet.crt", &certificate),
        &write("kubelet.key", &key),
    );
    let tls = Tls::new(given.unwrap(), &write("ca.crt", &authority.pem)).unwrap();
    let rules = Rules::default();
    let asked = rules.0.clone();
    let clock = Arc::new(fake::JumpingClock::new());
    let server = Arc::new(Server {
        runtime: Arc::new(fake::FakeRuntime::new(clock, |_| {})),
        pods: Registry::default(),
        gate: Gate::new(rules),
        log_dir: files.path().to_owned(),
        node_log_dir: files.path().to_owned(),
        changes: broadcast::channel(1).0,
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(server::serve(server, listener, Arc::new(tls)));
    Kubelet {
        address,
        authority,
        asked,
        files,
    }
}

impl Kubelet {
    /// The status of an answer; None when not even a connection is made.
    async fn ask(
        &self,
        credentials: Option<&(String, String)>,
        header: Option<(&str, &str)>,
        request: &str,
    ) -> Option<StatusCode> {
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(self.authority.pem.as_bytes()).unwrap())
            .unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let config = match credentials {
            None => config.with_no_client_auth(),
            Some((certificate, key)) => {
                let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
                config
                    .with_client_auth_cert(vec![certificate], key)
                    .unwrap()
            }
        };
        let stream = TcpStream::connect(self.address).await.unwrap();
        let name = ServerName::IpAddress(self.address.ip().into());
        let connector = TlsConnector::from(Arc::new(config));
        let stream = connector.connect(name, stream).await.ok()?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake::<_, Empty<Bytes>>(TokioIo::new(stream))
                .await
                .ok()?;
        tokio::spawn(connection);
        let (method, path) = request.split_once(' ').unwrap();
        let mut request = Request::builder().method(method).uri(path);
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        let request = request.header("host", "node-1").body(Empty::new()).unwrap();
        let answer = sender.send_request(request).await.ok()?;
        let status = answer.status();
        let _ = answer.into_body().collect().await;
        Some(status)
    }

    async fn hold(
        &self,
        credentials: Option<&(String, String)>,
        header: Option<(&str, &str)>,
        table: &[&str],
        expected: Option<u16>,
    ) {
        for request in table {
            let status = self.ask(credentials, header, request).await;
            let code = status.map(|status| status.as_u16());
            assert_eq!(code, expected, "{request} with {header:?}");
        }
    }
}

const CLIENT: ExtendedKeyUsagePurpose = ExtendedKeyUsagePurpose::ClientAuth;

/// A shell in a pod, in every spelling, and what else is here.
const EVERYTHING: [&str; 15] = [
    "POST /exec/shop/web/c?command=sh",
    "GET /exec/shop/web/c?command=sh",
    "GET //exec/shop/web/c?command=sh",
    "GET /%65xec/shop/web/c?command=sh",
    "GET /exec%2Fshop%2Fweb%2Fc?command=sh",
    "GET /healthz/../exec/shop/web/c?command=sh",
    "POST /attach/shop/web/c",
    "GET /portForward/shop/web?port=80",
    "GET /containerLogs/shop/web/c",
    "GET /pods",
    "GET /metrics",
    "GET /healthz",
    "GET /nothing",
    "GET /logs/",
    "GET /logs/ca.crt",
];

#[tokio::test]
async fn nobody_gets_into_a_node_for_being_known() {
    let kubelet = kubelet().await;
    // Not even a connection: what another authority signed, what has expired, what is for servers.
    let strangers = [
        Issued::new().leaf(API_SERVER, "system:masters", CLIENT),
        kubelet
            .authority
            .leaf_until(API_SERVER, "system:masters", CLIENT, 2021),
        kubelet
            .authority
            .leaf(API_SERVER, "", ExtendedKeyUsagePurpose::ServerAuth),
    ];
    for stranger in &strangers {
        kubelet
            .hold(Some(stranger), None, &["GET /pods"], None)
            .await;
    }
    // Nobody: no credentials, and such as the API server does not know.
    for header in [
        None,
        Some(("authorization", "Bearer nonsense")),
        Some(("authorization", "Bearer ")),
        Some(("authorization", "Basic YWRtaW46YWRtaW4=")),
        Some(("x-remote-user", API_SERVER)),
        Some(("impersonate-user", API_SERVER)),
    ] {
        kubelet.hold(None, header, &EVERYTHING, Some(401)).await;
    }
    let nameless = kubelet.authority.leaf("", "system:masters", CLIENT);
    kubelet
        .hold(Some(&nameless), None, &EVERYTHING, Some(401))
        .await;
    // Somebody, without any right here: a pod, another node, this node itself, a user; and no header makes them another.
    let pod = Some(("authorization", "Bearer of-a-pod"));
    kubelet.hold(None, pod, &EVERYTHING, Some(403)).await;
    for (user, group) in [
        ("system:node:node-2", "system:nodes"),
        ("system:node:node-1", "system:nodes"),
        ("jane", "team"),
    ] {
        let credentials = kubelet.authority.leaf(user, group, CLIENT);
        for header in [
            None,
            Some(("authorization", "Bearer of-the-scraper")),
            Some(("impersonate-user", API_SERVER)),
        ] {
            kubelet
                .hold(Some(&credentials), header, &EVERYTHING, Some(403))
                .await;
        }
    }
    // Whom the API server cannot be asked about is not let in either.
    let unasked = Some(("authorization", "Bearer unasked"));
    kubelet.hold(None, unasked, &["GET /pods"], Some(503)).await;
}

#[tokio::test]
async fn who_has_the_right_is_let_in_and_to_nothing_beside_it() {
    let kubelet = kubelet().await;
    let scraper = Some(("authorization", "Bearer of-the-scraper"));
    let (metrics, rest): (Vec<&str>, Vec<&str>) = EVERYTHING
        .iter()
        .partition(|request| matches!(**request, "GET /metrics" | "GET /pods"));
    kubelet.hold(None, scraper, &metrics, Some(200)).await;
    kubelet.hold(None, scraper, &rest, Some(403)).await;
    // Looking through the proxy is no way into a pod.
    let looker = kubelet.authority.leaf("looker", "", CLIENT);
    let looks = ["GET /pods", "GET /healthz"];
    kubelet.hold(Some(&looker), None, &looks, Some(200)).await;
    kubelet
        .hold(Some(&looker), None, &EVERYTHING[..5], Some(403))
        .await;
    kubelet
        .hold(Some(&looker), None, &EVERYTHING[13..], Some(403))
        .await;
    for (user, group) in [(API_SERVER, ""), ("admin", "system:masters")] {
        let credentials = kubelet.authority.leaf(user, group, CLIENT);
        kubelet
            .hold(Some(&credentials), None, &looks, Some(200))
            .await;
        let logs = ["GET /logs", "GET /logs/", "GET /logs/ca.crt"];
        kubelet
            .hold(Some(&credentials), None, &logs, Some(200))
            .await;
        // There is no such pod here.
        let pods = [EVERYTHING[0], EVERYTHING[8]];
        kubelet
            .hold(Some(&credentials), None, &pods, Some(404))
            .await;
    }
}

#[tokio::test]
async fn a_caller_in_a_loop_is_not_asked_about_each_time() {
    let kubelet = kubelet().await;
    let scraper = Some(("authorization", "Bearer of-the-scraper"));
    kubelet
        .hold(None, scraper, &["GET /metrics"; 5], Some(200))
        .await;
    assert_eq!(kubelet.asked.load(Ordering::Relaxed), 2, "who, and whether");
}

#[tokio::test]
async fn clients_are_of_the_authorities_that_are_in_the_file_now() {
    let kubelet = kubelet().await;
    let next = Issued::new();
    let [old, new] = [&kubelet.authority, &next].map(|by| by.leaf("looker", "", CLIENT));
    let put = |text: &str| {
        let file = kubelet.files.path().join("new");
        std::fs::write(&file, text).unwrap();
        std::fs::rename(file, kubelet.files.path().join("ca.crt")).unwrap();
    };
    let looks = ["GET /pods"];
    kubelet.hold(Some(&old), None, &looks, Some(200)).await;
    kubelet.hold(Some(&new), None, &looks, None).await;
    put(&format!("{}{}", kubelet.authority.pem, next.pem));
    kubelet.hold(Some(&old), None, &looks, Some(200)).await;
    kubelet.hold(Some(&new), None, &looks, Some(200)).await;
    put("nonsense");
    kubelet.hold(Some(&old), None, &looks, Some(200)).await;
    put(&next.pem);
    kubelet.hold(Some(&old), None, &looks, None).await;
    kubelet.hold(Some(&new), None, &looks, Some(200)).await;
}
