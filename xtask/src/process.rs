//! Child processes: how xtask runs programs and reports what failed.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// A command line, printable as the user would type it.
pub fn shown(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| {
            let word = word.to_string_lossy();
            if word.contains(char::is_whitespace) || word.is_empty() {
                format!("'{word}'")
            } else {
                word.into_owned()
            }
        })
        .collect::<Vec<_>>()
        .join(" ")
}

/// Runs a command with our output and fails when it does.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    if !status.success() {
        bail!("`{}` failed ({status})", shown(command));
    }
    Ok(())
}

/// Runs a command silently; its output appears in the error when it fails.
pub fn run_quiet(command: &mut Command) -> Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    if !output.status.success() {
        bail!(
            "`{}` failed ({})\n{}{}",
            shown(command),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

/// The trimmed standard output of a command that must succeed.
pub fn stdout_of(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    if !output.status.success() {
        bail!(
            "`{}` failed ({}): {}",
            shown(command),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
}

/// Becomes the command: the user's terminal, signals and exit status are its own. Returns only to say why it could not.
pub fn become_command(command: &mut Command) -> Result<()> {
    let error = command.exec();
    Err(error).with_context(|| format!("cannot start `{}`", shown(command)))
}

/// Finds an executable in PATH and in the folders where Debian keeps system programs, which a user's PATH may lack.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].iter().map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|candidate| is_executable(candidate))
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path)
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// True when this process is root.
pub fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    // The owner of our own /proc entry is the effective user.
    std::fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}

/// The cargo that runs this xtask, with cargo's own bin folder in PATH: rustc finds bpf-linker there, and a rustup from
/// Debian's package does not put that folder into PATH. What `cargo run` says of xtask to xtask is not passed on: build scripts ask for
/// it (ring's does), and all that depends on them would be built anew by every `cargo build` after a `cargo xtask`.
pub fn cargo(root: &Path) -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(root);
    for (name, _) in std::env::vars_os() {
        let of_xtask = ["CARGO_MANIFEST_", "CARGO_PKG_"];
        let name_bytes = name.as_encoded_bytes();
        if of_xtask
            .iter()
            .any(|prefix| name_bytes.starts_with(prefix.as_bytes()))
        {
            command.env_remove(&name);
        }
    }
    if let Some(path) = path_with_cargo_bin() {
        command.env("PATH", path);
    }
    command
}

/// PATH with cargo's bin folder at its end, when it can be told.
pub fn path_with_cargo_bin() -> Option<std::ffi::OsString> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let cargo_bin = cargo_home()?.join("bin");
    if !folders.contains(&cargo_bin) {
        folders.push(cargo_bin);
    }
    std::env::join_paths(folders).ok()
}

/// Where `cargo install` puts binaries by default.
pub fn cargo_home() -> Option<PathBuf> {
    let not_empty = |value: &std::ffi::OsString| value != OsStr::new("");
    std::env::var_os("CARGO_HOME")
        .filter(not_empty)
        .map(PathBuf::from)
        .or_else(|| {
            std::env::var_os("HOME")
                .filter(not_empty)
                .map(|home| PathBuf::from(home).join(".cargo"))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_command_is_named_with_its_output() {
        let error =
            run_quiet(Command::new("sh").args(["-c", "echo broken pipe dream >&2; exit 3"]))
                .unwrap_err();
        let text = error.to_string();
        assert!(text.contains("sh -c 'echo broken"), "{text}");
        assert!(text.contains("\nbroken pipe dream"), "{text}");
    }

    #[test]
    fn a_missing_command_is_named() {
        let error = run(&mut Command::new("/nonexistent/tool")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/tool"));
    }

    #[test]
    fn system_programs_are_found_and_folders_are_not_programs() {
        assert!(find("sh").is_some());
        assert!(find("no-such-program-anywhere").is_none());
        assert!(!is_executable(Path::new("/usr/bin")));
    }
}
