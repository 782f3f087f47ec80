//! The `bulkhead-fault` program: `bulkhead fault` runs it.
#![allow(clippy::print_stderr, reason = "a program of the command line")]

use bulkhead_faults::SCHEMA_VERSION;
use bulkhead_faults::random::{Planned, plan};
use bulkhead_faults::run::{Setting, clean_up_at_signals, run};
use bulkhead_faults::scenario::Scenario;
use bulkhead_faults::shrink::{scenario_of, shrink};
use bulkhead_faults::soak::{self, Tally};
use bulkhead_faults::verdict::{Outcome, Verdict};
use bulkhead_faults::workload::{Guests, Linux};
use bulkhead_faults::{matrix, points};
use clap::{Args, Parser, Subcommand};
use serde::Serialize;
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// The scenario is wrong.
const USAGE: u8 = 2;
/// The host lacks something.
const HOST: u8 = 4;
/// Most runs that shrinking takes.
const SHRINK_RUNS: u32 = 24;

/// Injects faults into running machines, and judges what becomes of them
#[derive(Debug, Parser)]
#[command(name = "bulkhead-fault", version, max_term_width = 100, after_long_help = AFTER)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const AFTER: &str = "\
Exit codes:
  0   everything held
  2   wrong usage or scenario
  4   the host lacks something
  10  something did not hold
  11  nothing was verified, or a fault was never injected

Environment:
  BULKHEAD_LIBEXEC_DIR, BULKHEAD_BIN_DIR
        directory of the programs [default: that of this program]
  BULKHEAD_TEST_GUEST
        the test guest [default: bulkhead-guest.elf beside the programs]
  BULKHEAD_TEST_LINUX_BZIMAGE, BULKHEAD_TEST_LINUX_INITRD, BULKHEAD_TEST_LINUX_CMDLINE
        the small Linux, for the workload files
";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a scenario
    Run(RunArgs),
    /// List the points at which faults can be injected
    Points {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Run drawn scenarios, one after the other, until the time is over: all kinds of faults equally often
    Soak(SoakArgs),
    /// Run every fault × every kind of process × what a machine goes through
    Matrix(MatrixArgs),
}

/// What of the matrix is run.
#[derive(Debug, Args)]
struct MatrixArgs {
    /// Only scenarios whose names contain one of these
    only: Vec<String>,
    /// Only each N-th of them
    #[arg(long, value_name = "N", default_value_t = 1)]
    every: usize,
    /// Leave the first N out: with --every, one of several programs that share the work
    #[arg(long, value_name = "N", default_value_t = 0)]
    skip: usize,
    /// Print the scenarios and run none
    #[arg(long)]
    list: bool,
    /// Directory for the scenarios and time lines of those that do not hold
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

/// How long, and how much is enough.
#[derive(Debug, Args)]
struct SoakArgs {
    /// How long
    #[arg(long, value_name = "M", default_value_t = 30)]
    minutes: u64,
    /// Chooses what is drawn
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Fail when a kind of fault was injected fewer times
    #[arg(long, value_name = "N", default_value_t = 20)]
    fewest: u64,
    /// Print JSON lines
    #[arg(long)]
    json: bool,
    /// Directory for the scenarios and time lines of those that do not hold
    #[arg(long, value_name = "DIR", default_value = ".")]
    output: PathBuf,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Scenario file
    scenario: PathBuf,
    /// Seed, in the place of the scenario's
    #[arg(long)]
    seed: Option<u64>,
    /// Run again with the next seed until this time is over
    #[arg(long, value_name = "M")]
    minutes: Option<u64>,
    /// Print JSON lines
    #[arg(long)]
    json: bool,
    /// Print the plan and inject nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not look for the fewest faults that fail
    #[arg(long)]
    no_shrink: bool,
    /// Where the shrunk scenario of a failure is written
    #[arg(long, value_name = "DIR", default_value = ".")]
    output: PathBuf,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { USAGE } else { 0 };
            let _unheard = error.print();
            return ExitCode::from(code);
        }
    };
    // 128 and the signal's number, as shells have it.
    if clean_up_at_signals(|| std::process::exit(130)).is_err() {
        return ExitCode::from(HOST);
    }
    let code = match cli.command {
        Command::Points { json } => list(json),
        Command::Run(args) => run_all(&args),
        Command::Soak(args) => run_soak(&args),
        Command::Matrix(args) => run_matrix(&args),
    };
    ExitCode::from(code)
}

/// An object of `--json`: the version of its form comes first.
#[derive(Serialize)]
struct Object<'a, T> {
    schema_version: u32,
    #[serde(flatten)]
    rest: &'a T,
}

fn say_json(rest: &impl Serialize) {
    let object = Object {
        schema_version: SCHEMA_VERSION,
        rest,
    };
    // Plain data with string keys can always be written.
    say(&serde_json::to_string(&object).unwrap_or_default());
}

