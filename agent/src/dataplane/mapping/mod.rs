//! Arrays of the kernel as memory of ours, as far as they are needed.
//!
//! The kernel enters every page of an array as it is mapped: all of a great array that is hardly used would be 40 MB of this process. So
//! addresses are taken for all of it, and pages from its beginning on as somebody reaches for them.

mod sys;

pub use sys::Mapping;

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::os::fd::{AsFd as _, OwnedFd};

    use dataplane_abi::{Backend, Cell};
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::sys::STEP;
    use super::*;

    /// A file in memory stands for an array: both give pages that are shared and zero at first.
    fn array(bytes: usize) -> OwnedFd {
        let file = memfd_create("array", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&file, bytes as i64).unwrap();
        file
    }

    fn backend(slot: u32) -> Cell {
        Cell::from(Backend::new(Ipv4Addr::LOCALHOST.into(), 80, slot))
    }

    #[test]
    fn what_was_written_stays_where_it_is_as_more_is_reached() {
        let bytes = 5 * STEP / 2;
        let array = array(bytes);
        let mut mapping = Mapping::reserve(array.as_fd(), bytes).unwrap();
        let cells = |bytes: usize| (bytes / size_of::<Cell>()) as u32;
        for last in [1, cells(STEP) + 1, cells(bytes)] {
            mapping.reach_cells(last).unwrap();
            mapping.write_cells(last - 1, &[backend(last)]);
        }
        mapping.reach_cells(u32::MAX).unwrap();
        let other = Mapping::whole(array.as_fd(), bytes).unwrap();
        for last in [1, cells(STEP) + 1, cells(bytes)] {
            assert_eq!(mapping.read_cell(last - 1), backend(last));
            assert_eq!(other.read_cell(last - 1), backend(last));
        }
    }

    #[test]
    #[should_panic(expected = "beyond what is mapped")]
    fn what_was_not_reached_is_not_touched() {
        let array = array(2 * STEP);
        let mut mapping = Mapping::reserve(array.as_fd(), 2 * STEP).unwrap();
        mapping.reach(1).unwrap();
        mapping.load_word((STEP / size_of::<u64>()) as u32);
    }
}
