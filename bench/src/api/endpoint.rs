//! An API server that is measured: where it is, as whom it is asked, and what its processes use.

use std::fs;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use futures::StreamExt as _;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use kube::Config;
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::Value;

use super::connection::{Connection, Connector};

/// `NAME=VALUE`, as flags give it.
#[derive(Clone, Debug)]
pub struct Named<T> {
    pub name: String,
    pub value: T,
}

impl<T: FromStr> FromStr for Named<T>
where
    T::Err: std::fmt::Display,
{
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("it is to be NAME=VALUE")?;
        Ok(Self {
            name: name.to_owned(),
            value: value.parse().map_err(|error: T::Err| error.to_string())?,
        })
    }
}

/// Numbers with commas between them.
#[derive(Clone, Debug)]
pub struct Pids(Vec<u32>);

impl FromStr for Pids {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.split(',')
            .map(str::parse)
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

/// An API server.
pub struct Endpoint {
    pub name: String,
    connector: Arc<Connector>,
    pids: Vec<u32>,
}

/// What an answer was, and how long it took.
pub struct Answer {
    pub status: StatusCode,
    pub body: Vec<u8>,
    pub took: Duration,
}

impl Answer {
    pub fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body).context("an answer that is no JSON")
    }

    /// The answer of a request that must not fail.
    pub fn ok(self) -> Result<Self> {
        let text = String::from_utf8_lossy(&self.body[..self.body.len().min(400)]).into_owned();
        ensure!(self.status.is_success(), "{}: {text}", self.status);
        Ok(self)
    }
}

/// A client with connections of its own: one for each request at a time.
#[derive(Clone)]
pub struct Caller {
    connector: Arc<Connector>,
    idle: Arc<Mutex<Vec<Connection>>>,
}

impl Endpoint {
    pub async fn open(kubeconfig: &Named<PathBuf>, pids: &[Named<Pids>]) -> Result<Self> {
        let path = &kubeconfig.value;
        let read = Kubeconfig::read_from(path).with_context(|| path.display().to_string())?;
        let config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await?;
        let connector = Connector::new(&config).with_context(|| path.display().to_string())?;
        let own = pids.iter().filter(|pids| pids.name == kubeconfig.name);
        Ok(Self {
            name: kubeconfig.name.clone(),
            connector: Arc::new(connector),
            pids: own.flat_map(|pids| pids.value.0.clone()).collect(),
        })
    }

    pub fn caller(&self) -> Result<Caller> {
        Ok(Caller {
            connector: self.connector.clone(),
            idle: Arc::default(),
        })
    }

    pub fn pids(&self) -> &[u32] {
        &self.pids
    }

    /// Its processes are others from now on.
    pub fn set_pids(&mut self, pids: Vec<u32>) {
        self.pids = pids;
    }

    /// Processor time that its processes have used; None when they are not known.
    pub fn cpu(&self) -> Result<Option<Duration>> {
        // Of proc_pid_stat(5): user and system time are fields 14 and 15, in ticks of a hundredth of a second.
        const TICK: Duration = Duration::from_millis(10);
        let mut ticks: u32 = 0;
        for pid in &self.pids {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat"))
                .with_context(|| format!("process {pid} of {}", self.name))?;
            let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
            let mut fields = rest.split_whitespace().skip(11);
            for _ in 0..2 {
                let field = fields.next().context("a short stat")?;
                ticks += field.parse::<u32>()?;
            }
        }
        Ok((!self.pids.is_empty()).then(|| TICK * ticks))
    }

    /// Memory of its processes that is in use, in bytes.
    pub fn memory(&self) -> Result<Option<f64>> {
        let mut bytes = 0.0;
        for pid in &self.pids {
            let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
            let number = line.and_then(|line| line.split_whitespace().next());
            bytes += number.context("no VmRSS")?.parse::<f64>()? * 1024.0;
        }
        Ok((!self.pids.is_empty()).then_some(bytes))
    }
}

impl Caller {
    fn idle(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection that nobody uses.
    async fn connection(&self) -> Result<Connection> {
        loop {
            let Some(mut idle) = self.idle().pop() else {
                return self.connector.open().await;
            };
            // The server may have closed it meanwhile.
            if idle.ready().await.is_ok() {
                return Ok(idle);
            }
        }
    }

    pub async fn send(
        &self,
        method: Method,
        path: &str,
        accept: &str,
        body: Option<&Value>,
    ) -> Result<Answer> {
        let kind = match method {
            Method::PATCH => "application/merge-patch+json",
            _ => "application/json",
        };
        let bytes = body.map(|body| body.to_string().into_bytes());
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::ACCEPT, accept)
            .header(http::header::CONTENT_TYPE, kind)
            .body(Full::from(bytes.unwrap_or_default()))?;
        let mut connection = self.connection().await?;
        let began = Instant::now();
        let response = self.connector.ask(&mut connection, request).await?;
        let (status, body) = (response.status(), response.into_body());
        let body = body.collect().await?.to_bytes().to_vec();
        let took = began.elapsed();
        self.idle().push(connection);
        Ok(Answer { status, body, took })
    }

