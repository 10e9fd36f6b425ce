//! Where the agent learns about the cluster: an API server, or a file.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use cluster_model::watch::kube::Client;
use cluster_model::watch::{self, ApiOptions, Report};
use cluster_model::{Change, Kind, Object, read_manifest};
use ipnetwork::IpNetwork;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use crate::balancer::Configured;
use crate::config::Source;
use crate::event::Event;
use crate::health::ProxyHealth;

/// The kinds that the agent needs.
pub const KINDS: [Kind; 3] = [Kind::Service, Kind::EndpointSlice, Kind::Node];

/// Longest pause before credentials that could not be read are read again.
const RETRY_MAX: Duration = Duration::from_secs(5);

/// A client of the API server, as soon as its credentials can be read. What it is for is named in the log.
pub async fn client(options: &ApiOptions, purpose: &str) -> Client {
    loop {
        match watch::client(options).await {
            Ok(client) => return client,
            // The event loop hears of it by its own watch.
            Err(error) => tracing::debug!(%error, "{purpose}: no client yet"),
        }
        tokio::time::sleep(RETRY_MAX).await;
    }
}

/// Where news of the cluster go: into the event loop, with the time of their arrival.
#[derive(Clone)]
pub struct Feed {
    pub events: Sender<Event>,
    /// Is told of what the maps may lack, so that a loop that is stuck shows.
    pub health: Arc<ProxyHealth>,
}

impl Feed {
    /// Tells what happened at once. False when nobody listens any more.
    fn send(&self, reports: Vec<Report>) -> bool {
        let seen = Instant::now();
        let concerns_maps = |report: &Report| match report {
            Report::Change(Change::Upsert(object)) => concerns_maps(object.kind()),
            Report::Change(Change::Remove(gone)) => concerns_maps(gone.kind),
            Report::Change(Change::Replace(kind, _)) => concerns_maps(*kind),
            Report::Rejected(_)
            | Report::Reached { .. }
            | Report::Refused
            | Report::Failed { .. } => false,
        };
        if reports.iter().any(concerns_maps) {
            self.health.queued(seen);
        }
        self.events.send(Event::Cluster { reports, seen }).is_ok()
    }
}

impl Feed {
    /// The pools of load balancers' addresses are these now. False when nobody listens any more.
    pub fn pools(&self, configured: Configured) -> bool {
        self.events.send(Event::Pools(configured)).is_ok()
    }

    /// ServiceCIDRs have these ranges now. False when nobody listens any more.
    pub fn service_ranges(&self, ranges: Vec<IpNetwork>) -> bool {
        self.events.send(Event::ServiceRanges(ranges)).is_ok()
    }
}

/// Whether a kind is what plans of Services are made from.
pub fn concerns_maps(kind: Kind) -> bool {
    matches!(kind, Kind::Service | Kind::EndpointSlice)
}

/// Feeds the event loop until it is gone.
pub async fn feed(source: Source, feed: Feed) {
    match source {
        Source::Api(options) => {
            let mut pause = Duration::from_millis(100);
            let (client, credentials) = loop {
                let credentials = Credentials::read(&options);
                match watch::client(&options).await {
                    Ok(client) => break (client, credentials),
                    Err(error) => {
                        let report = Report::Failed {
                            kind: Kind::Node,
                            error: error.to_string(),
                        };
                        if !feed.send(vec![report]) {
                            return;
                        }
                    }
                }
                // Credentials of a pod may be mounted a moment later.
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY_MAX);
            };
            let (tell, mut told) = mpsc::channel(1024);
            let watching = tokio::spawn(async move { watch::watch(client, &KINDS, tell).await });
            while let Some(report) = told.recv().await {
                // Other clients of this process were made at the same time, of the same files.
                if matches!(report, Report::Refused) && credentials.are_replaced(&options) {
                    // The loop has ended already when this fails.
                    let _ = feed.events.send(Event::CredentialsReplaced);
                }
                if !feed.send(vec![report]) {
                    break;
                }
            }
            watching.abort();
        }
        Source::File(path) => {
            let following = tokio::task::spawn_blocking(move || follow(&path, &feed));
            if let Ok(Err(error)) = following.await {
                tracing::error!(%error, "the snapshot file is not followed any more");
            }
        }
    }
}

