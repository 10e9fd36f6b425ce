//! The API server as clients see it: the real binary, driven by the real kubectl and by kube-rs.

mod access;
mod admission;
mod contention;
mod discovery;
mod durability;
mod encodings;
#[path = "../support/etcd.rs"]
mod etcd;
mod faults;
mod flags;
mod keeping;
mod kinds;
mod kubectl;
mod kubelet;
mod linear;
mod pressure;
mod renewing;
mod revisions;
mod rolling;
mod selecting;
mod server;
mod service_ranges;
mod services;
mod several;
mod soak;
mod statuses;
mod subresources;
mod upstream;
mod watching;
mod wire;
mod wrong_input;
