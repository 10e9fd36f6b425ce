//! OCI image layouts in one tar file (image-spec v1.1, "Image Layout"), as `ctr images import` and other tools read them.
//!
//! Everything is deterministic: no times, owners or orders of the machine, so equal inputs make equal archives, and an
//! image's digest changes only when its contents do. Layers are not compressed: they are imported on the machine
//! that builds them, where decompressing would cost more than reading.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// One entry of an image's file system. Paths are relative to its root.
pub enum Entry {
    Folder {
        path: String,
        mode: u32,
    },
    /// A file of the machine, copied with the mode given.
    File {
        path: String,
        mode: u32,
        source: PathBuf,
    },
    /// A small file whose contents are given.
    Text {
        path: String,
        mode: u32,
        contents: String,
    },
    Link {
        path: String,
        target: String,
    },
}

impl Entry {
    pub fn path(&self) -> &str {
        match self {
            Entry::Folder { path, .. }
            | Entry::File { path, .. }
            | Entry::Text { path, .. }
            | Entry::Link { path, .. } => path,
        }
    }
}

/// An image with one layer.
pub struct Image {
    /// The full reference it is imported as, for example `localhost/keelway/echo:0.1.0`.
    pub reference: String,
    pub entries: Vec<Entry>,
    pub entrypoint: Vec<String>,
    pub command: Vec<String>,
    pub environment: Vec<String>,
    /// `uid:gid`, or empty for root.
    pub user: String,
}

impl Image {
    /// Writes the archive to `path` by way of a partial file beside it.
    pub fn write(mut self, path: &Path) -> Result<()> {
        // A tar is read in order, so a folder must come before what it holds; sorting by path does that.
        self.entries.sort_by(|a, b| a.path().cmp(b.path()));
        let partial = path.with_extension("partial");
        let layer_file = path.with_extension("layer");
        let result = self.write_parts(&partial, &layer_file);
        // It is gone already when all went well.
        let _ = std::fs::remove_file(&layer_file);
        result.with_context(|| format!("cannot write the image {}", self.reference))?;
        std::fs::rename(&partial, path).with_context(|| format!("cannot write {}", path.display()))
    }

    fn write_parts(&self, archive: &Path, layer_file: &Path) -> Result<()> {
        let layer = self.write_layer(layer_file)?;
        let config = serde_json::to_vec(&self.config(&layer))?;
        let config_blob = Blob::of(&config);
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config_blob.descriptor("application/vnd.oci.image.config.v1+json"),
            "layers": [layer.descriptor("application/vnd.oci.image.layer.v1.tar")],
        }))?;
        let manifest_blob = Blob::of(&manifest);
        let mut described = manifest_blob.descriptor("application/vnd.oci.image.manifest.v1+json");
        described["platform"] = json!({"architecture": architecture(), "os": "linux"});
        // containerd names the image by the first annotation; other tools use the second, the tag alone.
        let tag = self.reference.rsplit(':').next().unwrap_or("latest");
        described["annotations"] = json!({
            "io.containerd.image.name": self.reference,
            "org.opencontainers.image.ref.name": tag,
        });
        let index = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [described],
        }))?;

        let mut tar = tar::Builder::new(io::BufWriter::new(File::create(archive)?));
        append(
            &mut tar,
            "oci-layout",
            0o644,
            br#"{"imageLayoutVersion":"1.0.0"}"#,
        )?;
        append(&mut tar, "index.json", 0o644, &index)?;
        append_folder(&mut tar, "blobs", 0o755)?;
        append_folder(&mut tar, "blobs/sha256", 0o755)?;
        append(&mut tar, &manifest_blob.path(), 0o644, &manifest)?;
        append(&mut tar, &config_blob.path(), 0o644, &config)?;
        let mut header = header(tar::EntryType::Regular, 0o644, layer.size);
        tar.append_data(&mut header, layer.path(), File::open(layer_file)?)?;
        tar.into_inner()?
            .into_inner()
            .map_err(|error| error.into_error())?
            .sync_all()?;
        Ok(())
    }

    fn write_layer(&self, layer_file: &Path) -> Result<Blob> {
        let mut tar = tar::Builder::new(Digesting::new(File::create(layer_file)?));
        for entry in &self.entries {
            match entry {
                Entry::Folder { path, mode } => append_folder(&mut tar, path, *mode)?,
                Entry::Text {
                    path,
                    mode,
                    contents,
                } => append(&mut tar, path, *mode, contents.as_bytes())?,
                Entry::File { path, mode, source } => {
                    let file = File::open(source)
                        .with_context(|| format!("cannot read {}", source.display()))?;
                    let size = file.metadata()?.len();
                    tar.append_data(
                        &mut header(tar::EntryType::Regular, *mode, size),
                        path,
                        file,
                    )?;
                }
                Entry::Link { path, target } => {
                    tar.append_link(&mut header(tar::EntryType::Symlink, 0o777, 0), path, target)?;
                }
            }
        }
        tar.into_inner()?.finish()
    }

    fn config(&self, layer: &Blob) -> Value {
        let mut config = json!({
            "Entrypoint": self.entrypoint,
            "Env": self.environment,
            "WorkingDir": "/",
            "StopSignal": "SIGTERM",
        });
        if !self.command.is_empty() {
            config["Cmd"] = json!(self.command);
        }
        if !self.user.is_empty() {
            config["User"] = json!(self.user);
        }
        json!({
            "architecture": architecture(),
            "os": "linux",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [layer.digest()]},
        })
    }
}