/// What clients are made of, as it was when this process made its own, by a digest.
struct Credentials([u8; 32]);

impl Credentials {
    fn read(options: &ApiOptions) -> Self {
        let mut digest = Sha256::new();
        for file in watch::credentials(options) {
            // What cannot be read is something else than what can.
            let read = std::fs::read(file).map(Sha256::digest);
            digest.update(read.unwrap_or_default());
        }
        Self(digest.finalize().into())
    }

    fn are_replaced(&self, options: &ApiOptions) -> bool {
        Self::read(options).0 != self.0
    }
}

/// Reads the file now and whenever it changes. A file that cannot be read changes nothing. All kinds of one reading are one event: Services
/// whose endpoints come with the next would refuse their clients in between.
fn follow(path: &Path, feed: &Feed) -> Result<(), FollowError> {
    let failed = |what, errno: nix::errno::Errno| FollowError {
        path: path.into(),
        what,
        source: errno.into(),
    };
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC).map_err(|errno| failed("inotify", errno))?;
    // The folder, not the file: editors and careful writers replace it by a rename.
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let interest = AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVED_TO;
    inotify
        .add_watch(folder, interest)
        .map_err(|errno| failed("watch the folder of", errno))?;
    loop {
        let reports = match read(path) {
            Ok(changes) => changes.into_iter().map(Report::Change).collect(),
            Err(error) => vec![Report::Failed {
                kind: Kind::Node,
                error,
            }],
        };
        if !feed.send(reports) {
            return Ok(());
        }
        loop {
            let changed = inotify
                .read_events()
                .map_err(|errno| failed("wait for", errno))?;
            if changed
                .iter()
                .any(|change| change.name.as_deref() == path.file_name())
            {
                break;
            }
        }
    }
}

/// Why the file can no longer be followed.
#[derive(Debug, thiserror::Error)]
#[error("{what} {}: {source}", path.display())]
struct FollowError {
    path: PathBuf,
    what: &'static str,
    source: std::io::Error,
}

/// The file as one complete list per kind.
fn read(path: &Path) -> Result<Vec<Change>, String> {
    let json = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let objects = read_manifest(&json).map_err(|error| format!("{}: {error}", path.display()))?;
    let of = |kind: Kind| -> Vec<Object> {
        objects
            .iter()
            .filter(|object| object.kind() == kind)
            .cloned()
            .collect()
    };
    Ok(KINDS
        .into_iter()
        .map(|kind| Change::Replace(kind, of(kind)))
        .collect())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    #[test]
    fn all_that_a_file_says_comes_as_one_event() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("cluster.json");
        let empty = r#"{"kind": "List", "apiVersion": "v1", "items": []}"#;
        let write = || {
            let partial = path.with_extension("new");
            std::fs::write(&partial, empty).expect("a file");
            std::fs::rename(partial, &path).expect("in its place");
        };
        write();
        let (events, heard) = mpsc::channel();
        let feed = Feed {
            events,
            health: Arc::default(),
        };
        let followed = path.clone();
        let following = thread::spawn(move || follow(&followed, &feed));
        let next = || match heard.recv().expect("an event") {
            Event::Cluster { reports, .. } => {
                let kind = |report: &Report| match report {
                    Report::Change(Change::Replace(kind, _)) => *kind,
                    other => panic!("{other:?}"),
                };
                reports.iter().map(kind).collect::<Vec<_>>()
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(next(), KINDS);
        write();
        assert_eq!(next(), KINDS);
        drop(heard);
        write();
        following
            .join()
            .expect("no panic")
            .expect("it ends with its listener");
    }
}
