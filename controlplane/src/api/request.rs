//! What a request asks for: its path, query and headers, checked once.

use std::borrow::Cow;
use std::num::{IntErrorKind, ParseIntError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::request::Parts;
use http::{Method, header};

use super::audit::Notes;
use super::status::{FieldError, Status, Subject};
use crate::auth::Identity;
use crate::codec::FieldValidation;
use crate::registry::{self, Resource};
use crate::selector::{FieldSelector, LabelSelector};

pub use super::negotiation::{Encoding, Form, MEDIA_TYPES};

/// The resource, object or part of an object that a path names.
#[derive(Debug, Clone)]
pub struct Target {
    pub resource: &'static Resource,
    pub namespace: Option<String>,
    pub name: Option<String>,
    /// `status`, `log`, `exec`, ...
    pub subresource: Option<String>,
    /// What follows the subresource (`proxy/<path>`), with its first slash, as the client encoded it.
    pub rest: String,
}

impl Target {
    /// Parses `/api/v1/...` and `/apis/<group>/<version>/...`.
    pub fn parse(path: &str) -> Option<Self> {
        let mut segments = Segments(path);
        let (group, version) = match segments.next()? {
            "api" => ("", segments.next()?),
            "apis" => (segments.next()?, segments.next()?),
            _ => return None,
        };
        let mut first = segments.next()?;
        let mut namespace = None;
        if first == "namespaces" {
            // `/namespaces/x` is the object itself, `/namespaces/x/pods` is what is in it.
            let mut inside = Segments(segments.0);
            if let (Some(name), Some(plural)) = (inside.next(), inside.next())
                && !(group.is_empty() && ["status", "finalize"].contains(&plural))
            {
                namespace = Some(percent_decode(name).into_owned());
                first = plural;
                segments = inside;
            }
        }
        let resource = registry::resource(group, version, &percent_decode(first))?;
        let mut decoded = || Some(percent_decode(segments.next()?).into_owned());
        let (name, subresource) = (decoded(), decoded());
        // A slash that was encoded would reach into another place of the store.
        if ![&namespace, &name]
            .into_iter()
            .flatten()
            .all(|name| is_path_segment(name))
        {
            return None;
        }
        let rest = segments.0;
        if namespace.is_some() != resource.namespaced && (namespace.is_some() || name.is_some()) {
            return None;
        }
        if subresource.as_deref() != Some("proxy") && !rest.trim_matches('/').is_empty() {
            return None;
        }
        Some(Self {
            resource,
            namespace,
            name,
            subresource,
            rest: rest.to_owned(),
        })
    }

    /// Whether a request connects to something else, mostly for long, rather than be answered from the store.
    pub fn connects(&self) -> bool {
        let subresource = self.subresource.as_deref();
        matches!(
            subresource,
            Some("log" | "exec" | "attach" | "portforward" | "proxy")
        )
    }

    pub fn subject(&self) -> Subject<'_> {
        self.subject_named(self.name.as_deref().unwrap_or(""))
    }

    pub fn subject_named<'a>(&self, name: &'a str) -> Subject<'a> {
        Subject {
            group: self.resource.group,
            resource: self.resource.plural,
            name,
        }
    }

    /// The name; a request without one does not get here.
    pub fn object_name(&self) -> Result<&str, Status> {
        self.name.as_deref().ok_or_else(Status::method_not_allowed)
    }

    pub fn key(&self) -> Result<String, Status> {
        Ok(self.key_of(self.object_name()?))
    }

    pub fn key_of(&self, name: &str) -> String {
        super::object::key(self.resource, self.namespace.as_deref(), name)
    }

    pub fn prefix(&self) -> String {
        super::object::prefix(self.resource, self.namespace.as_deref())
    }
}

/// The segments of a path, up to one that is empty; what is left of it stays as it is.
struct Segments<'a>(&'a str);

