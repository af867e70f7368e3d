#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pando_fuzz_bodies::csi_requests::run(bytes));
