//! The Kubernetes DNS specification 1.1.0, record by record, over the wire and nothing else.
//!
//! The subject is ours, started here over `cluster.json`, or the server that `KEELWAY_DNS_SUBJECT` (ADDRESS:PORT) names, in
//! whose cluster `kubectl create namespace conformance` and `kubectl apply -f cluster.json` were done; `KEELWAY_DNS_DOMAIN` is
//! its domain. Another server may choose other names for endpoints without a hostname, and other TTLs: what the specification
//! leaves open is not asked.

mod records;
mod subject;
mod transport;

use subject::Subject;

/// Every row and every rule, against one subject.
#[test]
fn the_subject_keeps_the_specification() {
    let subject = Subject::obtain();
    let mut failed = Vec::new();
    let mut count = 0;
    for row in records::ROWS {
        count += 1;
        if let Err(error) = row.check(&subject) {
            failed.push(error);
        }
    }
    for (name, rule) in transport::RULES {
        count += 1;
        if let Err(error) = rule(&subject) {
            failed.push(format!("{name}: {error}"));
        }
    }
    println!("{} of {count} rows hold", count - failed.len());
    assert!(
        failed.is_empty(),
        "{} of {count} rows fail:\n{}",
        failed.len(),
        failed.join("\n")
    );
}
