//! Images, imported once for all nodes of a machine.
//!
//! Importing is work for the CPU, and the same on every node. So one containerd, in a node of its own that lives only for
//! this, imports all archives into a folder; each node's containerd then begins with a copy of that folder, in which what
//! never changes (layers and blobs) is a hard link. The folder is kept beside the archives, so the next `up` of the same
//! build imports nothing.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::fs::{MetadataExt, lchown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::future::try_join_all;

use crate::cgroup::CgroupError;
use crate::checks::Machine;
use crate::containerd::{self, Containerd, ImageError, Snapshotter};
use crate::node::launch::{LaunchError, Nodes};
use crate::node::{BIN_DIR, Bind, NodeSpec, ServiceSpec};
use crate::state::ClusterDir;
use crate::sys;

/// The name of the node that imports.
const NODE: &str = "image-seed";
/// Folders beside the archives that hold imported images begin with this.
const FOLDER_PREFIX: &str = ".containerd-";
/// Below these folders of containerd's nothing is ever changed in place.
const UNCHANGING: [&str; 2] = ["blobs", "snapshots"];
/// Marks a folder of a layer that hides what lower layers have there.
const OPAQUE: &std::ffi::CStr = c"trusted.overlay.opaque";
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("cannot {action} {path}: {source}")]
    File {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SeedError {
    let path = path.to_owned();
    move |source| SeedError::File {
        action,
        path,
        source,
    }
}

/// What a seed is made from, and where.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    pub archives: &'a [PathBuf],
    pub keelway: &'a Path,
    pub machine: &'a Machine,
    pub cluster: &'a ClusterDir,
    pub snapshotter: Snapshotter,
    /// containerd's configuration in nodes.
    pub containerd_config: &'a str,
}

/// A folder of containerd's that has all images of a cluster.
#[derive(Debug, Clone)]
pub struct Seed(PathBuf);

impl Seed {
    /// The seed of an earlier `up` from the same archives, if there is one.
    pub fn find(source: &Source<'_>) -> Option<Seed> {
        let path = kept(source)?;
        path.is_dir().then_some(Seed(path))
    }

    /// Imports all archives.
    ///
    /// # Errors
    /// What containerd has against an archive, for example.
    pub async fn make(source: &Source<'_>) -> Result<Seed, SeedError> {
        let dir = source.cluster.node(NODE);
        fs::create_dir_all(&dir).map_err(file("make", &dir))?;
        source
            .machine
            .hierarchies
            .create(&source.cluster.name, NODE)?;
        let spec = spec(source, &dir);
        let spec_file = dir.join("node.json");
        let text = serde_json::to_vec_pretty(&spec)
            .map_err(|error| file("write", &spec_file)(error.into()))?;
        fs::write(&spec_file, text).map_err(file("write", &spec_file))?;

        let mut node = Nodes::default();
        node.start(source.keelway, &spec, &spec_file, None)?;
        node.wait(|board| board.is_ready(NODE, "containerd").then_some(()))
            .await?;
        let init = node.wait(|board| board.init(NODE)).await?;
        let containerd = Containerd::of_node(NODE, init.pid, source.snapshotter);
        let imports = source
            .archives
            .iter()
            .map(|archive| containerd.import(archive));
        node.while_well(async { try_join_all(imports).await.map_err(SeedError::from) })
            .await?;
        // Its databases are whole after every answered import, so it need not be asked to stop.
        init.kill_and_wait(PATIENCE)
            .map_err(file("stop the importing node of", &dir))?;

        let made = dir.join("var/lib/containerd");
        let Some(kept) = kept(source) else {
            return Ok(Seed(made));
        };
        match fs::rename(&made, &kept) {
            Ok(()) => {}
            // Another `up` was first, or the folder cannot be written to: this cluster uses its own.
            Err(_) => return Ok(Seed(made)),
        }
        remove_others(&kept);
        drop(fs::remove_dir_all(&dir));
        Ok(Seed(kept))
    }

    /// Gives a node's containerd, which has not run yet, the images. `to` is made.
    ///
    /// # Errors
    /// When the seed was removed meanwhile, or the disk is full.
    pub fn plant(&self, to: &Path) -> Result<(), SeedError> {
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).map_err(file("make", parent))?;
        }
        plant(&self.0, to, false)
    }
}

