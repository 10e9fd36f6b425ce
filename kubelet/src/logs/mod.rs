//! Container logs on disk: the CRI line format, reading the end, following, rotating.
//!
//! The runtime writes `<root>/<ns>_<name>_<uid>/<container>/<attempt>.log`, one line per line of output:
//! `<RFC 3339 time> <stdout|stderr> <F|P> <text>`; P marks a piece of a line that goes on.

mod follow;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use jiff::Timestamp;

pub use follow::{Ended, stream};

/// A log is rotated past this size, and this many older pieces are kept beside the current one (upstream's figures).
const ROTATE_BYTES: u64 = 10 << 20;
const PIECES_KEPT: usize = 4;
const CHUNK_BYTES: u64 = 64 << 10;

/// Output is which of a container's two outputs a line was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    Stdout,
    Stderr,
}

/// A Line of a log file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line<'a> {
    pub time: &'a [u8],
    pub output: Output,
    pub whole: bool,
    pub text: &'a [u8],
}

impl<'a> Line<'a> {
    /// Takes a line without its newline apart; None if the runtime did not write it in the CRI format.
    pub fn parse(line: &'a [u8]) -> Option<Self> {
        let mut parts = line.splitn(4, |byte| *byte == b' ');
        let (time, stream, tags) = (parts.next()?, parts.next()?, parts.next()?);
        let output = match stream {
            b"stdout" => Output::Stdout,
            b"stderr" => Output::Stderr,
            _ => return None,
        };
        // Further tags may follow the first, separated by colons.
        let whole = tags.first() != Some(&b'P');
        Some(Self {
            time,
            output,
            whole,
            text: parts.next().unwrap_or_default(),
        })
    }

    pub fn timestamp(&self) -> Option<Timestamp> {
        std::str::from_utf8(self.time).ok()?.parse().ok()
    }
}

/// Selection is which part of a log is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    pub tail_lines: Option<u64>,
    pub since: Option<Timestamp>,
    pub timestamps: bool,
    pub limit_bytes: Option<u64>,
    /// None for both, in the order they were written.
    pub output: Option<Output>,
    pub follow: bool,
}

/// A Printer turns log lines into what `kubectl logs` shows.
#[derive(Debug, Clone)]
pub struct Printer {
    since: Option<Timestamp>,
    timestamps: bool,
    left_bytes: Option<u64>,
    output: Option<Output>,
    /// Whether the last piece ended its line: a time is shown only at the start of one.
    at_start: bool,
}

impl Printer {
    pub fn new(selection: &Selection) -> Self {
        Self {
            since: selection.since,
            timestamps: selection.timestamps,
            left_bytes: selection.limit_bytes,
            output: selection.output,
            at_start: true,
        }
    }

    /// Adds one line of the file to `out`; false when the limit is reached.
    pub fn print(&mut self, line: &[u8], out: &mut Vec<u8>) -> bool {
        let Some(parsed) = Line::parse(line) else {
            return true;
        };
        if self.output.is_some_and(|output| output != parsed.output) {
            return true;
        }
        if let Some(since) = self.since
            && parsed.timestamp().is_some_and(|at| at < since)
        {
            return true;
        }
        let before = out.len();
        if self.timestamps && self.at_start {
            out.extend_from_slice(parsed.time);
            out.push(b' ');
        }
        out.extend_from_slice(parsed.text);
        if parsed.whole {
            out.push(b'\n');
        }
        self.at_start = parsed.whole;
        if let Some(left) = &mut self.left_bytes {
            let added = (out.len() - before) as u64;
            if added >= *left {
                out.truncate(before + usize::try_from(*left).unwrap_or(usize::MAX));
                *left = 0;
                return false;
            }
            *left -= added;
        }
        true
    }
}

/// Where the last `count` lines of a file begin.
pub fn tail_offset(file: &mut File, count: u64) -> std::io::Result<u64> {
    let end = file.seek(SeekFrom::End(0))?;
    if count == 0 {
        return Ok(end);
    }
    let mut found = 0;
    let mut chunk_end = end;
    let mut chunk = Vec::new();
    while chunk_end > 0 {
        let start = chunk_end.saturating_sub(CHUNK_BYTES);
        file.seek(SeekFrom::Start(start))?;
        chunk.clear();
        file.by_ref()
            .take(chunk_end - start)
            .read_to_end(&mut chunk)?;
        for (at, byte) in chunk.iter().enumerate().rev() {
            let position = start + at as u64;
            // The newline that ends the file ends the last line; it does not begin another.
            if *byte == b'\n' && position + 1 != end {
                found += 1;
                if found == count {
                    return Ok(position + 1);
                }
            }
        }
        chunk_end = start;
    }
    Ok(0)
}

