//! From another version of the shared layouts to ours: an upgrade, or the way back.
//!
//! The other's programs hang where the agent before this one hung them, and go on with its maps. What those say of the cluster we
//! write anew into maps of our own; what they say of traffic both have in common, where the layout is the same: whichever program
//! sees a packet knows the flow that the other opened. Service ports keep the ids that flows know them by ([`inherited`]), and
//! generations go on where the other's ended, so that none means two things.
//!
//! Once all Services are in our maps, the other's links and filters get our programs in place, one after the other within a
//! millisecond or so, and become ours: there is no moment without a program, and none with two.

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use dataplane_abi::{FrontendKey, Lead as RawLead, ServiceRef, limits, map};

use super::{
    Error,
    mapping::Mapping,
    op::{Frontend, Lead},
    programs::{POD_PROGRAMS, PacketProgram, Programs, pins_in, program_of, unlink},
    shapes::shape_fits,
    sys,
    tables::frontend_of,
};

/// What was taken over from other versions.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HandedOver {
    pub versions: u32,
    /// Links and filters that have our programs now.
    pub links: usize,
}

/// What another version left that its maps of the cluster say.
#[derive(Debug, Default)]
pub struct Inherited {
    /// Where frontends led: ids that flows and clients' backends are known by.
    pub leads: BTreeMap<Frontend, Lead>,
    /// The newest generation of a service's backends.
    pub generation: u32,
}

/// Whether another version's programs are at work.
pub fn is_due(root: &Path, own: &Path) -> Result<bool, Error> {
    Ok(!others(root, own)?.is_empty())
}

/// Pins what another version's programs know of traffic as ours, where we have nothing of our own yet and the layout is the same. To be
/// called before our maps are made.
pub fn share(root: &Path, own: &Path) -> Result<(), Error> {
    for dir in others(root, own)? {
        // Without generations that go on, an entry's could be mistaken for one of ours.
        if fitting(&dir, map::SERVICES)?.is_none() {
            continue;
        }
        for name in map::OF_TRAFFIC {
            let ours = own.join(name);
            if ours.exists() {
                continue;
            }
            if let Some(theirs) = fitting(&dir, name)? {
                sys::pin(theirs.as_fd(), &ours).map_err(failed("pin", name))?;
            }
        }
    }
    Ok(())
}

/// What the versions beside `own` left of the cluster.
pub fn inherited(root: &Path, own: &Path) -> Result<Inherited, Error> {
    let mut found = Inherited::default();
    for dir in others(root, own)? {
        if let Some(services) = fitting(&dir, map::SERVICES)? {
            let bytes = limits::SERVICES as usize * size_of::<u64>();
            let words = Mapping::whole(services.as_fd(), bytes);
            let words = words.map_err(failed("map", map::SERVICES))?;
            let word = |id| ServiceRef::from_word(words.load_word(id));
            let generations = (1..limits::SERVICES).map(|id| word(id).generation);
            let epoch = word(ServiceRef::EPOCH_ID).epoch();
            found.generation = generations.fold(found.generation.max(epoch), u32::max);
        }
        if let Some(frontends) = fitting(&dir, map::FRONTENDS)? {
            let entries = sys::entries::<FrontendKey, RawLead>(frontends.as_fd());
            let entries = entries.map_err(failed("read", map::FRONTENDS))?;
            let leads = entries
                .iter()
                .filter_map(|(key, lead)| frontend_of(key, &lead.bare()));
            found.leads.extend(leads);
        }
    }
    Ok(found)
}

