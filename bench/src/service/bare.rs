//! What hangs where ours hang, and does nothing: the part of a hook's cost that is the kernel's own. It is made of the data plane's own
//! programs, by constants that leave nothing of them.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use keelway_agent::dataplane::{Config, Dataplane, EarlyUplink, Xdp, XdpMode};
use keelway_tests::sandbox::ifindex;

/// Socket hooks that let every call of a control group go as it is.
pub fn hook_sockets(pin_root: PathBuf, cgroup: &Path) -> Result<()> {
    let mut dataplane = Dataplane::open(&Config {
        socket_lb: false,
        early: false,
        ..Config::new(pin_root)
    })?;
    // Pinned, so they stay when this process's side of them goes.
    dataplane.attach_cgroup(cgroup).context("empty hooks")
}

/// A program at the driver of the uplink of the calling thread's namespace that lets every frame pass: none has the address it is for.
pub fn hook_driver(pin_root: PathBuf) -> Result<()> {
    let mut dataplane = Dataplane::open(&Config {
        uplink_mac: None,
        ..Config::new(pin_root)
    })?;
    let uplink = EarlyUplink {
        ifindex: ifindex("eth0")?,
        is_veth: true,
    };
    let hung = dataplane.attach_early(&uplink, XdpMode::Native)?;
    ensure!(
        hung == Xdp::Native,
        "a bare program at the driver: {hung:?}"
    );
    Ok(())
}
