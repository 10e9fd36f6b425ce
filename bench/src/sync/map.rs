//! The kernel's maps, seen from beside the agent: when a change is in them, no report of the agent's own has to be believed.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use aya::maps::{Array, Map, MapData};
use dataplane_abi::{ABI_VERSION, map};
use keelway_agent::dataplane::{Frontend, Protocol, held};

use super::api::service_address;

const PATIENCE: Duration = Duration::from_secs(20);

/// The word of the services' array by which programs find the backends of one Service: a change replaces it, last of all.
pub struct ServiceWord {
    services: Array<MapData, u64>,
    id: u32,
}

impl ServiceWord {
    /// That of a Service of the cluster.
    pub fn of(pin_root: &Path, index: usize) -> Result<Self> {
        let frontend = Frontend {
            addr: service_address(index).into(),
            port: 80,
            protocol: Protocol::Tcp,
        };
        let held = held(pin_root)?;
        let lead = held.frontends.get(&frontend);
        let id = lead
            .with_context(|| format!("no {frontend} in the maps"))?
            .internal
            .0;
        let path = pin_root.join(format!("v{ABI_VERSION}")).join(map::SERVICES);
        let data = MapData::from_pin(&path).with_context(|| path.display().to_string())?;
        let services = Array::try_from(Map::Array(data)).context("the services' array")?;
        Ok(Self { services, id })
    }

    pub fn value(&self) -> Result<u64> {
        self.services
            .get(&self.id, 0)
            .context("the services' array")
    }

    /// Looks until it is another value, and says when it was.
    pub fn changed(&self, from: u64) -> Result<Instant> {
        nix::sys::prctl::set_timerslack(1).context("a precise timer")?;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if self.value()? != from {
                return Ok(Instant::now());
            }
            // Looking all the time would take a CPU from whom is measured.
            thread::sleep(Duration::from_micros(20));
        }
        bail!("the maps have not changed within {PATIENCE:?}")
    }
}
