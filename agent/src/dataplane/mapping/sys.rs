//! The memory of a mapped array, and the calls that map it.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    ptr,
    sync::atomic::{AtomicU64, Ordering},
};

use dataplane_abi::Cell;

/// What is mapped at a time: 0.1 ms of the kernel's work, and a multiple of every page size.
pub(super) const STEP: usize = 1 << 20;

/// An array of elements of 8 or 32 bytes, made with BPF_F_MMAPABLE.
pub struct Mapping {
    map: OwnedFd,
    base: *mut u8,
    bytes: usize,
    /// Of these, those that can be touched.
    reached: usize,
}

// SAFETY: shared memory of the kernel; all access is by the methods below, single words of it atomic.
unsafe impl Send for Mapping {}
// SAFETY: as above; what writes cells or maps more takes the mapping mutably.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// All of an array of `bytes`.
    pub fn whole(map: BorrowedFd<'_>, bytes: usize) -> io::Result<Self> {
        let mut mapping = Self::reserve(map, bytes)?;
        mapping.reach(bytes)?;
        Ok(mapping)
    }

    /// An array of `bytes`, none of which can be touched yet.
    pub fn reserve(map: BorrowedFd<'_>, bytes: usize) -> io::Result<Self> {
        let map = map.try_clone_to_owned()?;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            map,
            base: base.cast(),
            bytes,
            reached: 0,
        })
    }

    /// Lets the first `bytes` be touched, or all where there are fewer.
    pub fn reach(&mut self, bytes: usize) -> io::Result<()> {
        let wanted = bytes.next_multiple_of(STEP).min(self.bytes);
        if wanted <= self.reached {
            return Ok(());
        }
        // SAFETY: replaces a part of our own reservation that nothing has touched, within its bounds; `reached` is a multiple of a page,
        // as it is a multiple of the step while it is less than `bytes`.
        let mapped = unsafe {
            libc::mmap(
                self.base.add(self.reached).cast(),
                wanted - self.reached,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                self.map.as_fd().as_raw_fd(),
                self.reached as libc::off_t,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.reached = wanted;
        Ok(())
    }

    /// As [`Self::reach`], counted in cells.
    pub fn reach_cells(&mut self, cells: u32) -> io::Result<()> {
        self.reach(cells as usize * size_of::<Cell>())
    }

    fn word(&self, index: u32) -> &AtomicU64 {
        let offset = index as usize * size_of::<u64>();
        assert!(
            offset + size_of::<u64>() <= self.reached,
            "word {index} lies beyond what is mapped"
        );
        // SAFETY: within the mapping, aligned, and accessed atomically only.
        unsafe { AtomicU64::from_ptr(self.base.add(offset).cast()) }
    }

    pub fn load_word(&self, index: u32) -> u64 {
        self.word(index).load(Ordering::Acquire)
    }

    /// Publishes a word: whoever reads it sees all that was written before.
    pub fn store_word(&self, index: u32, value: u64) {
        self.word(index).store(value, Ordering::Release);
    }

    fn cell(&self, index: u32) -> *mut Cell {
        let offset = index as usize * size_of::<Cell>();
        assert!(
            offset + size_of::<Cell>() <= self.reached,
            "cell {index} lies beyond what is mapped"
        );
        // SAFETY: within the mapping.
        unsafe { self.base.add(offset).cast() }
    }

    pub fn read_cell(&self, index: u32) -> Cell {
        // SAFETY: within the mapping, aligned; only this process writes.
        unsafe { self.cell(index).read_volatile() }
    }

    /// Writes cells that no program reads yet, or whose reader checks them.
    pub fn write_cells(&mut self, first: u32, cells: &[Cell]) {
        for (index, cell) in (first..).zip(cells) {
            // SAFETY: within the mapping, aligned.
            unsafe { self.cell(index).write_volatile(*cell) };
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, to which no reference outlives self.
        unsafe { libc::munmap(self.base.cast(), self.bytes) };
    }
}
