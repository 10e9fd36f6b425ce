//! What can be read of the programs without running them: instructions, stack, calls of the kernel's helpers.
//!
//! It is the object as the agent carries it, so it depends on the compiler and on nothing else: not on the kernel, not on the
//! machine, and no rights are needed.

use std::collections::BTreeMap;

use object::read::elf::ElfFile64;
use object::{Object as _, ObjectSection as _, ObjectSymbol as _, SymbolKind};

/// Why an object cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    #[error("the eBPF object: {0}")]
    Elf(#[from] object::Error),
    #[error("the eBPF object's function {0} lies outside of its section")]
    Outside(String),
}

/// What one function of the object is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Function {
    pub instructions: u64,
    /// Deepest byte below the frame pointer that is touched.
    pub stack_bytes: u64,
    /// Calls of helpers by their number in the kernel's list, wherever they stand.
    pub helpers: BTreeMap<u32, u64>,
    /// Calls of the object's own functions, which hold look-ups of their own.
    pub inner_calls: u64,
}

const INSTRUCTION_BYTES: usize = 8;
/// An instruction that loads 64 bits takes the place of two.
const WIDE: u8 = 0x18;
const CALL: u8 = 0x85;
const FRAME_POINTER: u8 = 10;

/// Numbers of helpers (include/uapi/linux/bpf.h).
pub mod helper {
    pub const MAP_LOOKUP: u32 = 1;
    pub const MAP_UPDATE: u32 = 2;
    pub const MAP_DELETE: u32 = 3;
    /// The monotonic clock at the resolution of a tick.
    #[cfg(test)]
    pub const KTIME_GET_COARSE_NS: u32 = 160;
    /// The wall clock's atomic time, which is set with it.
    #[cfg(test)]
    pub const KTIME_GET_TAI_NS: u32 = 208;
}

/// All functions of an object: the programs, and what was not compiled into them.
pub fn functions(object: &[u8]) -> Result<BTreeMap<String, Function>, ObjectError> {
    let file = ElfFile64::<object::LittleEndian>::parse(object)?;
    let mut found = BTreeMap::new();
    for symbol in file.symbols() {
        let Some(section) = symbol.section_index() else {
            continue;
        };
        if symbol.kind() != SymbolKind::Text || symbol.size() == 0 {
            continue;
        }
        let name = symbol.name()?.to_owned();
        let data = file.section_by_index(section)?.data()?;
        let start = usize::try_from(symbol.address()).ok();
        let code = start.and_then(|start| {
            let end = start.checked_add(usize::try_from(symbol.size()).ok()?)?;
            data.get(start..end)
        });
        let code = code.ok_or_else(|| ObjectError::Outside(name.clone()))?;
        // Instances that read the same are one in the books.
        let sum: &mut Function = found.entry(readable(&name)).or_default();
        sum.add(function(code));
    }
    Ok(found)
}

impl Function {
    fn add(&mut self, other: Self) {
        self.instructions += other.instructions;
        self.stack_bytes = self.stack_bytes.max(other.stack_bytes);
        for (number, calls) in other.helpers {
            *self.helpers.entry(number).or_default() += calls;
        }
        self.inner_calls += other.inner_calls;
    }
}

/// The path of a function without its crate, whose mangled name holds a hash of where and how it was built (RFC 2603):
/// `_RNvNtCs5hx_14dataplane_ebpf7collect5visit` is `collect::visit`. Constants of a generic one follow; other names stay.
fn readable(symbol: &str) -> String {
    let path = symbol
        .strip_prefix("_R")
        .and_then(|mangled| mangled.split_once("Cs"))
        .and_then(|(_, rest)| rest.split_once('_'));
    let Some((_, mut rest)) = path else {
        return symbol.to_owned();
    };
    let mut names: Vec<&str> = Vec::new();
    loop {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let Ok(length) = rest[..digits].parse::<usize>() else {
            break;
        };
        // An underscore sets off a name that begins with a digit or with one itself.
        let name = rest[digits..].strip_prefix('_').unwrap_or(&rest[digits..]);
        let Some(found) = name.get(..length) else {
            break;
        };
        names.push(found);
        rest = &name[length..];
    }
    let mut readable = names.get(1..).unwrap_or_default().join("::");
    for constant in rest.split("Kb").skip(1) {
        readable += if constant.starts_with('1') {
            "<true>"
        } else {
            "<false>"
        };
    }
    readable
}

fn function(code: &[u8]) -> Function {
    let mut function = Function::default();
    let mut instructions = code.chunks_exact(INSTRUCTION_BYTES);
    while let Some([opcode, registers, offset @ .., a, b, c, d]) = instructions.next() {
        function.instructions += 1;
        let immediate = i32::from_le_bytes([*a, *b, *c, *d]);
        let (to, from) = (registers & 15, registers >> 4);
        let offset = offset.first_chunk().copied().map_or(0, i16::from_le_bytes);
        match *opcode {
            WIDE => drop(instructions.next()),
            // A call within the object has 1 for its source, of a kernel function 2.
            CALL if from == 0 => {
                *function
                    .helpers
                    .entry(immediate.unsigned_abs())
                    .or_default() += 1;
            }
            CALL if from == 1 => function.inner_calls += 1,
            _ => {}
        }
        // Loads (class 1) name the address's register second, stores (2 and 3) first; sums of the frame pointer become addresses
        // of what is handed to helpers.
        let below = match opcode & 7 {
            1 if from == FRAME_POINTER => i64::from(offset),
            2 | 3 if to == FRAME_POINTER => i64::from(offset),
            _ => 0,
        };
        function.stack_bytes = function.stack_bytes.max(below.min(0).unsigned_abs());
    }
    function
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instruction(opcode: u8, to: u8, from: u8, offset: i16, immediate: i32) -> [u8; 8] {
        let mut bytes = [opcode, from << 4 | to, 0, 0, 0, 0, 0, 0];
        bytes[2..4].copy_from_slice(&offset.to_le_bytes());
        bytes[4..].copy_from_slice(&immediate.to_le_bytes());
        bytes
    }

    #[test]
    fn names_do_not_depend_on_where_they_were_built() {
        for (symbol, name) in [
            ("pod_ingress", "pod_ingress"),
            (
                "_RNvNtCs5hxjr61fCdl_14dataplane_ebpf7collect5visit",
                "collect::visit",
            ),
            (
                "_RNvNvCs5hx_14dataplane_ebpf11pod_ingress11pod_ingress",
                "pod_ingress::pod_ingress",
            ),
            (
                "_RINvNtCs5hx_14dataplane_ebpf4hook11pod_ingressKb1_E",
                "hook::pod_ingress<true>",
            ),
        ] {
            assert_eq!(readable(symbol), name);
        }
    }

    #[test]
    fn wide_loads_are_one_instruction_and_calls_within_the_object_are_told_from_helpers() {
        let code = [
            instruction(WIDE, 1, 0, 0, 7),
            instruction(0, 0, 0, 0, 0),
            instruction(0x7b, 10, 1, -16, 0),
            instruction(0x79, 2, 10, -40, 0),
            instruction(CALL, 0, 0, 0, 1),
            instruction(CALL, 0, 1, 0, 1),
            instruction(0x95, 0, 0, 0, 0),
        ]
        .concat();
        let found = function(&code);
        assert_eq!((found.instructions, found.stack_bytes), (6, 40));
        assert_eq!(found.helpers, BTreeMap::from([(helper::MAP_LOOKUP, 1)]));
        assert_eq!(found.inner_calls, 1);
    }
}
