//! From the cluster's changes to the served zone.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cluster_model::watch::{ApiError, Report, client, watch_part};
use cluster_model::{Change, Dirty, Kind, Object, read_manifest, share};
use tokio::sync::{mpsc, watch as latest};
use tokio::time::{Instant, sleep, sleep_until};

use crate::config::Source;
use crate::kept::Kept;
use crate::server::Shared;
use crate::settings::Settings;
use crate::slim::{slim, slim_with_pods};
use crate::sources::Sources;
use crate::sys;

/// Reports that may wait: a burst becomes few batches, and the watch is slowed down rather than buffered.
const REPORTS_MAX: usize = 4096;
/// What a list needed on its way is let go of by others too, a little after it has been taken in.
const SETTLED: Duration = Duration::from_secs(3);
/// How often a snapshot file is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// What is kept of the cluster, and with which settings.
pub struct Feed {
    shared: Arc<Shared>,
    kept: Kept,
    sender: mpsc::Sender<Report>,
    reports: mpsc::Receiver<Report>,
    source: Source,
    pods_watched: bool,
}

impl Feed {
    /// Begins to follow the cluster.
    pub async fn start(shared: Arc<Shared>, source: Source) -> Result<Self, ApiError> {
        let (sender, reports) = mpsc::channel(REPORTS_MAX);
        let mut feed = Self {
            shared,
            kept: Kept::default(),
            sender,
            reports,
            source,
            pods_watched: false,
        };
        feed.watch(&share::KINDS).await?;
        feed.watch_pods().await?;
        Ok(feed)
    }

    async fn watch(&self, kinds: &'static [Kind]) -> Result<(), ApiError> {
        let sender = self.sender.clone();
        let named_by_pods = self.shared.settings().zone().endpoint_pod_names;
        let part = if named_by_pods { slim_with_pods } else { slim };
        match &self.source {
            Source::Api { options, agent } => {
                let client = client(options).await?;
                match agent {
                    Some(socket) if *kinds == share::KINDS => {
                        let sources = Sources {
                            client,
                            socket: socket.clone(),
                            part,
                            metrics: self.shared.metrics.clone(),
                            offers: self.shared.offers(),
                        };
                        tokio::spawn(sources.run(sender));
                    }
                    _ => {
                        tokio::spawn(async move { watch_part(client, kinds, part, sender).await });
                    }
                }
            }
            Source::File(path) => {
                tokio::spawn(follow(path.clone(), kinds, part, sender));
            }
        }
        Ok(())
    }

    async fn watch_pods(&mut self) -> Result<(), ApiError> {
        if self.shared.settings().needs_pods() && !self.pods_watched {
            self.watch(&[Kind::Pod]).await?;
            self.pods_watched = true;
        }
        Ok(())
    }

    /// Follows the cluster, and the settings, for as long as the process lives. While the API server is away the last zone is served
    /// on.
    pub async fn run(mut self, mut settings: latest::Receiver<Arc<Settings>>) {
        let mut batch = Vec::with_capacity(REPORTS_MAX);
        let mut settles: Option<Instant> = None;
        loop {
            tokio::select! {
                count = self.reports.recv_many(&mut batch, REPORTS_MAX) => {
                    if count == 0 {
                        return;
                    }
                    if self.take(&mut batch) {
                        // A list is held beside what was known before: for a moment twice as much is used as ever again.
                        sys::give_memory_back();
                        settles = Some(Instant::now() + SETTLED);
                    }
                }
                () = sleep_until(settles.unwrap_or_else(Instant::now)), if settles.is_some() => {
                    sys::give_memory_back();
                    if let Err(error) = sys::give_code_back() {
                        tracing::debug!(%error, "code that a list needed stays in memory");
                    }
                    settles = None;
                }
                changed = settings.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let new = settings.borrow_and_update().clone();
                    self.configure(new).await;
                }
            }
        }
    }

    /// Makes the zone by new settings, and takes both over.
    async fn configure(&mut self, new: Arc<Settings>) {
        let before = self.shared.state();
        let zone = if before.settings.zone() == new.zone() {
            before.zone.clone()
        } else {
            Arc::new(self.kept.zone(new.zone().clone()))
        };
        drop(before);
        new.warn();
        self.shared.configure(zone, new);
        self.shared.metrics.reloads.inc();
        tracing::info!("the new configuration is in effect");
        if let Err(error) = self.watch_pods().await {
            tracing::error!(%error, "pods can't be watched");
        }
    }

    /// Takes reports in. True when a list was among them.
    fn take(&mut self, batch: &mut Vec<Report>) -> bool {
        let (mut dirty, mut listed) = (Dirty::default(), false);
        for report in batch.drain(..) {
            match report {
                Report::Change(change) => {
                    self.kept.apply(&change, &mut dirty);
                    if matches!(change, Change::Replace(..)) {
                        listed = true;
                        // Not on this thread, which would use the pieces again for what is kept, each in the middle of pages that could
                        // be given back.
                        tokio::task::spawn_blocking(move || drop(change));
                    }
                }
                Report::Reached { .. } | Report::Refused => {}
                Report::Rejected(rejected) => tracing::warn!(%rejected, "left out"),
                Report::Failed { kind, error } => {
                    tracing::warn!(%kind, error, "watching; it is tried again")
                }
            }
        }
        if !dirty.is_empty() {
            self.update(&dirty);
        }
        listed
    }

    fn update(&mut self, dirty: &Dirty) {
        let mut zone = (*self.shared.zone()).clone();
        let was_synced = zone.synced();
        self.kept.update(&mut zone, dirty);
        let services = self.kept.services();
        self.shared.metrics.services.set(services as i64);
        self.shared.metrics.synced.set(i64::from(zone.synced()));
        if zone.synced() && !was_synced {
            tracing::info!(services, "synced");
        }
        self.shared.serve(zone);
    }
}

/// Reads a file now and whenever it has changed. One that can't be read changes nothing.
async fn follow(
    path: PathBuf,
    kinds: &'static [Kind],
    part: fn(Object) -> Object,
    reports: mpsc::Sender<Report>,
) {
    let mut last = None;
    loop {
        let stamp = tokio::fs::metadata(&path)
            .await
            .and_then(|meta| meta.modified())
            .ok();
        if stamp.is_none() || stamp != last {
            last = stamp;
            let out = match read(&path, kinds, part).await {
                Ok(changes) => changes.into_iter().map(Report::Change).collect(),
                Err(error) => vec![Report::Failed {
                    kind: kinds[0],
                    error,
                }],
            };
            for report in out {
                if reports.send(report).await.is_err() {
                    return;
                }
            }
        }
        sleep(LOOK).await;
    }
}

/// A file as one complete list per kind.
async fn read(
    path: &Path,
    kinds: &[Kind],
    part: fn(Object) -> Object,
) -> Result<Vec<Change>, String> {
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let json = tokio::fs::read(path)
        .await
        .map_err(|error| failed(&error))?;
    let objects = read_manifest(&json).map_err(|error| failed(&error))?;
    let of = |kind: Kind| -> Vec<Object> {
        let all = objects.iter();
        all.filter(|object| object.kind() == kind)
            .cloned()
            .map(part)
            .collect()
    };
    Ok(kinds
        .iter()
        .map(|kind| Change::Replace(*kind, of(*kind)))
        .collect())
}
