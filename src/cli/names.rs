//! The options of both programs about names that come out of files.
//!
//! Not here: what they do (`storage/name_policy.rs`).

use std::error::Error;
use std::path::PathBuf;

use clap::Args;

use super::failed;
use crate::storage::name_policy::NamePolicy;

/// Where names that come out of files may lead.
#[derive(Debug, Args)]
pub(super) struct NameArguments {
    /// Let files name block devices as raw images and backing files; those on the command line may
    /// be devices without this
    #[arg(long, global = true)]
    allow_devices: bool,
    /// Refuse every file that a file names and that does not lie beneath DIR
    #[arg(long, global = true, value_name = "DIR")]
    image_folder: Option<PathBuf>,
}

impl NameArguments {
    /// Makes this the policy of the process. Before any disk is opened.
    pub(super) fn install(&self) -> Result<(), Box<dyn Error>> {
        let folder = self.image_folder.as_deref();
        let installed = NamePolicy::new(self.allow_devices, folder).and_then(NamePolicy::install);
        let folder = folder.unwrap_or("".as_ref()).display();
        installed.map_err(failed(format!("cannot use --image-folder '{folder}'")))
    }
}
