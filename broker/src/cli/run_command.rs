//! `run`: from options and VM file to a checked machine, and on to whoever runs it.

use super::failure::{Failure, START, USAGE, print};
use super::paths::{PathOptions, Paths};
use super::run_args::{MachineArgs, RunArgs};
use super::run_session::Session;
use crate::console::attach::notice;
use crate::launch::cgroup::Reach;
use crate::launch::users::UserRange;
use crate::network::board::Switchboard;
use crate::serve::config::Config;
use crate::vm::session::RunOptions;
use crate::vm::spec::VmSpec;
use crate::vmfile::{
    HostMemory, Problems, Surroundings, check, is_name, load, print as print_config,
};
use std::path::{Path, PathBuf};

/// Runs `run`.
pub(super) fn run(args: &RunArgs, options: &PathOptions) -> Result<u8, Failure> {
    let paths = Paths::new(options)?;
    let mut spec = specification(&args.machine, &paths, args.overcommit)?;
    spec.limits.run_timeout = args.timeout;
    if args.print_config {
        let text = print_config(&spec)
            .map_err(|error| Failure::because(USAGE, "--print-config", &error))?;
        print(&text)?;
        return Ok(0);
    }
    let options = prepare(args, &paths, &spec)?;
    let remove_state = args.rm || (args.machine.vmfile.is_none() && args.machine.name.is_none());
    let _state = StateDirectory {
        path: options.state.clone(),
        remove: remove_state,
    };
    let session = Session {
        json: args.json,
        escape: args.escape(),
    };
    session.run(&spec, &options, crate::vm::run)
}

/// The machine that options and VM file describe together, checked against this host.
pub(super) fn specification(
    args: &MachineArgs,
    paths: &Paths,
    overcommit: bool,
) -> Result<VmSpec, Failure> {
    // Both sides' problems are shown at once.
    let file = args.vmfile.as_deref().map(load).transpose();
    let (options, file) = match (args.draft(), file) {
        (Ok(options), Ok(file)) => (options, file),
        (Err(problems), Ok(_)) | (Ok(_), Err(problems)) => return Err(problems.into()),
        (Err(mut problems), Err(more)) => {
            problems.0.extend(more.0);
            return Err(Problems(problems.0).into());
        }
    };
    let mut draft = options.or(file.unwrap_or_default());
    args.make_ephemeral(&mut draft);
    let named = draft.kernel.is_some() || draft.from_disk.is_some();
    let kernel = if args.vmfile.is_none() && !named {
        Some(paths.built_in_guest()?)
    } else {
        None
    };
    let around = Surroundings {
        name: default_name(args.vmfile.as_deref()),
        kernel,
        memory: HostMemory::read(Path::new("/")),
        overcommit,
    };
    Ok(check(draft, &around)?)
}

/// The VM file's name as a name of a machine, or one that no other run has.
fn default_name(vmfile: Option<&Path>) -> String {
    let stem = vmfile
        .and_then(Path::file_stem)
        .map(|stem| stem.to_string_lossy().into_owned());
    stem.filter(|stem| is_name(stem))
        .unwrap_or_else(|| format!("run-{}", std::process::id()))
}

/// The state directory of a run, removed at the end if that was wished.
#[derive(Debug)]
struct StateDirectory {
    path: PathBuf,
    remove: bool,
}

impl Drop for StateDirectory {
    fn drop(&mut self) {
        if self.remove {
            // Whatever cannot be removed now is a few rings that the next run of that name replaces.
            let _left = std::fs::remove_dir_all(&self.path);
        }
    }
}

fn prepare(args: &RunArgs, paths: &Paths, spec: &VmSpec) -> Result<RunOptions, Failure> {
    let users = users(paths)?;
    let binaries = paths.binaries()?;
    let state = paths.state.join("vms").join(&spec.name);
    for directory in [&paths.runtime, &state] {
        make_private(directory).map_err(|error| {
            let doing = format!("making the directory {}", directory.display());
            Failure::because(START, doing, &error)
        })?;
    }
    Ok(RunOptions {
        binaries,
        policies: paths.policies(),
        allow_looser_policy: args.allow_looser_policy,
        cache: Some(paths.state.join("cache")),
        state,
        runtime: paths.runtime.clone(),
        core: args.core.clone(),
        reach: Reach::Within,
        reboot: !args.machine.no_reboot,
        id: None,
        users,
        // Networks are the daemon's.
        networks: Switchboard::default(),
    })
}

/// The users of processes that the host's configuration file says.
pub(super) fn users(paths: &Paths) -> Result<UserRange, Failure> {
    let config = Config::load(&paths.config).map_err(|e| Failure::because(USAGE, "", &e))?;
    let users = config.host.users;
    if let Some(lacking) = users.lacking() {
        notice(&format!("bulkhead: {lacking}"));
    }
    Ok(users)
}

/// Makes a directory that only this user can enter.
pub(super) fn make_private(directory: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_are_named_after_their_file() {
        assert_eq!(default_name(Some(Path::new("/a/web.toml"))), "web");
        let odd = default_name(Some(Path::new("/a/my web.toml")));
        assert_eq!(odd, format!("run-{}", std::process::id()));
        assert_eq!(default_name(None), odd);
    }
}
