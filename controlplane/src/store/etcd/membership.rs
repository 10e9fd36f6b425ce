//! Who is a member of an etcd cluster: looked at and changed, as by `etcdctl member`.

use std::time::{Duration, Instant};

use etcd_client::MemberAddOptions;
use serde::Serialize;

use super::members::Members;
use super::{EtcdConfig, StoreError};

/// etcd changes its members only when all of them have been connected for five seconds, and gives a vote only to one that has
/// caught up. It tells nobody when that is so: it is asked again.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(200);

/// A member as etcd knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EtcdMember {
    /// In hexadecimal digits, as etcdctl shows it.
    pub id: String,
    /// Empty until it has started.
    pub name: String,
    pub peer_urls: Vec<String>,
    pub client_urls: Vec<String>,
    /// It learns what the others have, and has no vote yet.
    pub is_learner: bool,
    #[serde(skip)]
    number: u64,
}

impl EtcdMember {
    fn of(member: &etcd_client::Member) -> Self {
        Self {
            id: format!("{:x}", member.id()),
            name: member.name().to_owned(),
            peer_urls: member.peer_urls().to_vec(),
            client_urls: member.client_urls().to_vec(),
            is_learner: member.is_learner(),
            number: member.id(),
        }
    }
}

/// The members of an etcd, each known by the address that others reach it at.
pub struct EtcdMembership {
    members: Members,
}

impl EtcdMembership {
    /// # Errors
    /// When the files of `config` cannot be read.
    pub async fn connect(config: &EtcdConfig) -> Result<Self, StoreError> {
        let members = Members::new(config).await?;
        Ok(Self { members })
    }

    /// # Errors
    /// When no member answers.
    pub async fn list(&self) -> Result<Vec<EtcdMember>, StoreError> {
        let answer = self
            .members
            .ask_any("list the members", async |mut client| {
                client.member_list().await
            })
            .await?;
        Ok(answer.members().iter().map(EtcdMember::of).collect())
    }

    async fn at(&self, peer: &str) -> Result<Option<EtcdMember>, StoreError> {
        let mut members = self.list().await?.into_iter();
        Ok(members.find(|member| member.peer_urls.iter().any(|url| url == peer)))
    }

    /// Takes in a member of a name that is about to start at `peer`, without a vote; gives all members. One that is there at this address
    /// is taken out before, if it never started or had this name: it is what an attempt that was cut off has left, or a machine that came
    /// back without its state.
    ///
    /// # Errors
    /// When another member is at this address, or etcd refuses for a minute.
    pub async fn add(&self, peer: &str, name: &str) -> Result<Vec<EtcdMember>, StoreError> {
        let there = self.at(peer).await?;
        if let Some(other) = there.filter(|there| !there.name.is_empty() && there.name != name) {
            return Err(StoreError::Unavailable {
                operation: "add a member",
                reason: format!("{} is at {peer}, which is another one", other.name),
            });
        }
        self.remove(peer).await?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let added = self
                .members
                .ask("add a member", async |mut client| {
                    let options = MemberAddOptions::new().with_is_learner();
                    client.member_add([peer], Some(options)).await
                })
                .await;
            match added {
                Ok(answer) => {
                    return Ok(answer.member_list().iter().map(EtcdMember::of).collect());
                }
                // What was not answered may have been done.
                Err(_) if self.at(peer).await?.is_some() => return self.list().await,
                Err(error) => again(error, deadline).await?,
            }
        }
    }

    /// Gives the member at `peer` a vote, once it has caught up.
    ///
    /// # Errors
    /// When there is none, or it has not caught up within a minute.
    pub async fn promote(&self, peer: &str) -> Result<(), StoreError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let Some(member) = self.at(peer).await? else {
                return Err(StoreError::Unavailable {
                    operation: "promote a member",
                    reason: format!("there is none at {peer}"),
                });
            };
            if !member.is_learner {
                return Ok(());
            }
            let promoted = self
                .members
                .ask("promote a member", async |mut client| {
                    client.member_promote(member.number).await
                })
                .await;
            match promoted {
                Ok(_) => return Ok(()),
                Err(error) => again(error, deadline).await?,
            }
        }
    }

    /// Takes out the member at `peer`, if there is one.
    ///
    /// # Errors
    /// When etcd refuses for a minute: without it, too few would be left that live.
    pub async fn remove(&self, peer: &str) -> Result<(), StoreError> {
        let deadline = Instant::now() + PATIENCE;
        while let Some(member) = self.at(peer).await? {
            let removed = self
                .members
                .ask("remove a member", async |mut client| {
                    client.member_remove(member.number).await
                })
                .await;
            match removed {
                Ok(_) => return Ok(()),
                Err(error) => again(error, deadline).await?,
            }
        }
        Ok(())
    }
}

/// Waits before the next attempt, or gives up.
async fn again(error: StoreError, deadline: Instant) -> Result<(), StoreError> {
    if Instant::now() >= deadline {
        return Err(error);
    }
    tokio::time::sleep(PAUSE).await;
    Ok(())
}
