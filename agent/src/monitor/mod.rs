//! What happens to packets, as it happens: for `keelway-agent monitor`.
//!
//! Programs write to a ring while somebody wants it ([`Hub`] says so by a word in a map), one thread reads the ring for all who
//! listen, and each listener's own thread names ([`Namer`]), filters and sends. A listener that is slow loses events and is told
//! how many; the packets do not wait.

mod decode;
mod hub;
mod item;

pub use decode::{Decoded, decode};
pub use hub::{Heard, Hub, Subscription};
pub use item::{EventItem, MonitorFilter, Namer};
