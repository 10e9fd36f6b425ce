//! The node's own log files: `/logs/PATH`, as `kubectl get --raw /api/v1/nodes/NAME/proxy/logs/` asks for them.
//!
//! Pods may write into that folder (a hostPath), links among the rest. What is shown lies beneath it, wherever a link leads.

use std::fs::File;
use std::io::{Error, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Component, Path};

use bytes::Bytes;
use futures::{Stream, stream};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use tokio::task::spawn_blocking;

const CHUNK_BYTES: usize = 64 << 10;
/// By so many bytes it is judged whether a file is text.
const LOOK_BYTES: usize = 512;

/// Found is what a path leads to.
pub enum Found {
    /// The names in a folder, as a page of links.
    Folder(String),
    File {
        file: File,
        text: bool,
    },
}

/// Looks `parts` up below `root`. `slash` says that the request ended with one, which is what the page's links depend on.
///
/// # Errors
/// NotFound for what is not there, leads out of `root`, or is neither a folder nor a file; else why it cannot be read.
pub fn look(root: &Path, parts: &[&str], slash: bool) -> Result<Found, Error> {
    let asked: std::path::PathBuf = parts.iter().collect();
    if !asked
        .components()
        .all(|part| matches!(part, Component::Normal(_)))
    {
        return Err(ErrorKind::NotFound.into());
    }
    let root = root.canonicalize()?;
    let path = root.join(asked).canonicalize()?;
    let below = path.strip_prefix(&root).map_err(|_| ErrorKind::NotFound)?;
    let file = open_beneath(&File::open(&root)?, below)?;
    let kind = file.metadata()?.file_type();
    if kind.is_dir() {
        let own = if slash { None } else { parts.last() };
        return Ok(Found::Folder(page(&path, own.copied())?));
    }
    if !kind.is_file() {
        return Err(ErrorKind::NotFound.into());
    }
    let mut head = [0; LOOK_BYTES];
    let length = file.read_at(&mut head, 0)?;
    let text = !head[..length].contains(&0);
    Ok(Found::File { file, text })
}

/// Opens a path that has been freed of links. A link that was put there since is refused, and a pipe does not wait for its writer.
fn open_beneath(root: &File, below: &Path) -> Result<File, Error> {
    let below = match below.as_os_str().is_empty() {
        true => Path::new("."),
        false => below,
    };
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    Ok(File::from(openat2(root, below, how)?))
}

/// The names in a folder. Links count from the folder, or, where the request had no slash at its end, from the one above.
fn page(folder: &Path, own: Option<&str>) -> Result<String, Error> {
    let mut names: Vec<String> = std::fs::read_dir(folder)?
        .map(|entry| {
            let entry = entry?;
            let mark = if entry.file_type()?.is_dir() { "/" } else { "" };
            Ok(format!("{}{mark}", entry.file_name().to_string_lossy()))
        })
        .collect::<Result<_, Error>>()?;
    names.sort();
    let prefix = own
        .map(|own| format!("{}/", encoded(own)))
        .unwrap_or_default();
    let mut page = "<!doctype html>\n<pre>\n".to_owned();
    for name in &names {
        let link = format!(
            "<a href=\"./{prefix}{}\">{}</a>\n",
            encoded(name),
            escaped(name)
        );
        page.push_str(&link);
    }
    page.push_str("</pre>\n");
    Ok(page)
}

/// A name as a part of a URL's path.
fn encoded(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => {
                out.push(char::from(byte));
            }
            byte => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

fn escaped(name: &str) -> String {
    name.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// The bytes of a file up to where it ends now.
pub fn chunks(file: File) -> impl Stream<Item = Result<Bytes, Error>> + Send + Sync {
    stream::try_unfold((std::sync::Arc::new(file), 0), |(file, at)| async move {
        let reader = file.clone();
        let read = spawn_blocking(move || {
            let mut chunk = vec![0; CHUNK_BYTES];
            let length = reader.read_at(&mut chunk, at)?;
            chunk.truncate(length);
            Ok::<_, Error>(chunk)
        });
        let chunk = read.await.map_err(Error::other)??;
        let end = at + chunk.len() as u64;
        Ok((!chunk.is_empty()).then(|| (Bytes::from(chunk), (file, end))))
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn text(found: Result<Found, Error>) -> String {
        match found.expect("found") {
            Found::Folder(page) => page,
            Found::File { file, .. } => std::io::read_to_string(file).expect("read"),
        }
    }

    #[test]
    fn folders_are_listed_and_files_read_and_nothing_outside_is_seen() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("secret"), "s").unwrap();
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        std::fs::create_dir(at("pods")).unwrap();
        std::fs::write(at("pods/a<b c.log"), "hello").unwrap();
        std::fs::write(at("wtmp"), [7, 0]).unwrap();
        symlink("pods/a<b c.log", at("relative")).unwrap();
        symlink(at("pods/a<b c.log"), at("absolute")).unwrap();
        symlink(outside.path(), at("folder-out")).unwrap();
        symlink(outside.path().join("secret"), at("out")).unwrap();
        nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();

        let look = |parts: &[&str], slash| look(root.path(), parts, slash);
        let link = "<a href=\"./a%3Cb%20c.log\">a&lt;b c.log</a>";
        assert!(text(look(&["pods"], true)).contains(link));
        let from_above = "<a href=\"./pods/a%3Cb%20c.log\">";
        assert!(text(look(&["pods"], false)).contains(from_above));
        assert!(text(look(&[], true)).contains("<a href=\"./pods/\">pods/</a>"));
        for path in [&["pods", "a<b c.log"][..], &["relative"], &["absolute"]] {
            assert_eq!(text(look(path, false)), "hello");
        }
        let judged = |parts: &[&str]| match look(parts, false).expect("found") {
            Found::File { text, .. } => text,
            Found::Folder(_) => panic!("a file"),
        };
        assert!(judged(&["relative"]) && !judged(&["wtmp"]));
        for path in [
            &["out"][..],
            &["folder-out"],
            &["folder-out", "secret"],
            &["pods", "..", "wtmp"],
            &["..", "etc"],
            &["/etc/passwd"],
            &["pipe"],
            &["nothing"],
        ] {
            let error = look(path, false).err().expect("refused");
            assert_eq!(error.kind(), ErrorKind::NotFound, "{path:?}");
        }
        // A link that comes after the path was looked at.
        let root = File::open(root.path()).unwrap();
        assert!(open_beneath(&root, Path::new("out")).is_err());
    }
}