impl<'a> Iterator for Segments<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let path = self.0.strip_prefix('/')?;
        let (segment, rest) = path.split_at(path.find('/').unwrap_or(path.len()));
        if segment.is_empty() {
            return None;
        }
        self.0 = rest;
        Some(segment)
    }
}

/// The path that the older form of a watch (`/api/v1/watch/pods`) stands for.
pub fn watched_path(method: &Method, path: &str) -> Option<String> {
    if method != Method::GET {
        return None;
    }
    let (head, rest) = path.split_once("/watch/")?;
    let depth = head.split('/').count();
    let versioned = match head.split('/').nth(1) {
        Some("api") => depth == 3,
        Some("apis") => depth == 4,
        _ => false,
    };
    versioned.then(|| format!("{head}/{rest}"))
}

/// What is wrong with the name at the end of a path that names an object otherwise.
pub fn name_fault(path: &str) -> Option<Status> {
    let (head, last) = path.rsplit_once('/')?;
    let name = percent_decode(last);
    let why = match &*name {
        "." | ".." => format!("may not be '{name}'"),
        name if name.contains('%') && !name.contains('/') => "may not contain '%'".to_owned(),
        _ => return None,
    };
    Target::parse(&format!("{head}/x"))?.name?;
    Some(Status::bad_request(format!(
        "Name parameter invalid: {name:?}: {why}"
    )))
}

/// The query of a request, decoded.
#[derive(Debug, Clone, Default)]
pub struct Query(Vec<(String, String)>);

impl Query {
    pub fn parse(query: &str) -> Self {
        let pairs = query
            .split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| {
                let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                let decode = |text: &str| percent_decode(&text.replace('+', " ")).into_owned();
                (decode(key), decode(value))
            });
        Self(pairs.collect())
    }

    /// Turns a switch on, whatever was given.
    pub fn turn_on(&mut self, key: &str) {
        self.0.insert(0, (key.to_owned(), "true".to_owned()));
    }

    /// The first value of a key, "" when absent.
    pub fn get(&self, key: &str) -> &str {
        self.0
            .iter()
            .find(|(name, _)| name == key)
            .map_or("", |(_, value)| value)
    }

    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.0
            .iter()
            .filter(move |(name, _)| name == key)
            .map(|(_, value)| value.as_str())
    }

    /// Whether a key is given at all, with or without a value.
    pub fn has(&self, key: &str) -> bool {
        self.0.iter().any(|(name, _)| name == key)
    }

    /// Whether a switch is on: whatever is given is a yes, unless it says no. As upstream reads them.
    pub fn flag(&self, key: &str) -> bool {
        self.has(key) && self.get(key) != "0" && !self.get(key).eq_ignore_ascii_case("false")
    }

    pub fn number(&self, key: &str) -> Result<Option<i64>, Status> {
        match self.get(key) {
            "" => Ok(None),
            text => text
                .parse()
                .map(Some)
                .map_err(|error| Status::bad_request(not_parsed("ParseInt", text, &error))),
        }
    }

    /// The revision that a read is to be of, or why there is none.
    pub fn revision(&self) -> Result<Option<u64>, String> {
        match self.get("resourceVersion") {
            "" => Ok(None),
            text => text.parse().map(Some).map_err(|error| {
                let why = not_parsed("ParseUint", text, &error);
                format!("resourceVersion: Invalid value: {text:?}: {why}")
            }),
        }
    }
}

impl Query {
    /// A duration as Go writes them: `1m30s`, `500ms`.
    pub fn duration(&self, key: &str) -> Result<Option<Duration>, Status> {
        match self.get(key) {
            "" => Ok(None),
            text => duration(text).map(Some).ok_or_else(|| {
                let bare = text
                    .bytes()
                    .all(|byte| byte.is_ascii_digit() || byte == b'.');
                let why = if bare {
                    "missing unit in duration"
                } else {
                    "invalid duration"
                };
                Status::bad_request(format!(
                    "invalid {key} specified in the request URL - time: {why} {text:?}"
                ))
            }),
        }
    }
}