/// A line on standard output. A reader that has gone away is no failure.
fn say(line: &str) {
    let _unheard = writeln!(std::io::stdout().lock(), "{line}");
}

fn list(as_json: bool) -> u8 {
    for listed in points::all() {
        if as_json {
            say_json(&listed);
        } else {
            say(&format!(
                "{:<40} {:<12} {}",
                listed.point, listed.process, listed.step
            ));
        }
    }
    0
}

/// Where programs and guests are.
fn setting() -> Result<Setting, String> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let own = std::env::current_exe().ok();
    let own = own.and_then(|program| Some(program.parent()?.to_owned()));
    let programs = variable("BULKHEAD_BIN_DIR")
        .or_else(|| variable("BULKHEAD_LIBEXEC_DIR"))
        .or(own)
        .filter(|directory| directory.join("bulkhead-vcpu").is_file());
    let programs = programs.ok_or("the programs of Bulkhead are not beside this one")?;
    let guest = variable("BULKHEAD_TEST_GUEST");
    let test = guest.unwrap_or_else(|| programs.join("bulkhead-guest.elf"));
    if !test.is_file() {
        return Err(format!("there is no test guest {}", test.display()));
    }
    Ok(Setting {
        programs,
        guests: Guests {
            test,
            linux: Linux::from_environment(),
        },
    })
}

fn run_all(args: &RunArgs) -> u8 {
    let scenario = match Scenario::load(&args.scenario) {
        Ok(scenario) => scenario,
        Err(error) => {
            eprintln!("bulkhead-fault: error: {error}");
            return USAGE;
        }
    };
    let mut seed = args.seed.unwrap_or(scenario.seed);
    if args.dry_run {
        show_plan(&scenario, seed, &plan(&scenario, seed), args.json);
        return 0;
    }
    let setting = match setting() {
        Ok(setting) => setting,
        Err(error) => {
            eprintln!("bulkhead-fault: error: {error}");
            return HOST;
        }
    };
    let until = args
        .minutes
        .map(|minutes| Instant::now() + Duration::from_secs(minutes * 60));
    loop {
        let code = run_once(&scenario, seed, &setting, args);
        if code != 0 || until.is_none_or(|until| Instant::now() > until) {
            return code;
        }
        seed += 1;
    }
}

/// Runs decks until the time is over, one line for each scenario and one for each kind of fault. The code is
/// that of the worst.
fn run_soak(args: &SoakArgs) -> u8 {
    let setting = match setting() {
        Ok(setting) => setting,
        Err(error) => {
            eprintln!("bulkhead-fault: error: {error}");
            return HOST;
        }
    };
    let until = Instant::now() + Duration::from_secs(args.minutes * 60);
    let (mut tally, mut runs, mut verified) = (Tally::new(), 0_u64, 0_u64);
    let mut failed = Vec::new();
    let scenarios = (0..).flat_map(|number| soak::deck(args.seed, number));
    for scenario in scenarios.take_while(|_| Instant::now() < until) {
        let plan = plan(&scenario, scenario.seed);
        let outcome = match run(&scenario, scenario.seed, &plan, &setting) {
            Ok(outcome) => outcome,
            Err(error) => {
                eprintln!("bulkhead-fault: error: {}: {error}", scenario.name);
                return HOST;
            }
        };
        runs += 1;
        verified += outcome.verified.iter().map(|(_, count)| count).sum::<u64>();
        for (planned, times) in &outcome.injected {
            tally.add(&planned.fault, *times);
        }
        if args.json {
            say_json(&outcome.as_json());
        } else {
            tell(&scenario, &outcome);
        }
        // A fault that a machine's loss has prevented is one that was not injected, and counts as such.
        if outcome.verdict() == Verdict::Failed {
            keep(&args.output, &scenario, &outcome);
            failed.push(scenario.name);
        }
    }
    let below = tally.below(args.fewest);
    if args.json {
        say_json(
            &json!({ "kind": "soak", "seed": args.seed, "runs": runs, "verified": verified,
                "failed": failed, "injected": tally.counts(), "too_seldom": below }),
        );
    } else {
        for (kind, count) in tally.counts() {
            say(&format!("{kind:<28} {count:>6}"));
        }
        say(&format!(
            "{runs} runs, {} failed; {verified} things verified",
            failed.len()
        ));
        if !below.is_empty() {
            let below = below.into_iter().collect::<Vec<_>>().join(", ");
            let fewest = args.fewest;
            say(&format!("injected fewer than {fewest} times: {below}"));
        }
    }
    match (failed.is_empty(), tally.below(args.fewest).is_empty()) {
        (false, _) => Verdict::Failed.code(),
        (true, false) => Verdict::NothingVerified.code(),
        (true, true) if verified == 0 => Verdict::NothingVerified.code(),
        (true, true) => 0,
    }
}