    pub async fn get(&self, path: &str) -> Result<Answer> {
        self.send(Method::GET, path, "application/json", None)
            .await?
            .ok()
    }

    pub async fn post(&self, path: &str, body: &Value) -> Result<Answer> {
        self.send(Method::POST, path, "application/json", Some(body))
            .await
    }

    pub async fn patch(&self, path: &str, body: &Value) -> Result<Answer> {
        self.send(Method::PATCH, path, "application/json", Some(body))
            .await
    }

    pub async fn delete(&self, path: &str) -> Result<Answer> {
        self.send(Method::DELETE, path, "application/json", None)
            .await
    }

    /// Reads a watch, and tells how many events have come, whenever some have, until the answer is that it is enough.
    pub async fn watch(
        &self,
        path: &str,
        mut events: Events,
        mut come: impl FnMut(u64) -> bool,
    ) -> Result<()> {
        let request = Request::get(path)
            .header(http::header::ACCEPT, events.media_type())
            .body(Full::default())?;
        let mut connection = self.connection().await?;
        let response = self.connector.ask(&mut connection, request).await?;
        ensure!(
            response.status().is_success(),
            "a watch: {}",
            response.status()
        );
        let mut chunks = response.into_body().into_data_stream();
        while let Some(chunk) = chunks.next().await {
            let ended = events.ended_in(&chunk?);
            if ended > 0 && !come(ended) {
                return Ok(());
            }
        }
        bail!("a watch ended")
    }
}

/// How the events of a watch are told apart.
pub enum Events {
    /// JSON, each on a line.
    Lines,
    /// Protobuf, as informers of Kubernetes' own components ask for it: each behind four bytes of its length.
    Frames(Frame),
}

/// How much of the present frame has come.
#[derive(Default)]
pub struct Frame {
    head: Vec<u8>,
    left: usize,
}

impl Events {
    fn media_type(&self) -> &'static str {
        match self {
            Self::Lines => "application/json",
            Self::Frames(_) => "application/vnd.kubernetes.protobuf;stream=watch",
        }
    }

    /// How many events end in the next bytes.
    fn ended_in(&mut self, mut bytes: &[u8]) -> u64 {
        let frame = match self {
            Self::Lines => return bytes.iter().map(|byte| u64::from(*byte == b'\n')).sum(),
            Self::Frames(frame) => frame,
        };
        let mut ended = 0;
        while !bytes.is_empty() {
            if frame.head.len() < 4 {
                let taken = bytes.len().min(4 - frame.head.len());
                frame.head.extend_from_slice(&bytes[..taken]);
                bytes = &bytes[taken..];
                if let Ok(length) = <[u8; 4]>::try_from(frame.head.as_slice()) {
                    frame.left = u32::from_be_bytes(length) as usize;
                }
                continue;
            }
            let taken = bytes.len().min(frame.left);
            frame.left -= taken;
            bytes = &bytes[taken..];
            if frame.left == 0 {
                ended += 1;
                frame.head.clear();
            }
        }
        ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_counted_however_they_are_cut() {
        let lines = b"{}\n{\"a\": 1}\n";
        assert_eq!(Events::Lines.ended_in(lines), 2);
        let mut frames = Vec::new();
        for length in [1_u32, 300, 2] {
            frames.extend_from_slice(&length.to_be_bytes());
            frames.extend(std::iter::repeat_n(b'\n', length as usize));
        }
        for size in [1, 3, 5, 7, 100, 1000] {
            let mut events = Events::Frames(Frame::default());
            let ended = frames.chunks(size).map(|chunk| events.ended_in(chunk));
            assert_eq!(ended.sum::<u64>(), 3, "chunks of {size}");
        }
    }

    #[test]
    fn flags_name_endpoints() {
        let pids: Named<Pids> = "ours=1,22".parse().expect("read");
        assert_eq!((pids.name.as_str(), pids.value.0), ("ours", vec![1, 22]));
        assert!("1,22".parse::<Named<Pids>>().is_err());
        assert!("ours=x".parse::<Named<Pids>>().is_err());
    }
}
