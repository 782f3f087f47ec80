//! Follows a command and writes what its sandboxed processes used of the policies, for `grants`.
//!
//! `policy-follow RESULT (as-it-is|without-vdso) PROGRAM ARGUMENTS…`. What it follows is its only child,
//! and has its standard streams.

use bulkhead::learn::tracer::{Clock, follow};
use bulkhead_ipc::ident::ProcKind;
use bulkhead_policies::cache::Compiled;
use bulkhead_policies::grant::Grant;
use std::collections::BTreeMap;
use std::error::Error;
use std::ffi::OsString;
use std::process::ExitCode;

#[expect(
    clippy::disallowed_methods,
    reason = "it starts the product as a user does"
)]
fn run(mut arguments: impl Iterator<Item = OsString>) -> Result<u8, Box<dyn Error>> {
    let mut next = || arguments.next().ok_or("an argument is missing");
    let (result, clock, program) = (next()?, next()?, next()?);
    let clock = match clock.to_str() {
        Some("as-it-is") => Clock::AsItIs,
        Some("without-vdso") => Clock::WithoutVdso,
        _ => return Err("the clock is as-it-is or without-vdso".into()),
    };
    // The run's own overrides do not change what a grant is.
    let policies = Compiled::fresh(None, false)?;
    let mut command = std::process::Command::new(program);
    let learnt = follow(command.args(arguments), &policies, clock)?;
    let used: BTreeMap<ProcKind, Vec<Grant>> = learnt
        .used
        .into_iter()
        .map(|(kind, used)| (kind, used.into_iter().collect()))
        .collect();
    std::fs::write(result, serde_json::to_vec(&used)?)?;
    Ok(u8::try_from(learnt.exit_code).unwrap_or(1))
}

fn main() -> ExitCode {
    match run(std::env::args_os().skip(1)) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            tracing_line(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stderr, reason = "the test that started it shows it")]
fn tracing_line(error: &str) {
    eprintln!("policy-follow: {error}");
}
