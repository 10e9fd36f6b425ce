//! bpf(2) commands that aya does not have: batches, links of any kind, test runs.
//!
//! Attributes are the leading fields of the kernel's `union bpf_attr` for each command (include/uapi/linux/bpf.h).

use std::{
    ffi::CString,
    io,
    mem::MaybeUninit,
    ops::ControlFlow,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr,
};

use dataplane_abi::Plain;

use crate::net::socket_option;

const BPF_MAP_LOOKUP_ELEM: u32 = 1;
const BPF_OBJ_PIN: u32 = 6;
const BPF_OBJ_GET: u32 = 7;
const BPF_PROG_TEST_RUN: u32 = 10;
const BPF_OBJ_GET_INFO_BY_FD: u32 = 15;
const BPF_MAP_LOOKUP_BATCH: u32 = 24;
const BPF_MAP_UPDATE_BATCH: u32 = 26;
const BPF_MAP_DELETE_BATCH: u32 = 27;
const BPF_LINK_CREATE: u32 = 28;
const BPF_LINK_UPDATE: u32 = 29;
const BPF_LINK_DETACH: u32 = 34;

/// Elements per batch: 64 reach 94 % of the speed of 1000 (measured), and the buffers stay small.
const BATCH: usize = 512;

fn bpf<A>(command: u32, attr: &mut A) -> io::Result<i32> {
    // SAFETY: each caller passes the attribute struct of its command, zero-extended by the kernel to the size it knows, and
    // keeps what its pointers lead to alive and large enough.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, ptr::from_mut(attr), size_of::<A>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as i32)
    }
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the kernel just returned it as a new descriptor of ours.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_nul| io::Error::from(io::ErrorKind::InvalidInput))
}

#[repr(C)]
struct ObjectAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Opens what is pinned at a path.
pub fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = ObjectAttr {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    bpf(BPF_OBJ_GET, &mut attr).map(owned)
}

/// Pins an object at a path.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = ObjectAttr {
        path: path.as_ptr() as u64,
        fd: object.as_raw_fd() as u32,
        flags: 0,
    };
    bpf(BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Whether a directory lies on a bpffs.
pub fn is_bpffs(path: &Path) -> io::Result<bool> {
    const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
    let path = c_path(path)?;
    // SAFETY: statfs is plain integers, for which zero is valid; the kernel fills it.
    let (result, buffer) = unsafe {
        let mut buffer: libc::statfs = std::mem::zeroed();
        (libc::statfs(path.as_ptr(), &mut buffer), buffer)
    };
    if result != 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(buffer.f_type == BPF_FS_MAGIC)
    }
}

/// The cookie of the calling thread's network namespace, by which programs know whose socket they see.
pub fn netns_cookie() -> io::Result<u64> {
    const SO_NETNS_COOKIE: i32 = 71;
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    let mut cookie = [0; size_of::<u64>()];
    socket_option(
        socket.as_fd(),
        libc::SOL_SOCKET,
        SO_NETNS_COOKIE,
        &mut cookie,
    )?;
    Ok(u64::from_ne_bytes(cookie))
}

/// What a map is made of, as far as sharing it depends on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct MapShape {
    pub kind: u32,
    id: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub flags: u32,
}

impl MapShape {
    pub const fn new(
        kind: u32,
        key_size: usize,
        value_size: usize,
        max_entries: u32,
        flags: u32,
    ) -> Self {
        Self {
            kind,
            id: 0,
            key_size: key_size as u32,
            value_size: value_size as u32,
            max_entries,
            flags,
        }
    }
}

impl MapShape {
    pub const fn with_max_entries(self, max_entries: u32) -> Self {
        Self {
            max_entries,
            ..self
        }
    }
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    len: u32,
    info: u64,
}

/// The shape of a map; its id, which differs from map to map, is left out.
pub fn map_shape(map: BorrowedFd<'_>) -> io::Result<MapShape> {
    let mut shape = MapShape {
        kind: 0,
        id: 0,
        key_size: 0,
        value_size: 0,
        max_entries: 0,
        flags: 0,
    };
    let mut attr = InfoAttr {
        fd: map.as_raw_fd() as u32,
        len: size_of::<MapShape>() as u32,
        info: &raw mut shape as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    shape.id = 0;
    Ok(shape)
}

/// The leading fields of a link's information, for tcx, XDP and cgroup links alike.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
struct RawLinkInfo {
    kind: u32,
    id: u32,
    prog_id: u32,
    pad: u32,
    /// tcx: interface index, attach type; XDP: interface index; cgroup: id, as two words.
    words: [u32; 4],
}

/// What a link hangs on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LinkTarget {
    /// An interface by its index; 0 when it is gone.
    Interface(u32),
    /// A control group by its id; 0 when it is gone.
    Cgroup(u64),
    Other,
}

