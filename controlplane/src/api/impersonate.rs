//! Acting as somebody else: who may, says `impersonate` on users, groups, uids and extra fields, each asked for by name.

use std::collections::BTreeMap;

use http::HeaderMap;

use super::Api;
use super::request::percent_decode;
use super::status::Status;
use crate::auth::{Attributes, Identity, Resource};

const USER: &str = "impersonate-user";
const GROUP: &str = "impersonate-group";
const UID: &str = "impersonate-uid";
const EXTRA: &str = "impersonate-extra-";
const ACCOUNTS: &str = "system:serviceaccounts";

/// Whom the headers of a request ask to act as; None when they ask for nobody.
pub fn wished(headers: &HeaderMap) -> Result<Option<Identity>, Status> {
    let texts = |name: &str| -> Result<Vec<String>, Status> {
        let text = |value: &http::HeaderValue| {
            value.to_str().map(str::to_owned).map_err(|_| {
                Status::bad_request(format!("the header {name} must be printable ASCII"))
            })
        };
        headers.get_all(name).iter().map(text).collect()
    };
    let one = |name: &str| {
        let mut found = texts(name)?;
        if found.len() > 1 {
            return Err(Status::bad_request(format!(
                "the header {name} must be there once"
            )));
        }
        Ok(found.pop().unwrap_or_default())
    };
    let mut extra: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for name in headers.keys() {
        if let Some(key) = name.as_str().strip_prefix(EXTRA) {
            extra.insert(percent_decode(key).into_owned(), texts(name.as_str())?);
        }
    }
    let wished = Identity {
        user: one(USER)?,
        groups: texts(GROUP)?,
        uid: one(UID)?,
        extra,
    };
    if !wished.user.is_empty() {
        return Ok(Some(wished));
    }
    if wished == Identity::default() {
        return Ok(None);
    }
    Err(Status::bad_request(
        "groups, uid and extra fields cannot be impersonated without a user",
    ))
}

impl Api {
    /// The identity wished for, when the caller may take every part of it.
    pub(super) async fn impersonate(
        &self,
        caller: &Identity,
        mut wished: Identity,
    ) -> Result<Identity, Status> {
        let authentication = "authentication.k8s.io";
        let user = match wished.account() {
            Some((namespace, name)) => Resource {
                resource: "serviceaccounts",
                namespace,
                name,
                ..Resource::default()
            },
            None => Resource {
                resource: "users",
                name: &wished.user,
                ..Resource::default()
            },
        };
        let mut parts = vec![user];
        parts.extend(wished.groups.iter().map(|name| Resource {
            resource: "groups",
            name,
            ..Resource::default()
        }));
        if !wished.uid.is_empty() {
            parts.push(Resource {
                group: authentication,
                resource: "uids",
                name: &wished.uid,
                ..Resource::default()
            });
        }
        for (key, values) in &wished.extra {
            parts.extend(values.iter().map(|name| Resource {
                group: authentication,
                resource: "userextras",
                subresource: key,
                name,
                ..Resource::default()
            }));
        }
        for part in parts {
            self.authorize(caller, &Attributes::resource("impersonate", part))
                .await?;
        }
        if wished.groups.is_empty()
            && let Some((namespace, _)) = wished.account()
        {
            wished.groups = vec![ACCOUNTS.to_owned(), format!("{ACCOUNTS}:{namespace}")];
        }
        Ok(wished.among_everybody())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().expect("a value"));
        }
        headers
    }

    #[test]
    fn headers_say_whom_to_act_as() {
        assert_eq!(wished(&headers(&[])).expect("nobody"), None);
        let all = headers(&[
            (USER, "jane"),
            (GROUP, "team"),
            (GROUP, "others"),
            (UID, "7"),
            ("impersonate-extra-example.org%2fscope", "a"),
        ]);
        let identity = wished(&all).expect("well formed").expect("somebody");
        assert_eq!(
            (identity.user.as_str(), identity.uid.as_str()),
            ("jane", "7")
        );
        assert_eq!(identity.groups, ["team", "others"]);
        assert_eq!(identity.extra["example.org/scope"], ["a"]);
    }

    #[test]
    fn half_of_an_identity_or_two_are_refused() {
        for wrong in [
            &[(GROUP, "system:masters")][..],
            &[(UID, "7")],
            &[("impersonate-extra-scope", "a")],
            &[(USER, "jane"), (USER, "joe")],
            &[(USER, "jane"), (GROUP, "t\u{e9}am")],
        ] {
            let refused = wished(&headers(wrong)).expect_err("refused");
            assert_eq!(refused.code.as_u16(), 400, "{wrong:?}");
        }
    }
}
