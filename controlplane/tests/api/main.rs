//! The API server as clients see it: the real binary, driven by the real kubectl and by kube-rs.

mod access;
mod admission;
mod discovery;
mod durability;
mod encodings;
#[path = "../support/etcd.rs"]
mod etcd;
mod flags;
mod kinds;
mod kubectl;
mod kubelet;
mod server;
mod soak;
mod statuses;
mod subresources;
mod watching;
mod wire;
mod wrong_input;
