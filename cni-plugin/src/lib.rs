//! CNI spec types and the agent protocol.
