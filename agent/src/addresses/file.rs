//! The file that a [`Pool`] survives in.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use serde::{Deserialize, Serialize};

use super::{Allocation, Pool};

/// Where a pool is kept.
#[derive(Clone, Debug)]
pub struct AddressFile {
    path: PathBuf,
}

/// Why the file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}: {reason}", path.display())]
    Content { path: PathBuf, reason: String },
}

#[derive(Serialize, Deserialize)]
struct Content {
    version: u32,
    #[serde(default)]
    last: Vec<IpAddr>,
    allocations: Vec<Allocation>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    dying: BTreeMap<String, Vec<IpAddr>>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    resting: BTreeMap<IpAddr, u64>,
}

const CONTENT_VERSION: u32 = 2;

impl AddressFile {
    pub fn new(state_dir: &Path) -> Self {
        Self {
            path: state_dir.join("addresses.json"),
        }
    }

    /// The pool of an earlier agent, without ranges; an empty one if there was none.
    pub fn load(&self) -> Result<Pool, FileError> {
        let bad = |reason: String| FileError::Content {
            path: self.path.clone(),
            reason,
        };
        let json = match fs::read(&self.path) {
            Ok(json) => json,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Pool::default()),
            Err(source) => {
                return Err(FileError::Io {
                    path: self.path.clone(),
                    source,
                });
            }
        };
        let content: Content =
            serde_json::from_slice(&json).map_err(|error| bad(error.to_string()))?;
        if content.version != CONTENT_VERSION {
            return Err(bad(format!(
                "version {} is not {CONTENT_VERSION}",
                content.version
            )));
        }
        Pool::restore(
            content.allocations,
            content.dying,
            content.resting,
            content.last,
        )
        .map_err(bad)
    }

    /// Keeps a file that cannot be read, under another name, for people to look at.
    pub fn set_aside(&self) -> Result<PathBuf, FileError> {
        let aside = self.path.with_extension("json.unreadable");
        fs::rename(&self.path, &aside).map_err(|source| FileError::Io {
            path: self.path.clone(),
            source,
        })?;
        Ok(aside)
    }

    /// Writes the pool: whenever this process is killed, the file holds the old pool or the new one, whole.
    ///
    /// Two files trade names. To put one in the place of another has ext4 write its data at once (`auto_da_alloc`), 0.35 ms of every
    /// ADD and DEL, and so has it one that was made empty.
    ///
    /// It does not wait for the disk. What that could save is a power cut, and after one no pod is left whose address could be given
    /// twice; the interfaces that are there tell the truth then, as they do when the file is lost.
    pub fn save(&self, pool: &Pool) -> Result<(), FileError> {
        let content = Content {
            version: CONTENT_VERSION,
            last: pool.last(),
            allocations: pool.allocations().cloned().collect(),
            dying: pool.dying().clone(),
            resting: pool.resting().clone(),
        };
        let write = || -> io::Result<()> {
            let dir = self.path.parent().unwrap_or(Path::new("/"));
            let partial = self.path.with_extension("json.new");
            let json = serde_json::to_vec(&content)?;
            let open = || {
                let mut options = File::options();
                options
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .open(&partial)
            };
            let mut file = match open() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    fs::create_dir_all(dir)?;
                    open()?
                }
                other => other?,
            };
            file.write_all(&json)?;
            file.set_len(json.len() as u64)?;
            let traded = renameat2(
                AT_FDCWD,
                &partial,
                AT_FDCWD,
                &self.path,
                RenameFlags::RENAME_EXCHANGE,
            );
            match traded {
                Ok(()) => Ok(()),
                // The first time there is nothing to trade with, and not every file system can.
                Err(_) => fs::rename(&partial, &self.path),
            }
        };
        write().map_err(|source| FileError::Io {
            path: self.path.clone(),
            source,
        })
    }
}
