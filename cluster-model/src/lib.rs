//! Snapshot: an immutable view of Services, EndpointSlices, Nodes and Pods, built from watches.
