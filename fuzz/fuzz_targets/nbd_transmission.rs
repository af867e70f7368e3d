#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pando_engine::testing::fuzz::run("nbd_transmission", bytes));
