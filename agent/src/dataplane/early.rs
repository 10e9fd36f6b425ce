//! The program at the uplink's driver (XDP): where it hangs, and why it does not.

use std::{fs, io, os::fd::AsFd as _, path::PathBuf};

use super::{
    Error,
    programs::{Programs, take_off},
    sys::{self, LinkTarget},
};

/// Name of the program in the object.
pub const PROGRAM: &str = "uplink_early";
/// What the names of its pins begin with.
pub const PIN: &str = "xdp";

/// How the uplink's packets are to be looked at before the stack makes buffers of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub enum XdpMode {
    /// By the driver, where it can and hands over whole packets; else not.
    #[default]
    Auto,
    /// By the driver, whatever it is.
    Native,
    /// By the kernel, after it made buffers of them: slower than not at all, for trying out.
    Generic,
    Off,
}

/// What of it is so.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Xdp {
    #[default]
    Off,
    Native,
    Generic,
    /// It was wished for, and packets are looked at by the hook at tc alone; in words, why.
    AtTc(String),
}

impl Xdp {
    /// Where packets are looked at first, in a word.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
            Self::Off | Self::AtTc(_) => "tc",
        }
    }

    /// Why not in the driver, though that was wished for.
    pub fn why_not(&self) -> Option<&str> {
        match self {
            Self::AtTc(why) => Some(why),
            Self::Off | Self::Native | Self::Generic => None,
        }
    }
}

/// The interface whose driver is asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EarlyUplink {
    pub ifindex: u32,
    /// It is one end of a veth pair. What the other end sends may have checksums that are yet to be completed, which nobody does for
    /// what is sent on from a driver.
    pub is_veth: bool,
}

impl EarlyUplink {
    /// Whether its driver is asked in a mode.
    pub fn is_asked(&self, mode: XdpMode) -> bool {
        match mode {
            XdpMode::Off => false,
            XdpMode::Auto => !self.is_veth,
            XdpMode::Native | XdpMode::Generic => true,
        }
    }
}

impl Programs {
    /// Hangs the program on an uplink's driver as the mode says, in place of what an earlier agent hung there in another way; gives what
    /// came of it. A driver that cannot is no error.
    pub fn attach_early(&self, uplink: &EarlyUplink, mode: XdpMode) -> Result<Xdp, Error> {
        let pin = |kind: &str| format!("{PIN}-{kind}-{}", uplink.ifindex);
        let (kept, hung, flags) = match mode {
            XdpMode::Off => (None, Xdp::Off, 0),
            XdpMode::Auto if uplink.is_veth => {
                let why = "a veth's other end may send packets whose checksums are not complete; --xdp native uses it all the same";
                (None, Xdp::AtTc(why.into()), 0)
            }
            XdpMode::Auto | XdpMode::Native => (Some(pin("native")), Xdp::Native, DRIVER),
            XdpMode::Generic => (Some(pin("generic")), Xdp::Generic, GENERIC),
        };
        self.clear_early(kept.as_deref())?;
        let Some(pin) = kept else {
            return Ok(hung);
        };
        let path = self.links().join(pin);
        let target = LinkTarget::Interface(uplink.ifindex);
        match sys::open_pinned(&path) {
            Ok(link) => {
                if self.renew(&path, link, PROGRAM, Some(target))? {
                    return Ok(hung);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(Error::Link { link: path, source }),
        }
        let program = self.fd(PROGRAM)?;
        match sys::create_link_with(program, uplink.ifindex, BPF_XDP, flags) {
            Ok(link) => {
                sys::pin(link.as_fd(), &path)
                    .map_err(|source| Error::Link { link: path, source })?;
                Ok(hung)
            }
            Err(error) => Ok(Xdp::AtTc(refusal(&error))),
        }
    }

    /// Takes the program off where it hangs by another pin than this one.
    fn clear_early(&self, kept: Option<&str>) -> Result<(), Error> {
        let failed = |source| Error::Pins {
            path: self.links().to_owned(),
            source,
        };
        let entries = fs::read_dir(self.links()).map_err(failed)?;
        for entry in entries {
            let path: PathBuf = entry.map_err(failed)?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let is_early = name.is_some_and(|name| name.starts_with(PIN));
            if !is_early || name == kept {
                continue;
            }
            take_off(&path)?;
        }
        Ok(())
    }
}

/// Attach type, and flags of a link (include/uapi/linux/if_link.h).
const BPF_XDP: u32 = 37;
const GENERIC: u32 = 2;
const DRIVER: u32 = 4;

/// Why the kernel hung the program nowhere.
fn refusal(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => "the driver cannot, or not with its present settings".into(),
        Some(libc::EBUSY | libc::EEXIST) => "another program is there".into(),
        Some(libc::EINVAL | libc::ERANGE | libc::EMSGSIZE) => {
            format!("the driver refuses, perhaps for the MTU: {error}")
        }
        _ => error.to_string(),
    }
}
