//! Priority and fairness: how many requests are worked on at a time, of whom, and who waits.
//!
//! Callers belong to levels, as in Kubernetes' own configuration; each level has seats of its own, so no level takes another
//! one's. Within a level the flows (users, or namespaces of ServiceAccounts) take turns: who asks a thousand times at once
//! waits behind oneself. Who waits too long, or makes too many wait, gets 429 and the advice to come again.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use super::request::Target;
use super::status::Status;
use crate::auth::Identity;
use crate::auth::node::node_of;
use crate::auth::policy::CONTROLLERS;

/// Requests of one flow that may wait.
const WAITING_MAX: usize = 50;
/// Flows of a level of which requests may wait.
const FLOWS_MAX: usize = 128;
/// A quarter of what a request may take, as upstream.
const PATIENCE: Duration = Duration::from_secs(15);
/// When refused callers should come again.
const RETRY_S: u32 = 1;

/// The levels and their shares of the seats, as Kubernetes suggests them.
const LEVELS: [(&str, usize); 7] = [
    ("leader-election", 10),
    ("node-high", 40),
    ("system", 30),
    ("workload-high", 40),
    ("workload-low", 100),
    ("global-default", 20),
    ("catch-all", 5),
];

/// Fairness gives out seats.
pub struct Fairness {
    levels: [Arc<Level>; LEVELS.len()],
    /// How long a request may wait for a seat.
    patience: Duration,
}

struct Level {
    name: &'static str,
    seats: Mutex<Seats>,
}

#[derive(Default)]
struct Seats {
    free: usize,
    /// Who waits, by flow; the first flow has the next turn.
    flows: VecDeque<(String, VecDeque<oneshot::Sender<Seat>>)>,
}

impl Seats {
    /// Whose turn it is.
    fn next(&mut self) -> Option<oneshot::Sender<Seat>> {
        let (flow, mut waiting) = self.flows.pop_front()?;
        let next = waiting.pop_front();
        if !waiting.is_empty() {
            self.flows.push_back((flow, waiting));
        }
        next
    }
}

/// A Seat is the right to be worked on, until it is dropped.
pub struct Seat(Option<Arc<Level>>);

impl Drop for Seat {
    fn drop(&mut self) {
        let Some(level) = self.0.take() else { return };
        loop {
            let mut seats = level.lock();
            let Some(next) = seats.next() else {
                seats.free += 1;
                return;
            };
            drop(seats);
            match next.send(Seat(Some(level.clone()))) {
                Ok(()) => return,
                // Who waited has gone away: it is the next one's turn.
                Err(mut unwanted) => drop(unwanted.0.take()),
            }
        }
    }
}

/// Why a request gets no seat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refused {
    QueueFull,
    TimedOut,
}

impl Level {
    fn lock(&self) -> MutexGuard<'_, Seats> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn enter(self: &Arc<Self>, flow: &str, patience: Duration) -> Result<Seat, Refused> {
        let waiting = {
            let mut seats = self.lock();
            if seats.free > 0 {
                seats.free -= 1;
                return Ok(Seat(Some(self.clone())));
            }
            let (turn, waiting) = oneshot::channel();
            let known = seats.flows.len();
            let queue = seats.flows.iter_mut().find(|(name, _)| name == flow);
            match queue {
                Some((_, queue)) => {
                    queue.retain(|waiting| !waiting.is_closed());
                    if queue.len() >= WAITING_MAX {
                        return Err(Refused::QueueFull);
                    }
                    queue.push_back(turn);
                }
                None if known >= FLOWS_MAX => return Err(Refused::QueueFull),
                None => seats.flows.push_back((flow.to_owned(), [turn].into())),
            }
            waiting
        };
        match tokio::time::timeout(patience, waiting).await {
            Ok(Ok(seat)) => Ok(seat),
            _ => Err(Refused::TimedOut),
        }
    }
}

impl Fairness {
    /// With so many seats in all, of which each level has at least one.
    pub fn new(seats: usize) -> Self {
        let shares: usize = LEVELS.iter().map(|(_, share)| share).sum();
        Self {
            patience: PATIENCE,
            levels: LEVELS.map(|(name, share)| {
                Arc::new(Level {
                    name,
                    seats: Mutex::new(Seats {
                        free: (seats * share).div_ceil(shares).max(1),
                        ..Seats::default()
                    }),
                })
            }),
        }
    }

    /// A seat for a request, when one is free or its turn comes; None for requests that need none.
    pub async fn enter(
        &self,
        caller: &Identity,
        verb: &str,
        target: Option<&Target>,
    ) -> Result<Option<Seat>, Status> {
        let Some(name) = level_of(caller, verb, target) else {
            return Ok(None);
        };
        let Some(level) = self.levels.iter().find(|level| level.name == name) else {
            return Ok(None);
        };
        let seat = level.enter(flow_of(caller), self.patience).await;
        seat.map(Some).map_err(|why| {
            tracing::debug!(
                user = caller.user,
                level = level.name,
                ?why,
                "asked to come again"
            );
            let message = "Too many requests, please try again later.";
            Status::too_many_requests(message, RETRY_S)
        })
    }
}