/// Takes over from the versions beside `own` under `root`, and removes their pins. `filtered` is what hangs by filters beside the
/// programs of pods.
pub fn take_over(
    root: &Path,
    own: &Path,
    programs: &Programs,
    filtered: &[(PacketProgram, u32)],
) -> Result<HandedOver, Error> {
    let mut taken = HandedOver::default();
    let hooks = programs.filters(&POD_PROGRAMS)?;
    for dir in others(root, own)? {
        // Looked up before, so that all change within a millisecond or so.
        let pods = hooks.attached()?;
        let links = dir.join("links");
        // Where ours hang behind theirs already, they would see each packet twice.
        make_way_for(&links, programs)?;
        taken.links += hooks.replace(&pods)?;
        for (program, ifindex) in filtered {
            taken.links += programs.filters(&[*program])?.replace(&[*ifindex])?;
        }
        taken.links += take_links(&links, programs)?;
        remove_all(&dir)?;
        taken.versions += 1;
        tracing::info!(path = %dir.display(), links = taken.links, "took over from another version");
    }
    Ok(taken)
}

/// Directories beside `own` that are named like a version's: first those whose programs hang somewhere.
fn others(root: &Path, own: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |source| Error::Pins {
        path: root.to_owned(),
        source,
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(root).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let is_version = name
            .and_then(|name| name.strip_prefix('v'))
            .is_some_and(|number| number.parse::<u32>().is_ok());
        if is_version && path != own {
            found.push(path);
        }
    }
    found.sort();
    let is_at_work = |dir: &PathBuf| {
        fs::read_dir(dir.join("links")).is_ok_and(|mut links| links.next().is_some())
    };
    found.sort_by_key(|dir| !is_at_work(dir));
    Ok(found)
}

/// The links of another version; none when there is no such directory.
fn links_in(theirs: &Path) -> Result<Vec<PathBuf>, Error> {
    if theirs.is_dir() {
        pins_in(theirs)
    } else {
        Ok(Vec::new())
    }
}

/// Takes our programs off where another version's links hang.
fn make_way_for(theirs: &Path, programs: &Programs) -> Result<(), Error> {
    for path in links_in(theirs)? {
        let ours = programs.links().join(path.file_name().unwrap_or_default());
        match sys::open_pinned(&ours) {
            Ok(link) => {
                let failed = |source| Error::Link {
                    link: ours.clone(),
                    source,
                };
                sys::detach_link(link.as_fd()).map_err(failed)?;
                unlink(&ours)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(Error::Link { link: ours, source }),
        }
    }
    Ok(())
}

/// Gives another version's links our programs in place, and makes their pins ours. What hung on something that is gone, and what is
/// no hook of ours, is taken off. Gives how many are ours now.
fn take_links(theirs: &Path, programs: &Programs) -> Result<usize, Error> {
    let mut taken = 0;
    for path in links_in(theirs)? {
        let failed = |source| Error::Link {
            link: path.clone(),
            source,
        };
        let link = sys::open_pinned(&path).map_err(failed)?;
        let Some(name) = program_of(&path).filter(|name| programs.is_loaded(name)) else {
            sys::detach_link(link.as_fd()).map_err(failed)?;
            unlink(&path)?;
            continue;
        };
        if programs.renew(&path, link, name, None)? {
            let ours = programs.links().join(path.file_name().unwrap_or_default());
            fs::rename(&path, ours).map_err(failed)?;
            taken += 1;
        }
    }
    Ok(taken)
}

fn failed(action: &'static str, map: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Map {
        action,
        map,
        source,
    }
}

/// A map of another version that our programs could have; nothing where it has none, or one of another layout.
fn fitting(dir: &Path, name: &'static str) -> Result<Option<OwnedFd>, Error> {
    let map = match sys::open_pinned(&dir.join(name)) {
        Ok(map) => map,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("open", name)(error)),
    };
    let shape = sys::map_shape(map.as_fd()).map_err(failed("open", name))?;
    if !shape_fits(name, shape) {
        tracing::warn!(path = %dir.display(), map = name, "what is in a map of another layout ends");
        return Ok(None);
    }
    Ok(Some(map))
}

/// Removes a directory of pins and what is in it.
fn remove_all(dir: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(dir) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Pins {
            path: dir.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}
