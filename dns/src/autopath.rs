//! The search path of a pod, followed on the server: the first of up to six questions gets the answer of the last.
//!
//! It is done only for a pod that is known beyond doubt, and only where its own resolver would come to the same answer. In every other
//! case the plain "no" stands, and the client goes on by itself: slower, never wrong. So nothing is guessed for addresses that
//! several pods or none have, for names of another namespace than the pod's, or for those of one label, which may mean a Service.

use std::net::IpAddr;

use crate::name::{Name, before, parent};
use crate::query::rtype;
use crate::zone::Zone;

/// What a client looks for, when the name is that with the first domain of its own search path: the rest of the name, and the
/// cluster's domain.
pub fn rest<'q, 'z>(
    zone: &'z Zone,
    name: &'q [u8],
    kind: u16,
    client: IpAddr,
) -> Option<(&'q [u8], &'z Name)> {
    if !matches!(kind, rtype::A | rtype::AAAA) {
        return None;
    }
    let namespace = zone.namespace_of(client)?;
    for origin in &zone.settings().origins {
        let Some(inner) = before(name, origin.wire()).and_then(|inner| before(inner, b"\x03svc"))
        else {
            continue;
        };
        let labels: Vec<&[u8]> = std::iter::successors(Some(inner), |at| parent(at)).collect();
        // The last of them is empty: the end.
        let [.., last, _] = &labels[..] else { continue };
        if last[1..].eq_ignore_ascii_case(namespace.as_bytes()) {
            let rest = &inner[..inner.len() - last.len()];
            // One label may be a Service, which others of the path would hide.
            return (labels.len() > 3).then_some((rest, origin));
        }
    }
    None
}

/// The names that the client would ask next, in its order.
pub fn candidates(rest: &[u8], origin: &Name, search: &[Name]) -> Vec<Name> {
    let below = |tail: &[&[u8]]| {
        let wire = [&[rest], tail].concat().concat();
        (wire.len() <= crate::name::NAME_BYTES_MAX).then(|| Name::from_wire(&wire))
    };
    let own = [below(&[b"\x03svc", origin.wire()]), below(&[origin.wire()])];
    // Those of the cluster are asked before; where this process has them too, they are another namespace's.
    let others = search.iter().filter(|domain| !domain.is_in(origin));
    let others = others.map(|domain| below(&[domain.wire()]));
    own.into_iter()
        .chain(others)
        .chain([below(&[&[0]])])
        .flatten()
        .collect()
}
