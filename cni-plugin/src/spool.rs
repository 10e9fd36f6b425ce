//! Deletions that wait for an agent that was away: one file per attachment, named by it.

use std::fs;
use std::io;
use std::path::Path;

use crate::Attachment;

/// Deletions that may wait at one time. More than a node's pods many times over: an agent that is away for good must not fill the
/// disk. What no longer fits costs time, not addresses: the agent also finds by itself what has gone.
pub const WAITING_MAX: usize = 4096;

/// Writes a deletion down. Doing so twice is the same as once.
pub fn put(dir: &Path, attachment: &Attachment) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let name = attachment.to_string();
    if !dir.join(&name).exists() && fs::read_dir(dir)?.count() >= WAITING_MAX {
        return Err(io::Error::new(
            io::ErrorKind::StorageFull,
            format!("{WAITING_MAX} deletions wait already"),
        ));
    }
    // A reader never sees half a file: names with a leading dot are not read.
    let partial = dir.join(format!(".{name}.{}", std::process::id()));
    fs::write(&partial, serde_json::to_vec(attachment)?)?;
    fs::rename(&partial, dir.join(name))
}

/// The deletions that wait, in the order of their names. Files that are none are left out.
pub fn list(dir: &Path) -> io::Result<Vec<Attachment>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| !name.starts_with('.')) else {
            continue;
        };
        let attachment = fs::read(entry.path())
            .ok()
            .and_then(|json| serde_json::from_slice(&json).ok());
        if let Some(attachment) = attachment.filter(|one: &Attachment| one.to_string() == name) {
            found.push(attachment);
        }
    }
    found.sort();
    Ok(found)
}

/// Strikes a deletion out, once it is done or an ADD has overtaken it.
pub fn remove(dir: &Path, attachment: &Attachment) -> io::Result<()> {
    match fs::remove_file(dir.join(attachment.to_string())) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
