#![cfg_attr(not(test), no_std)]
//! Packet logic of the data plane: compiles for the kernel and is tested on the host.
