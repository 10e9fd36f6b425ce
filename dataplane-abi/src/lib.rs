#![no_std]
//! Map keys and values, limits and drop reasons shared by the eBPF programs and the agent.
