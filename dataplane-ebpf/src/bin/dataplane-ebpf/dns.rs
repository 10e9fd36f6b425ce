//! The program that answers pods' questions for cluster names at their interface; the logic is in [`dataplane_ebpf::dns`].
//!
//! It is a program of its own, which `pod_ingress` goes over to for what is sent to port 53 and which goes back for what it does not
//! answer: other packets pay for a look at their port, and the verifier looks at each by itself.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{__sk_buff, BPF_F_NO_PREALLOC, TC_ACT_SHOT},
    btf_maps::{Array, HashMap, PerCpuArray, ProgramArray},
    helpers::generated::{bpf_get_prandom_u32, bpf_redirect_peer, bpf_skb_load_bytes},
    macros::{btf_map, classifier},
    programs::TcContext,
};
use dataplane_abi::{
    DnsCount, DnsZone, FrontendKey, Hook, NameAddresses, NameKey, POD_DNS, POD_INGRESS, Reason,
    limits, proto,
};
use dataplane_ebpf::{
    dns::{self, Answer, Envelope, MESSAGE_AT_LIMIT, TEXT_BYTES, Text},
    packet::{ETH_LEN, IPV4_LEN, IPV6_LEN},
    tables::Tables as _,
};

use crate::{
    KERNEL_DNS,
    monitor::Watched,
    packets::{NEXT, Skb},
};

const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;
const DNS_PORT: u16 = 53_u16.to_be();
/// Names are shorter than this.
const NAME_LIMIT: usize = 256;
/// In the packet's control block: it has been looked at already.
const LEFT: u32 = 0x6b77_6473;

#[btf_map]
pub static POD_PROGRAMS: ProgramArray<2> = ProgramArray::new();
#[btf_map]
pub static DNS_NAMES: HashMap<NameKey, NameAddresses, { limits::DNS_NAMES as usize }, NO_PREALLOC> =
    HashMap::new();
/// Where questions are sent: the Service of the cluster DNS, and what sockets are given in its place.
#[btf_map]
pub static DNS_SERVERS: HashMap<FrontendKey, u32, { limits::DNS_SERVERS as usize }, NO_PREALLOC> =
    HashMap::new();
#[btf_map]
pub static DNS_ZONE: Array<DnsZone, 1> = Array::new();
#[btf_map]
pub static DNS_COUNTS: PerCpuArray<u64, { DnsCount::COUNT as usize }> = PerCpuArray::new();
/// Room for one question on each CPU: the stack is too small for it.
#[btf_map]
static DNS_TEXT: PerCpuArray<Text, 1> = PerCpuArray::new();
/// What a name has, of the question that is looked at.
#[btf_map]
static DNS_FOUND: PerCpuArray<NameAddresses, 1> = PerCpuArray::new();
#[btf_map]
static DNS_ASIDE: PerCpuArray<u64, 1> = PerCpuArray::new();

/// Goes over to the program that answers, if there is one, for what may be a question: it does not return then.
#[inline(always)]
pub fn ask(ctx: &TcContext, v6: bool) {
    if KERNEL_DNS.load() == 0 {
        return;
    }
    let skb: *mut __sk_buff = ctx.as_ptr().cast();
    let (protocol_at, port_at) = match v6 {
        true => (ETH_LEN + 6, ETH_LEN + IPV6_LEN + 2),
        false => (ETH_LEN + 9, ETH_LEN + IPV4_LEN + 2),
    };
    if load::<u16>(ctx, port_at) != Some(DNS_PORT)
        || load::<u8>(ctx, protocol_at) != Some(proto::UDP)
    {
        return;
    }
    // SAFETY: a valid context; the other program is of the same kind, and nothing here is to be dropped.
    unsafe {
        if (*skb).cb[0] == LEFT {
            (*skb).cb[0] = 0;
        } else {
            POD_PROGRAMS.tail_call(ctx, POD_DNS);
        }
    }
}

#[inline(always)]
fn load<T: Copy>(ctx: &TcContext, at: usize) -> Option<T> {
    let (start, end) = (ctx.data() + at, ctx.data_end());
    if start + size_of::<T>() > end {
        return None;
    }
    // SAFETY: within the packet, and a number of two bytes at most, as `Skb` reads it.
    Some(unsafe { (start as *const T).read_unaligned() })
}

/// Answers a question, or leaves it to the server.
#[classifier]
pub fn pod_dns(ctx: TcContext) -> i32 {
    let mut skb = Skb::new::<false>(&ctx);
    match answer(&mut skb, ctx.len() as usize) {
        Some(true) => {
            // Back into the pod's own namespace. SAFETY: no memory arguments.
            unsafe { bpf_redirect_peer(skb.ifindex(), 0) as i32 }
        }
        Some(false) => {
            Watched::new(skb.raw(), Hook::PodIngress).count(Reason::RewriteFailed);
            TC_ACT_SHOT
        }
        None => leave(&ctx),
    }
}

/// Goes on as with any other packet.
#[inline(always)]
fn leave(ctx: &TcContext) -> i32 {
    let skb: *mut __sk_buff = ctx.as_ptr().cast();
    // SAFETY: a valid context, whose control block is a program's to use; the other program is of the same kind.
    unsafe {
        (*skb).cb[0] = LEFT;
        POD_PROGRAMS.tail_call(ctx, POD_INGRESS);
    }
    // The agent ended just now, and the array with it: the host's routes lead to Services too.
    NEXT
}

