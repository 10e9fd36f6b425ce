//! The operator's command: clusters on one machine, and machines as nodes of clusters ([`machine`]).
//!
//! `up` makes nodes ([`node`]), connects them ([`network`]), gives them credentials ([`pki`]) and waits until the cluster
//! answers; `down` takes all of it away, also what a killed `up` left. What belongs to a cluster is known from its state
//! folder ([`state`]) and, when that is gone, from its control groups ([`cgroup`]).

pub mod api;
pub mod cgroup;
pub mod checks;
pub mod config;
pub mod connectivity;
pub mod containerd;
pub mod deploy;
pub mod down;
mod etcd;
pub mod family;
pub mod forward;
pub mod kubeconfig;
pub mod machine;
pub mod monitor;
pub mod network;
pub mod node;
pub mod pki;
pub mod process;
pub mod progress;
pub mod seed;
pub mod state;
pub mod status;
mod sys;
pub mod up;
