//! `cargo xtask`: everything a developer or CI runs on this repository, in one place.
//!
//! Responsible for: checking the tree (`tidy`), building and fetching the guests that tests boot
//! (`guest`), and running all suites (`test`). It fetches what it needs, so that a fresh Debian
//! machine with Rust is enough.
//!
//! It must never be part of the product: nothing that Bulkhead does at run time may depend on it.
//! Further subcommands get a module each beside `suite.rs` and one variant of [`Task`].

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command line tool talks to its terminal"
)]

mod bench;
mod cache;
mod command;
mod daemon;
mod demo;
mod guest;
mod mutants;
mod packages;
mod process;
#[allow(
    dead_code,
    unreachable_pub,
    reason = "the end-to-end tests' own, of which not all is asked here"
)]
#[path = "../../src/restart.rs"]
mod restart;
mod soak;
mod suite;
mod tidy;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Bulkhead's development tasks")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Check formatting, lints, licences and the house rules.
    Tidy,
    /// Run every check: tidy, unit tests, guest builds, end-to-end tests.
    Test(suite::Options),
    /// Boot the built-in guest, show the processes that it is made of, and kill one that it needs.
    Demo,
    /// Measure what the README publishes, beside QEMU.
    Bench(bench::Options),
    /// Kill and replace parts of machines that verify what they do, and their daemon, for minutes.
    Soak(soak::Options),
    /// Break the code on purpose, one patch after the other, and see the fault harness find it.
    Mutants(mutants::Options),
    /// Build or fetch the guests that tests boot.
    #[command(subcommand)]
    Guest(guest::Task),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Tidy => tidy::run(),
        Task::Test(options) => suite::run(&options),
        Task::Demo => demo::run(),
        Task::Bench(options) => bench::run(&options),
        Task::Soak(options) => soak::run(&options),
        Task::Mutants(options) => mutants::run(&options),
        Task::Guest(task) => guest::run(task),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
