//! place: making and removing the folders and mounts of a pod's volumes.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{HostPathVolumeSource, Pod, Volume};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{PodFolder, VolumeError, VolumeKind};
use crate::quantity::whole;

/// Makes the place of a volume: a folder, a tmpfs, or what a hostPath asks for. What is there already is kept.
pub fn prepare(pod: &Pod, volume: &Volume, folder: &PodFolder) -> Result<PathBuf, VolumeError> {
    let unsupported = || VolumeError::Unsupported {
        volume: volume.name.clone(),
    };
    let kind = VolumeKind::of(volume).ok_or_else(unsupported)?;
    let path = folder.volume(volume).ok_or_else(unsupported)?;
    if let Some(host) = &volume.host_path {
        prepare_host_path(volume, host)?;
        return Ok(path);
    }
    let failed = |operation: &'static str, error: io::Error| VolumeError::Io {
        volume: volume.name.clone(),
        operation,
        path: path.display().to_string(),
        message: error.to_string(),
    };
    let existed = path.is_dir();
    fs::create_dir_all(&path).map_err(|e| failed("make", e))?;
    let mut fresh = !existed;
    if kind.in_memory() && !is_mount(&path) {
        let size = volume
            .empty_dir
            .as_ref()
            .and_then(|dir| dir.size_limit.as_ref())
            .and_then(whole);
        let options = size.map_or("mode=0755".to_owned(), |bytes| {
            format!("mode=0755,size={bytes}")
        });
        mount(
            Some("tmpfs"),
            &path,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .map_err(|errno| failed("mount a tmpfs on", errno.into()))?;
        fresh = true;
    }
    if fresh {
        let group = fs_group(pod);
        let mode = match kind {
            VolumeKind::EmptyDir { .. } if group.is_some() => 0o2777,
            VolumeKind::EmptyDir { .. } => 0o777,
            _ => 0o755,
        };
        if group.is_some() {
            chown(&path, None, group).map_err(|e| failed("chown", e))?;
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))
            .map_err(|e| failed("chmod", e))?;
    }
    Ok(path)
}

/// The group that owns a pod's volumes.
pub fn fs_group(pod: &Pod) -> Option<u32> {
    let group = pod.spec.as_ref()?.security_context.as_ref()?.fs_group?;
    u32::try_from(group).ok()
}

fn prepare_host_path(volume: &Volume, host: &HostPathVolumeSource) -> Result<(), VolumeError> {
    let path = Path::new(&host.path);
    let failed = |operation: &'static str, error: io::Error| VolumeError::Io {
        volume: volume.name.clone(),
        operation,
        path: host.path.clone(),
        message: error.to_string(),
    };
    let kind = host.type_.as_deref().unwrap_or_default();
    match kind {
        "DirectoryOrCreate" if !path.exists() => {
            fs::create_dir_all(path).map_err(|e| failed("make", e))?
        }
        "FileOrCreate" if !path.exists() => {
            fs::OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .map_err(|e| failed("make", e))?;
        }
        // The runtime cannot mount what is not there; upstream's runtimes make a folder then, ours says the same.
        "" if !path.exists() => fs::create_dir_all(path).map_err(|e| failed("make", e))?,
        _ => {}
    }
    let found = fs::metadata(path).ok().map(|meta| meta.file_type());
    let (holds, expected) = match kind {
        "Directory" | "DirectoryOrCreate" => (found.is_some_and(|t| t.is_dir()), "directory"),
        "File" | "FileOrCreate" => (found.is_some_and(|t| t.is_file()), "file"),
        "Socket" => (found.is_some_and(|t| t.is_socket()), "socket file"),
        "CharDevice" => (
            found.is_some_and(|t| t.is_char_device()),
            "character device",
        ),
        "BlockDevice" => (found.is_some_and(|t| t.is_block_device()), "block device"),
        _ => (true, "file"),
    };
    match holds {
        true => Ok(()),
        false => Err(VolumeError::HostPath {
            volume: volume.name.clone(),
            path: host.path.clone(),
            expected,
        }),
    }
}

fn is_mount(path: &Path) -> bool {
    mounts_below(path).iter().any(|mount| mount == path)
}

/// Mount points at and below a path, deepest first.
fn mounts_below(path: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = text
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| PathBuf::from(unescape(point)));
    let mut found: Vec<PathBuf> = points.filter(|point| point.starts_with(path)).collect();
    found.sort();
    found.reverse();
    found
}

/// mountinfo writes blanks and backslashes as three octal digits.
fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let code = bytes
            .get(at + 1..at + 4)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        match code
            .and_then(|digits| u8::from_str_radix(digits, 8).ok())
            .filter(|_| bytes[at] == b'\\')
        {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Removes everything of a pod below its folder. Nothing is removed through a mount: what cannot be unmounted stops it.
pub fn remove(folder: &PodFolder) -> io::Result<()> {
    for point in mounts_below(&folder.0) {
        umount2(&point, MntFlags::MNT_DETACH).map_err(io::Error::from)?;
    }
    match fs::remove_dir_all(&folder.0) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blanks_in_mount_points_are_read_back() {
        assert_eq!(unescape("/a\\040b\\134c"), "/a b\\c");
        assert_eq!(unescape("/plain"), "/plain");
    }
}
