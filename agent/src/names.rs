//! Answers to pods' questions at their interfaces: keeps the maps of names in step with the cluster, and with what this node's DNS server
//! says of its own answers.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher as _, Hasher as _, RandomState};

use cluster_model::{ServiceKey, Snapshot};
use dataplane_abi::{DNS_RECURSION, DnsCount, DnsZone, FrontendKey};
use keelway_dns::name::BadName;

use crate::dataplane::{Error, NameTables};
use crate::offers::Terms;
use crate::plan::names::{Domains, NameLedger, plan_names, plan_servers};

/// Why questions are left to the server.
#[derive(Debug, thiserror::Error)]
pub enum NamesError {
    #[error(transparent)]
    Dataplane(#[from] Error),
    #[error("a domain of the node's DNS server is no name: {0}")]
    Domain(#[from] BadName),
}

/// The names that are answered in the kernel.
pub struct KernelNames {
    tables: NameTables,
    /// By what the maps are filled; nothing is answered without.
    terms: Option<(Terms, Domains)>,
    ledger: NameLedger,
    /// Where each Service that leads to the server is asked.
    servers: BTreeMap<ServiceKey, BTreeSet<FrontendKey>>,
    held_servers: BTreeSet<FrontendKey>,
    zone: DnsZone,
    on: bool,
}

impl KernelNames {
    /// Nothing is answered yet.
    pub fn new(tables: NameTables) -> Self {
        let random = || RandomState::new().build_hasher().finish();
        Self {
            tables,
            terms: None,
            ledger: NameLedger::default(),
            servers: BTreeMap::new(),
            held_servers: BTreeSet::new(),
            zone: DnsZone {
                seed: [random(), random()],
                ..DnsZone::default()
            },
            on: false,
        }
    }

    /// Plans a Service's names again, and whether the server is asked by it.
    pub fn replan(&mut self, snapshot: &Snapshot, key: &ServiceKey) {
        let Some((terms, domains)) = &self.terms else {
            return;
        };
        self.ledger.set(key, plan_names(domains, snapshot, key));
        let servers = plan_servers(snapshot, key, &terms.addresses);
        if servers.is_empty() {
            self.servers.remove(key);
        } else {
            self.servers.insert(key.clone(), servers);
        }
    }

    /// Brings the maps to the plan, by these terms. To be called once all of the cluster is known. On an error nothing is answered until
    /// another try succeeds.
    pub fn settle(&mut self, snapshot: &Snapshot, terms: Option<Terms>) -> Result<(), NamesError> {
        let settled = self.bring(snapshot, terms);
        if settled.is_err() {
            self.turn_off()?;
            // All of it is planned again.
            self.terms = None;
        }
        settled
    }

    fn bring(&mut self, snapshot: &Snapshot, terms: Option<Terms>) -> Result<(), NamesError> {
        let now = self.terms.as_ref().map(|(terms, _)| terms);
        if now != terms.as_ref() {
            self.take_terms(snapshot, terms)?;
        }
        let servers: BTreeSet<FrontendKey> = self.servers.values().flatten().copied().collect();
        let wanted = self.terms.is_some() && !servers.is_empty();
        if self.ledger.is_settled() && servers == self.held_servers && wanted == self.on {
            return Ok(());
        }
        let (gone, set) = self.ledger.due();
        // What is gone first: a map that is full takes nothing new.
        self.tables.remove_names(&gone)?;
        self.tables.set_names(&set)?;
        self.ledger.applied();
        let (new, old): (Vec<_>, Vec<_>) = (
            servers.difference(&self.held_servers).copied().collect(),
            self.held_servers.difference(&servers).copied().collect(),
        );
        self.tables.remove_servers(&old)?;
        self.tables.set_servers(&new)?;
        self.held_servers = servers;
        if !gone.is_empty() || !set.is_empty() {
            self.zone.serial = self.zone.serial.wrapping_add(1);
            self.tables.set_zone(&self.zone)?;
        }
        if wanted && !self.on {
            self.tables.turn_on()?;
            self.on = true;
            tracing::info!(
                names = self.ledger.count(),
                "questions for cluster names are answered at pods' interfaces"
            );
        } else if !wanted {
            self.turn_off()?;
        }
        Ok(())
    }

    /// Plans everything by other terms. Meanwhile nothing is answered.
    fn take_terms(&mut self, snapshot: &Snapshot, terms: Option<Terms>) -> Result<(), NamesError> {
        self.turn_off()?;
        self.ledger.clear();
        self.servers.clear();
        self.terms = None;
        let Some(terms) = terms else {
            return Ok(());
        };
        let rules = &terms.rules;
        self.zone.ttl_s = rules.ttl_s;
        self.zone.udp_bytes = rules.udp_bytes_max.into();
        self.zone.flags = if rules.recursion { DNS_RECURSION } else { 0 };
        self.tables.set_zone(&self.zone)?;
        let domains = Domains::new(rules, self.zone.seed)?;
        self.terms = Some((terms, domains));
        for service in snapshot.services() {
            self.replan(snapshot, &service.key);
        }
        Ok(())
    }

    fn turn_off(&mut self) -> Result<(), Error> {
        if self.on {
            self.tables.turn_off()?;
            self.on = false;
            tracing::info!("all questions are the DNS server's to answer");
        }
        Ok(())
    }

    /// Questions by what became of them, in the order of [`DnsCount::ALL`].
    pub fn counts(&self) -> Result<[u64; DnsCount::ALL.len()], Error> {
        self.tables.counts()
    }

    /// Names that are answered.
    pub fn count(&self) -> usize {
        if self.on { self.ledger.count() } else { 0 }
    }

    /// Services for whose names there is no room.
    pub fn left_out(&self) -> usize {
        self.ledger.left_out()
    }
}
