//! follow: a log as a stream of bytes, to its end or for as long as its container runs.

use std::fs::File;
use std::future::Future;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;

use bytes::Bytes;
use futures::Stream;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::net::unix::pipe::Receiver;
use tokio::sync::mpsc;

use super::{Printer, Selection, tail_offset};

/// What is read at once, and how many such pieces may wait for a slow reader.
const READ_BYTES: usize = 32 << 10;
const PIECES_WAITING_MAX: usize = 4;

/// Ends when the container that writes the log has ended, and all it wrote is on disk.
pub type Ended = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The selected part of a log. The file is read as the reader takes it; a reader that leaves ends it.
pub fn stream(
    path: PathBuf,
    selection: Selection,
    ended: Ended,
) -> impl Stream<Item = Result<Bytes, std::io::Error>> + Send + 'static {
    let (send, mut receive) = mpsc::channel(PIECES_WAITING_MAX);
    tokio::spawn(async move {
        if let Err(error) = copy(&path, &selection, ended, &send).await {
            let _ = send.send(Err(error)).await;
        }
    });
    futures::stream::poll_fn(move |context| receive.poll_recv(context))
}

async fn copy(
    path: &Path,
    selection: &Selection,
    ended: Ended,
    send: &mpsc::Sender<Result<Bytes, std::io::Error>>,
) -> std::io::Result<()> {
    // Watching starts before reading: nothing that is written in between is missed.
    let watched = if selection.follow {
        Some(watch(path)?)
    } else {
        None
    };
    let mut file = File::open(path)?;
    if let Some(count) = selection.tail_lines {
        let offset = tail_offset(&mut file, count)?;
        file.seek(SeekFrom::Start(offset))?;
    }
    let mut printer = Printer::new(selection);
    let mut pending = Vec::new();
    let mut ended = ended;
    let mut over = watched.is_none();
    loop {
        if !drain(&mut file, &mut pending, &mut printer, send).await? {
            return Ok(());
        }
        if replaced(path, &file) {
            file = File::open(path)?;
            continue;
        }
        let (Some(watched), false) = (&watched, over) else {
            return Ok(());
        };
        tokio::select! {
            ready = watched.readable() => {
                ready?;
                // Which event it was does not matter: any is a reason to read on.
                let mut events = [0; 4096];
                while watched.try_read(&mut events).is_ok() {}
            }
            // One more pass takes what was written last.
            () = &mut ended => over = true,
            () = send.closed() => return Ok(()),
        }
    }
}

/// An inotify instance. It is waited for like a pipe, which is how it behaves, because tokio's own wrapper for
/// descriptors of other kinds cannot be made without `unsafe`.
fn watch(path: &Path) -> std::io::Result<Receiver> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    let folder = path.parent().unwrap_or(Path::new("/"));
    // The folder, not the file: a rotation makes a new file of the same name.
    inotify.add_watch(
        folder,
        AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVE,
    )?;
    Receiver::from_owned_fd_unchecked(inotify.as_fd().try_clone_to_owned()?)
}

/// Whether the path leads to another file by now.
fn replaced(path: &Path, file: &File) -> bool {
    let (Ok(now), Ok(open)) = (std::fs::metadata(path), file.metadata()) else {
        return false;
    };
    (now.dev(), now.ino()) != (open.dev(), open.ino())
}

/// Copies all whole lines up to the end of the file; false when no more is wanted.
async fn drain(
    file: &mut File,
    pending: &mut Vec<u8>,
    printer: &mut Printer,
    send: &mpsc::Sender<Result<Bytes, std::io::Error>>,
) -> std::io::Result<bool> {
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(true);
        }
        pending.extend_from_slice(&buffer[..count]);
        let mut out = Vec::new();
        let mut from = 0;
        let mut wanted = true;
        while let Some(length) = pending[from..].iter().position(|byte| *byte == b'\n') {
            wanted = printer.print(&pending[from..from + length], &mut out);
            from += length + 1;
            if !wanted {
                break;
            }
        }
        pending.drain(..from);
        if !out.is_empty() && send.send(Ok(Bytes::from(out))).await.is_err() {
            return Ok(false);
        }
        if !wanted {
            return Ok(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::StreamExt;
    use std::io::Write;

    #[tokio::test]
    async fn following_shows_new_lines_goes_through_a_rotation_and_ends_with_the_container() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut file = File::create(&path).unwrap();
        writeln!(file, "2026-01-01T00:00:01Z stdout F one").unwrap();
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let ended: Ended = Box::pin(async move { drop(ended.await) });
        let selection = Selection {
            follow: true,
            ..Default::default()
        };
        let mut lines = Box::pin(stream(path.clone(), selection, ended));
        assert_eq!(lines.next().await.unwrap().unwrap(), "one\n");
        writeln!(file, "2026-01-01T00:00:02Z stdout F two").unwrap();
        assert_eq!(lines.next().await.unwrap().unwrap(), "two\n");
        std::fs::rename(&path, dir.path().join("0.log.1")).unwrap();
        let mut file = File::create(&path).unwrap();
        writeln!(file, "2026-01-01T00:00:03Z stdout F three").unwrap();
        assert_eq!(lines.next().await.unwrap().unwrap(), "three\n");
        end.send(()).unwrap();
        assert!(lines.next().await.is_none());
    }

    #[tokio::test]
    async fn without_follow_the_stream_ends_with_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        std::fs::write(
            &path,
            "2026-01-01T00:00:01Z stdout F one\n2026-01-01T00:00:02Z stdout F two\n",
        )
        .unwrap();
        let selection = Selection {
            tail_lines: Some(1),
            ..Default::default()
        };
        let lines: Vec<_> = stream(path, selection, Box::pin(std::future::pending()))
            .collect()
            .await;
        assert_eq!(
            lines.into_iter().map(Result::unwrap).collect::<Vec<_>>(),
            ["two\n"]
        );
    }
}