/// A text that is no number, in the words of Go's parser.
fn not_parsed(parser: &str, text: &str, error: &ParseIntError) -> String {
    let why = match error.kind() {
        IntErrorKind::PosOverflow | IntErrorKind::NegOverflow => "value out of range",
        _ => "invalid syntax",
    };
    format!("strconv.{parser}: parsing {text:?}: {why}")
}

fn duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let (mut total, mut rest) = (Duration::ZERO, text);
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (amount, after) = rest.split_at(number);
        let unit = after
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(unit);
        let seconds = match unit {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        let amount: f64 = amount.parse().ok()?;
        total = total.checked_add(Duration::try_from_secs_f64(amount * seconds).ok()?)?;
        rest = after;
    }
    (!text.is_empty()).then_some(total)
}

/// What a list or watch is asked for.
#[derive(Debug, Clone, Default)]
pub struct ListOptions {
    pub labels: LabelSelector,
    pub fields: FieldSelector,
    pub watch: bool,
    pub resource_version: Option<u64>,
    /// "", `Exact` or `NotOlderThan`.
    pub resource_version_match: String,
    pub limit: Option<usize>,
    pub continue_token: String,
    pub timeout_s: Option<u64>,
    pub bookmarks: bool,
    pub initial_events: Option<bool>,
}

impl ListOptions {
    pub fn parse(query: &Query, resource: &Resource) -> Result<Self, Status> {
        let fields = super::object::stored_selector(query.get("fieldSelector"), resource);
        let resource_version = query.revision().map_err(|why| {
            let whole = !query.flag("watch");
            let what = if whole {
                "invalid resource version: "
            } else {
                ""
            };
            Status::bad_request(format!("{what}{why}"))
        })?;
        let version_match = query.get("resourceVersionMatch").to_owned();
        let options = Self {
            labels: LabelSelector::parse(query.get("labelSelector"))
                .map_err(|error| Status::bad_request(error.to_string()))?,
            fields: FieldSelector::parse(&fields)
                .map_err(|error| Status::bad_request(error.to_string()))?,
            watch: query.flag("watch"),
            resource_version,
            resource_version_match: version_match,
            limit: query
                .number("limit")?
                .and_then(|limit| usize::try_from(limit).ok())
                .filter(|limit| *limit > 0),
            continue_token: query.get("continue").to_owned(),
            timeout_s: query
                .number("timeoutSeconds")?
                .and_then(|timeout| u64::try_from(timeout).ok())
                .filter(|timeout| *timeout > 0),
            bookmarks: query.flag("allowWatchBookmarks"),
            initial_events: query
                .has("sendInitialEvents")
                .then(|| query.flag("sendInitialEvents")),
        };
        options.check()?;
        Ok(options)
    }

    fn check(&self) -> Result<(), Status> {
        let invalid = |field: &str, why: &str| {
            let error = FieldError::forbidden(field, why);
            Err(Status::invalid(
                "meta.k8s.io",
                "ListOptions",
                "",
                vec![error],
            ))
        };
        if self.initial_events.is_some() {
            if !self.watch {
                return invalid(
                    "sendInitialEvents",
                    "sendInitialEvents is forbidden for list",
                );
            }
            if self.resource_version_match != "NotOlderThan" {
                let why = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan";
                return invalid("resourceVersionMatch", why);
            }
        } else if self.watch && !self.resource_version_match.is_empty() {
            let why =
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided";
            return invalid("resourceVersionMatch", why);
        }
        if !self.continue_token.is_empty() && !self.watch {
            if !self.resource_version_match.is_empty() {
                let why = "resourceVersionMatch is forbidden when continue is provided";
                return invalid("resourceVersionMatch", why);
            }
            // The token says which revision the list is of.
            if self.resource_version.is_some_and(|revision| revision > 0) {
                let why = "specifying resource version is not allowed when using continue";
                return Err(Status::bad_request(why));
            }
        }
        if !self.watch && !self.resource_version_match.is_empty() && self.resource_version.is_none()
        {
            return invalid(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden unless resourceVersion is provided",
            );
        }
        let given = self.resource_version_match.as_str();
        let known: &[&str] = match self.watch {
            true => &["NotOlderThan"],
            false => &["Exact", "NotOlderThan", ""],
        };
        if !given.is_empty() && !known.contains(&given) {
            let field = "resourceVersionMatch";
            let error = FieldError::unsupported_as_listed(field, given, known);
            return Err(Status::invalid(
                "meta.k8s.io",
                "ListOptions",
                "",
                vec![error],
            ));
        }
        if given == "Exact" && self.resource_version == Some(0) {
            return invalid(
                "resourceVersionMatch",
                "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"",
            );
        }
        Ok(())
    }

