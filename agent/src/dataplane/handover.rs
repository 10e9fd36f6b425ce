//! From another version of the shared layouts to ours: an upgrade, or the way back.
//!
//! The other's programs hang where the agent before this one hung them, and go on with maps of their own. Once all Services are in
//! our maps, its links and filters get our programs in place, one after the other within a millisecond or so, and become ours: there
//! is no moment without a program, and none with two. Flows, and which backends clients keep, are copied before and after, where their
//! layout is the same: of a connection that is opened between the two copies and answered before the second has ended, the answer is
//! nobody's.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use dataplane_abi::{
    Addr, Affinity, AffinityKey, Flow, FlowKey, FrontendKey, Lead, LocalAddress, map,
};

use super::{
    Error,
    programs::{Programs, pins_in, program_of, unlink},
    sys::{self, MapShape},
};

/// What was taken over from other versions.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HandedOver {
    pub versions: u32,
    /// Links and filters that have our programs now.
    pub links: usize,
    /// Entries (two per flow) of flows that go on.
    pub flows: usize,
    /// Clients of Services with affinity that keep their backends.
    pub affinities: usize,
}

/// Whether another version's programs are at work.
pub fn is_due(root: &Path, own: &Path) -> Result<bool, Error> {
    Ok(!others(root, own)?.is_empty())
}

/// Takes over from the versions beside `own` under `root`, and removes their pins.
pub fn take_over(root: &Path, own: &Path, programs: &Programs) -> Result<HandedOver, Error> {
    let mut taken = HandedOver::default();
    let hooks = programs.pod_hooks()?;
    for dir in others(root, own)? {
        // Looked up before, so that all change within a millisecond or so.
        let pods = hooks.attached()?;
        let links = dir.join("links");
        // Where ours hang behind theirs already, they would see each packet twice.
        make_way_for(&links, programs)?;
        taken.flows += take_flows(&dir, own)?;
        taken.affinities += take_affinities(&dir, own)?;
        taken.links += hooks.replace(&pods)?;
        taken.links += take_links(&links, programs)?;
        // What was opened or answered between the two.
        taken.flows += take_flows(&dir, own)?;
        taken.affinities += take_affinities(&dir, own)?;
        remove_all(&dir)?;
        taken.versions += 1;
        tracing::info!(
            path = %dir.display(),
            links = taken.links,
            flows = taken.flows,
            affinities = taken.affinities,
            "took over from another version"
        );
    }
    Ok(taken)
}

/// Directories beside `own` that are named like a version's.
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
        let Some(name) = program_of(&path) else {
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

/// Copies flows that `own` does not have, answered ones and those that wait for it.
fn take_flows(from: &Path, own: &Path) -> Result<usize, Error> {
    let mut taken = 0;
    for name in [map::FLOWS, map::FLOWS_UNREPLIED] {
        taken += take_table(from, own, name)?;
    }
    Ok(taken)
}

/// Copies which backend each client of a Service with affinity keeps, where `own` does not know better.
fn take_affinities(from: &Path, own: &Path) -> Result<usize, Error> {
    let Some((their_frontends, our_frontends)) = both(from, own, map::FRONTENDS)? else {
        return Ok(0);
    };
    let Some((theirs, ours)) = both(from, own, map::AFFINITY)? else {
        return Ok(0);
    };
    // Ids are another ledger's: what leads to one there and to another here is the same service port.
    let mut ids: HashMap<u32, u32> = HashMap::new();
    let frontends = sys::entries::<FrontendKey, Lead>(their_frontends.as_fd());
    for (key, lead) in frontends.map_err(failed("read", map::FRONTENDS))? {
        let now = sys::lookup::<_, Lead>(our_frontends.as_fd(), &key)
            .map_err(failed("read", map::FRONTENDS))?;
        if let Some(now) = now.filter(|_| !key.is_marker()) {
            ids.insert(lead.internal, now.internal);
            ids.insert(lead.external, now.external);
        }
    }
    let read = |map: &OwnedFd| {
        sys::entries::<AffinityKey, Affinity>(map.as_fd()).map_err(failed("read", map::AFFINITY))
    };
    let known: HashSet<AffinityKey> = read(&ours)?.into_iter().map(|(key, _)| key).collect();
    let taken: Vec<(AffinityKey, Affinity)> = read(&theirs)?
        .into_iter()
        .filter_map(|(key, kept)| {
            let key = AffinityKey::new(key.client, *ids.get(&key.service)?);
            (!known.contains(&key)).then_some((key, kept))
        })
        .collect();
    sys::update_batch(ours.as_fd(), &taken).map_err(failed("write", map::AFFINITY))?;
    Ok(taken.len())
}

fn failed(action: &'static str, map: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Map {
        action,
        map,
        source,
    }
}

/// A map as another version has it and as ours does; nothing where it has none, or one of another layout.
fn both(from: &Path, own: &Path, name: &'static str) -> Result<Option<(OwnedFd, OwnedFd)>, Error> {
    let theirs = match sys::open_pinned(&from.join(name)) {
        Ok(theirs) => theirs,
        // Of a version that had none.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("open", name)(error)),
    };
    let ours = sys::open_pinned(&own.join(name)).map_err(failed("open", name))?;
    let layout = |shape: MapShape| (shape.key_size, shape.value_size);
    let shape = |map: &OwnedFd| {
        sys::map_shape(map.as_fd())
            .map(layout)
            .map_err(failed("open", name))
    };
    if shape(&theirs)? != shape(&ours)? {
        tracing::warn!(path = %from.display(), map = name, "what is in a map of another layout ends");
        return Ok(None);
    }
    Ok(Some((theirs, ours)))
}

fn take_table(from: &Path, own: &Path, name: &'static str) -> Result<usize, Error> {
    let Some((theirs, ours)) = both(from, own, name)? else {
        return Ok(0);
    };
    let open = |name| sys::open_pinned(&own.join(name)).map_err(failed("open", name));
    let (frontends, local) = (open(map::FRONTENDS)?, open(map::LOCAL)?);
    // Ids and generations are another ledger's.
    let service_of = |client: &FlowKey| -> io::Result<u32> {
        let asked = FrontendKey::new(client.dst, client.dport, client.proto);
        let mut lead = sys::lookup::<_, Lead>(frontends.as_fd(), &asked)?;
        if lead.is_none() {
            lead = sys::lookup(frontends.as_fd(), &asked.on_every_address())?;
        }
        let here = sys::lookup::<Addr, LocalAddress>(local.as_fd(), &client.src)?.is_some();
        Ok(match lead {
            Some(lead) if here => lead.internal,
            Some(lead) => lead.external,
            // Of none: a datagram chooses anew, an established connection does not ask.
            None => u32::MAX,
        })
    };
    let read = |map| sys::entries::<FlowKey, Flow>(map).map_err(failed("read", name));
    let known: HashSet<FlowKey> = read(ours.as_fd())?
        .into_iter()
        .map(|(key, _)| key)
        .collect();
    let mut taken = Vec::new();
    for (key, flow) in read(theirs.as_fd())? {
        if known.contains(&key) {
            continue;
        }
        let client = if flow.reply == 1 { &flow.other } else { &key };
        let service = match flow.service {
            0 => 0,
            _ => service_of(client).map_err(failed("read", map::FRONTENDS))?,
        };
        let generation = 0;
        taken.push((
            key,
            Flow {
                service,
                generation,
                ..flow
            },
        ));
    }
    sys::update_batch(ours.as_fd(), &taken).map_err(failed("write", name))?;
    Ok(taken.len())
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