/// The machine's architecture by the name that Go, and so the image specification, uses.
fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") {
        "arm64"
    } else {
        "amd64"
    }
}

fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn append<W: Write>(
    tar: &mut tar::Builder<W>,
    path: &str,
    mode: u32,
    contents: &[u8],
) -> Result<()> {
    let mut header = header(tar::EntryType::Regular, mode, contents.len() as u64);
    Ok(tar.append_data(&mut header, path, contents)?)
}

fn append_folder<W: Write>(tar: &mut tar::Builder<W>, path: &str, mode: u32) -> Result<()> {
    let mut header = header(tar::EntryType::Directory, mode, 0);
    Ok(tar.append_data(&mut header, format!("{path}/"), io::empty())?)
}

/// The identity of a blob: its SHA-256 in hexadecimal and its size in bytes.
struct Blob {
    sha256: String,
    size: u64,
}

impl Blob {
    fn of(bytes: &[u8]) -> Blob {
        Blob {
            sha256: hex::encode(Sha256::digest(bytes)),
            size: bytes.len() as u64,
        }
    }

    fn digest(&self) -> String {
        format!("sha256:{}", self.sha256)
    }

    fn path(&self) -> String {
        format!("blobs/sha256/{}", self.sha256)
    }

    fn descriptor(&self, media_type: &str) -> Value {
        json!({"mediaType": media_type, "digest": self.digest(), "size": self.size})
    }
}

/// A file being written whose digest is taken on the way.
struct Digesting {
    file: io::BufWriter<File>,
    hasher: Sha256,
    size: u64,
}

impl Digesting {
    fn new(file: File) -> Digesting {
        Digesting {
            file: io::BufWriter::with_capacity(1 << 20, file),
            hasher: Sha256::new(),
            size: 0,
        }
    }

    fn finish(mut self) -> Result<Blob> {
        self.file.flush()?;
        Ok(Blob {
            sha256: hex::encode(self.hasher.finalize()),
            size: self.size,
        })
    }
}

impl Write for Digesting {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::io::Read;

