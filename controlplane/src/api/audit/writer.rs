//! The file of the audit log: a line per event, and older files beside it.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use tokio::sync::mpsc;

/// Events that may wait for the disk before requests do.
const QUEUE_MAX: usize = 4096;

/// Writer hands lines to a thread of its own.
pub struct Writer(mpsc::Sender<String>);

impl Writer {
    /// Appends to a file, which is renamed to `<path>.1` (and that to `<path>.2`, up to `kept`) when it has grown beyond `bytes_max`.
    pub fn open(path: &Path, bytes_max: u64, kept: usize) -> io::Result<Self> {
        let mut log = Log::open(path, bytes_max, kept)?;
        let (lines, mut queue) = mpsc::channel::<String>(QUEUE_MAX);
        std::thread::Builder::new()
            .name("audit-log".to_owned())
            .spawn(move || {
                while let Some(line) = queue.blocking_recv() {
                    let written = log.append(&line);
                    // What waits is written together.
                    let flushed = match queue.is_empty() {
                        true => written.and_then(|()| log.file.flush()),
                        false => written,
                    };
                    if let Err(error) = flushed {
                        tracing::error!(%error, path = %log.path.display(), "the audit log cannot be written");
                    }
                }
            })?;
        Ok(Self(lines))
    }

    pub async fn write(&self, line: String) {
        // Its thread ends with this value.
        let _ = self.0.send(line).await;
    }
}

struct Log {
    path: PathBuf,
    file: BufWriter<File>,
    bytes: u64,
    bytes_max: u64,
    kept: usize,
}

fn open(path: &Path) -> io::Result<File> {
    // It tells who did what: nobody else's to read.
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

impl Log {
    fn open(path: &Path, bytes_max: u64, kept: usize) -> io::Result<Self> {
        let file = open(path)?;
        Ok(Self {
            path: path.to_owned(),
            bytes: file.metadata()?.len(),
            file: BufWriter::new(file),
            bytes_max,
            kept,
        })
    }

    fn append(&mut self, line: &str) -> io::Result<()> {
        let bytes = line.len() as u64 + 1;
        if self.bytes > 0 && self.bytes + bytes > self.bytes_max {
            self.rotate()?;
        }
        self.bytes += bytes;
        self.file.write_all(line.as_bytes())?;
        self.file.write_all(b"\n")
    }

    fn rotate(&mut self) -> io::Result<()> {
        self.file.flush()?;
        let older = |at: usize| PathBuf::from(format!("{}.{at}", self.path.display()));
        for at in (1..self.kept).rev() {
            if older(at).exists() {
                std::fs::rename(older(at), older(at + 1))?;
            }
        }
        match self.kept {
            0 => std::fs::remove_file(&self.path)?,
            _ => std::fs::rename(&self.path, older(1))?,
        }
        self.file = BufWriter::new(open(&self.path)?);
        self.bytes = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_bounded_and_the_newest_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.log");
        let mut log = Log::open(&path, 100, 2).unwrap();
        for at in 0..40 {
            log.append(&format!("event {at:03}")).unwrap();
        }
        log.file.flush().unwrap();
        let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3);
        let all = read("audit.log.2") + &read("audit.log.1") + &read("audit.log");
        let expected: String = (10..40).map(|at| format!("event {at:03}\n")).collect();
        assert_eq!(all, expected);
        // It goes on where it was.
        drop(log);
        let mut log = Log::open(&path, 100, 2).unwrap();
        log.append("more").unwrap();
        log.file.flush().unwrap();
        assert!(read("audit.log.1").ends_with("event 039\n"));
        assert_eq!(read("audit.log"), "more\n");
    }
}
