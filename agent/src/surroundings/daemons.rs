//! Programs that keep the host's network, and may take what they did not make for a mistake.

use std::fs;
use std::path::Path;

/// A program that runs on the host, in this network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Daemon {
    NetworkManager { leaves_us_alone: bool },
    Networkd { leaves_routes_alone: bool },
}

/// The beginning of a program's name as the kernel keeps it, 15 bytes at most.
const NETWORK_MANAGER: &str = "NetworkManager";
const NETWORKD: &str = "systemd-network";

impl Daemon {
    /// What is to be done about it, if anything.
    pub fn note(self) -> Option<String> {
        match self {
            Daemon::NetworkManager { leaves_us_alone: false } => Some(
                "NetworkManager runs here, and may take pods' interfaces for its own: put [keyfile] unmanaged-devices=interface-name:kw*;interface-name:keelway-* \
                 into /etc/NetworkManager/conf.d/keelway.conf and reload it"
                    .into(),
            ),
            Daemon::Networkd { leaves_routes_alone: false } => Some(
                "systemd-networkd runs here, and removes routes that it did not make when it restarts (they come back within 10 s): put [Network] \
                 ManageForeignRoutes=no into /etc/systemd/networkd.conf.d/keelway.conf and restart it"
                    .into(),
            ),
            _ => None,
        }
    }
}

/// The programs that `proc` shows in the network namespace of this process.
pub fn daemons(proc: &Path) -> Vec<Daemon> {
    let own = fs::read_link(proc.join("self/ns/net")).ok();
    let mut found: Vec<Daemon> = fs::read_dir(proc)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| {
            let name = entry.file_name();
            name.to_str()
                .is_some_and(|name| name.bytes().all(|digit| digit.is_ascii_digit()))
        })
        .filter_map(|entry| daemon(&entry.path(), own.as_deref()))
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

fn daemon(process: &Path, own: Option<&Path>) -> Option<Daemon> {
    let name = fs::read_to_string(process.join("comm")).ok()?;
    let name = name.trim_end();
    if name != NETWORK_MANAGER && name != NETWORKD {
        return None;
    }
    if fs::read_link(process.join("ns/net")).ok().as_deref() != own {
        return None;
    }
    // Its own view of the file system: this process is in a container.
    let etc = process.join("root/etc");
    Some(if name == NETWORK_MANAGER {
        let told = settings(&etc.join("NetworkManager/NetworkManager.conf"))
            .chain(settings_in(&etc.join("NetworkManager/conf.d")))
            .any(|(key, value)| {
                key == "unmanaged-devices" && (value.contains("interface-name:kw*") || value == "*")
            });
        Daemon::NetworkManager {
            leaves_us_alone: told,
        }
    } else {
        let told = settings(&etc.join("systemd/networkd.conf"))
            .chain(settings_in(&etc.join("systemd/networkd.conf.d")))
            .any(|(key, value)| {
                key == "ManageForeignRoutes"
                    && ["no", "false", "off", "0"].contains(&value.to_lowercase().as_str())
            });
        Daemon::Networkd {
            leaves_routes_alone: told,
        }
    })
}

/// The settings of a file of the kind that both programs have; none, when it cannot be read.
fn settings(file: &Path) -> impl Iterator<Item = (String, String)> + use<> {
    let text = fs::read_to_string(file).unwrap_or_default();
    let settings: Vec<(String, String)> = text
        .lines()
        .filter(|line| !line.trim_start().starts_with(['#', ';']))
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned()))
        .collect();
    settings.into_iter()
}

fn settings_in(folder: &Path) -> impl Iterator<Item = (String, String)> + use<> {
    let files: Vec<_> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| end == "conf"))
        .collect();
    files.into_iter().flat_map(|file| settings(&file))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn process(proc: &Path, name: &str, comm: &str, network: &str) {
        let folder = proc.join(name);
        fs::create_dir_all(folder.join("ns")).expect("a folder");
        symlink(network, folder.join("ns/net")).expect("a link");
        fs::write(folder.join("comm"), format!("{comm}\n")).expect("a file");
    }

    #[test]
    fn programs_of_this_network_are_found_and_what_they_were_told() {
        let proc = tempfile::tempdir().expect("a folder");
        let proc = proc.path();
        process(proc, "self", "keelway-agent", "net:[1]");
        process(proc, "7", "NetworkManager", "net:[1]");
        process(proc, "8", "systemd-network", "net:[2]");
        process(proc, "9", "sh", "net:[1]");
        let found = daemons(proc);
        assert_eq!(
            found,
            [Daemon::NetworkManager {
                leaves_us_alone: false
            }]
        );
        assert!(
            found[0]
                .note()
                .is_some_and(|note| note.contains("unmanaged-devices"))
        );

        let conf = proc.join("7/root/etc/NetworkManager/conf.d");
        fs::create_dir_all(&conf).expect("a folder");
        fs::write(
            conf.join("keelway.conf"),
            "[keyfile]\n# mine\nunmanaged-devices=interface-name:kw*;interface-name:keelway-*\n",
        )
        .expect("a file");
        assert_eq!(daemons(proc)[0].note(), None);
    }

    #[test]
    fn networkd_is_content_once_it_leaves_routes_alone() {
        let proc = tempfile::tempdir().expect("a folder");
        let proc = proc.path();
        process(proc, "self", "keelway-agent", "net:[1]");
        process(proc, "8", "systemd-network", "net:[1]");
        assert!(
            daemons(proc)[0]
                .note()
                .is_some_and(|note| note.contains("ManageForeignRoutes=no"))
        );
        let etc = proc.join("8/root/etc/systemd");
        fs::create_dir_all(&etc).expect("a folder");
        fs::write(
            etc.join("networkd.conf"),
            "[Network]\n#ManageForeignRoutes=yes\nManageForeignRoutes = No\n",
        )
        .expect("a file");
        assert_eq!(daemons(proc)[0].note(), None);
        assert!(daemons(Path::new("/nowhere")).is_empty());
    }
}
