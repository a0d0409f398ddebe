//! Why a job ended early.

use crate::format::FormatError;
use crate::image::{ImageError, OpenError};
use crate::jobs::progress::Interrupted;

/// Why a job ended before it was done. What is true of the disk then is said by each job.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// A file could not be opened, made, or used in its role.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The disk could not be read or written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The add-cow file's header cannot say what it would have to say. Nothing was changed.
    #[error("cannot change the header of the add-cow file")]
    Header(#[source] FormatError),
    /// It was told to stop.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
    /// The disk, or what was asked for, is not of a kind that the job can work on. Nothing was
    /// changed.
    #[error("{0}")]
    Refused(String),
}
