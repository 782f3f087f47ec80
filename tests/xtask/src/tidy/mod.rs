//! `cargo xtask tidy`: formatting, lints, and the rules of this house that no compiler knows.
//!
//! Each rule looks at the tree and returns complaints as `file:line: what is wrong`; all complaints
//! are shown together.

mod architecture;
mod licences;
mod policies;
mod spdx;
mod text;

use anyhow::{Result, bail};

use crate::guest::TEST_GUEST;
use crate::{command, workspace};

/// Runs every check of the source tree.
pub(crate) fn run() -> Result<()> {
    rules()?;
    // The test guest is a workspace of its own.
    for workspace in [workspace::root(), workspace::root().join(TEST_GUEST)] {
        let mut fmt = command::cargo();
        command::run(
            fmt.args(["fmt", "--all", "--check"])
                .current_dir(&workspace),
        )?;
        let mut clippy = command::cargo();
        clippy.args([
            "clippy",
            "--workspace",
            "--all-targets",
            "--quiet",
            "--",
            "-D",
            "warnings",
        ]);
        command::run(clippy.current_dir(&workspace))?;
    }
    Ok(())
}

fn rules() -> Result<()> {
    let files = workspace::source_files()?;
    let mut complaints = text::check(&files);
    complaints.extend(architecture::check(&files));
    complaints.extend(policies::check(&files));
    complaints.extend(licences::check(&files)?);
    for complaint in &complaints {
        eprintln!("{complaint}");
    }
    if !complaints.is_empty() {
        bail!("{} of the house rules are broken", complaints.len());
    }
    Ok(())
}

#[cfg(test)]
fn file(path: &str, text: &str) -> workspace::SourceFile {
    workspace::SourceFile {
        path: path.to_owned(),
        text: text.to_owned(),
    }
}
