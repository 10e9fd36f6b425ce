//! The configuration, read again when a file of it has changed. One with an error changes nothing but the log.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use crate::config::files::Files;
use crate::config::read_spec_of;
use crate::server::Shared;
use crate::settings::Settings;

/// How often files are looked at. By content: a ConfigMap's files change by a link far above them.
const LOOK: Duration = Duration::from_secs(2);

/// Follows the files of a configuration for as long as the process lives. What is new is handed to whoever makes the zone, so that both
/// come into effect as one.
pub async fn follow(
    shared: Arc<Shared>,
    file: PathBuf,
    mut files: Files,
    settings: watch::Sender<Arc<Settings>>,
) {
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if !files.have_changed() {
            continue;
        }
        // Also those of a reading that fails are looked at from now on: the error may be in one that is new.
        files = Files::default();
        let before = settings.borrow().clone();
        match reload(&shared, &file, &mut files, &before) {
            Ok(new) => {
                settings.send_replace(Arc::new(new));
            }
            Err(error) => {
                shared.metrics.failed_reloads.inc();
                tracing::error!(%error, "the new configuration has an error; the one before stays in effect");
            }
        }
    }
}

fn reload(
    shared: &Shared,
    file: &Path,
    files: &mut Files,
    before: &Settings,
) -> Result<Settings, String> {
    let spec = read_spec_of(file, files).map_err(|error| error.to_string())?;
    if (spec.port, &spec.http) != (before.spec.port, &before.spec.http) {
        return Err("ports can't be changed without a restart".into());
    }
    if spec.zone.endpoint_pod_names != before.spec.zone.endpoint_pod_names {
        // What pods endpoints belong to is kept only where they are called by them.
        return Err("endpoint_pod_names can't be changed without a restart".into());
    }
    Settings::build(spec, &shared.metrics, Some(before)).map_err(|error| error.to_string())
}
