//! Programs that an earlier worker of the same build left: what the kernel has verified once need not be verified again when a worker
//! dies or is restarted, which is most of what a start costs.
//!
//! They are pinned beside the links, in a directory named by all that they are made of: the object, the load-time constants, and the maps
//! that they were loaded over. Whatever of it is another, another directory is looked for, and nothing is found. That something cannot
//! be kept or found is no fault: the kernel verifies it then.

use std::{
    collections::BTreeMap,
    fs,
    os::fd::{BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use aya::{
    EbpfLoader,
    maps::{MapData, MapInfo},
    programs::{ProgramFd, ProgramInfo, SchedClassifier},
};
use dataplane_abi::map;
use sha2::{Digest as _, Sha256};

use super::{PacketProgram, shapes::shapes, sys};

/// A number that says which object this build carries.
const OBJECT: &str = env!("DATAPLANE_OBJECT");

/// Under the directory of a version's pins.
const PROGRAMS: &str = "programs";

/// The programs of one build.
pub(super) struct Kept {
    all: PathBuf,
    own: PathBuf,
    /// Some map is not there yet, so no program can be.
    is_new: bool,
}

impl Kept {
    /// What there may be of this build with these constants, over the maps that are pinned in `dir` now.
    pub fn of(dir: &Path, constants: &str) -> Self {
        let maps = shapes().map(|(name, _)| MapInfo::from_pin(dir.join(name)).ok());
        let ids = maps.map(|map| map.map_or(0, |info| info.id()));
        let build = Sha256::digest(format!("{OBJECT} {constants} {ids:?}"));
        let name = build[..8]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>();
        let all = dir.join(PROGRAMS);
        Self {
            own: all.join(name),
            all,
            is_new: ids.contains(&0),
        }
    }

    /// Has the object loaded over the one map that is not pinned and that programs share with this process: who loads others beside the
    /// kept ones must have theirs. Without it nothing is kept.
    pub fn lend<'a>(&'a self, loader: &mut EbpfLoader<'a>) -> Option<Lent<'a>> {
        if self.is_new || !self.own.is_dir() {
            return None;
        }
        let lent = self.own.join(map::POD_PROGRAMS);
        // One that an earlier worker was killed over.
        let _absent = fs::remove_file(&lent);
        if let Some(shared) = self.shared()
            && shared.pin(&lent).is_ok()
        {
            loader.map_pin_path(map::POD_PROGRAMS, lent.clone());
            return Some(Lent { kept: self, lent });
        }
        self.forget();
        None
    }

    fn shared(&self) -> Option<MapData> {
        let info = ProgramInfo::from_pin(self.pin(PacketProgram::PodIngress.name())).ok()?;
        let maps = info.map_ids().ok()??;
        let shared = maps.into_iter().find(|id| {
            let info = MapInfo::from_id(*id).ok();
            info.is_some_and(|info| info.name_as_str() == Some(map::POD_PROGRAMS))
        })?;
        MapData::from_id(shared).ok()
    }

    /// Keeps a program for later workers.
    pub fn keep(&self, name: &'static str, program: BorrowedFd<'_>) {
        let kept = fs::create_dir_all(&self.own).and_then(|()| sys::pin(program, &self.pin(name)));
        if let Err(error) = kept {
            tracing::debug!(program = name, %error, "not kept for the next worker");
        }
    }

    /// Forgets other builds' programs, which hang nowhere any more.
    pub fn forget_others(&self) {
        let others = fs::read_dir(&self.all).into_iter().flatten().flatten();
        for other in others.map(|entry| entry.path()) {
            if other != self.own {
                forget(&other);
            }
        }
    }

    fn forget(&self) {
        forget(&self.own);
    }

    fn pin(&self, name: &str) -> PathBuf {
        self.own.join(name)
    }
}

/// What is left of it costs the kernel memory, no more.
fn forget(dir: &Path) {
    if let Err(error) = fs::remove_dir_all(dir) {
        tracing::debug!(path = %dir.display(), %error, "programs of another build stay");
    }
}

/// A build's programs, with the map that they share lent to a loader.
pub(super) struct Lent<'a> {
    kept: &'a Kept,
    lent: PathBuf,
}

impl Lent<'_> {
    /// The kept ones of these programs, and the one that questions come from as its map wants it; to be called when the object is loaded.
    pub fn take(&self, names: &[&'static str]) -> BTreeMap<&'static str, OwnedFd> {
        let open =
            |name: &&'static str| Some((*name, sys::open_pinned(&self.kept.pin(name)).ok()?));
        names.iter().filter_map(open).collect()
    }

    /// As maps of programs want it.
    pub fn pod_ingress(&self) -> Option<ProgramFd> {
        let pinned = SchedClassifier::from_pin(self.kept.pin(PacketProgram::PodIngress.name()));
        pinned.ok()?.fd().ok()?.try_clone().ok()
    }
}

impl Drop for Lent<'_> {
    /// The kernel empties the map when nobody has it open any more, which a pin would keep from happening.
    fn drop(&mut self) {
        let _absent = fs::remove_file(&self.lent);
    }
}