/// Where a seed of these archives is kept: beside them, when that is on the file system of the state, or links would not
/// work.
fn kept(source: &Source<'_>) -> Option<PathBuf> {
    let folder = source.archives.first()?.parent()?;
    let device = |path: &Path| fs::metadata(path).ok().map(|meta| meta.dev());
    if device(folder)? != device(&source.cluster.path)? {
        return None;
    }
    let mut key = DefaultHasher::new();
    source.containerd_config.hash(&mut key);
    source.machine.path.hash(&mut key);
    for archive in source.archives {
        let meta = fs::metadata(archive).ok()?;
        (archive, meta.len(), meta.mtime(), meta.mtime_nsec()).hash(&mut key);
    }
    Some(folder.join(format!("{FOLDER_PREFIX}{:016x}", key.finish())))
}

/// Seeds of earlier builds are of no use any more.
fn remove_others(kept: &Path) {
    let Some(Ok(entries)) = kept.parent().map(fs::read_dir) else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        let is_seed = path
            .file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.starts_with(FOLDER_PREFIX));
        if is_seed && path != kept {
            // What stays costs room on the disk only.
            drop(fs::remove_dir_all(path));
        }
    }
}

fn spec(source: &Source<'_>, dir: &Path) -> NodeSpec {
    NodeSpec {
        cluster: source.cluster.name.clone(),
        name: NODE.into(),
        dir: dir.to_owned(),
        binds: vec![Bind {
            from: source.keelway.to_owned(),
            to: Path::new(BIN_DIR).join("keelway"),
            read_only: true,
        }],
        files: BTreeMap::from([(
            containerd::CONFIG.into(),
            source.containerd_config.to_owned(),
        )]),
        net_sysctls: BTreeMap::new(),
        path: source.machine.path.clone(),
        machine: false,
        services: vec![containerd_service()],
    }
}

/// containerd, as a service of a node.
pub fn containerd_service() -> ServiceSpec {
    ServiceSpec {
        name: "containerd".into(),
        argv: ["containerd", "--config", containerd::CONFIG]
            .map(String::from)
            .to_vec(),
        env: BTreeMap::new(),
        after: Vec::new(),
        notifies: true,
        listens: false,
        outside: false,
    }
}

fn plant(from: &Path, to: &Path, unchanging: bool) -> Result<(), SeedError> {
    let meta = fs::symlink_metadata(from).map_err(file("look at", from))?;
    if !meta.is_dir() {
        // A link of a link or of a device (a layer's mark of a removed file) is as good as one of a file.
        let placed = if unchanging {
            fs::hard_link(from, to)
        } else {
            fs::copy(from, to).map(drop)
        };
        return placed.map_err(file("place", to));
    }
    fs::create_dir(to).map_err(file("make", to))?;
    lchown(to, Some(meta.uid()), Some(meta.gid())).map_err(file("set the owner of", to))?;
    fs::set_permissions(to, meta.permissions()).map_err(file("set permissions of", to))?;
    sys::copy_attribute(from, to, OPAQUE).map_err(file("set attributes of", to))?;
    for entry in fs::read_dir(from).map_err(file("read", from))? {
        let name = entry.map_err(file("read", from))?.file_name();
        let unchanging = unchanging || UNCHANGING.iter().any(|folder| name == *folder);
        plant(&from.join(&name), &to.join(&name), unchanging)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_linked_and_databases_are_copied() {
        let folder = tempfile::tempdir().expect("a folder");
        let (from, to) = (
            folder.path().join("from"),
            folder.path().join("nodes/1/containerd"),
        );
        let layer = "snapshotter/snapshots/1/fs/bin";
        fs::create_dir_all(from.join(layer)).expect("made");
        fs::write(from.join(layer).join("sh"), "x").expect("written");
        std::os::unix::fs::symlink("sh", from.join(layer).join("ash")).expect("linked");
        fs::create_dir_all(from.join("content/blobs/sha256")).expect("made");
        fs::write(from.join("content/blobs/sha256/abc"), "blob").expect("written");
        fs::write(from.join("snapshotter/metadata.db"), "db").expect("written");
        Seed(from.clone()).plant(&to).expect("planted");

        let inode = |path: PathBuf| fs::symlink_metadata(&path).expect("there").ino();
        for same in [
            &*format!("{layer}/sh"),
            &*format!("{layer}/ash"),
            "content/blobs/sha256/abc",
        ] {
            assert_eq!(inode(from.join(same)), inode(to.join(same)), "{same}");
        }
        assert_eq!(
            fs::read_link(to.join(layer).join("ash")).expect("a link"),
            Path::new("sh")
        );
        fs::write(to.join("snapshotter/metadata.db"), "changed").expect("written");
        assert_eq!(
            fs::read_to_string(from.join("snapshotter/metadata.db")).expect("read"),
            "db"
        );
        assert!(
            Seed(from).plant(&to).is_err(),
            "a containerd that has something is left alone"
        );
    }
}
