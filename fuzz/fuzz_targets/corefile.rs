#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| keelway_fuzz::corefile(input));
