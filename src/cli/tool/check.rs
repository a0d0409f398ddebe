//! `addcow check`: whether an add-cow file is as it should be.
//!
//! Exit codes are those of `qemu-img check`, so that scripts can tell harmless from harmful.
//!
//! Not here: what is checked (`image::check`).

use std::io::{self, Write};
use std::path::Path;

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{DiskArguments, DiskFormat, PROGRAM};
use crate::cli::output::{Output, percent, print, printable, write_json};
use crate::cli::{Outcome, error_line, failed};
use crate::format::FormatError;
use crate::image::OpenError;
use crate::image::check::{CheckReport, Finding, add_cow};
use crate::image::open::is_wrong_format;

/// Exit code: something is broken.
const EXIT_CORRUPTIONS: u8 = 2;

/// Exit code: something is superfluous, and nothing broken.
const EXIT_LEAKS: u8 = 3;

/// Exit code: not an add-cow file of a version that can be checked.
const EXIT_UNSUPPORTED: u8 = 63;

/// The command line of `addcow check`.
#[derive(Debug, Args)]
#[command(mut_arg("format", |format| {
    format.help("Format of the disk: add-cow; nothing else is checked").hide_possible_values(true)
}))]
#[command(mut_arg("disk", |disk| disk.help("The disk: its add-cow file")))]
pub struct Arguments {
    /// Which disk, and how to show the result.
    #[command(flatten)]
    disk: DiskArguments,
    /// Clear bits behind the end of the disk, which must not be in use. Damage is never repaired:
    /// `all` does no more than `leaks`
    #[arg(short, long, value_name = "WHAT")]
    repair: Option<Repair>,
    /// Print errors and leaks only
    #[arg(short, long)]
    quiet: bool,
}

impl Arguments {
    /// Whether something may be repaired; whichever it is, there is one kind of repair.
    pub(super) fn repairs(&self) -> bool {
        matches!(self.repair, Some(Repair::Leaks | Repair::All))
    }
}

/// What may be repaired.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Repair {
    /// Superfluous bits.
    Leaks,
    /// All that can be repaired.
    All,
}

/// The result; the keys are those of qemu-img, but for the last.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct CheckResult {
    /// The first byte that the format does not use.
    #[serde(skip_serializing_if = "Option::is_none")]
    image_end_offset: Option<u64>,
    /// Clusters of the disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    total_clusters: Option<u64>,
    /// Clusters in the raw image.
    #[serde(skip_serializing_if = "Option::is_none")]
    allocated_clusters: Option<u64>,
    /// Things that could not be checked: such an error ends the check instead.
    check_errors: u64,
    /// Superfluous bits that are left.
    leaks: u64,
    /// Broken things that are left.
    corruptions: u64,
    /// Superfluous bits that were cleared.
    leaks_fixed: u64,
    /// Broken things that were repaired: none ever is.
    corruptions_fixed: u64,
    /// The file's name as given.
    filename: String,
    /// Its format.
    format: &'static str,
    /// What was found, in words.
    messages: Vec<String>,
}

/// Checks a disk.
pub fn run(arguments: &Arguments) -> Outcome {
    let path = &arguments.disk.disk;
    if let Some(cause) = unsupported(arguments.disk.format) {
        let error = failed(format!("cannot check '{}'", path.display()))(cause);
        eprintln!("{}", error_line(PROGRAM, error.as_ref()));
        return Ok(EXIT_UNSUPPORTED);
    }
    let repair = arguments.repairs();
    if repair && arguments.disk.force_share {
        return Err("-r changes the disk and needs it alone: it does not go with -U".into());
    }
    let report = match add_cow(path, repair, arguments.disk.locking()) {
        Err(error) if is_unsupported(&error, path) => {
            eprintln!("{}", error_line(PROGRAM, &error));
            return Ok(EXIT_UNSUPPORTED);
        }
        result => result?,
    };
    print(|out| match arguments.disk.output {
        Output::Json => Ok(write_json(out, &result_of(path, &report))?),
        Output::Human => Ok(write_human(out, &report, arguments.quiet)?),
    })?;
    Ok(match (report.corruptions(), report.leaks()) {
        (0, 0) => 0,
        (0, _) => EXIT_LEAKS,
        _ => EXIT_CORRUPTIONS,
    })
}

/// Why disks in that format are not checked, if they are not.
fn unsupported(format: DiskFormat) -> Option<&'static str> {
    match format {
        DiskFormat::AddCow => None,
        DiskFormat::Raw => Some("a raw image has nothing that could be checked"),
        DiskFormat::Qcow2 | DiskFormat::Qed => {
            Some("only add-cow files are checked (qemu-img check does it for qcow2 and QED)")
        }
    }
}

/// Whether the error is that `disk` itself is no file that can be checked. One of its chain may be
/// none either, and then the check could not be done.
fn is_unsupported(error: &OpenError, disk: &Path) -> bool {
    let version = matches!(
        error,
        OpenError::Format {
            source: FormatError::OldMagic | FormatError::UnknownFeatures { .. },
            ..
        }
    );
    let is_own = matches!(error, OpenError::Format { path, .. } if path == disk);
    is_own && (version || is_wrong_format(error))
}

/// The result for programs.
fn result_of(path: &Path, report: &CheckReport) -> CheckResult {
    let geometry = report.geometry.as_ref();
    CheckResult {
        image_end_offset: geometry.map(|geometry| geometry.file_len()),
        total_clusters: geometry.map(|geometry| geometry.clusters()),
        allocated_clusters: geometry.map(|_| report.allocated),
        check_errors: 0,
        leaks: report.leaks(),
        corruptions: report.corruptions(),
        leaks_fixed: report.leaks_fixed,
        corruptions_fixed: 0,
        filename: path.display().to_string(),
        format: "add-cow",
        messages: report.findings.iter().map(ToString::to_string).collect(),
    }
}

/// The result for people; only what is wrong if they want `quiet`.
fn write_human(out: &mut dyn Write, report: &CheckReport, quiet: bool) -> io::Result<()> {
    for finding in &report.findings {
        let kind = kind_of(finding);
        if !quiet || kind != "note" {
            writeln!(out, "{kind}: {}", printable(&finding.to_string()))?;
        }
    }
    if quiet {
        return Ok(());
    }
    if report.leaks_fixed > 0 {
        writeln!(out, "Cleared {} stray bits.", report.leaks_fixed)?;
    }
    match (report.corruptions(), report.leaks()) {
        (0, 0) => writeln!(out, "No errors were found on the image.")?,
        (0, leaks) => writeln!(
            out,
            "{leaks} leaks were found on the image: no data is damaged; -r leaks clears them."
        )?,
        (corruptions, _) => writeln!(
            out,
            "{corruptions} errors were found on the image: data may be lost; do not write to it."
        )?,
    }
    if let Some(geometry) = &report.geometry {
        let (allocated, total) = (report.allocated, geometry.clusters());
        writeln!(out, "{allocated}/{total} = {} allocated", percent(allocated, total))?;
        writeln!(out, "Image end offset: {}", geometry.file_len())?;
    }
    Ok(())
}

/// The word that is put before a finding.
fn kind_of(finding: &Finding) -> &'static str {
    if finding.corruptions() > 0 {
        "ERROR"
    } else if finding.leaks() > 0 {
        "leak"
    } else {
        "note"
    }
}
