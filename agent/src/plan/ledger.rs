//! The plans of all Services against what the maps hold.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use cluster_model::ServiceKey;
use dataplane_abi::limits;
use litemap::LiteMap;

use super::{PortKey, PortPlan, Route, ServicePlan};
use crate::dataplane::{Frontend, Lead, Op, ServiceId, Sources, State, Vip};

/// Books of every service port: its plan, its id, and what the maps hold. Costs per change, not per cluster.
///
/// Ids live in the maps alone: a ledger that is opened on maps that an earlier agent filled finds the id of a service
/// port by its frontends, so connections go on as they were.
#[derive(Debug, Default)]
pub struct Ledger {
    plans: HashMap<ServiceKey, ServicePlan>,
    ids: HashMap<PortKey, ServiceId>,
    owners: HashMap<ServiceId, PortKey>,
    /// Who wants a frontend. The first one has it, whatever came first in time.
    claims: BTreeMap<Frontend, Claims>,
    vip_claims: BTreeMap<IpAddr, Claims>,
    /// What the maps hold, of services, frontends and VIPs.
    held: State,
    /// Where frontends led in another version's maps: flows are known by these ids, so each is kept for the service port that had it.
    inherited: BTreeMap<Frontend, Lead>,
    inherited_ids: HashSet<ServiceId>,
    /// Where the search for a free id goes on: an id rests as long as possible before it is used again.
    last_id: u32,
    /// All Services are known, so that what no plan wants may go.
    knows_all: bool,
    touched: Touched,
    /// What there was no room for, until it is tried again.
    parked: Touched,
    /// Service ports without an id whose owners know.
    refused: BTreeSet<PortKey>,
}

/// Services that want the same, in their order: hardly ever more than one, for which a tree's first node has ten times the room.
type Claims = LiteMap<ServiceKey, ()>;

/// Entries whose wish or holding may differ.
#[derive(Debug, Default, PartialEq)]
struct Touched {
    ports: BTreeSet<PortKey>,
    ids: BTreeSet<ServiceId>,
    frontends: BTreeSet<Frontend>,
    vips: BTreeSet<IpAddr>,
    /// Service ports that something led to which leads elsewhere now. Held until that is told in the maps: once the frontends are there,
    /// nothing else says so.
    left: BTreeSet<ServiceId>,
}

impl Touched {
    fn take_in(&mut self, other: Self) {
        self.ports.extend(other.ports);
        self.ids.extend(other.ids);
        self.frontends.extend(other.frontends);
        self.vips.extend(other.vips);
        self.left.extend(other.left);
    }
}

/// What brings the maps from what they hold to what is wished.
#[derive(Debug, Default, PartialEq)]
pub struct Batch {
    /// In the order in which no packet sees half a service.
    pub ops: Vec<Op>,
    pub refusals: Vec<Refusal>,
}

/// A wish that cannot be met.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("{0}: all {max} service ports are in use", max = limits::SERVICES - 1)]
    NoId(PortKey),
    #[error("{frontend} is wanted by {loser} and belongs to {winner}")]
    Contested {
        frontend: Frontend,
        winner: ServiceKey,
        loser: ServiceKey,
    },
}

impl Ledger {
    /// A ledger over maps that hold `held`. All of it counts as unwanted until a plan wants it.
    pub fn adopt(held: State) -> Self {
        let mut ledger = Self::waiting(held);
        ledger.judge_all();
        ledger
    }

    /// As [`Self::adopt`], while not all Services are known: what no plan has wanted yet stays as it is until [`Self::judge_all`].
    pub fn waiting(held: State) -> Self {
        let mut ledger = Self::default();
        ledger.hold(held);
        ledger
    }

    /// From now on what no plan wants goes.
    pub fn judge_all(&mut self) {
        if !std::mem::replace(&mut self.knows_all, true) {
            self.touch_held();
        }
    }

    fn touch_held(&mut self) {
        let (held, touched) = (&self.held, &mut self.touched);
        touched
            .ids
            .extend(held.services.keys().chain(held.sources.keys()));
        touched.frontends.extend(held.frontends.keys());
        touched.vips.extend(held.vips.keys());
    }

