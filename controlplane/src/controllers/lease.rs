//! Leader election by Lease: of several control planes one at a time runs the controllers, and one the scheduler.

use std::time::Duration;

use http::Method;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::object::{Key, Kind, Object};
use super::watch::{Api, CallError};

const NAMESPACE: &str = "kube-system";
/// How long a leader may be silent before another may take over.
const DURATION: Duration = Duration::from_secs(15);
/// How long a leader tries to renew before it stops leading: before anyone else may start.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
const RENEW_EVERY: Duration = Duration::from_secs(5);
const RETRY_EVERY: Duration = Duration::from_secs(2);
/// Between attempts while the API server does not answer at all: it is starting, most likely.
const UNREACHABLE_RETRY: Duration = Duration::from_millis(50);
/// How long a leader that stops tries to give its lease back.
const RELEASE_DEADLINE: Duration = Duration::from_secs(2);

/// Works whenever this control plane has the lease `name`, until `stop` fires; then it is given back.
pub async fn work_while_leading<Work: Future<Output = ()>>(
    api: &Api,
    name: &'static str,
    identity: &str,
    stop: &CancellationToken,
    work: impl Fn() -> Work,
) {
    loop {
        let mut candidate = Candidate::new(api.clone(), name, identity);
        tokio::select! {
            () = candidate.lead() => {}
            () = stop.cancelled() => return,
        }
        tokio::select! {
            () = work() => {}
            () = candidate.keep() => tracing::warn!(lease = name, "the lease is lost; what it is for stops until it is taken again"),
            () = stop.cancelled() => {}
        }
        if stop.is_cancelled() {
            return candidate.release().await;
        }
    }
}

/// One candidate for one lease.
struct Candidate {
    api: Api,
    name: &'static str,
    identity: String,
    /// What the lease last said, and when that was first seen here: other machines' clocks are not trusted.
    observed: Option<(LeaseSpec, Instant)>,
}

impl Candidate {
    /// `name` is that of the upstream component with the same task, so that one of upstream's cannot run beside it.
    fn new(api: Api, name: &'static str, identity: &str) -> Self {
        Self {
            api,
            name,
            identity: identity.into(),
            observed: None,
        }
    }

    /// Waits until this candidate leads.
    async fn lead(&mut self) {
        loop {
            let wait = match self.attempt().await {
                Ok(true) => {
                    tracing::info!(lease = self.name, identity = self.identity, "leading");
                    return;
                }
                Ok(false) => RETRY_EVERY,
                Err(error) if error.code().is_none() => UNREACHABLE_RETRY,
                // The server is up, but its own bootstrap (kube-system, for one) may not be done.
                Err(error) => {
                    tracing::debug!(lease = self.name, %error, "cannot take the lease");
                    UNREACHABLE_RETRY * 4
                }
            };
            tokio::time::sleep(wait).await;
        }
    }

    /// Keeps the lease; returns when it is lost.
    async fn keep(&mut self) {
        let mut renewed = Instant::now();
        loop {
            let wait = if renewed.elapsed() < RENEW_EVERY {
                RENEW_EVERY
            } else {
                RETRY_EVERY
            };
            tokio::time::sleep(wait).await;
            match tokio::time::timeout(
                RENEW_DEADLINE.saturating_sub(renewed.elapsed()),
                self.attempt(),
            )
            .await
            {
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

    /// Gives the lease back, so that nobody has to wait until it ends by itself. To be called when what it was for has stopped.
    async fn release(&self) {
        match tokio::time::timeout(RELEASE_DEADLINE, self.give_back()).await {
            Ok(Ok(())) => tracing::info!(lease = self.name, "given back"),
            Ok(Err(error)) => tracing::debug!(lease = self.name, %error, "cannot give it back"),
            Err(_) => tracing::debug!(lease = self.name, "cannot give it back in time"),
        }
    }

    async fn give_back(&self) -> Result<(), CallError> {
        let resource = Kind::Lease.resource();
        let key = Key::new(NAMESPACE, self.name);
        let Some(Object::Lease(lease)) = self.api.get(resource, &key).await? else {
            return Ok(());
        };
        let mut lease = (*lease).clone();
        let spec = lease.spec.get_or_insert_default();
        if spec.holder_identity.as_deref() != Some(&self.identity) {
            return Ok(());
        }
        (spec.holder_identity, spec.acquire_time) = (None, None);
        // As client-go leaves it: whoever knows only durations may take it at once, too.
        spec.lease_duration_seconds = Some(1);
        spec.renew_time = Some(MicroTime(Timestamp::now()));
        let body = encode(&lease);
        let path = resource.object_path(&key);
        let given = self.api.call(Method::PUT, &path, Some(&body)).await;
        given.map(drop)
    }

    /// Takes or renews the lease if that is possible now.
    async fn attempt(&mut self) -> Result<bool, CallError> {
        let resource = Kind::Lease.resource();
        let key = Key::new(NAMESPACE, self.name);
        let now = MicroTime(Timestamp::now());
        let Some(Object::Lease(lease)) = self.api.get(resource, &key).await? else {
            let lease = Lease {
                metadata: ObjectMeta {
                    namespace: Some(NAMESPACE.into()),
                    name: Some(self.name.into()),
                    ..Default::default()
                },
                spec: Some(self.claim(None, now)),
            };
            return match self
                .api
                .call(
                    Method::POST,
                    &resource.path(NAMESPACE),
                    Some(&encode(&lease)),
                )
                .await
            {
                Ok(_) => Ok(true),
                Err(error) if error.is_already_there() => Ok(false),
                Err(error) => Err(error),
            };
        };
        let spec = lease.spec.clone().unwrap_or_default();
        if !self.may_take(&spec) {
            return Ok(false);
        }
        let mut claimed = (*lease).clone();
        claimed.spec = Some(self.claim(Some(&spec), now));
        // With the resourceVersion that was read: of two who try, one succeeds.
        match self
            .api
            .call(
                Method::PUT,
                &resource.object_path(&key),
                Some(&encode(&claimed)),
            )
            .await
        {
            Ok(_) => Ok(true),
            Err(error) if error.code() == Some(409) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn may_take(&mut self, spec: &LeaseSpec) -> bool {
        let holder = spec.holder_identity.as_deref().unwrap_or_default();
        if holder.is_empty() || holder == self.identity {
            return true;
        }
        match &self.observed {
            Some((known, since)) if known == spec => {
                let duration = spec
                    .lease_duration_seconds
                    .and_then(|seconds| u64::try_from(seconds).ok());
                since.elapsed() >= duration.map_or(DURATION, Duration::from_secs)
            }
            _ => {
                self.observed = Some((spec.clone(), Instant::now()));
                false
            }
        }
    }

    fn claim(&self, old: Option<&LeaseSpec>, now: MicroTime) -> LeaseSpec {
        let ours = old.and_then(|old| old.holder_identity.as_deref()) == Some(&self.identity);
        let transitions = old.and_then(|old| old.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: if ours {
                old.and_then(|old| old.acquire_time.clone())
            } else {
                Some(now.clone())
            },
            renew_time: Some(now),
            lease_transitions: Some(if ours || old.is_none() {
                transitions
            } else {
                transitions + 1
            }),
            ..Default::default()
        }
    }
}

fn encode(lease: &Lease) -> serde_json::Value {
    serde_json::to_value(lease).unwrap_or_default()
}