    fn image(source: &Path) -> Image {
        Image {
            reference: "localhost/keelway/sample:1.2.3".into(),
            entries: vec![
                Entry::File {
                    path: "bin/tool".into(),
                    mode: 0o755,
                    source: source.into(),
                },
                Entry::Link {
                    path: "bin/alias".into(),
                    target: "tool".into(),
                },
                Entry::Folder {
                    path: "bin".into(),
                    mode: 0o755,
                },
                Entry::Text {
                    path: "etc/passwd".into(),
                    mode: 0o644,
                    contents: "root:x:0:0::/:/bin/sh\n".into(),
                },
                Entry::Folder {
                    path: "etc".into(),
                    mode: 0o755,
                },
            ],
            entrypoint: vec!["/bin/tool".into()],
            command: vec!["serve".into()],
            environment: vec!["PATH=/bin".into()],
            user: "65535:65535".into(),
        }
    }

    fn contents(archive: &Path) -> BTreeMap<String, Vec<u8>> {
        let mut tar = tar::Archive::new(File::open(archive).unwrap());
        tar.entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).unwrap();
                (entry.path().unwrap().display().to_string(), bytes)
            })
            .collect()
    }

    fn blob<'a>(files: &'a BTreeMap<String, Vec<u8>>, descriptor: &Value) -> &'a [u8] {
        let digest = descriptor["digest"].as_str().unwrap();
        let bytes = &files[&format!("blobs/sha256/{}", digest.strip_prefix("sha256:").unwrap())];
        assert_eq!(Blob::of(bytes).digest(), digest);
        assert_eq!(bytes.len() as u64, descriptor["size"].as_u64().unwrap());
        bytes
    }

    #[test]
    fn an_archive_leads_from_its_index_to_every_blob_and_carries_the_reference() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("source");
        std::fs::write(&source, "program").unwrap();
        let archive = folder.path().join("sample.tar");
        image(&source).write(&archive).unwrap();

        let files = contents(&archive);
        let index: Value = serde_json::from_slice(&files["index.json"]).unwrap();
        let described = &index["manifests"][0];
        assert_eq!(
            described["annotations"]["io.containerd.image.name"],
            "localhost/keelway/sample:1.2.3"
        );
        assert_eq!(
            described["annotations"]["org.opencontainers.image.ref.name"],
            "1.2.3"
        );
        let manifest: Value = serde_json::from_slice(blob(&files, described)).unwrap();
        let config: Value = serde_json::from_slice(blob(&files, &manifest["config"])).unwrap();
        assert_eq!(config["config"]["Entrypoint"], json!(["/bin/tool"]));
        assert_eq!(config["config"]["User"], "65535:65535");
        assert_eq!(
            config["rootfs"]["diff_ids"][0],
            manifest["layers"][0]["digest"]
        );

        let layer = blob(&files, &manifest["layers"][0]).to_vec();
        let mut tar = tar::Archive::new(&layer[..]);
        let listing: Vec<String> = tar
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let header = entry.header();
                assert_eq!((header.uid().unwrap(), header.mtime().unwrap()), (0, 0));
                format!(
                    "{} {:o}",
                    entry.path().unwrap().display(),
                    header.mode().unwrap()
                )
            })
            .collect();
        assert_eq!(
            listing,
            [
                "bin/ 755",
                "bin/alias 777",
                "bin/tool 755",
                "etc/ 755",
                "etc/passwd 644"
            ]
        );
        let leftovers = std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(leftovers, 2, "only the source and the archive remain");
    }

    #[test]
    fn equal_inputs_make_equal_archives() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("source");
        std::fs::write(&source, "program").unwrap();
        let (first, second) = (folder.path().join("a.tar"), folder.path().join("b.tar"));
        image(&source).write(&first).unwrap();
        // The time of a file is not part of an image.
        std::fs::write(&source, "program").unwrap();
        image(&source).write(&second).unwrap();
        assert_eq!(
            std::fs::read(first).unwrap(),
            std::fs::read(second).unwrap()
        );
    }

    #[test]
    fn a_missing_binary_is_named_and_leaves_no_archive() {
        let folder = tempfile::tempdir().unwrap();
        let archive = folder.path().join("sample.tar");
        let error = image(&folder.path().join("absent"))
            .write(&archive)
            .unwrap_err();
        assert!(format!("{error:#}").contains("absent"), "{error:#}");
        assert!(!archive.exists());
    }
}