    /// Whether a plan can be had before all Services are known: nothing that it wants may be another's.
    pub fn is_free_for(&self, plan: &ServicePlan) -> bool {
        let is_its = |(frontend, route): (&Frontend, &Route)| {
            let Some(lead) = self.held.frontends.get(frontend) else {
                return true;
            };
            let held = self.held.services.get(&lead.internal);
            let wish = plan.ports.get(&route.internal);
            held.is_some() && held == wish.map(|port| &port.backends)
        };
        self.inherited.is_empty() && plan.frontends.iter().all(is_its)
    }

    /// Keeps the ids that another version's frontends lead to for the service ports that they are of; with none, no longer.
    pub fn inherit(&mut self, leads: BTreeMap<Frontend, Lead>) {
        let ids = leads
            .values()
            .flat_map(|lead| [lead.internal, lead.external]);
        self.inherited_ids = ids.collect();
        self.inherited = leads;
    }

    /// Takes what the maps were found to hold, after a change of them failed half way.
    pub fn hold(&mut self, held: State) {
        let touched = &mut self.touched;
        touched.ids.extend(self.owners.keys());
        touched.frontends.extend(self.claims.keys());
        touched.vips.extend(self.vip_claims.keys());
        if self.knows_all {
            self.touch_held();
        }
        self.held = State {
            services: held.services,
            sources: held.sources,
            frontends: held.frontends,
            vips: held.vips,
            ..State::default()
        };
        if self.knows_all {
            self.touch_held();
        }
    }

    /// Leaves what differs still for [`Ledger::resume`]: the maps have no room for it, and what comes now is not to wait for that.
    pub fn park(&mut self) {
        let left = std::mem::take(&mut self.touched);
        self.parked.take_in(left);
    }

    /// Lets the next [`Ledger::diff`] try what there was no room for.
    pub fn resume(&mut self) {
        let parked = std::mem::take(&mut self.parked);
        self.touched.take_in(parked);
    }

    /// Whether something waits for room.
    pub fn is_short_of_room(&self) -> bool {
        self.parked != Touched::default()
    }

    /// Records the plan of a Service; the empty plan forgets it.
    pub fn set(&mut self, key: &ServiceKey, plan: ServicePlan) {
        let old = self.plans.remove(key).unwrap_or_default();
        let vips: BTreeSet<&IpAddr> = old.vips.keys().chain(plan.vips.keys()).collect();
        for vip in vips {
            if old.vips.get(vip) == plan.vips.get(vip) {
                continue;
            }
            self.touched.vips.insert(*vip);
            let claims = self.vip_claims.entry(*vip).or_default();
            if plan.vips.contains_key(vip) {
                claims.insert(key.clone(), ())
            } else {
                claims.remove(key)
            };
            if claims.is_empty() {
                self.vip_claims.remove(vip);
            }
        }
        let ports: BTreeSet<&PortKey> = old.ports.keys().chain(plan.ports.keys()).collect();
        for port in ports {
            if old.ports.get(port) != plan.ports.get(port) {
                self.touched.ports.insert(port.clone());
            }
        }
        let frontends: BTreeSet<&Frontend> =
            old.frontends.keys().chain(plan.frontends.keys()).collect();
        for frontend in frontends {
            let (had, wish) = (old.frontends.get(frontend), plan.frontends.get(frontend));
            if had == wish {
                continue;
            }
            self.touched.frontends.insert(*frontend);
            let routes = had.into_iter().chain(wish);
            let ends = routes.flat_map(|route| [&route.internal, &route.external]);
            self.touched.ports.extend(ends.cloned());
            if had.is_some() == wish.is_some() {
                continue;
            }
            let claims = self.claims.entry(*frontend).or_default();
            if wish.is_some() {
                claims.insert(key.clone(), ())
            } else {
                claims.remove(key)
            };
            // Others that want the frontend may gain or lose it.
            for other in claims.keys().filter(|other| *other != key) {
                let plan = self.plans.get(other);
                let route = plan.and_then(|plan| plan.frontends.get(frontend));
                let ends = route
                    .into_iter()
                    .flat_map(|route| [&route.internal, &route.external]);
                self.touched.ports.extend(ends.cloned());
            }
            if claims.is_empty() {
                self.claims.remove(frontend);
            }
        }
        if plan != ServicePlan::default() {
            self.plans.insert(key.clone(), plan);
        }
    }

