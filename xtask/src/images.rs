//! Keelway's images, made from static binaries into `target/images/<name>.tar`, without a container runtime.

pub mod foreign;
pub mod oci;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::project::Project;
use crate::{build, process};
use oci::{Entry, Image};

/// What an image is made of; its file system and configuration follow from its name.
struct Recipe {
    name: &'static str,
    packages: &'static [&'static str],
    image: fn(&Project, &Path) -> Result<Contents>,
}

struct Contents {
    entries: Vec<Entry>,
    entrypoint: &'static [&'static str],
    command: &'static [&'static str],
    environment: &'static [&'static str],
    user: &'static str,
}

const RECIPES: &[Recipe] = &[
    Recipe {
        name: "agent",
        packages: &["keelway-agent", "keelway-cni"],
        image: agent,
    },
    Recipe {
        name: "dns",
        packages: &["keelway-dns"],
        image: dns,
    },
    Recipe {
        name: "pause",
        packages: &["keelway-image-programs"],
        image: pause,
    },
    Recipe {
        name: "echo",
        packages: &["keelway-image-programs"],
        image: echo,
    },
    Recipe {
        name: "client",
        packages: &["keelway-image-programs"],
        image: client,
    },
];

/// Makes the named images, or all of them, and rebuilds only those whose inputs changed.
pub fn run(project: &Project, profile: &str, names: &[String], build: bool) -> Result<()> {
    for name in names {
        if !RECIPES.iter().any(|recipe| recipe.name == name) {
            let known: Vec<&str> = RECIPES.iter().map(|recipe| recipe.name).collect();
            bail!(
                "there is no image {name}; the images are {}",
                known.join(", ")
            );
        }
    }
    let wanted =
        |recipe: &&Recipe| names.is_empty() || names.iter().any(|name| name == recipe.name);
    let recipes: Vec<&Recipe> = RECIPES.iter().filter(wanted).collect();
    if build {
        let mut packages: Vec<&str> = recipes
            .iter()
            .flat_map(|recipe| recipe.packages)
            .copied()
            .collect();
        packages.sort_unstable();
        packages.dedup();
        build::packages(project, profile, &packages)?;
    }
    fs::create_dir_all(project.images_dir())?;
    let bin_dir = project.bin_dir(profile);
    for recipe in recipes {
        write(project, recipe, &bin_dir)?;
    }
    Ok(())
}

fn write(project: &Project, recipe: &Recipe, bin_dir: &Path) -> Result<()> {
    let Contents {
        entries,
        entrypoint,
        command,
        environment,
        user,
    } = (recipe.image)(project, bin_dir)?;
    let words = |list: &[&str]| list.iter().map(|word| word.to_string()).collect();
    let image = Image {
        reference: format!("localhost/keelway/{}:{}", recipe.name, project.version),
        entries,
        entrypoint: words(entrypoint),
        command: words(command),
        environment: words(environment),
        user: user.to_owned(),
    };
    let archive = project.images_dir().join(format!("{}.tar", recipe.name));
    let inputs_file = archive.with_extension("inputs");
    let inputs = inputs(&image)?;
    if archive.exists() && fs::read_to_string(&inputs_file).is_ok_and(|recorded| recorded == inputs)
    {
        return Ok(());
    }
    let reference = image.reference.clone();
    image.write(&archive)?;
    fs::write(&inputs_file, inputs)?;
    let mib = fs::metadata(&archive)?.len() as f64 / f64::from(1 << 20);
    eprintln!(
        "images: {reference} -> {} ({mib:.1} MiB)",
        archive.display()
    );
    Ok(())
}

