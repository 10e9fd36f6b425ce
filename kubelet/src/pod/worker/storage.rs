//! storage: how much of the disk a worker's pod uses, counted at looks at the runtime.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::Instant;

use super::Worker;
use crate::cluster::EventKind;
use crate::pod::storage::{EVICTED, Usage, excess, is_limited, on_disk};
use crate::runtime::ContainerPhase;
use crate::volume::PodFolder;

/// How often it is counted (upstream's figure).
const COUNT_PERIOD: Duration = Duration::from_secs(10);
/// What the kernel counts a file's blocks in.
const BLOCK_BYTES: u64 = 512;

impl Worker {
    /// Ends a pod that uses more of the disk than it may.
    pub(super) async fn hold_to_storage_limits(&mut self) {
        let is_due = self.counted.is_none_or(|at| at.elapsed() >= COUNT_PERIOD);
        if !is_due || self.removed || self.memory.evicted.is_some() || !is_limited(&self.pod) {
            return;
        }
        self.counted = Some(Instant::now());
        let usage = self.usage().await;
        if let Some(message) = excess(&self.pod, &usage) {
            tracing::warn!(pod = %self.key, message, "the pod is evicted");
            let (kind, cluster) = (EventKind::Warning, &self.context.cluster);
            cluster.event(&self.pod, None, kind, EVICTED, message.clone());
            self.memory.evicted = Some(message);
        }
    }

    async fn usage(&self) -> Usage {
        let mut usage = Usage::default();
        let running = |phase| phase == ContainerPhase::Running;
        for run in self.view.containers.iter().filter(|c| running(c.phase)) {
            let written = self.context.runtime.written_bytes(&run.id).await;
            let written = written.unwrap_or_else(|error| {
                tracing::debug!(pod = %self.key, container = run.name, %error, "cannot tell what a container wrote");
                0
            });
            let logs = match Path::new(&run.log_path).parent() {
                Some(folder) => counted(folder.to_owned()).await,
                None => 0,
            };
            *usage.containers.entry(run.name.clone()).or_default() += written + logs;
        }
        let folder = PodFolder::new(&self.context.config.root_dir, &self.key.uid);
        for volume in on_disk(&self.pod) {
            if let Some(place) = folder.volume(volume) {
                let used = counted(place).await;
                usage.volumes.insert(volume.name.clone(), used);
            }
        }
        usage
    }
}

/// What the files at and below a place take of the disk. It may take long, and holds up no other pod.
async fn counted(place: PathBuf) -> u64 {
    let count = tokio::task::spawn_blocking(move || used(&place));
    count.await.unwrap_or(0)
}

/// Files come and go while they are counted: those that are gone take nothing.
fn used(path: &Path) -> u64 {
    let Ok(meta) = fs::symlink_metadata(path) else {
        return 0;
    };
    let below = meta.is_dir().then(|| fs::read_dir(path).ok()).flatten();
    let below = below.into_iter().flatten().flatten();
    meta.blocks() * BLOCK_BYTES + below.map(|entry| used(&entry.path())).sum::<u64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_takes_what_all_below_it_takes_and_no_more_than_that() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b");
        fs::create_dir_all(&deep).unwrap();
        let before = used(dir.path());
        fs::write(deep.join("file"), vec![1; 1 << 20]).unwrap();
        let sparse = fs::File::create(deep.join("sparse")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        std::os::unix::fs::symlink("/", deep.join("out")).unwrap();
        let grown = used(dir.path()) - before;
        assert!((1 << 20..2 << 20).contains(&grown), "{grown}");
        assert_eq!(used(Path::new("/nowhere")), 0);
    }
}
