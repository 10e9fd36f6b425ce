//! The node agent that runs pods over CRI.
//!
//! `pods` hands each pod of the node to a worker (`pod::worker`), which looks at the runtime, plans (`pod::plan`), carries
//! out the plan (`pod::operations`) and reports (`pod::status`). `node` keeps the Node object and its lease; `server` is
//! what `kubectl logs`, `exec`, `attach` and `port-forward` reach. `runtime` and `cluster` are the two seams.

#![forbid(unsafe_code)]

pub mod authorities;
pub mod backoff;
pub mod certificates;
pub mod cgroup;
pub mod clock;
pub mod cluster;
pub mod config;
pub mod logs;
pub mod machine;
pub mod node;
pub mod pod;
pub mod pods;
pub mod probe;
pub mod quantity;
pub mod resources;
pub mod run;
pub mod runtime;
pub mod server;
pub mod task;
pub mod volume;
