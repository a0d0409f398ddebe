//! libFuzzer's entry to `fuzz::messages`.
#![no_main]

#[path = "../src/glue.rs"]
mod glue;

libfuzzer_sys::fuzz_target!(|data: &[u8]| glue::run("messages", data));
