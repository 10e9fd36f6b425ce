//! The files that a configuration was read from, as they were then: so that it is known when it would be read differently.

use std::path::{Path, PathBuf};
use std::{fs, io};

use sha2::{Digest as _, Sha256};

type Sum = [u8; 32];

/// What was read and looked for, also by a reading that came to an error.
#[derive(Debug, Default)]
pub struct Files {
    /// Files, with what they held; `None` where there was none.
    read: Vec<(PathBuf, Option<Sum>)>,
    /// Patterns of names, with the files that they stood for.
    matched: Vec<(PathBuf, Vec<PathBuf>)>,
}

fn sum(content: &[u8]) -> Sum {
    Sha256::digest(content).into()
}

impl Files {
    /// Reads a file.
    ///
    /// # Errors
    /// When it can't be read, or is no text.
    pub fn text(&mut self, path: &Path) -> io::Result<String> {
        let content = fs::read(path);
        let held = content.as_ref().ok().map(|content| sum(content));
        self.read.push((path.into(), held));
        String::from_utf8(content?)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    /// Notes a file that others will read.
    pub fn note(&mut self, path: &Path) {
        let held = fs::read(path).ok().map(|content| sum(&content));
        self.read.push((path.into(), held));
    }

    /// The files that a name stands for, which may have a star: in their order, and none is fine where it has.
    pub fn matching(&mut self, path: PathBuf) -> Vec<PathBuf> {
        let name = path.file_name().unwrap_or_default();
        if !name.to_string_lossy().contains('*') {
            return vec![path];
        }
        let files = matching(&path);
        self.matched.push((path, files.clone()));
        files
    }

    /// Whether another reading would find something else.
    pub fn have_changed(&self) -> bool {
        let mut read = self.read.iter();
        let mut matched = self.matched.iter();
        // A file that is gone is a change too, as is its return.
        read.any(|(path, held)| fs::read(path).ok().map(|content| sum(&content)) != *held)
            || matched.any(|(pattern, files)| matching(pattern) != *files)
    }

    /// Every file that was read.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.read.iter().map(|(path, _)| path.as_path())
    }
}

fn matching(pattern: &Path) -> Vec<PathBuf> {
    let name = pattern.file_name().unwrap_or_default().to_string_lossy();
    let Some((before, after)) = name.split_once('*') else {
        return Vec::new();
    };
    let Some(Ok(entries)) = pattern.parent().map(fs::read_dir) else {
        return Vec::new();
    };
    let fits = |file: &PathBuf| {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        name.len() >= before.len() + after.len()
            && name.starts_with(before)
            && name.ends_with(after)
    };
    let entries = entries.flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> = entries.filter(fits).collect();
    files.sort();
    files
}
