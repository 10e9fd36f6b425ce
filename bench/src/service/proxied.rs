//! The real kube-proxy: on a node that the kernel alone routes for, with an API server of ours to learn the Services from.

use std::path::Path;

use anyhow::Result;
use keelway_tests::sandbox::Sandbox;

use super::cluster::services;
use super::keelway::manifests;
use super::plain::Plain;
use crate::sync::api::{ApiServer, Cluster};
use crate::sync::node::{Subject, Who};

/// Nothing that the API server's client makes by itself.
const NONE: Cluster = Cluster {
    services: 0,
    endpoints: 0,
};

/// Two nodes, the first of which kube-proxy looks after.
pub struct Proxied {
    pub plain: Plain,
    who: Who,
    server: ApiServer,
    /// Services that the API server has.
    made: usize,
    subject: Option<Subject>,
}

impl Proxied {
    /// Builds the nodes, without any Service.
    pub fn build(who: Who, bin_dir: &Path) -> Result<Self> {
        let plain = Plain::build()?;
        let server = ApiServer::start(bin_dir, &plain.hosts[0])?;
        server.with_writer(NONE, async |writer| writer.found().await)?;
        Ok(Self {
            plain,
            who,
            server,
            made: 0,
            subject: None,
        })
    }

    pub fn name(&self) -> String {
        self.who.name()
    }

    /// Gives it so many Services, not fewer than before, and waits until its rules are those.
    pub fn load(&mut self, count: usize, sandbox: &Sandbox, cgroup: &Path) -> Result<()> {
        let servers = self.plain.servers.each_ref().map(|server| server.address);
        let all = services(count, servers);
        let new = all.iter().enumerate().skip(self.made);
        let objects = new.flat_map(|(index, service)| manifests(index, service));
        let objects = objects.collect();
        self.server
            .with_writer(NONE, async move |writer| writer.add(objects).await)?;
        self.made = count;
        // One that starts says when all is done; its rules stay while there is none.
        self.subject = None;
        let host = &self.plain.hosts[0];
        let kubeconfig = self.server.kubeconfig();
        let mut subject = Subject::start(&self.who, host, sandbox, &kubeconfig, cgroup)?;
        subject.learnt()?;
        self.subject = Some(subject);
        Ok(())
    }
}