#[inline(always)]
fn add(count: DnsCount) {
    if let Some(counter) = DNS_COUNTS.get_ptr_mut(count as u32) {
        // SAFETY: this CPU's own element. An interrupt between load and store loses a count at most.
        unsafe { *counter += 1 };
    }
}

/// A place outside of the stack.
struct Aside(*mut u64);

impl Aside {
    /// The number, below a power of two, of which neither compiler nor verifier knows more than that. The compiler would take a mask away
    /// where it knows better, and the verifier, which has lost sight of the comparison by then, refuses the program; and what the verifier
    /// knows of a loop's end it would follow to the end of the program for each end of the loop.
    #[inline(always)]
    fn below(&self, limit: usize, number: usize) -> usize {
        // SAFETY: this CPU's own element, while the program runs.
        unsafe {
            self.0.write_volatile(number as u64);
            self.0.read_volatile() as usize & (limit - 1)
        }
    }
}

/// [`dns::key`], with the seed where the key goes, as a global function: the verifier judges such a one once, by itself. Inline, it would
/// walk the loop anew for each kind of question, which was nine tenths of all that it looked at.
///
/// # Safety
/// None but the verifier's: it has each pointer point to a whole value, or to nothing.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn dns_key(text: *const Text, key: *mut NameKey, name_bytes: u32) -> u32 {
    // SAFETY: as said.
    let (Some(text), Some(key)) = (unsafe { text.as_ref() }, unsafe { key.as_mut() }) else {
        return 0;
    };
    let (found, sum) = dns::key(text, name_bytes as usize & (NAME_LIMIT - 1), key.words);
    *key = found;
    sum
}

/// Puts the answer in the place of the question: whether that could be done. `None`, and the packet as it was, when it is no question for
/// the cluster DNS, or the server's to answer.
#[inline(always)]
fn answer(skb: &mut Skb, packet_bytes: usize) -> Option<bool> {
    let aside = Aside(DNS_ASIDE.get_ptr_mut(0)?);
    let mut envelope = dns::open(skb, packet_bytes)?;
    // Both families go one way from here, until headers are written.
    envelope.message_at = aside.below(MESSAGE_AT_LIMIT, envelope.message_at);
    let server = FrontendKey::new(envelope.server, DNS_PORT, proto::UDP);
    // Whether it is there is all that is asked.
    DNS_SERVERS.get_ptr(&server)?;
    let answered = answer_for_server(skb, &envelope, &aside);
    if answered.is_none() {
        add(DnsCount::Left);
    }
    answered
}

/// What a name has, in memory of this CPU. The answer is written record by record, and the element may go to another name meanwhile, or
/// just now: the words at both its ends are read after all between them, and whoever writes it anew begins with one of them.
#[inline(always)]
fn copied(found: *const NameAddresses) -> Option<&'static NameAddresses> {
    const WORDS: usize = size_of::<NameAddresses>() / size_of::<u64>();
    let copy = DNS_FOUND.get_ptr_mut(0)?;
    let (from, to) = (found.cast::<u64>(), copy.cast::<u64>());
    let mut word = WORDS;
    // SAFETY: whole words of two values, aligned: the one is memory of its map while the program runs, the other this CPU's own.
    unsafe {
        while word > 1 {
            word -= 1;
            to.add(word).write(from.add(word).read_volatile());
        }
        to.write(from.read_volatile());
        let last = WORDS - 1;
        to.add(last).write(from.add(last).read_volatile());
        Some(&*copy)
    }
}

#[inline(always)]
fn answer_for_server(skb: &mut Skb, envelope: &Envelope, aside: &Aside) -> Option<bool> {
    let zone = DNS_ZONE.get(0)?;
    let text = DNS_TEXT.get_ptr_mut(0)?;
    let bytes = aside.below(TEXT_BYTES, envelope.text_bytes);
    if bytes == 0 {
        return None;
    }
    // SAFETY: a valid context; the text has room for so many bytes, and is this CPU's own while the program runs.
    let loaded = unsafe {
        bpf_skb_load_bytes(
            skb.raw().cast(),
            envelope.text_at() as u32,
            text.cast(),
            bytes as u32,
        )
    };
    if loaded != 0 {
        return None;
    }
    // SAFETY: as above.
    let text = unsafe { &*text };
    let name_bytes = aside.below(NAME_LIMIT, dns::name_bytes(text));
    if name_bytes == 0 {
        return None;
    }
    let question = dns::question(text, name_bytes, envelope)?;
    let mut key = NameKey { words: zone.seed };
    // SAFETY: both are whole values.
    let name_sum = unsafe { dns_key(text, &mut key, name_bytes as u32) };
    let name_bytes = aside.below(NAME_LIMIT, name_bytes);
    let found = copied(DNS_NAMES.get_ptr(&key)?)?;
    if !found.is_under(&key) || found.name_bytes as usize != name_bytes {
        return None;
    }
    let answer = Answer {
        question,
        name_bytes,
        name_sum,
        found,
        zone,
        // SAFETY: no arguments, no effect.
        turn: unsafe { bpf_get_prandom_u32() },
    };
    let put = dns::put(skb, envelope, &answer);
    if put {
        add(if question.v6 {
            DnsCount::Aaaa
        } else {
            DnsCount::A
        });
        if dns::answers(&question, found) == 0 {
            add(DnsCount::NoData);
        }
    }
    Some(put)
}
