//! Where the members of an etcd are, in a file that outlives the process: an address a line.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

/// More than etcd has in practice (it advises seven); what is beyond is not remembered.
const MEMBERS_MAX: usize = 16;

/// What was known last; nothing when there is no file.
pub(super) fn remembered(path: Option<&Path>) -> Vec<String> {
    let text = path.and_then(|path| fs::read_to_string(path).ok());
    let text = text.unwrap_or_default();
    let lines = text.lines().map(str::trim);
    let addresses =
        lines.filter(|line| line.starts_with("https://") || line.starts_with("http://"));
    addresses.take(MEMBERS_MAX).map(str::to_owned).collect()
}

/// Writes down what is known, if it is new. What is not remembered is learned again, as long as a member lives that is known.
pub(super) fn remember(path: &Path, members: &[String]) {
    if remembered(Some(path)) == members {
        return;
    }
    let new = path.with_extension("new");
    let write = || {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut out = fs::File::create(&new)?;
        for member in members.iter().take(MEMBERS_MAX) {
            writeln!(out, "{member}")?;
        }
        out.sync_all()?;
        fs::rename(&new, path)
    };
    let written: io::Result<()> = write();
    if let Err(error) = written {
        tracing::warn!(%error, path = %path.display(), "etcd's members are not remembered");
    }
}

/// The members in one order: those that were configured first, as they were, then the others.
pub(super) fn ordered(configured: &[String], mut found: Vec<String>) -> Vec<String> {
    found.sort();
    found.dedup();
    let own = configured.iter().filter(|url| found.contains(url));
    let others = found.iter().filter(|url| !configured.contains(url));
    own.chain(others).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn urls(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn the_configured_members_come_first_and_those_that_left_go() {
        let found = urls(&["https://c:1", "https://a:1", "https://b:1", "https://a:1"]);
        assert_eq!(
            ordered(&urls(&["https://b:1", "https://x:1"]), found),
            urls(&["https://b:1", "https://a:1", "https://c:1"])
        );
        assert!(ordered(&urls(&["https://b:1"]), Vec::new()).is_empty());
    }

    #[test]
    fn members_are_remembered_and_what_is_no_address_is_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("new/members");
        assert!(remembered(Some(&path)).is_empty() && remembered(None).is_empty());
        let members = urls(&["https://10.0.0.1:2379", "https://[fd00::1]:2379"]);
        remember(&path, &members);
        assert_eq!(remembered(Some(&path)), members);
        fs::write(&path, "https://a:1\n\nhttps\n\u{0}\nhttp://b:1").expect("written");
        assert_eq!(
            remembered(Some(&path)),
            urls(&["https://a:1", "http://b:1"])
        );
    }
}