    pub fn selects_all(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }
}

/// The longest name of a field manager, as upstream.
const MANAGER_BYTES_MAX: usize = 128;

/// What goes with every write.
#[derive(Debug, Clone, Default)]
pub struct WriteOptions {
    pub dry_run: bool,
    pub validation: FieldValidation,
    pub manager: String,
    pub force: bool,
    /// Who writes; None is the server itself.
    pub caller: Option<Arc<Identity>>,
    pub warnings: Warnings,
    /// What the audit log is told; None without one.
    pub notes: Option<Notes>,
}

/// What a client is told beside the answer, each once: a write that is tried again says the same again.
#[derive(Debug, Clone, Default)]
pub struct Warnings(Arc<Mutex<Vec<String>>>);

impl Warnings {
    pub fn add(&self, warnings: impl IntoIterator<Item = String>) {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for warning in warnings {
            if !told.contains(&warning) {
                told.push(warning);
            }
        }
    }

    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl WriteOptions {
    pub fn parse(query: &Query, parts: &Parts) -> Result<Self, Status> {
        let headers = &parts.headers;
        let mut errors = Vec::new();
        let media = headers
            .get(header::CONTENT_TYPE)
            .and_then(|content| content.to_str().ok())
            .unwrap_or("");
        let patches = parts.method == Method::PATCH;
        let applies = media.starts_with("application/apply-patch");
        if applies && query.get("fieldManager").is_empty() {
            errors.push(FieldError::required(
                "fieldManager",
                "is required for apply patch",
            ));
        }
        if patches && !applies && !query.get("force").is_empty() {
            let why = "may not be specified for non-apply patch";
            errors.push(FieldError::forbidden("force", why));
        }
        // A client that gives no manager is known by its program, as upstream.
        let agent = headers
            .get(header::USER_AGENT)
            .and_then(|agent| agent.to_str().ok())
            .unwrap_or("");
        let program = agent.split('/').next().unwrap_or("");
        let manager = match query.get("fieldManager") {
            "" if program.is_empty() || program.len() > MANAGER_BYTES_MAX => "unknown",
            "" => program,
            name => name,
        };
        check_manager(query.get("fieldManager"), &mut errors);
        let dry_run: Vec<&str> = query.all("dryRun").collect();
        check_dry_run(&dry_run, &mut errors);
        let validation = FieldValidation::parse(query.get("fieldValidation"));
        if validation.is_none() {
            let given = query.get("fieldValidation");
            let known = ["", "Ignore", "Strict", "Warn"];
            errors.push(FieldError::unsupported("fieldValidation", given, &known));
        }
        if !errors.is_empty() {
            let kind = match parts.method {
                Method::PATCH => "PatchOptions",
                Method::PUT => "UpdateOptions",
                _ => "CreateOptions",
            };
            return Err(Status::invalid("meta.k8s.io", kind, "", errors));
        }
        Ok(Self {
            dry_run: !dry_run.is_empty(),
            validation: validation.unwrap_or_default(),
            manager: manager.to_owned(),
            force: query.flag("force"),
            warnings: Warnings::default(),
            caller: None,
            notes: None,
        })
    }
}

/// Refuses what is no name of a field manager.
fn check_manager(name: &str, errors: &mut Vec<FieldError>) {
    if name.len() > MANAGER_BYTES_MAX {
        errors.push(FieldError::too_long("fieldManager", MANAGER_BYTES_MAX));
    }
    for (at, character) in name.char_indices() {
        if character.is_control() || (character.is_whitespace() && character != ' ') {
            let code = u32::from(character);
            let why = format!("invalid character U+{code:04X} (at position {at})");
            errors.push(FieldError::invalid("fieldManager", name, why));
        }
    }
}

/// Refuses every wish for a dry run but the one for all of it.
pub fn check_dry_run(given: &[&str], errors: &mut Vec<FieldError>) {
    if given.iter().any(|value| *value != "All") {
        errors.push(FieldError::unsupported("dryRun", given, &["All"]));
    }
}

/// The verb of a request, as access rules name it.
pub fn verb(method: &Method, target: &Target, query: &Query) -> &'static str {
    match (method.as_str(), target.name.is_some()) {
        ("GET" | "HEAD", named)
            if query.flag("watch") && (!named || target.subresource.is_none()) =>
        {
            "watch"
        }
        ("GET" | "HEAD", true) => "get",
        ("GET" | "HEAD", false) => "list",
        ("POST", _) => "create",
        ("PUT", _) => "update",
        ("PATCH", _) => "patch",
        ("DELETE", true) => "delete",
        ("DELETE", false) => "deletecollection",
        _ => "",
    }
}