/// A line for a scenario, and one for each thing that is wrong.
fn tell(scenario: &Scenario, outcome: &Outcome) {
    let verdict = outcome.verdict().in_words();
    say(&format!("{:<64} {verdict}", scenario.name));
    let missing = outcome.missing.iter().map(|(_, why)| why);
    for why in outcome.errors.iter().chain(missing) {
        say(&format!("    {why}"));
    }
}

/// Runs the matrix, one line for each scenario. The code is that of the worst.
fn run_matrix(args: &MatrixArgs) -> u8 {
    let setting = match setting() {
        Ok(setting) => setting,
        Err(error) => {
            eprintln!("bulkhead-fault: error: {error}");
            return HOST;
        }
    };
    let wanted = |scenario: &Scenario| {
        args.only.is_empty() || args.only.iter().any(|part| scenario.name.contains(part))
    };
    let scenarios = matrix::all().into_iter().filter(wanted);
    let mut code = 0;
    for scenario in scenarios.skip(args.skip).step_by(args.every.max(1)) {
        if args.list {
            say(&scenario.name);
            continue;
        }
        let plan = plan(&scenario, scenario.seed);
        let outcome = match run(&scenario, scenario.seed, &plan, &setting) {
            Ok(outcome) => outcome,
            Err(error) => {
                say(&format!("{:<64} cannot be run: {error}", scenario.name));
                code = HOST;
                continue;
            }
        };
        let verdict = outcome.verdict();
        tell(&scenario, &outcome);
        if let (Some(output), true) = (&args.output, verdict != Verdict::Held) {
            keep(output, &scenario, &outcome);
        }
        code = match (code, verdict) {
            (10, _) | (_, Verdict::Held) => code,
            (_, verdict) => verdict.code(),
        };
    }
    code
}

/// Writes a scenario and its time line.
fn keep(output: &std::path::Path, scenario: &Scenario, outcome: &Outcome) {
    let place = |ending: &str| output.join(format!("{}.{ending}", scenario.name));
    let text = toml::to_string(scenario).map_err(std::io::Error::other);
    let written = text
        .and_then(|text| std::fs::write(place("toml"), text))
        .and_then(|()| std::fs::write(place("log"), outcome.in_words()));
    if let Err(error) = written {
        eprintln!("bulkhead-fault: error: {}: {error}", output.display());
    }
}

fn show_plan(scenario: &Scenario, seed: u64, plan: &[Planned], as_json: bool) {
    for planned in plan {
        if as_json {
            say_json(&json!({ "kind": "planned",
                    "scenario": scenario.name, "seed": seed, "fault": planned }));
        } else {
            let fault = &planned.fault;
            let when = match (fault.at_ms, fault.nth) {
                (Some(ms), _) => format!("at {ms} ms"),
                (None, nth) => format!("at occurrence {}", nth.unwrap_or(1)),
            };
            say(&format!(
                "#{} {:?} at {} {when}",
                planned.id, fault.action, fault.point
            ));
        }
    }
}

fn run_once(scenario: &Scenario, seed: u64, setting: &Setting, args: &RunArgs) -> u8 {
    let plan = plan(scenario, seed);
    let outcome = match run(scenario, seed, &plan, setting) {
        Ok(outcome) => outcome,
        Err(error) => {
            eprintln!("bulkhead-fault: error: {error}");
            return HOST;
        }
    };
    show(&outcome, args.json);
    if outcome.verdict() == Verdict::Failed && !args.no_shrink && plan.len() > 1 {
        write_shrunk(scenario, seed, &plan, setting, args);
    }
    outcome.verdict().code()
}

fn show(outcome: &Outcome, as_json: bool) {
    if !as_json {
        return say(outcome.in_words().trim_end());
    }
    for entry in &outcome.entries {
        say_json(&entry.as_json());
    }
    say_json(&outcome.as_json());
}

/// Looks for the fewest faults that fail, and writes them as a scenario.
fn write_shrunk(
    scenario: &Scenario,
    seed: u64,
    plan: &[Planned],
    setting: &Setting,
    args: &RunArgs,
) {
    let shrunk = shrink(plan, SHRINK_RUNS, |plan| {
        let failed = run(scenario, seed, plan, setting);
        failed.is_ok_and(|outcome| outcome.verdict() == Verdict::Failed)
    });
    let shrunk = scenario_of(scenario, seed, &shrunk);
    let path = args.output.join(format!("{}.toml", shrunk.name));
    let written = toml::to_string(&shrunk)
        .map_err(std::io::Error::other)
        .and_then(|text| std::fs::write(&path, text));
    match written {
        Ok(()) => eprintln!(
            "{} faults still fail: {}",
            shrunk.fault.len(),
            path.display()
        ),
        Err(error) => eprintln!("bulkhead-fault: error: {}: {error}", path.display()),
    }
}
