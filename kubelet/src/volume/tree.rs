//! tree: writing a payload so that readers see all of the old files or all of the new ones.
//!
//! The layout is upstream's, which programs that watch for updates rely on: files live in a folder named by time,
//! `..data` is a link to it that is replaced by one rename, and visible names are links through `..data`.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Component, Path, PathBuf};

use jiff::Timestamp;

use super::VolumeError;
use super::payload::{File, Payload};

const DATA: &str = "..data";
const DATA_NEW: &str = "..data_tmp";

fn io_error<'a>(
    volume: &'a str,
    operation: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> VolumeError + 'a {
    move |error| VolumeError::Io {
        volume: volume.to_owned(),
        operation,
        path: path.display().to_string(),
        message: error.to_string(),
    }
}

/// Writes the files below `root`; says whether anything changed. `group` owns the files when the pod has an fsGroup.
pub fn write(
    volume: &str,
    root: &Path,
    payload: &Payload,
    group: Option<u32>,
    now: Timestamp,
) -> Result<bool, VolumeError> {
    let mut payload = payload.clone();
    if group.is_some() {
        payload.values_mut().for_each(|file| file.mode |= 0o040);
    }
    if read(root).is_some_and(|current| current == payload) {
        return Ok(false);
    }
    let fresh_name = format!("..{}", now.strftime("%Y_%m_%d_%H_%M_%S.%9f"));
    let fresh = root.join(&fresh_name);
    fs::create_dir_all(&fresh).map_err(io_error(volume, "make", &fresh))?;
    for (path, File { data, mode }) in &payload {
        let file = fresh.join(path);
        if let Some(parent) = file.parent() {
            fs::create_dir_all(parent).map_err(io_error(volume, "make", parent))?;
        }
        fs::write(&file, data).map_err(io_error(volume, "write", &file))?;
        // Not left to the umask, and set after writing so that a read-only file can be written at all.
        fs::set_permissions(&file, fs::Permissions::from_mode(*mode))
            .map_err(io_error(volume, "chmod", &file))?;
        if group.is_some() {
            chown(&file, None, group).map_err(io_error(volume, "chown", &file))?;
        }
    }
    let old = fs::read_link(root.join(DATA)).ok();
    let link = root.join(DATA_NEW);
    let _ = fs::remove_file(&link);
    symlink(&fresh_name, &link).map_err(io_error(volume, "link", &link))?;
    fs::rename(&link, root.join(DATA)).map_err(io_error(volume, "rename", &link))?;

    let wanted: BTreeSet<&str> = payload
        .keys()
        .filter_map(|path| path.split('/').next())
        .collect();
    for name in &wanted {
        let visible = root.join(name);
        if fs::symlink_metadata(&visible).is_err() {
            symlink(Path::new(DATA).join(name), &visible)
                .map_err(io_error(volume, "link", &visible))?;
        }
    }
    for entry in fs::read_dir(root)
        .map_err(io_error(volume, "list", root))?
        .flatten()
    {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with("..") && !wanted.contains(name.as_ref()) {
            let _ = fs::remove_file(entry.path());
        }
    }
    if let Some(old) = old.filter(|old| *old != Path::new(&fresh_name)) {
        let _ = fs::remove_dir_all(root.join(old));
    }
    Ok(true)
}

/// What a volume holds now; None if it was never written.
fn read(root: &Path) -> Option<Payload> {
    let data = root.join(fs::read_link(root.join(DATA)).ok()?);
    let mut payload = Payload::new();
    read_into(&data, &data, &mut payload).ok()?;
    Some(payload)
}

fn read_into(top: &Path, folder: &Path, payload: &mut Payload) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            read_into(top, &entry.path(), payload)?;
        } else if let Ok(path) = entry.path().strip_prefix(top) {
            let mode = entry.metadata()?.permissions().mode() & 0o777;
            payload.insert(
                path.to_string_lossy().into_owned(),
                File {
                    data: fs::read(entry.path())?,
                    mode,
                },
            );
        }
    }
    Ok(())
}

/// The real path of `sub_path` in a volume, made as a folder if it is not there. Links are followed only inside the
/// volume: a container that can write to a volume must not be able to point its next mount at the host's files.
pub fn resolve_below(root: &Path, sub_path: &str, volume: &str) -> Result<PathBuf, VolumeError> {
    let escapes = || VolumeError::Escapes {
        volume: volume.to_owned(),
        path: sub_path.to_owned(),
    };
    let real_root = fs::canonicalize(root).map_err(io_error(volume, "resolve", root))?;
    let mut at = real_root.clone();
    for part in Path::new(sub_path).components() {
        let Component::Normal(part) = part else {
            if part == Component::CurDir {
                continue;
            }
            return Err(escapes());
        };
        let next = at.join(part);
        if fs::symlink_metadata(&next).is_err() {
            fs::create_dir(&next).map_err(io_error(volume, "make", &next))?;
            // As open as the volume itself: whoever may write there may write here.
            let open = fs::metadata(&real_root).map_err(io_error(volume, "look at", &real_root))?;
            fs::set_permissions(&next, open.permissions())
                .map_err(io_error(volume, "chmod", &next))?;
        }
        at = fs::canonicalize(&next).map_err(io_error(volume, "resolve", &next))?;
        if !at.starts_with(&real_root) {
            return Err(escapes());
        }
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(files: &[(&str, &str)]) -> Payload {
        let file = |text: &str| File {
            data: text.as_bytes().to_vec(),
            mode: 0o644,
        };
        files
            .iter()
            .map(|(path, text)| ((*path).to_owned(), file(text)))
            .collect()
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn an_update_replaces_all_files_by_one_rename() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        assert!(
            write(
                "v",
                root,
                &payload(&[("a", "1"), ("d/b", "2")]),
                None,
                at(1)
            )
            .unwrap()
        );
        assert_eq!(fs::read_to_string(root.join("a")).unwrap(), "1");
        assert_eq!(fs::read_to_string(root.join("d/b")).unwrap(), "2");
        let before = fs::read_link(root.join(DATA)).unwrap();
        assert!(
            !write(
                "v",
                root,
                &payload(&[("a", "1"), ("d/b", "2")]),
                None,
                at(2)
            )
            .unwrap(),
            "nothing changed"
        );
        assert_eq!(fs::read_link(root.join(DATA)).unwrap(), before);
        assert!(write("v", root, &payload(&[("a", "3"), ("c", "4")]), None, at(3)).unwrap());
        assert_eq!(fs::read_to_string(root.join("a")).unwrap(), "3");
        assert_eq!(fs::read_to_string(root.join("c")).unwrap(), "4");
        assert!(
            fs::symlink_metadata(root.join("d")).is_err(),
            "names that are gone disappear"
        );
        assert!(!root.join(before).exists(), "the old files are removed");
    }

    #[test]
    fn a_sub_path_is_made_and_cannot_leave_the_volume() {
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("v"), dir.path().join("outside"));
        fs::create_dir_all(&root).unwrap();
        fs::create_dir_all(&outside).unwrap();
        symlink(&outside, root.join("link")).unwrap();
        assert!(resolve_below(&root, "a/b", "v").unwrap().is_dir());
        for path in ["../outside", "/etc", "a/../../outside", "link"] {
            assert!(
                matches!(
                    resolve_below(&root, path, "v"),
                    Err(VolumeError::Escapes { .. })
                ),
                "{path}"
            );
        }
    }
}
