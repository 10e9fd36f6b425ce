//! An API server that lists and watches, and nothing else: for servers that only look, with objects by the hundred thousand and
//! outages at will.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use serde_json::{Value, json};

/// Objects of one page of a list, when the client names no limit.
const PAGE: usize = 500;

/// A listening server; it ends with this value.
pub struct ListServer {
    pub address: SocketAddr,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    /// Objects by plural, as `services`, in the order in which they are listed.
    objects: Mutex<BTreeMap<String, Vec<Value>>>,
    /// Connections, to be cut; and whether new ones are closed at once.
    connections: Mutex<Vec<TcpStream>>,
    away: Mutex<bool>,
    lists: Mutex<usize>,
    /// The token that whoever asks must have, once there is one.
    token: Mutex<Option<String>>,
    /// Changes with the objects: watches from an earlier one are told to list again.
    version: Mutex<u64>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ListServer {
    /// Listens on a free port of the loopback, with nothing to list.
    ///
    /// # Errors
    /// When no port can be had.
    pub fn start() -> std::io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let state = Arc::new(State::default());
        let shared = state.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if *lock(&shared.away) {
                    continue;
                }
                if let Ok(twin) = stream.try_clone() {
                    lock(&shared.connections).push(twin);
                }
                let state = shared.clone();
                thread::spawn(move || drop(state.serve(stream)));
            }
        });
        Ok(Self { address, state })
    }

    /// Replaces all objects of a plural. Watches hear nothing of it until they begin anew.
    pub fn set(&self, plural: &str, objects: Vec<Value>) {
        *lock(&self.state.version) += 1;
        lock(&self.state.objects).insert(plural.to_owned(), objects);
    }

    /// Ends every connection, and closes new ones until it is back.
    pub fn go_away(&self) {
        *lock(&self.state.away) = true;
        self.cut();
    }

    /// Serves again.
    pub fn come_back(&self) {
        *lock(&self.state.away) = false;
    }

    /// Ends every connection, and what watches could go on from: clients come back at once, and list.
    pub fn expire(&self) {
        *lock(&self.state.version) += 1;
        self.cut();
    }

    fn cut(&self) {
        for stream in lock(&self.state.connections).drain(..) {
            // It may have ended by itself.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Refuses, from now on and also on connections that are there, whoever asks without this token.
    pub fn demand(&self, token: &str) {
        *lock(&self.state.token) = Some(token.to_owned());
        self.expire();
    }

    /// Lists that were given to their end: one that is cut on its way may be gone on with, and tells nothing.
    pub fn lists(&self) -> usize {
        *lock(&self.state.lists)
    }

    /// Writes a kubeconfig for this server into a folder, with the token that it demands.
    ///
    /// # Errors
    /// When the folder can't be written to.
    pub fn kubeconfig(&self, folder: &Path) -> std::io::Result<PathBuf> {
        let path = folder.join("kubeconfig");
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "lists",
            "clusters": [{"name": "lists", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "lists", "user": {"token": *lock(&self.state.token)}}],
            "contexts": [{"name": "lists", "context": {"cluster": "lists", "user": "lists"}}],
        });
        std::fs::write(&path, config.to_string())?;
        Ok(path)
    }
}

impl Drop for ListServer {
    fn drop(&mut self) {
        self.go_away();
    }
}

