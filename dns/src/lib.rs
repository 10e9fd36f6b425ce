//! The cluster DNS: zone, server, forwarder.
