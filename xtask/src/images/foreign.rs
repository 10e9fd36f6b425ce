//! Images of programs that were built outside the project, under whatever name a test suite asks for.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::oci::{Entry, Image};
use super::{Contents, client, pause, shared_libraries};
use crate::project::Project;

/// What an image of foreign programs is made of.
#[derive(clap::Args)]
pub struct Recipe {
    /// The full reference, for example registry.k8s.io/pause:3.10.1
    reference: String,
    /// Start from an image of the project: `client` (a shell and busybox's programs) or `pause`
    #[arg(long)]
    base: Option<String>,
    /// A program, FILE or FILE:PATH in the image (default /bin/<its name>), with the libraries that it loads
    #[arg(long = "program")]
    programs: Vec<String>,
    /// A folder whose contents become the image's
    #[arg(long)]
    root: Option<PathBuf>,
    /// The entry point's words, one an option; the base's own when none is given
    #[arg(long, allow_hyphen_values = true)]
    entrypoint: Vec<String>,
    /// The words of the default arguments, one an option
    #[arg(long, allow_hyphen_values = true)]
    command: Vec<String>,
    /// `uid:gid`; root when not given
    #[arg(long)]
    user: Option<String>,
    /// Where the archive goes
    #[arg(long)]
    output: PathBuf,
    /// The profile of the project's own programs in a base
    #[arg(long, default_value = "dist")]
    profile: String,
}

/// Makes the archive. Later parts replace files of earlier ones: base, then folder, then programs.
pub fn run(project: &Project, recipe: Recipe) -> Result<()> {
    let bin_dir = project.bin_dir(&recipe.profile);
    let base = match recipe.base.as_deref() {
        None => None,
        Some("client") => Some(client(project, &bin_dir)?),
        Some("pause") => Some(pause(project, &bin_dir)?),
        Some(other) => bail!("there is no base {other}; the bases are client and pause"),
    };
    let words = |given: &[String], of_base: &[&str]| match given {
        [] => of_base.iter().map(|word| (*word).to_owned()).collect(),
        given => given.to_vec(),
    };
    let Contents {
        entries,
        entrypoint,
        command,
        environment,
        user,
    } = base.unwrap_or(Contents {
        entries: Vec::new(),
        entrypoint: &[],
        command: &[],
        environment: &["PATH=/bin:/usr/bin:/usr/local/bin:/"],
        user: "",
    });
    let mut by_path: BTreeMap<String, Entry> = BTreeMap::new();
    let mut add = |entry: Entry| drop(by_path.insert(entry.path().to_owned(), entry));
    entries.into_iter().for_each(&mut add);
    if let Some(root) = &recipe.root {
        walk(root, root, &mut add)?;
    }
    for program in &recipe.programs {
        let (source, path) = place(program)?;
        // A static program has none, of which ldd speaks as of an error.
        for (path, source) in shared_libraries(&source).unwrap_or_default() {
            add(Entry::File {
                path,
                mode: 0o755,
                source,
            });
        }
        add(Entry::File {
            path,
            mode: 0o755,
            source,
        });
    }
    if by_path.is_empty() {
        bail!("an image of nothing: name a --base, a --root or a --program");
    }
    let image = Image {
        reference: recipe.reference.clone(),
        entries: by_path.into_values().collect(),
        entrypoint: words(&recipe.entrypoint, entrypoint),
        command: words(&recipe.command, command),
        environment: environment.iter().map(|word| (*word).to_owned()).collect(),
        user: recipe.user.unwrap_or_else(|| user.to_owned()),
    };
    image.write(&recipe.output)?;
    eprintln!(
        "images: {} -> {}",
        recipe.reference,
        recipe.output.display()
    );
    Ok(())
}

/// A program and its place, from `FILE` or `FILE:PATH`.
fn place(program: &str) -> Result<(PathBuf, String)> {
    let (file, path) = program.split_once(':').unwrap_or((program, ""));
    let source = fs::canonicalize(file).with_context(|| format!("there is no program {file}"))?;
    let path = match path.trim_start_matches('/') {
        "" => {
            let name = Path::new(file)
                .file_name()
                .context("a program has a name")?;
            format!("bin/{}", name.to_string_lossy())
        }
        path => path.to_owned(),
    };
    Ok((source, path))
}

/// Adds what is below `folder`, with its modes; links stay links.
fn walk(root: &Path, folder: &Path, add: &mut impl FnMut(Entry)) -> Result<()> {
    let read = |path: &Path| format!("cannot read {}", path.display());
    for entry in fs::read_dir(folder).with_context(|| read(folder))? {
        let source = entry.with_context(|| read(folder))?.path();
        let inside = source
            .strip_prefix(root)
            .context("an entry lies below its root")?;
        let path = inside
            .to_str()
            .with_context(|| format!("{} is no UTF-8 name", source.display()))?
            .to_owned();
        let meta = fs::symlink_metadata(&source).with_context(|| read(&source))?;
        let mode = meta.permissions().mode() & 0o7777;
        if meta.is_dir() {
            add(Entry::Folder { path, mode });
            walk(root, &source, add)?;
        } else if meta.is_symlink() {
            let target = fs::read_link(&source).with_context(|| read(&source))?;
            let target = target.to_string_lossy().into_owned();
            add(Entry::Link { path, target });
        } else if meta.is_file() {
            add(Entry::File { path, mode, source });
        } else {
            bail!(
                "{} is neither a file, a folder nor a link",
                source.display()
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_have_their_places() {
        let file = std::env::current_exe()
            .expect("this test")
            .display()
            .to_string();
        let name = Path::new(&file)
            .file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned();
        assert_eq!(place(&file).expect("a program").1, format!("bin/{name}"));
        assert_eq!(
            place(&format!("{file}:/agnhost")).expect("a program").1,
            "agnhost"
        );
        assert!(place("/no/such/program").is_err());
    }

    #[test]
    fn a_folder_becomes_entries_of_every_kind() {
        let root = std::env::temp_dir().join(format!("xtask-foreign-{}", std::process::id()));
        fs::create_dir_all(root.join("etc")).expect("a folder");
        fs::write(root.join("etc/passwd"), "root").expect("a file");
        std::os::unix::fs::symlink("etc", root.join("link")).expect("a link");
        let mut paths = Vec::new();
        let walked = walk(&root, &root, &mut |entry| {
            paths.push(entry.path().to_owned())
        });
        fs::remove_dir_all(&root).expect("removed");
        walked.expect("readable");
        paths.sort();
        assert_eq!(paths, ["etc", "etc/passwd", "link"]);
    }
}
