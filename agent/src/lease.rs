//! What one agent of the cluster does for all: the one that holds a Lease.

use std::time::Duration;

use cluster_model::api::api::coordination::v1::{Lease, LeaseSpec};
use cluster_model::api::apimachinery::pkg::apis::meta::v1::MicroTime;
use cluster_model::api::jiff::Timestamp;
use cluster_model::watch::kube::api::{Api, ObjectMeta, PostParams};
use cluster_model::watch::kube::{self, Client};
use tokio::time::Instant;

/// How long a holder may be silent before another may take over.
const DURATION: Duration = Duration::from_secs(15);
/// How long a holder tries to renew before it stops: before anyone else may begin.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
const RENEW_EVERY: Duration = Duration::from_secs(4);
const RETRY_EVERY: Duration = Duration::from_secs(5);

/// One candidate for one Lease of kube-system.
pub struct Candidate {
    leases: Api<Lease>,
    name: &'static str,
    holding: Holding,
}

/// Who holds a Lease, as one candidate sees it.
struct Holding {
    identity: String,
    /// What the Lease last said, and when that was first seen here: other machines' clocks are not trusted, nor this one's that can be set.
    observed: Option<(LeaseSpec, Instant)>,
}

impl Candidate {
    /// `identity` is the same after a restart, so that a holder that was killed goes on at once.
    pub fn new(client: Client, name: &'static str, identity: &str) -> Self {
        Self {
            leases: Api::namespaced(client, "kube-system"),
            name,
            holding: Holding {
                identity: identity.into(),
                observed: None,
            },
        }
    }

    /// Waits until this candidate holds the Lease.
    pub async fn lead(&mut self) {
        loop {
            match self.attempt().await {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => tracing::debug!(lease = self.name, %error, "cannot take the lease"),
            }
            tokio::time::sleep(RETRY_EVERY).await;
        }
    }

    /// Keeps the Lease; returns when it is lost.
    pub async fn keep(&mut self) {
        let mut renewed = Instant::now();
        loop {
            tokio::time::sleep(RENEW_EVERY).await;
            let left = RENEW_DEADLINE.saturating_sub(renewed.elapsed());
            match tokio::time::timeout(left, self.attempt()).await {
                Ok(Ok(true)) => renewed = Instant::now(),
                Ok(Ok(false)) => return,
                Ok(Err(error)) => {
                    tracing::warn!(lease = self.name, %error, "cannot renew the lease")
                }
                Err(_) => {}
            }
            if renewed.elapsed() >= RENEW_DEADLINE {
                return;
            }
        }
    }

    /// Lets others take over at once.
    pub async fn release(&mut self) {
        let Ok(Some(mut lease)) = self.leases.get_opt(self.name).await else {
            return;
        };
        if let Some(spec) = lease.spec.as_mut()
            && spec.holder_identity.as_ref() == Some(&self.holding.identity)
        {
            spec.holder_identity = None;
            // Whoever took it meanwhile keeps it: the resourceVersion that was read goes along.
            let parameters = PostParams::default();
            let released = self.leases.replace(self.name, &parameters, &lease).await;
            if let Err(error) = released {
                tracing::debug!(lease = self.name, %error, "the lease was not released");
            }
        }
    }

    /// Takes or renews the Lease if that is possible now.
    async fn attempt(&mut self) -> Result<bool, kube::Error> {
        let parameters = PostParams::default();
        let Some(mut lease) = self.leases.get_opt(self.name).await? else {
            let lease = Lease {
                metadata: ObjectMeta {
                    name: Some(self.name.into()),
                    ..ObjectMeta::default()
                },
                spec: Some(self.holding.claim(None)),
            };
            return took(self.leases.create(&parameters, &lease).await);
        };
        let spec = lease.spec.clone().unwrap_or_default();
        if !self.holding.may_take(&spec, Instant::now()) {
            return Ok(false);
        }
        lease.spec = Some(self.holding.claim(Some(&spec)));
        // With the resourceVersion that was read: of two who try, one succeeds.
        took(self.leases.replace(self.name, &parameters, &lease).await)
    }
}

impl Holding {
    fn may_take(&mut self, spec: &LeaseSpec, now: Instant) -> bool {
        let holder = spec.holder_identity.as_deref().unwrap_or_default();
        if holder.is_empty() || holder == self.identity {
            return true;
        }
        match &self.observed {
            Some((known, since)) if known == spec => {
                let duration = spec
                    .lease_duration_seconds
                    .and_then(|seconds| u64::try_from(seconds).ok());
                now.saturating_duration_since(*since)
                    >= duration.map_or(DURATION, Duration::from_secs)
            }
            _ => {
                self.observed = Some((spec.clone(), now));
                false
            }
        }
    }

    fn claim(&self, old: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let ours = old.and_then(|old| old.holder_identity.as_deref()) == Some(&self.identity);
        let transitions = old.and_then(|old| old.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: match old {
                Some(old) if ours => old.acquire_time.clone(),
                _ => Some(now.clone()),
            },
            renew_time: Some(now),
            lease_transitions: Some(transitions + i32::from(!ours && old.is_some())),
            ..LeaseSpec::default()
        }
    }
}

/// A conflict means that another one was faster.
fn took<T>(answer: Result<T, kube::Error>) -> Result<bool, kube::Error> {
    match answer {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(identity: &str) -> Holding {
        Holding {
            identity: identity.into(),
            observed: None,
        }
    }

    #[test]
    fn a_holder_is_followed_once_it_was_silent_for_as_long_as_its_lease_says_whatever_its_clock() {
        let (mut first, mut second) = (candidate("first"), candidate("second"));
        let began = Instant::now();
        let mut lease = first.claim(None);
        assert!(first.may_take(&lease, began));
        let second = &mut second;
        let mut after = |lease: &LeaseSpec, seconds| {
            second.may_take(lease, began + Duration::from_secs(seconds))
        };
        assert!(!after(&lease, 0));
        assert!(!after(&lease, 14));
        // It is renewed by a clock that is an hour behind: what counts is that it has changed.
        lease.renew_time = lease
            .renew_time
            .map(|time| MicroTime(time.0 - jiff::SignedDuration::from_hours(1)));
        assert!(!after(&lease, 15));
        assert!(!after(&lease, 29));
        assert!(after(&lease, 30));
        // One that wants longer is left as long.
        lease.lease_duration_seconds = Some(60);
        assert!(!after(&lease, 31));
        assert!(!after(&lease, 90));
        assert!(after(&lease, 91));
    }

    #[test]
    fn a_holder_that_was_away_for_an_hour_goes_on_if_nobody_followed_and_waits_if_somebody_did() {
        let (mut first, second) = (candidate("first"), candidate("second"));
        let later = Instant::now() + Duration::from_secs(3600);
        let lease = first.claim(None);
        assert!(first.may_take(&lease, later));
        let renewed = first.claim(Some(&lease));
        assert_eq!(renewed.lease_transitions, Some(0));
        assert_eq!(renewed.acquire_time, lease.acquire_time);
        let others = second.claim(Some(&renewed));
        assert_eq!(others.lease_transitions, Some(1));
        assert!(!first.may_take(&others, later));
        // Given back, it is anybody's at once.
        let free = LeaseSpec {
            holder_identity: None,
            ..others
        };
        assert!(first.may_take(&free, later));
    }

    /// Whoever cannot renew stops before another may begin.
    const _: () = assert!(RENEW_DEADLINE.as_secs() + RENEW_EVERY.as_secs() < DURATION.as_secs());
}
