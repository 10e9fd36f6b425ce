//! A program of the bench's own whose cost depends on the CPU alone: what the cost of ours is a ratio to. It is run by the kernel as
//! ours are, right before them, so a slower clock, or a neighbour on the same core, is in both.

use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};

/// Turns of its loop: some 270 ns of a CPU at 3 GHz, so that a nanosecond, the kernel's unit, is little of it.
const TURNS: i32 = 200;
pub const NAME: &str = "yardstick";
/// No shorter packet is taken.
const PACKET: [u8; 64] = [0; 64];

/// The loaded program. It goes with this value.
pub struct Yardstick(Ebpf);

impl Yardstick {
    pub fn load() -> Result<Self> {
        let mut loaded = Ebpf::load(&object()).context("the yardstick's object")?;
        let program = loaded.program_mut(NAME).context("the yardstick")?;
        let program: &mut SchedClassifier = program.try_into()?;
        program.load().context("loading the yardstick")?;
        Ok(Self(loaded))
    }

    /// Nanoseconds of a run, the mean of so many in a row.
    pub fn run(&self, repeat: u32) -> Result<f64> {
        let program = self.0.program(NAME).context("the yardstick")?;
        let program: &SchedClassifier = program.try_into()?;
        let run = program.test_run(TestRunOptions {
            data_in: Some(&PACKET),
            repeat,
            ..TestRunOptions::default()
        })?;
        Ok(run.duration.as_nanos() as f64)
    }
}

/// One instruction: operation, registers (source and destination), offset, immediate value.
fn instruction(operation: u8, registers: u8, offset: i16, immediate: i32) -> [u8; 8] {
    let mut bytes = [operation, registers, 0, 0, 0, 0, 0, 0];
    bytes[2..4].copy_from_slice(&offset.to_le_bytes());
    bytes[4..].copy_from_slice(&immediate.to_le_bytes());
    bytes
}

/// A loop in which each multiplication waits for the one before (instruction set: RFC 9669).
fn code() -> Vec<u8> {
    [
        instruction(0xb7, 0x00, 0, 1),     // r0 = 1
        instruction(0xb7, 0x01, 0, TURNS), // r1 = TURNS
        instruction(0x27, 0x00, 0, 31),    // r0 *= 31
        instruction(0x0f, 0x10, 0, 0),     // r0 += r1
        instruction(0x07, 0x01, 0, -1),    // r1 -= 1
        instruction(0x55, 0x01, -4, 0),    // if r1 != 0, three back
        instruction(0xb7, 0x00, 0, 0),     // r0 = 0
        instruction(0x95, 0x00, 0, 0),     // exit
    ]
    .concat()
}

/// The code as an object file, as loaders want it: a section of code, a symbol for it, and names.
fn object() -> Vec<u8> {
    const HEADER: usize = 64;
    const EBPF: u16 = 247;
    let code = code();
    let names = b"\0classifier\0.symtab\0.strtab\0yardstick\0";
    let name = |text: &str| {
        let found = names
            .windows(text.len())
            .position(|at| at == text.as_bytes());
        found.unwrap_or_default() as u32
    };
    let mut symbols = vec![0; 24];
    symbols.extend(name(NAME).to_le_bytes());
    // Global, a function, in the first section, at its start.
    symbols.extend([0x12, 0, 1, 0]);
    symbols.extend(0_u64.to_le_bytes());
    symbols.extend((code.len() as u64).to_le_bytes());

    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let contents = [code.as_slice(), &symbols, names];
    let table = HEADER + contents.iter().map(|content| content.len()).sum::<usize>();
    file.extend([1_u16, EBPF].map(u16::to_le_bytes).concat());
    file.extend(1_u32.to_le_bytes());
    file.extend([0, 0, table as u64].map(u64::to_le_bytes).concat());
    file.extend(0_u32.to_le_bytes());
    file.extend(
        [HEADER as u16, 0, 0, 64, 4, 3]
            .map(u16::to_le_bytes)
            .concat(),
    );
    for content in contents {
        file.extend(content);
    }
    // Name, type, flags; where and how long; the section of names and the first global symbol; alignment and size of an entry.
    file.extend([0; 64]);
    let mut at = HEADER;
    for (content, (text, kind, flags, link, info, entry)) in contents.into_iter().zip([
        ("classifier", 1, 6, 0, 0, 0),
        (".symtab", 2, 0, 3, 1, 24),
        (".strtab", 3, 0, 0, 0, 0),
    ]) {
        file.extend([name(text), kind].map(u32::to_le_bytes).concat());
        file.extend(
            [flags, 0, at as u64, content.len() as u64]
                .map(u64::to_le_bytes)
                .concat(),
        );
        file.extend([link, info].map(u32::to_le_bytes).concat());
        file.extend([1, entry].map(u64::to_le_bytes).concat());
        at += content.len();
    }
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_takes_it_and_runs_it() {
        if !keelway_tests::sandbox::is_root("the_kernel_takes_it_and_runs_it") {
            return;
        }
        let yardstick = Yardstick::load().expect("a program");
        assert!(yardstick.run(1000).expect("a run") > 0.0);
    }
}