pub fn link_target(link: BorrowedFd<'_>) -> io::Result<LinkTarget> {
    const LINK_TYPE_CGROUP: u32 = 3;
    const LINK_TYPE_XDP: u32 = 6;
    const LINK_TYPE_TCX: u32 = 11;
    let mut info = RawLinkInfo::default();
    let mut attr = InfoAttr {
        fd: link.as_raw_fd() as u32,
        len: size_of::<RawLinkInfo>() as u32,
        info: &raw mut info as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(match info.kind {
        LINK_TYPE_CGROUP => {
            LinkTarget::Cgroup(u64::from(info.words[0]) | u64::from(info.words[1]) << 32)
        }
        LINK_TYPE_TCX | LINK_TYPE_XDP => LinkTarget::Interface(info.words[0]),
        _ => LinkTarget::Other,
    })
}

/// The id of an open control group: the inode number that its directory has.
pub fn cgroup_id(path: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    Ok(std::fs::metadata(path)?.ino())
}

#[repr(C)]
struct LinkCreateAttr {
    prog_fd: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    pad: u32,
    expected_revision: u64,
}

/// Attaches a program to an interface (by index) or a control group (by descriptor), behind what is there.
pub fn create_link(program: BorrowedFd<'_>, target: u32, attach_type: u32) -> io::Result<OwnedFd> {
    create_link_with(program, target, attach_type, 0)
}

/// As [`create_link`], with flags of the attach type's own.
pub fn create_link_with(
    program: BorrowedFd<'_>,
    target: u32,
    attach_type: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr {
        prog_fd: program.as_raw_fd() as u32,
        target,
        attach_type,
        flags,
        relative: 0,
        pad: 0,
        expected_revision: 0,
    };
    bpf(BPF_LINK_CREATE, &mut attr).map(owned)
}

#[repr(C)]
struct LinkUpdateAttr {
    link_fd: u32,
    prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// Replaces a link's program in place: each packet sees the old one or the new one.
pub fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdateAttr {
        link_fd: link.as_raw_fd() as u32,
        prog_fd: program.as_raw_fd() as u32,
        flags: 0,
        old_prog_fd: 0,
    };
    bpf(BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// Takes a link's program off at once; dropping the link would have the kernel do so some time later.
pub fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = link.as_raw_fd() as u32;
    bpf(BPF_LINK_DETACH, &mut attr).map(drop)
}

#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Sets entries of a hash. On an error, some may be set.
pub fn update_batch<K: Plain, V: Plain>(map: BorrowedFd<'_>, entries: &[(K, V)]) -> io::Result<()> {
    for chunk in entries.chunks(BATCH) {
        let (keys, values): (Vec<K>, Vec<V>) = chunk.iter().copied().unzip();
        let mut attr = BatchAttr {
            in_batch: 0,
            out_batch: 0,
            keys: keys.as_ptr() as u64,
            values: values.as_ptr() as u64,
            count: chunk.len() as u32,
            map_fd: map.as_raw_fd() as u32,
            elem_flags: 0,
            flags: 0,
        };
        bpf(BPF_MAP_UPDATE_BATCH, &mut attr)?;
    }
    Ok(())
}

/// Removes entries of a hash; those that are not there are no error.
pub fn delete_batch<K: Plain>(map: BorrowedFd<'_>, keys: &[K]) -> io::Result<()> {
    let mut rest = keys;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(BATCH)];
        let mut attr = BatchAttr {
            in_batch: 0,
            out_batch: 0,
            keys: chunk.as_ptr() as u64,
            values: 0,
            count: chunk.len() as u32,
            map_fd: map.as_raw_fd() as u32,
            elem_flags: 0,
            flags: 0,
        };
        match bpf(BPF_MAP_DELETE_BATCH, &mut attr) {
            Ok(_) => rest = &rest[chunk.len()..],
            // The kernel stops at a key that is not there, having said how many it removed before.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                rest = &rest[attr.count as usize + 1..]
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Every entry of a hash or a trie that nobody else changes meanwhile.
pub fn entries<K: Plain, V: Plain>(map: BorrowedFd<'_>) -> io::Result<Vec<(K, V)>> {
    let mut all = Vec::new();
    visit_entries(map, |entry| {
        all.push(entry);
        ControlFlow::Continue(())
    })?;
    Ok(all)
}

/// Shows every entry of a hash or a trie that was there all the time, until told to stop. Of those that come and go meanwhile, some.
pub fn visit_entries<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    mut see: impl FnMut((K, V)) -> ControlFlow<()>,
) -> io::Result<()> {
    let mut size = BATCH;
    // Where the kernel stopped: a hash's is a number, that of other maps is the key that it gave last.
    let words = size_of::<K>().div_ceil(size_of::<u64>()).max(1);
    let (mut position, mut next, mut started) = (vec![0u64; words], vec![0u64; words], false);
    loop {
        let mut keys: Vec<K> = Vec::with_capacity(size);
        let mut values: Vec<V> = Vec::with_capacity(size);
        let mut attr = BatchAttr {
            in_batch: if started { position.as_ptr() as u64 } else { 0 },
            out_batch: next.as_mut_ptr() as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: size as u32,
            map_fd: map.as_raw_fd() as u32,
            elem_flags: 0,
            flags: 0,
        };
        let result = bpf(BPF_MAP_LOOKUP_BATCH, &mut attr);
        let done = match &result {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            // A bucket of the hash holds more than the batch has room for.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                size *= 2;
                continue;
            }
            Err(_) => return Err(result.unwrap_err()),
        };
        // SAFETY: the kernel filled `count` elements of each, which fit the capacity and are plain.
        unsafe {
            keys.set_len(attr.count as usize);
            values.set_len(attr.count as usize);
        }
        for entry in keys.into_iter().zip(values) {
            if see(entry).is_break() {
                return Ok(());
            }
        }
        if done {
            return Ok(());
        }
        std::mem::swap(&mut position, &mut next);
        started = true;
    }
}

#[repr(C)]
struct ElementAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The value of a key, if it is there.
pub fn lookup<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = MaybeUninit::<V>::uninit();
    let mut attr = ElementAttr {
        map_fd: map.as_raw_fd() as u32,
        pad: 0,
        key: ptr::from_ref(key) as u64,
        value: value.as_mut_ptr() as u64,
        flags: 0,
    };
    match bpf(BPF_MAP_LOOKUP_ELEM, &mut attr) {
        // SAFETY: the kernel filled it, and it is plain.
        Ok(_) => Ok(Some(unsafe { value.assume_init() })),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Seconds of the monotonic clock, as programs note them.
pub fn monotonic_s() -> u32 {
    (monotonic_ns() / 1_000_000_000) as u32
}

/// Nanoseconds of the same clock.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: a clock that every kernel has, into a struct of ours.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The part of the kernel's `struct __sk_buff` that a test run takes and gives back.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct SkBuff {
    pub len_pkt_type: [u32; 2],
    pub mark: u32,
    pub queue_to_priority: [u32; 6],
    pub ingress_ifindex: u32,
    pub ifindex: u32,
    pub tc_index: u32,
    pub control: [u32; 5],
    pub after_control: [u32; 27],
    /// Bytes behind the headers of each packet that hardware cuts the buffer into; 0 when it is one.
    pub segment: u32,
    pub rest: [u32; 3],
}

const _: () = assert!(size_of::<SkBuff>() == 192);
const _: () = assert!(
    std::mem::offset_of!(SkBuff, ifindex) == 40
        && std::mem::offset_of!(SkBuff, control) == 48
        && std::mem::offset_of!(SkBuff, segment) == 176
);

#[repr(C)]
struct TestRunAttr {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}

/// The kernel's `struct xdp_md`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct XdpFrame {
    pub data: u32,
    pub data_end: u32,
    pub data_meta: u32,
    pub ingress_ifindex: u32,
    pub rx_queue_index: u32,
    pub egress_ifindex: u32,
}

