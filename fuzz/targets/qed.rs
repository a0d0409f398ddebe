//! libFuzzer's entry to `fuzz::qed`.
#![no_main]

#[path = "../src/glue.rs"]
mod glue;

libfuzzer_sys::fuzz_target!(|data: &[u8]| glue::run("qed", data));
