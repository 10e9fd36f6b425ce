//! The node agent that runs pods over CRI.
