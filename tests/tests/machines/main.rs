//! Machines that become nodes of a cluster: `keelway server`, `join`, `token`, `start` and `leave`, with network namespaces as
//! machines. Each has its own state folder, as a machine has its /var.

mod control_planes;
mod cut_off;
mod ipv6;
mod joining;
mod machine;
mod members;
mod moving;
mod rotation;