/// The level of a request; None for administrators, and for connections that stay open.
fn level_of(caller: &Identity, verb: &str, target: Option<&Target>) -> Option<&'static str> {
    if caller.is_master() || target.is_some_and(Target::connects) {
        return None;
    }
    let plural = target.map_or("", |target| target.resource.plural);
    let system = matches!(
        caller.user.as_str(),
        CONTROLLERS | "system:kube-controller-manager" | "system:kube-scheduler"
    );
    let namespace = target.and_then(|target| target.namespace.as_deref());
    Some(if node_of(caller).is_some() {
        match plural {
            "leases" => "node-high",
            "nodes" if matches!(verb, "get" | "update" | "patch") => "node-high",
            _ => "system",
        }
    } else if plural == "leases"
        && (system || (namespace == Some("kube-system") && is_account_of(caller, "kube-system")))
    {
        "leader-election"
    } else if system || is_account_of(caller, "kube-system") {
        "workload-high"
    } else if caller.in_group("system:serviceaccounts") {
        "workload-low"
    } else if caller.in_group("system:authenticated") {
        "global-default"
    } else {
        "catch-all"
    })
}

fn is_account_of(caller: &Identity, namespace: &str) -> bool {
    matches!(caller.account(), Some((of, _)) if of == namespace)
}

/// Who takes turns with others: a user, or the ServiceAccounts of a namespace together.
fn flow_of(caller: &Identity) -> &str {
    match caller.account() {
        Some(("kube-system", _)) | None => &caller.user,
        Some((namespace, _)) => namespace,
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn caller(user: &str, groups: &[&str]) -> Identity {
        let groups = groups.iter().chain(&["system:authenticated"]);
        Identity {
            user: user.to_owned(),
            groups: groups.map(|group| (*group).to_owned()).collect(),
            ..Identity::default()
        }
    }

    fn target(path: &str) -> Option<Target> {
        Some(Target::parse(path).expect("a resource"))
    }

    #[test]
    fn callers_have_the_levels_that_kubernetes_suggests() {
        let node = caller("system:node:n", &["system:nodes"]);
        let accounts = ["system:serviceaccounts"];
        let account = |name: &str| caller(&format!("system:serviceaccount:{name}"), &accounts);
        let lease = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/x";
        let pods = "/api/v1/namespaces/a/pods";
        let exec = "/api/v1/namespaces/a/pods/x/exec";
        for (caller, verb, path, expected) in [
            (&node, "update", lease, Some("node-high")),
            (&node, "patch", "/api/v1/nodes/n/status", Some("node-high")),
            (&node, "watch", pods, Some("system")),
            (
                &caller(CONTROLLERS, &[]),
                "list",
                pods,
                Some("workload-high"),
            ),
            (
                &caller(CONTROLLERS, &[]),
                "update",
                lease,
                Some("leader-election"),
            ),
            (
                &account("kube-system:dns"),
                "list",
                pods,
                Some("workload-high"),
            ),
            (
                &account("kube-system:agent"),
                "update",
                lease,
                Some("leader-election"),
            ),
            (
                &account("shop:default"),
                "update",
                lease,
                Some("workload-low"),
            ),
            (&caller("jane", &[]), "list", pods, Some("global-default")),
            (&caller("jane", &[]), "create", exec, None),
            (&caller("root", &["system:masters"]), "list", pods, None),
            (&Identity::default(), "list", pods, Some("catch-all")),
        ] {
            let level = level_of(caller, verb, target(path).as_ref());
            assert_eq!(level, expected, "{} {verb} {path}", caller.user);
        }
        assert_eq!(flow_of(&account("shop:a")), flow_of(&account("shop:b")));
    }

    #[tokio::test]
    async fn who_asks_without_end_waits_behind_oneself_and_nobody_else_does() {
        let fairness = Fairness::new(245);
        let pods = target("/api/v1/namespaces/a/pods");
        let enter = async |caller: &Identity| fairness.enter(caller, "list", pods.as_ref()).await;
        let (greedy, modest) = (caller("greedy", &[]), caller("modest", &[]));
        let mut seats = Vec::new();
        for _ in 0..20 {
            seats.push(enter(&greedy).await.expect("a seat"));
        }
        // All seats of the level are taken; its requests wait, then they are refused at once.
        let mut waiting: Vec<_> = (0..WAITING_MAX).map(|_| Box::pin(enter(&greedy))).collect();
        for request in &mut waiting {
            assert!(request.as_mut().now_or_never().is_none());
        }
        let refused = enter(&greedy).await.err().expect("too many");
        assert_eq!(
            (refused.code.as_u16(), refused.reason),
            (429, "TooManyRequests")
        );
        assert_eq!(refused.details["retryAfterSeconds"], 1);
        // Other levels notice nothing.
        let node = caller("system:node:n", &["system:nodes"]);
        for _ in 0..30 {
            seats.push(enter(&node).await.expect("a seat"));
        }
        // Another user of the level has the second turn, not the fifty-first.
        let mut other = Box::pin(enter(&modest));
        assert!(other.as_mut().now_or_never().is_none());
        seats.swap_remove(0);
        assert!(waiting[0].as_mut().now_or_never().is_some());
        assert!(other.as_mut().now_or_never().is_some());
        assert!(
            waiting[1].as_mut().now_or_never().is_some(),
            "both gave theirs back"
        );
    }

    #[tokio::test]
    async fn who_waits_too_long_is_told_to_come_again_and_takes_no_seat_along() {
        let fairness = Fairness {
            patience: Duration::from_millis(20),
            ..Fairness::new(1)
        };
        let jane = caller("jane", &[]);
        let held = fairness.enter(&jane, "list", None).await.expect("a seat");
        for _ in 0..3 {
            let refused = fairness.enter(&jane, "list", None).await.err();
            assert_eq!(refused.expect("it waited").code, 429);
        }
        drop(held);
        for _ in 0..3 {
            assert!(fairness.enter(&jane, "list", None).await.is_ok());
        }
    }
}