/// A text that changes when an image has to be made again: its configuration, the xtask that makes it, and the identity
/// (size, time, inode) of every file in it.
fn inputs(image: &Image) -> Result<String> {
    let identity = |path: &Path| -> Result<String> {
        let meta = fs::metadata(path).with_context(|| {
            format!(
                "{} is missing; build it with `cargo xtask build`",
                path.display()
            )
        })?;
        Ok(format!(
            "{} {}.{} {}",
            meta.len(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ino()
        ))
    };
    let mut text = format!(
        "{} {:?}\n",
        image.reference,
        (
            &image.entrypoint,
            &image.command,
            &image.environment,
            &image.user
        )
    );
    text += &format!("made by {}\n", identity(&std::env::current_exe()?)?);
    for entry in &image.entries {
        text += &match entry {
            Entry::Folder { path, mode } => format!("{path} {mode:o}\n"),
            Entry::File { path, mode, source } => format!(
                "{path} {mode:o} {} {}\n",
                source.display(),
                identity(source)?
            ),
            Entry::Text {
                path,
                mode,
                contents,
            } => format!("{path} {mode:o} {contents:?}\n"),
            Entry::Link { path, target } => format!("{path} -> {target}\n"),
        };
    }
    Ok(text)
}

fn program(bin_dir: &Path, name: &str) -> Entry {
    Entry::File {
        path: name.to_owned(),
        mode: 0o755,
        source: bin_dir.join(name),
    }
}

fn folder(path: &str, mode: u32) -> Entry {
    Entry::Folder {
        path: path.to_owned(),
        mode,
    }
}

fn agent(_: &Project, bin_dir: &Path) -> Result<Contents> {
    Ok(Contents {
        entries: vec![
            program(bin_dir, "keelway-agent"),
            program(bin_dir, "keelway-cni"),
        ],
        entrypoint: &["/keelway-agent"],
        command: &[],
        environment: &["PATH=/"],
        user: "",
    })
}

fn dns(_: &Project, bin_dir: &Path) -> Result<Contents> {
    Ok(Contents {
        entries: vec![program(bin_dir, "keelway-dns")],
        entrypoint: &["/keelway-dns"],
        command: &["serve"],
        environment: &["PATH=/"],
        user: "",
    })
}

fn pause(_: &Project, bin_dir: &Path) -> Result<Contents> {
    Ok(Contents {
        entries: vec![program(bin_dir, "pause")],
        entrypoint: &["/pause"],
        command: &[],
        environment: &["PATH=/"],
        user: "65535:65535",
    })
}

fn echo(_: &Project, bin_dir: &Path) -> Result<Contents> {
    Ok(Contents {
        entries: vec![program(bin_dir, "echo")],
        entrypoint: &["/echo"],
        command: &[],
        environment: &["PATH=/"],
        user: "",
    })
}

/// Ours in the client image, which go before busybox's of the same name.
const CLIENT_PROGRAMS: &[&str] = &["dig", "nc", "wget"];

/// Debian's own programs that start others: busybox's would start its applets, whatever PATH says.
const WRAPPERS: &[&str] = &["env", "nice", "nohup", "timeout", "xargs"];

/// A shell, busybox's programs and ours. The shell is dash, because busybox's own prefers its applets to what is in PATH.
/// Debian has no static dash, so the C library that it names comes along.
fn client(_: &Project, bin_dir: &Path) -> Result<Contents> {
    let busybox = Path::new("/bin/busybox");
    let mut entries = vec![
        folder("bin", 0o755),
        folder("etc", 0o755),
        folder("lib", 0o755),
        folder("lib64", 0o755),
        folder("root", 0o700),
        folder("tmp", 0o1777),
        folder("var", 0o755),
        folder("var/run", 0o755),
        Entry::Text {
            path: "etc/passwd".into(),
            mode: 0o644,
            contents: "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
                .into(),
        },
        Entry::Text {
            path: "etc/group".into(),
            mode: 0o644,
            contents: "root:x:0:\nnogroup:x:65534:\n".into(),
        },
        Entry::File {
            path: "bin/busybox".into(),
            mode: 0o755,
            source: busybox.into(),
        },
        Entry::File {
            path: "bin/sh".into(),
            mode: 0o755,
            source: "/bin/dash".into(),
        },
    ];
    for name in CLIENT_PROGRAMS {
        entries.push(Entry::File {
            path: format!("bin/{name}"),
            mode: 0o755,
            source: bin_dir.join(name),
        });
    }
    let applets = process::stdout_of(Command::new(busybox).arg("--list"))
        .context("the client image is made from Debian's busybox-static")?;
    let has_better = |applet: &&str| {
        ["sh", "busybox"].contains(applet)
            || CLIENT_PROGRAMS.contains(applet)
            || WRAPPERS.contains(applet)
    };
    for applet in applets.lines().filter(|applet| !has_better(applet)) {
        entries.push(Entry::Link {
            path: format!("bin/{applet}"),
            target: "busybox".into(),
        });
    }
    let mut libraries = BTreeMap::new();
    for name in WRAPPERS {
        let source = Path::new("/usr/bin").join(name);
        libraries.extend(shared_libraries(&source)?);
        entries.push(Entry::File {
            path: format!("bin/{name}"),
            mode: 0o755,
            source,
        });
    }
    libraries.extend(shared_libraries(Path::new("/bin/dash"))?);
    entries.extend(libraries.into_iter().map(|(path, source)| Entry::File {
        path,
        mode: 0o755,
        source,
    }));
    Ok(Contents {
        entries,
        entrypoint: &[],
        command: &["/bin/sh"],
        environment: &["PATH=/bin", "HOME=/root"],
        user: "",
    })
}

/// The files that a dynamically linked program loads: where each belongs in an image, and where it is here.
fn shared_libraries(program: &Path) -> Result<Vec<(String, PathBuf)>> {
    let listing = process::stdout_of(Command::new("ldd").arg(program))?;
    Ok(libraries_in(&listing))
}

fn libraries_in(listing: &str) -> Vec<(String, PathBuf)> {
    listing
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(|path| {
            let name = path.rsplit('/').next().unwrap_or(path);
            // The loader is named by its full path in programs; the others are looked for in /lib.
            let place = if path.starts_with("/lib64/") || name.starts_with("ld-linux") {
                path.trim_start_matches('/').to_owned()
            } else {
                format!("lib/{name}")
            };
            (place, PathBuf::from(path))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loader_keeps_its_path_and_libraries_go_where_it_looks() {
        let listing = "\tlinux-vdso.so.1 (0x00007ffd)\n\
                       \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                       \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let found = libraries_in(listing);
        let places: Vec<&str> = found.iter().map(|(place, _)| place.as_str()).collect();
        assert_eq!(places, ["lib/libc.so.6", "lib64/ld-linux-x86-64.so.2"]);
        assert_eq!(found[0].1, Path::new("/lib/x86_64-linux-gnu/libc.so.6"));
    }

    #[test]
    fn an_image_is_made_again_when_its_binary_or_configuration_changes() {
        let folder = tempfile::tempdir().unwrap();
        let binary = folder.path().join("tool");
        let image = |user: &str| Image {
            reference: "localhost/keelway/tool:1".into(),
            entries: vec![program(folder.path(), "tool")],
            entrypoint: vec![],
            command: vec![],
            environment: vec![],
            user: user.into(),
        };
        assert!(
            inputs(&image(""))
                .unwrap_err()
                .to_string()
                .contains("tool is missing")
        );
        fs::write(&binary, "one").unwrap();
        let first = inputs(&image("")).unwrap();
        assert_eq!(first, inputs(&image("")).unwrap());
        assert_ne!(first, inputs(&image("1:1")).unwrap());
        fs::write(&binary, "changed").unwrap();
        assert_ne!(first, inputs(&image("")).unwrap());
    }
}
