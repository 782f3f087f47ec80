//! The commands about machines of a daemon that change something: `create`, `start`, `stop` and
//! their like.

use super::client_args::ClientArgs;
use super::failure::{Failure, USAGE, print, print_json};
use super::paths::{PathOptions, Paths};
use super::run_args::MachineArgs;
use super::run_command::specification;
use crate::api::client::{Client, ClientError};
use crate::api::{Changed, Code, Create, Stop, Waited};
use crate::vmfile::{is_name, parse_duration, print as print_config};
use clap::Args;
use serde::Serialize;
use std::time::Duration;
use tokio::task::JoinSet;

/// Requests that are under way at a time when several machines are named.
const AT_ONCE: usize = 16;

/// Add a machine to the daemon, without starting it
///
/// The machine is described as for run. The daemon keeps the VM file in full, with every default
/// and absolute paths: later changes of the file change nothing. A machine that is there already
/// and is the same is left alone.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bulkhead create web.toml && bulkhead start web
  bulkhead create --name web --kernel vmlinuz --disk root.img -m 512MiB
")]
pub(super) struct CreateArgs {
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    client: ClientArgs,
}

/// The machines that a command is about.
#[derive(Debug, Clone, Args)]
pub(super) struct Names {
    /// Machine; several are dealt with side by side
    #[arg(value_name = "VM", required = true)]
    names: Vec<String>,
    #[command(flatten)]
    pub(super) client: ClientArgs,
}

impl Names {
    /// The one machine that an option is for.
    ///
    /// # Errors
    /// When there are several.
    pub(super) fn only(&self, option: &str) -> Result<&str, Failure> {
        match self.names.as_slice() {
            [name] => Ok(name),
            names => {
                let line = format!("{option} is for one machine, and {} are named", names.len());
                Err(Failure::new(USAGE, line))
            }
        }
    }
}

/// A power button and patience.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct StopOptions {
    /// How long the guest has to power off
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "90s")]
    timeout: Duration,
    /// Cut the power when it has not
    #[arg(long)]
    force: bool,
}

/// Options of `stop` and `restart`.
#[derive(Debug, Args)]
pub(super) struct StopArgs {
    #[command(flatten)]
    how: StopOptions,
    #[command(flatten)]
    names: Names,
}

/// Options of `rm`.
#[derive(Debug, Args)]
pub(super) struct RemoveArgs {
    /// Cut the power of a machine that runs
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    names: Names,
}

/// A verb that needs nothing but names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    /// Start.
    Start,
    /// Cut the power.
    Kill,
    /// Press reset.
    Reset,
    /// Stop the vCPUs.
    Pause,
    /// Let them run.
    Resume,
}

impl Verb {
    const fn word(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Kill => "kill",
            Self::Reset => "reset",
            Self::Pause => "pause",
            Self::Resume => "resume",
        }
    }
}

impl Names {
    /// Whether JSON is wanted, and then, whether as one object rather than an array.
    pub(super) fn json(&self) -> Option<bool> {
        self.client.json.then_some(self.names.len() == 1)
    }

    /// Asks about each machine, [`AT_ONCE`] at a time, and returns the answers in order.
    pub(super) async fn each<T: Send + 'static, F>(
        &self,
        client: &Client,
        ask: impl Fn(Client, String) -> F,
    ) -> Result<Vec<Result<T, ClientError>>, Failure>
    where
        F: Future<Output = Result<T, ClientError>> + Send + 'static,
    {
        if let Some(name) = self.names.iter().find(|name| !is_name(name)) {
            return Err(Failure::new(
                USAGE,
                format!("{name}: there is no such machine"),
            ));
        }
        Ok(side_by_side(&self.names, |name| ask(client.clone(), name)).await)
    }
}

/// Asks about each of several things, [`AT_ONCE`] at a time, and returns the answers in order.
pub(super) async fn side_by_side<I: Clone, T: Send + 'static, F>(
    items: &[I],
    ask: impl Fn(I) -> F,
) -> Vec<Result<T, ClientError>>
where
    F: Future<Output = Result<T, ClientError>> + Send + 'static,
{
    let (mut answers, mut asking) = (Vec::new(), JoinSet::new());
    for (n, item) in items.iter().enumerate() {
        if asking.len() == AT_ONCE {
            answers.extend(asking.join_next().await.and_then(Result::ok));
        }
        let asked = ask(item.clone());
        asking.spawn(async move { (n, asked.await) });
    }
    answers.extend(asking.join_all().await);
    answers.sort_by_key(|(n, _)| *n);
    answers.into_iter().map(|(_, answer)| answer).collect()
}

/// Prints what went well as one object, or as an array where several machines were named, and tells
/// what did not. The exit code is that of the first failure.
pub(super) fn conclude<T: Serialize>(
    names: &Names,
    answers: Vec<Result<T, ClientError>>,
    show: impl Fn(&T) -> String,
) -> Result<u8, Failure> {
    tell(names.json(), answers, |good| {
        good.iter().map(&show).collect()
    })
}

