//! The configuration, read again when a file of it has changed. One with an error changes nothing but the log.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use crate::config::read_spec;
use crate::config::spec::Spec;
use crate::server::Shared;
use crate::settings::Settings;
use crate::zone::ZoneSettings;

/// How often files are looked at. By content: a ConfigMap's files change by a link far above them.
const LOOK: Duration = Duration::from_secs(2);

fn digest(files: &[PathBuf]) -> Vec<u8> {
    let mut digest = Sha256::new();
    for file in files {
        // A file that is gone is a change too, as is its return.
        let text = std::fs::read(file).unwrap_or_default();
        digest.update(text.len().to_le_bytes());
        digest.update(&text);
    }
    digest.finalize().to_vec()
}

/// Follows the files of a configuration for as long as the process lives.
pub async fn follow(
    shared: Arc<Shared>,
    file: PathBuf,
    spec: Spec,
    zone: watch::Sender<ZoneSettings>,
) {
    let mut files = spec.files;
    let mut last = digest(&files);
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let now = digest(&files);
        if now == last {
            continue;
        }
        last = now;
        match reload(&shared, &file) {
            Ok(read) => {
                files.clone_from(&read.files);
                last = digest(&files);
                shared.metrics.reloads.inc();
                tracing::info!(file = %file.display(), "the new configuration is in effect");
                zone.send_if_modified(|old| {
                    let changed = *old != read.zone;
                    *old = read.zone;
                    changed
                });
            }
            Err(error) => {
                shared.metrics.failed_reloads.inc();
                tracing::error!(%error, "the new configuration has an error; the one before stays in effect");
            }
        }
    }
}

fn reload(shared: &Shared, file: &Path) -> Result<Spec, String> {
    let spec = read_spec(file).map_err(|error| error.to_string())?;
    let before = shared.settings.load();
    if (spec.port, &spec.http) != (before.spec.port, &before.spec.http) {
        return Err("ports can't be changed without a restart".into());
    }
    if spec.zone.endpoint_pod_names != before.spec.zone.endpoint_pod_names {
        // What pods endpoints belong to is kept only where they are called by them.
        return Err("endpoint_pod_names can't be changed without a restart".into());
    }
    let settings = Settings::build(spec.clone(), &shared.metrics, Some(&before));
    shared.configure(settings.map_err(|error| error.to_string())?);
    Ok(spec)
}