    /// The keys of all Services that have a plan.
    pub fn services(&self) -> impl Iterator<Item = &ServiceKey> {
        self.plans.keys()
    }

    /// The plan of a Service and the ids of its ports.
    pub fn service(&self, key: &ServiceKey) -> Option<(&ServicePlan, Vec<(&PortKey, ServiceId)>)> {
        let plan = self.plans.get(key)?;
        let ids = plan
            .ports
            .keys()
            .filter_map(|port| Some((port, *self.ids.get(port)?)))
            .collect();
        Some((plan, ids))
    }

    /// The Service that has a frontend of those that want it.
    pub fn winner(&self, frontend: &Frontend) -> Option<&ServiceKey> {
        self.claims.get(frontend)?.first().map(|(first, ())| first)
    }

    /// Every service port that has an id.
    pub fn owners(&self) -> &HashMap<ServiceId, PortKey> {
        &self.owners
    }

    /// What the maps hold, as far as Services go.
    pub fn held(&self) -> &State {
        &self.held
    }

    /// The changes that make the maps hold what is wished, for all that was touched since they last did.
    pub fn diff(&mut self) -> Batch {
        let mut refusals = self.settle_ids();
        let (mut set, mut removed) = (Vec::new(), Vec::new());
        let (mut sources, mut no_sources) = (Vec::new(), Vec::new());
        let none = Sources::new();
        for id in &self.touched.ids {
            let wish = self.wished(*id);
            match (wish.map(|port| &port.backends), self.held.services.get(id)) {
                (Some(wish), held) if held != Some(wish) => {
                    set.push(Op::SetService {
                        id: *id,
                        backends: wish.clone(),
                    });
                }
                (None, Some(_)) => removed.push(Op::RemoveService { id: *id }),
                _ => {}
            }
            let wish = wish.map_or(&none, |port| &port.sources);
            if wish != self.held.sources.get(id).unwrap_or(&none) {
                let op = Op::SetSources {
                    id: *id,
                    sources: wish.clone(),
                };
                // Ranges come before the frontends that ask for them, and go after.
                if wish.is_empty() {
                    no_sources.push(op);
                } else {
                    sources.push(op);
                }
            }
        }
        let (mut set_vips, mut removed_vips) = (Vec::new(), Vec::new());
        for addr in &self.touched.vips {
            match (self.wished_vip(addr), self.held.vips.get(addr)) {
                (Some(kind), held) if held != Some(&kind) => {
                    set_vips.push(Op::SetVip { addr: *addr, kind });
                }
                (None, Some(_)) => removed_vips.push(Op::RemoveVip { addr: *addr }),
                _ => {}
            }
        }
        let (mut set_frontends, mut removed_frontends) = (Vec::new(), Vec::new());
        let mut left = Vec::new();
        for frontend in &self.touched.frontends {
            let (wish, held) = (
                self.wished_lead(frontend),
                self.held.frontends.get(frontend),
            );
            // Until it has a frontend of its own, an address of the node is led by that of all of them.
            let every = || {
                let every = frontend.on_every_address();
                let held = self.held.frontends.get(&every).copied();
                held.into_iter().chain(self.wished_lead(&every))
            };
            let shadowed = wish.filter(|_| held.is_none()).map(|_| every());
            for had in held
                .copied()
                .into_iter()
                .chain(shadowed.into_iter().flatten())
            {
                let ends = [
                    (had.internal, wish.map(|wish| wish.internal)),
                    (had.external, wish.map(|wish| wish.external)),
                ];
                let ends = ends.into_iter().filter(|(had, has)| *has != Some(*had));
                left.extend(ends.map(|(had, _)| had));
            }
            match (wish, held) {
                (Some(lead), held) if held != Some(&lead) => {
                    set_frontends.push(Op::SetFrontend {
                        frontend: *frontend,
                        lead,
                    });
                }
                (None, Some(_)) => removed_frontends.push(Op::RemoveFrontend {
                    frontend: *frontend,
                }),
                _ => {}
            }
            let claims = self.claims.get(frontend).into_iter();
            let mut claims = claims.flat_map(Claims::keys);
            if let Some(winner) = claims.next() {
                refusals.extend(claims.map(|loser| Refusal::Contested {
                    frontend: *frontend,
                    winner: winner.clone(),
                    loser: loser.clone(),
                }));
            }
        }
        self.touched.left.extend(left);
        // Nobody has a service port that comes into the maps with a later batch.
        let is_there = |id: &&ServiceId| {
            self.held.services.contains_key(*id) || self.touched.ids.contains(*id)
        };
        let renewed = self.touched.left.iter().filter(is_there);
        let renewed = renewed.filter_map(|id| self.renewal(*id)).collect();
        // A marker comes after the frontends of its address and goes before them: between the two a port would be
        // rejected that has a Service.
        let order = [
            set,
            sources,
            set_frontends,
            set_vips,
            removed_vips,
            removed_frontends,
            no_sources,
            renewed,
            removed,
        ];
        Batch {
            ops: order.into_iter().flatten().collect(),
            refusals,
        }
    }

