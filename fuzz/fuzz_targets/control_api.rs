#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pando_fuzz_bodies::control_api::run(bytes));