/// As [`conclude`]. `json` is whether one object is wanted rather than an array, if JSON is.
pub(super) fn tell<T: Serialize>(
    json: Option<bool>,
    answers: Vec<Result<T, ClientError>>,
    show: impl FnOnce(&[T]) -> String,
) -> Result<u8, Failure> {
    let mut code = 0;
    let mut good = Vec::new();
    for answer in answers {
        match answer {
            Ok(answer) => good.push(answer),
            Err(error) => {
                let failure = Failure::from(error);
                failure.report();
                code = if code == 0 { failure.code } else { code };
            }
        }
    }
    match (json, good.as_slice()) {
        (Some(true), []) => {}
        (Some(true), [one]) => print_json(one)?,
        (Some(_), all) => print_json(&all)?,
        (None, all) => print(&show(all))?,
    }
    Ok(code)
}

fn show(changed: &Changed) -> String {
    let state = changed.state.map_or("removed", |state| state.word());
    let already = if changed.changed { "" } else { " already" };
    format!("{}: {state}{already}\n", changed.name)
}

/// Runs `create`.
pub(super) fn create(args: &CreateArgs, options: &PathOptions) -> Result<u8, Failure> {
    let paths = Paths::new(options)?;
    let spec = specification(&args.machine, &paths, true)?;
    let vm_file =
        print_config(&spec).map_err(|error| Failure::because(USAGE, "the machine", &error))?;
    let wish = Create {
        vm_file,
        file_name: spec.name.clone(),
        directory: "/".to_owned(),
        default_name: spec.name,
    };
    let changed: Changed = args.client.talk(options, async |client| {
        Ok(client.post("/v1/vms", Some(&wish)).await?)
    })?;
    match args.client.json {
        true => print_json(&changed)?,
        false => print(&show(&changed))?,
    }
    Ok(0)
}

/// Runs a verb.
pub(super) fn verb(verb: Verb, names: &Names, options: &PathOptions) -> Result<u8, Failure> {
    let answers = names.client.talk(options, async |client| {
        let ask = |client: Client, name: String| async move {
            let path = format!("/v1/vms/{name}/{}", verb.word());
            client.post::<Changed>(&path, None::<&()>).await
        };
        names.each(&client, ask).await
    })?;
    conclude(names, answers, show)
}

/// Runs `stop` or `restart`.
pub(super) fn stop(args: &StopArgs, restart: bool, options: &PathOptions) -> Result<u8, Failure> {
    let how = Stop {
        timeout_ms: u64::try_from(args.how.timeout.as_millis()).unwrap_or(u64::MAX),
        force: args.how.force,
    };
    let word = if restart { "restart" } else { "stop" };
    let answers = args.names.client.talk(options, async |client| {
        let ask = |client: Client, name: String| async move {
            let path = format!("/v1/vms/{name}/{word}");
            client.post::<Changed>(&path, Some(&how)).await
        };
        args.names.each(&client, ask).await
    })?;
    conclude(&args.names, answers, show)
}

/// Runs `rm`. A machine that is not there is removed already.
pub(super) fn remove(args: &RemoveArgs, options: &PathOptions) -> Result<u8, Failure> {
    let force = args.force;
    let answers = args.names.client.talk(options, async |client| {
        let ask = |client: Client, name: String| async move {
            let path = format!("/v1/vms/{name}?force={force}");
            match client.delete::<Changed>(&path).await {
                Err(ClientError::Api(error)) if error.code == Code::NotFound => Ok(Changed {
                    schema_version: super::SCHEMA_VERSION,
                    name,
                    changed: false,
                    state: None,
                }),
                other => other,
            }
        };
        args.names.each(&client, ask).await
    })?;
    conclude(&args.names, answers, show)
}

/// Runs `wait`: the exit code is that of the first machine that did not end with 0.
pub(super) fn wait(names: &Names, options: &PathOptions) -> Result<u8, Failure> {
    let answers = names.client.talk(options, async |client| {
        let ask = |client: Client, name: String| async move {
            client.get::<Waited>(&format!("/v1/vms/{name}/wait")).await
        };
        names.each(&client, ask).await
    })?;
    let codes = answers.iter().map(|answer| match answer {
        Ok(waited) => waited.last_run.exit_code,
        Err(error) => error.exit_code(),
    });
    let code = codes.into_iter().find(|&code| code != 0).unwrap_or(0);
    conclude(names, answers, |waited| {
        let run = &waited.last_run;
        let message = run.message.as_ref().map(|m| format!(": {m}"));
        let (word, message) = (run.ending.replace('_', " "), message.unwrap_or_default());
        format!("{}: {word}{message}\n", waited.name)
    })?;
    Ok(code)
}