    /// What renews a service port with all that is wished for it.
    pub fn renewal(&self, id: ServiceId) -> Option<Op> {
        let backends = self.wished(id)?.backends.clone();
        Some(Op::RenewService { id, backends })
    }

    /// Whether a batch that is not in the maps yet takes a backend from clients that have it.
    pub fn loses_backends(&self, batch: &Batch) -> bool {
        batch.ops.iter().any(|op| match op {
            Op::SetService { id, backends } => {
                let held = self.held.services.get(id);
                held.is_some_and(|held| !backends.holds_all(held))
            }
            Op::SetFrontend { frontend, .. } => [*frontend, frontend.on_every_address()]
                .iter()
                .any(|led| self.held.frontends.contains_key(led)),
            Op::RemoveService { .. } | Op::RemoveFrontend { .. } => true,
            _ => false,
        })
    }

    /// Whether clients here that ask a frontend may have a backend, as the maps are.
    pub fn leads_to(&self, frontend: &Frontend, backend: &SocketAddr) -> bool {
        let held = &self.held.frontends;
        let lead = held
            .get(frontend)
            .or_else(|| held.get(&frontend.on_every_address()));
        let backends = lead.and_then(|lead| self.held.services.get(&lead.internal));
        backends.is_some_and(|backends| backends.all().any(|one| one == backend))
    }

    /// Records that a batch of [`Ledger::diff`] is in the maps.
    pub fn applied(&mut self, batch: &Batch) {
        for op in &batch.ops {
            match op {
                Op::SetService { id, backends } => {
                    self.held.services.insert(*id, backends.clone());
                }
                Op::RemoveService { id } => {
                    self.held.services.remove(id);
                }
                Op::SetSources { id, sources } if sources.is_empty() => {
                    self.held.sources.remove(id);
                }
                Op::SetSources { id, sources } => {
                    self.held.sources.insert(*id, sources.clone());
                }
                Op::SetFrontend { frontend, lead } => {
                    self.held.frontends.insert(*frontend, *lead);
                }
                Op::RemoveFrontend { frontend } => {
                    self.held.frontends.remove(frontend);
                }
                Op::SetVip { addr, kind } => {
                    self.held.vips.insert(*addr, *kind);
                }
                Op::RemoveVip { addr } => {
                    self.held.vips.remove(addr);
                }
                Op::RenewService { .. }
                | Op::SetPod { .. }
                | Op::RemovePod { .. }
                | Op::SetHostAddress { .. }
                | Op::RemoveHostAddress { .. }
                | Op::SetUnmasqueraded { .. }
                | Op::SetPeers { .. } => {}
            }
        }
        self.touched = Touched::default();
    }