/// Whether a name can be one segment of a path.
pub fn is_path_segment(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '%'])
}

/// Undoes percent encoding; broken sequences stay as they are.
pub fn percent_decode(text: &str) -> Cow<'_, str> {
    if !text.contains('%') {
        return Cow::Owned(text.to_owned());
    }
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = bytes
            .get(at + 1..at + 3)
            .filter(|hex| hex.iter().all(u8::is_ascii_hexdigit))
            .and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) if bytes[at] == b'%' => {
                decoded.push(byte);
                at += 3;
            }
            _ => {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
    }
    Cow::Owned(String::from_utf8_lossy(&decoded).into_owned())
}

/// Encodes a query value.
pub fn percent_encode(text: &str) -> String {
    text.bytes()
        .fold(String::with_capacity(text.len()), |mut out, byte| {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                out.push(char::from(byte));
            } else {
                out.push_str(&format!("%{byte:02X}"));
            }
            out
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_encoding_goes_both_ways() {
        let text = "a b/ü=&%41";
        assert_eq!(percent_decode(&percent_encode(text)), text);
        for broken in ["100%", "%+1", "%g1", "%"] {
            assert_eq!(percent_decode(broken), broken);
        }
        assert_eq!(
            Query::parse("labelSelector=a%3Db+c&watch=1").get("labelSelector"),
            "a=b c"
        );
    }

    #[test]
    fn durations_are_read_as_go_writes_them() {
        for (text, millis) in [
            ("1s", Some(1000)),
            ("1m30s", Some(90_000)),
            ("1.5s", Some(1500)),
            ("500ms", Some(500)),
            ("0", Some(0)),
            ("5", None),
            ("-1s", None),
            ("1d", None),
            ("s", None),
        ] {
            let expected = millis.map(Duration::from_millis);
            assert_eq!(duration(text), expected, "{text}");
        }
    }

    #[test]
    fn paths_name_objects_in_and_outside_namespaces() {
        let target = Target::parse("/api/v1/namespaces/default/pods/web/log").expect("a pod's log");
        assert_eq!(target.key().expect("key"), "/core/pods/default/web");
        assert_eq!(target.subresource.as_deref(), Some("log"));
        let target = Target::parse("/api/v1/namespaces/default/finalize").expect("a namespace");
        assert_eq!(
            (target.resource.plural, target.name.as_deref()),
            ("namespaces", Some("default"))
        );
        let target = Target::parse("/apis/apps/v1/deployments").expect("all deployments");
        assert_eq!(target.prefix(), "/apps/deployments/");
        assert!(
            Target::parse("/api/v1/pods/web").is_none(),
            "a pod needs a namespace"
        );
        assert!(
            Target::parse("/api/v1/namespaces/a/nodes/b").is_none(),
            "a node has no namespace"
        );
        assert!(Target::parse("/apis/apps/v1/nothings").is_none());
        assert!(
            Target::parse("/api/v1/namespaces/a/pods/b/status/more").is_none(),
            "nothing is below a status"
        );
        for trick in [
            "/api/v1/namespaces/a%2Fb/secrets",
            "/api/v1/namespaces/a/secrets/..%2Fb%2Fc",
            "/api/v1/namespaces/../secrets",
            "/api/v1/namespaces/a/secrets/%2e%2e",
            "/api/v1/nodes/a%252Fb",
        ] {
            assert!(Target::parse(trick).is_none(), "{trick}");
        }
    }

    #[test]
    fn older_watches_are_watches_and_odd_paths_are_none() {
        for (path, expected) in [
            ("/api/v1/watch/pods", Some("/api/v1/pods")),
            (
                "/apis/apps/v1/watch/namespaces/a/deployments/b",
                Some("/apis/apps/v1/namespaces/a/deployments/b"),
            ),
            ("/api/v1/namespaces/a/pods/watch/log", None),
            ("/api/v1/namespaces/a/services/b/proxy/watch/x", None),
        ] {
            let watched = watched_path(&Method::GET, path);
            assert_eq!(watched.as_deref(), expected, "{path}");
            assert_eq!(watched_path(&Method::POST, path), None, "{path}");
        }
        for path in [
            "//api/v1/pods",
            "/api/v1//pods",
            "/api/v1/namespaces//pods",
            "/api/v1/namespaces/a//pods",
        ] {
            assert!(Target::parse(path).is_none(), "{path}");
        }
        let fault = |path: &str| name_fault(path).map(|status| status.message);
        assert_eq!(
            fault("/api/v1/namespaces/a/pods/%2e%2e").as_deref(),
            Some("Name parameter invalid: \"..\": may not be '..'")
        );
        assert_eq!(
            fault("/api/v1/nodes/a%25b").as_deref(),
            Some("Name parameter invalid: \"a%b\": may not contain '%'")
        );
        assert!(fault("/api/v1/nodes/a%252Fb").is_some());
        assert_eq!(fault("/api/v1/namespaces/../secrets"), None);
        assert_eq!(fault("/openapi/.."), None);
    }

    #[test]
    fn switches_and_numbers_are_read_as_upstream_reads_them() {
        let query = Query::parse("a&b=0&c=False&d=x&e=&n=-1&m=x&resourceVersion=-1");
        let on = ["a", "b", "c", "d", "e", "f"].map(|key| query.flag(key));
        assert_eq!(on, [true, false, false, true, true, false]);
        assert_eq!(query.number("n").expect("a number"), Some(-1));
        assert_eq!(
            query.number("m").expect_err("none").message,
            "strconv.ParseInt: parsing \"x\": invalid syntax"
        );
        assert_eq!(
            query.revision().expect_err("none"),
            "resourceVersion: Invalid value: \"-1\": strconv.ParseUint: parsing \"-1\": invalid syntax"
        );
    }

    #[test]
    fn what_follows_a_proxy_stays_as_the_client_wrote_it() {
        for (path, name, rest) in [
            ("/api/v1/namespaces/a/services/web/proxy", "web", ""),
            (
                "/api/v1/namespaces/a/services/http:web:80/proxy/",
                "http:web:80",
                "/",
            ),
            (
                "/api/v1/namespaces/a/services/https%3Aweb%3A/proxy/x//y%2Fz/",
                "https:web:",
                "/x//y%2Fz/",
            ),
        ] {
            let target = Target::parse(path).expect("a proxy");
            assert_eq!(
                (target.name.as_deref(), target.rest.as_str()),
                (Some(name), rest),
                "{path}"
            );
        }
    }
}
