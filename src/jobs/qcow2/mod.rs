//! What adopting and exporting qcow2 files are made of: tables written, tables read, a data file
//! taken over. Each over any storage; the jobs `adopt` and `export` do the rest.
//!
//! Not here: the format (`format::qcow2`).

pub mod tables;
pub mod takeover;
pub mod walk;