    /// Gives ids to the touched service ports that have a frontend now, and takes them from those that have none.
    /// Taking comes first, so that a port under a new name gets the id that its frontend leads to.
    fn settle_ids(&mut self) -> Vec<Refusal> {
        let touched = std::mem::take(&mut self.touched.ports);
        let services: BTreeSet<&ServiceKey> = touched.iter().map(|port| &port.service).collect();
        let won: HashMap<PortKey, Vec<(Frontend, Ends)>> = services
            .into_iter()
            .flat_map(|service| self.won(service))
            .collect();
        let (reached, unreached): (Vec<&PortKey>, Vec<&PortKey>) =
            touched.iter().partition(|port| won.contains_key(port));
        for port in unreached {
            self.refused.remove(port);
            if let Some(id) = self.ids.remove(port) {
                self.owners.remove(&id);
                self.touched.ids.insert(id);
            }
        }
        let mut refusals = Vec::new();
        let mut has_free = true;
        for port in reached {
            let id = self.ids.get(port).copied();
            let id = id.or_else(|| self.inherited_id(won.get(port).map_or(&[], Vec::as_slice)));
            // One search is enough to know that there is none.
            let id = id.or_else(|| has_free.then(|| self.free_id()).flatten());
            match id {
                Some(id) => {
                    self.ids.insert(port.clone(), id);
                    self.owners.insert(id, port.clone());
                    self.touched.ids.insert(id);
                    self.refused.remove(port);
                }
                None => {
                    has_free = false;
                    self.parked.ports.insert(port.clone());
                    if self.refused.insert(port.clone()) {
                        refusals.push(Refusal::NoId(port.clone()));
                    }
                }
            }
        }
        refusals
    }

    /// The frontends that a Service wants and has, by the service port that they lead to. One pass for all ports: there may be
    /// thousands.
    fn won(&self, service: &ServiceKey) -> HashMap<PortKey, Vec<(Frontend, Ends)>> {
        let mut won: HashMap<PortKey, Vec<(Frontend, Ends)>> = HashMap::new();
        let plan = self.plans.get(service);
        for (frontend, route) in plan.into_iter().flat_map(|plan| &plan.frontends) {
            if self.winner(frontend) != Some(service) {
                continue;
            }
            let ends = |port: &PortKey| Ends {
                internal: route.internal == *port,
            };
            let mut lead = |port: &PortKey| {
                let end = (*frontend, ends(port));
                won.entry(port.clone()).or_default().push(end);
            };
            lead(&route.internal);
            if route.external != route.internal {
                lead(&route.external);
            }
        }
        won
    }

    fn wished(&self, id: ServiceId) -> Option<&PortPlan> {
        let port = self.owners.get(&id)?;
        self.plans.get(&port.service)?.ports.get(port)
    }

    fn wished_vip(&self, addr: &IpAddr) -> Option<Vip> {
        let claims = self.vip_claims.get(addr)?.keys();
        claims
            .filter_map(|key| self.plans.get(key)?.vips.get(addr))
            .min()
            .copied()
    }

    fn wished_lead(&self, frontend: &Frontend) -> Option<Lead> {
        let winner = self.winner(frontend)?;
        let route = self.plans.get(winner)?.frontends.get(frontend)?;
        Some(Lead {
            internal: *self.ids.get(&route.internal)?,
            external: *self.ids.get(&route.external)?,
            guarded: route.guarded,
        })
    }

    /// The id that one of a port's frontends leads to already, when nobody owns it.
    fn inherited_id(&self, won: &[(Frontend, Ends)]) -> Option<ServiceId> {
        let maps = [&self.held.frontends, &self.inherited];
        let mut leads_to = maps.into_iter().flat_map(|leads| {
            won.iter().filter_map(|(frontend, ends)| {
                let lead = leads.get(frontend)?;
                Some(if ends.internal {
                    lead.internal
                } else {
                    lead.external
                })
            })
        });
        leads_to.find(|id| !self.owners.contains_key(id))
    }

    fn free_id(&mut self) -> Option<ServiceId> {
        for _ in 1..limits::SERVICES {
            self.last_id = if self.last_id + 1 >= limits::SERVICES {
                1
            } else {
                self.last_id + 1
            };
            let id = ServiceId(self.last_id);
            let is_another = self.owners.contains_key(&id)
                || self.held.services.contains_key(&id)
                || self.inherited_ids.contains(&id);
            if !is_another {
                return Some(id);
            }
        }
        None
    }
}

/// For which clients of a frontend a service port is.
#[derive(Clone, Copy)]
struct Ends {
    /// Those of the node; else those outside alone.
    internal: bool,
}
