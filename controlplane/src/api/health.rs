//! Health: `/livez`, `/readyz` and `/healthz`, each as a whole, in words (`?verbose`), and check by check.

use http::{StatusCode, request::Parts};

use super::reply::{self, Answer};
use super::request::Query;
use super::status::Status;
use super::{Api, object};
use crate::registry;

/// What is checked, under upstream's names. The hooks are done when the server listens: it does not before.
const CHECKS: [&str; 6] = [
    "ping",
    "log",
    "etcd",
    "poststarthook/start-system-namespaces-controller",
    "poststarthook/scheduling/bootstrap-system-priority-classes",
    "poststarthook/start-service-ip-repair-controllers",
];
/// Being about to stop makes a server unready, and no less alive.
const SHUTDOWN: &str = "shutdown";

/// A health endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Endpoint(&'static str);

impl Endpoint {
    /// The endpoint of a path, and the check below it that is asked for.
    fn of(path: &str) -> Option<(Self, Option<&str>)> {
        ["livez", "readyz", "healthz"].into_iter().find_map(|name| {
            let rest = path.strip_prefix('/')?.strip_prefix(name)?;
            match rest.strip_prefix('/') {
                None if rest.is_empty() => Some((Self(name), None)),
                None => None,
                Some("") => Some((Self(name), None)),
                Some(check) => Some((Self(name), Some(check))),
            }
        })
    }

    fn checks(self) -> impl Iterator<Item = &'static str> {
        let stopping = (self.0 == "readyz").then_some(SHUTDOWN);
        CHECKS.into_iter().chain(stopping)
    }
}

impl Api {
    /// The state of the server, which anybody may know; None when the path is of something else.
    pub(super) async fn health(&self, parts: &Parts) -> Option<Result<Answer, Status>> {
        let (endpoint, None) = Endpoint::of(parts.uri.path())? else {
            return None;
        };
        let query = Query::parse(parts.uri.query().unwrap_or(""));
        let mut excluded: Vec<&str> = query.all("exclude").collect();
        let (mut lines, mut failed) = (String::new(), false);
        for check in endpoint.checks() {
            if let Some(at) = excluded.iter().position(|name| *name == check) {
                excluded.swap_remove(at);
                lines += &format!("[+]{check} excluded: ok\n");
                continue;
            }
            match self.check(check).await {
                Ok(()) => lines += &format!("[+]{check} ok\n"),
                Err(why) => {
                    tracing::warn!(check, why, "a health check fails");
                    failed = true;
                    lines += &format!("[-]{check} failed: reason withheld\n");
                }
            }
        }
        if !excluded.is_empty() {
            let names = excluded.join(",");
            lines +=
                &format!("warn: some health checks cannot be excluded: no matches for {names}\n");
        }
        let Endpoint(name) = endpoint;
        Some(Ok(if failed {
            let text = format!("{lines}{name} check failed\n");
            reply::text(StatusCode::INTERNAL_SERVER_ERROR, text)
        } else if query.has("verbose") {
            reply::text(StatusCode::OK, format!("{lines}{name} check passed\n"))
        } else {
            reply::text(StatusCode::OK, "ok")
        }))
    }

    /// One check alone, for callers that have said who they are.
    pub(super) async fn health_check(&self, path: &str) -> Option<Result<Answer, Status>> {
        let (endpoint, Some(asked)) = Endpoint::of(path)? else {
            return None;
        };
        let Some(check) = endpoint.checks().find(|check| *check == asked) else {
            return Some(Err(Status::no_such_path()));
        };
        Some(Ok(match self.check(check).await {
            Ok(()) => reply::text(StatusCode::OK, "ok"),
            Err(why) => {
                let text = format!("internal server error: {why}\n");
                reply::text(StatusCode::INTERNAL_SERVER_ERROR, text)
            }
        }))
    }

    async fn check(&self, name: &str) -> Result<(), String> {
        match name {
            SHUTDOWN if self.stop.is_cancelled() => Err("process is shutting down".to_owned()),
            "etcd" => {
                let namespaces = registry::resource("", "v1", "namespaces");
                let key = namespaces.map(|resource| object::key(resource, None, "default"));
                let read = self.store.get(&key.unwrap_or_default()).await;
                read.map(drop).map_err(|error| error.to_string())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_whole_paths_and_checks_lie_below_them() {
        for (path, endpoint) in [
            ("/livez", Some(("livez", None))),
            ("/readyz/", Some(("readyz", None))),
            ("/healthz/etcd", Some(("healthz", Some("etcd")))),
            (
                "/livez/poststarthook/x",
                Some(("livez", Some("poststarthook/x"))),
            ),
            ("/livezz", None),
            ("/live", None),
            ("/api", None),
        ] {
            let found = Endpoint::of(path).map(|(Endpoint(name), check)| (name, check));
            assert_eq!(found, endpoint, "{path}");
        }
        assert!(Endpoint("readyz").checks().any(|check| check == SHUTDOWN));
        assert!(!Endpoint("livez").checks().any(|check| check == SHUTDOWN));
    }
}
