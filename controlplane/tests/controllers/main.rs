//! Controllers and scheduler against the API server, as a user sees them: objects in, pods and endpoints out.

mod cluster;
mod policies;
mod serving;
mod slices;
mod workloads;