impl State {
    fn serve(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        loop {
            let mut request = String::new();
            if reader.read_line(&mut request)? == 0 {
                return Ok(());
            }
            let (mut header, mut shown) = (String::new(), None);
            while reader.read_line(&mut header)? > 0 && header.trim() != "" {
                if let Some((name, value)) = header.split_once(": Bearer ")
                    && name.eq_ignore_ascii_case("authorization")
                {
                    shown = Some(value.trim().to_owned());
                }
                header.clear();
            }
            let demanded = lock(&self.token).clone();
            if demanded.is_some() && demanded != shown {
                let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Unauthorized", "code": 401});
                respond(&mut stream, "401 Unauthorized", &status)?;
                continue;
            }
            let target = request.split_whitespace().nth(1).unwrap_or("/");
            let (path, query) = target.split_once('?').unwrap_or((target, ""));
            let value = |key: &str| {
                let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
                pairs.find(|(name, _)| *name == key).map(|(_, value)| value)
            };
            let plural = path.rsplit('/').next().unwrap_or_default();
            let watching = matches!(value("watch"), Some("1" | "true"));
            if watching && value("sendInitialEvents") == Some("true") {
                let error = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Invalid", "code": 422});
                respond(&mut stream, "422 Unprocessable Entity", &error)?;
            } else if watching {
                let version = lock(&self.version).to_string();
                if value("resourceVersion").is_some_and(|from| from != version) {
                    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Expired", "code": 410,
                        "message": "too old resource version"});
                    let event = json!({"type": "ERROR", "object": status});
                    respond(&mut stream, "200 OK", &event)?;
                    continue;
                }
                // Nothing changes; the stream stays open until one of both ends it.
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")?;
                return reader.read_line(&mut header).map(drop);
            } else if path == "/version" {
                let version = json!({"major": "1", "minor": "36", "gitVersion": "v1.36.0"});
                respond(&mut stream, "200 OK", &version)?;
            } else if path == "/apis/discovery.k8s.io/v1" {
                let resources = json!({
                    "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "discovery.k8s.io/v1",
                    "resources": [{"name": "endpointslices", "namespaced": true, "kind": "EndpointSlice", "verbs": ["list", "watch"]}],
                });
                respond(&mut stream, "200 OK", &resources)?;
            } else {
                let limit = value("limit")
                    .and_then(|limit| limit.parse().ok())
                    .filter(|limit| *limit > 0);
                let from = value("continue")
                    .and_then(|from| from.parse().ok())
                    .unwrap_or(0);
                let page = self.page(plural, from, limit.unwrap_or(PAGE));
                respond(&mut stream, "200 OK", &page)?;
                if page["metadata"]["continue"] == "" {
                    *lock(&self.lists) += 1;
                }
            }
        }
    }

    fn page(&self, plural: &str, from: usize, limit: usize) -> Value {
        let (kind, version) = match plural {
            "services" => ("ServiceList", "v1"),
            "endpointslices" => ("EndpointSliceList", "discovery.k8s.io/v1"),
            "pods" => ("PodList", "v1"),
            "namespaces" => ("NamespaceList", "v1"),
            _ => ("NodeList", "v1"),
        };
        let objects = lock(&self.objects);
        let all = objects.get(plural).map_or(&[][..], Vec::as_slice);
        let end = (from + limit).min(all.len());
        let next = if end < all.len() {
            end.to_string()
        } else {
            String::new()
        };
        json!({
            "kind": kind, "apiVersion": version,
            "metadata": {"resourceVersion": lock(&self.version).to_string(), "continue": next},
            "items": &all[from.min(end)..end],
        })
    }
}

fn respond(stream: &mut TcpStream, status: &str, body: &Value) -> std::io::Result<()> {
    let body = body.to_string();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// So many Services with as many endpoints each, as `services` and `endpointslices`; every tenth is headless.
pub fn services(count: usize, endpoints: usize) -> [Vec<Value>; 2] {
    let one = |i: usize| {
        let (name, namespace) = (format!("svc-{i}"), format!("ns-{}", i % 50));
        let headless = i % 10 == 9;
        let address = if headless {
            "None".to_owned()
        } else {
            Ipv4Addr::from_bits(u32::from_be_bytes([10, 96, 0, 100]) + i as u32).to_string()
        };
        let service = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": namespace, "uid": format!("00000000-0000-0000-0000-{i:012}"),
                "resourceVersion": "1", "creationTimestamp": "2026-01-01T00:00:00Z", "labels": {"app": name}},
            "spec": {"type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "selector": {"app": name},
                "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}]},
        });
        let endpoint = |j: usize| {
            let number = (i * endpoints + j) as u32;
            json!({
                "addresses": [Ipv4Addr::from_bits(u32::from_be_bytes([10, 128, 0, 0]) + number)],
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "nodeName": format!("node-{}", number % 100),
                "targetRef": {"kind": "Pod", "name": format!("{name}-{j}"), "namespace": namespace,
                    "uid": format!("00000000-0000-0000-0001-{number:012}")},
            })
        };
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("{name}-abcde"), "namespace": namespace, "resourceVersion": "1",
                "labels": {"kubernetes.io/service-name": name}},
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": (0..endpoints).map(endpoint).collect::<Vec<_>>(),
        });
        (service, slice)
    };
    let (services, slices) = (0..count).map(one).unzip();
    [services, slices]
}