/// The end of a log as text: what stands in for a termination message. Empty if there is none.
pub fn last_words(path: &Path, bytes_max: usize) -> String {
    let Ok(mut file) = File::open(path) else {
        return String::new();
    };
    let Ok(offset) = tail_offset(&mut file, 80) else {
        return String::new();
    };
    let mut text = Vec::new();
    if file
        .seek(SeekFrom::Start(offset))
        .and_then(|_| file.read_to_end(&mut text))
        .is_err()
    {
        return String::new();
    }
    let mut printer = Printer::new(&Selection::default());
    let mut out = Vec::new();
    for line in text.split(|byte| *byte == b'\n') {
        printer.print(line, &mut out);
    }
    let from = out.len().saturating_sub(bytes_max);
    String::from_utf8_lossy(&out[from..]).into_owned()
}

/// Moves a log that has grown too large aside; true if the runtime must be told to open a new one.
pub fn rotate(path: &Path, now: Timestamp) -> std::io::Result<bool> {
    if std::fs::metadata(path)?.len() <= ROTATE_BYTES {
        return Ok(false);
    }
    let mut pieces = pieces(path)?;
    pieces.sort();
    for old in pieces.iter().rev().skip(PIECES_KEPT - 1) {
        std::fs::remove_file(old)?;
    }
    let mut moved = path.as_os_str().to_owned();
    moved.push(now.strftime(".%Y%m%d-%H%M%S").to_string());
    std::fs::rename(path, moved)?;
    Ok(true)
}

fn pieces(path: &Path) -> std::io::Result<Vec<PathBuf>> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(Vec::new());
    };
    let prefix = format!("{}.", name.to_string_lossy());
    let entries = std::fs::read_dir(folder)?.flatten();
    Ok(entries
        .filter(|e| e.file_name().to_string_lossy().starts_with(&prefix))
        .map(|e| e.path())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const LOG: &str = "\
2026-01-01T00:00:01.000000001Z stdout F one
2026-01-01T00:00:02Z stderr P tw
2026-01-01T00:00:02Z stderr F o
2026-01-01T00:00:03Z stdout F three with blanks
";

    fn printed(selection: &Selection) -> String {
        let mut printer = Printer::new(selection);
        let mut out = Vec::new();
        for line in LOG.lines() {
            if !printer.print(line.as_bytes(), &mut out) {
                break;
            }
        }
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn pieces_are_joined_and_options_respected() {
        let all = Selection::default();
        assert_eq!(printed(&all), "one\ntwo\nthree with blanks\n");
        let since = Selection {
            since: Some("2026-01-01T00:00:02Z".parse().unwrap()),
            ..all.clone()
        };
        assert_eq!(printed(&since), "two\nthree with blanks\n");
        let timed = Selection {
            timestamps: true,
            since: Some("2026-01-01T00:00:02Z".parse().unwrap()),
            ..all.clone()
        };
        assert_eq!(
            printed(&timed),
            "2026-01-01T00:00:02Z two\n2026-01-01T00:00:03Z three with blanks\n"
        );
        let limited = Selection {
            limit_bytes: Some(6),
            ..all.clone()
        };
        assert_eq!(printed(&limited), "one\ntw");
        for (output, expected) in [
            (Output::Stdout, "one\nthree with blanks\n"),
            (Output::Stderr, "two\n"),
        ] {
            let only = Selection {
                output: Some(output),
                ..all.clone()
            };
            assert_eq!(printed(&only), expected);
        }
    }

    #[test]
    fn the_tail_starts_at_the_right_line_across_chunks() {
        let mut file = tempfile::tempfile().unwrap();
        let line = format!("{}\n", "x".repeat(999));
        for _ in 0..200 {
            file.write_all(line.as_bytes()).unwrap();
        }
        for (count, offset) in [
            (0, 200_000),
            (1, 199_000),
            (100, 100_000),
            (200, 0),
            (500, 0),
        ] {
            assert_eq!(
                tail_offset(&mut file, count).unwrap(),
                offset,
                "{count} lines"
            );
        }
    }

    #[test]
    fn what_the_runtime_did_not_write_is_not_a_line() {
        assert_eq!(Line::parse(b"garbage"), None);
        assert_eq!(Line::parse(b"2026-01-01T00:00:01Z other F x"), None);
        assert_eq!(
            Line::parse(b"2026-01-01T00:00:01Z stdout F").unwrap().text,
            b""
        );
    }

    #[test]
    fn a_large_log_is_moved_aside_and_only_so_many_pieces_stay() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        for second in 0..7 {
            File::create(&path)
                .unwrap()
                .set_len(ROTATE_BYTES + 1)
                .unwrap();
            assert!(rotate(&path, Timestamp::from_second(second).unwrap()).unwrap());
        }
        assert_eq!(pieces(&path).unwrap().len(), PIECES_KEPT);
        File::create(&path).unwrap();
        assert!(!rotate(&path, Timestamp::from_second(9).unwrap()).unwrap());
    }
}
