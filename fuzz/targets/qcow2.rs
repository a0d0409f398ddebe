//! libFuzzer's entry to `fuzz::qcow2`.
#![no_main]

#[path = "../src/glue.rs"]
mod glue;

libfuzzer_sys::fuzz_target!(|data: &[u8]| glue::run("qcow2", data));