/// [`test_run`] with a buffer whose sum hardware has told, which has to be right afterwards, too: else EBADMSG. Linux 6.11.
pub const TEST_SKB_CHECKSUM_COMPLETE: u32 = 1 << 2;

/// Runs a program on a packet `repeat` times, with its context ([`SkBuff`] or [`XdpFrame`]): its verdict, the packet it left, and the
/// mean time of a run in nanoseconds.
pub fn test_run<C>(
    program: BorrowedFd<'_>,
    packet: &[u8],
    context: &mut C,
    repeat: u32,
    flags: u32,
) -> io::Result<(i32, Vec<u8>, u32)> {
    // Room to grow: an ICMP error is longer than the datagram that it answers.
    let mut out = vec![0u8; packet.len() + 256];
    let mut attr = TestRunAttr {
        prog_fd: program.as_raw_fd() as u32,
        retval: 0,
        data_size_in: packet.len() as u32,
        data_size_out: out.len() as u32,
        data_in: packet.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        repeat,
        duration: 0,
        ctx_size_in: size_of::<C>() as u32,
        ctx_size_out: size_of::<C>() as u32,
        ctx_in: ptr::from_mut(context) as u64,
        ctx_out: ptr::from_mut(context) as u64,
        flags,
        cpu: 0,
        batch_size: 0,
        pad: 0,
    };
    bpf(BPF_PROG_TEST_RUN, &mut attr)?;
    out.truncate(attr.data_size_out as usize);
    Ok((attr.retval as i32, out, attr.duration))
}
