#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pando_sim::fuzz::run("allocator", bytes));
