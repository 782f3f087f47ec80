//! The launch plan: what a newborn does between `clone` and `exec`, as data.
//!
//! A plan is made from a policy and from what the broker may do, without touching the system;
//! [`super::sys`] carries it out in the child. The order matters and is tested: the network and
//! root are joined while the broker's rights are there, the user is given up before the user
//! namespace is made, the descriptors are placed last, and `exec` ends everything.

use super::users::UserRange;
use bulkhead_policies::Policy;
use bulkhead_policies::plan::Limits;
use bulkhead_policies::schema::{FdType, Namespace, Speculation};

/// One thing that a newborn does. None allocates, and each is a few plain system calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Own session, default signal handling: the terminal's signals are the broker's.
    NewSession,
    /// Have the host end it rather than others when memory runs out.
    OutOfMemory {
        /// `oom_score_adj`.
        adjust: u16,
    },
    /// Take back what an ancestor may have said: that the kernel may merge equal pages of this
    /// process with those of others, who could then tell from the time of a write what it holds.
    NeverMerge,
    /// Give up a kind of speculation for good, where the processor has a switch for it.
    GiveUpSpeculation {
        /// PR_SPEC_*.
        which: u32,
    },
    /// Join the shared empty network namespace.
    JoinNetwork,
    /// Join the shared mount namespace that holds nothing but an empty read-only directory.
    JoinEmptyRoot,
    /// Give up the broker's user and groups.
    BecomeUser(NewUser),
    /// Make namespaces.
    Unshare {
        /// CLONE_NEW* flags.
        flags: u32,
    },
    /// Map the one user and group that it is to [`INSIDE_ID`] in its user namespace; with a folder, where the
    /// broker is root, to those that own what is in there, since the mount has the same map.
    MapUser,
    /// Where mounting is only possible in a mount namespace of its own: put a mount of the folder alone in the
    /// place of the folder's descriptor.
    TakeFolder,
    /// In a mount namespace of its own: an empty read-only root.
    EmptyRoot,
    /// Set a resource limit, hard and soft.
    Limit {
        /// RLIMIT_*.
        resource: u32,
        /// The value.
        value: u64,
    },
    /// Empty the capability bounding set and every other set.
    DropCapabilities,
    /// No program that it executes may gain rights.
    NoNewPrivileges,
    /// Move the listed descriptors to their numbers and close all others.
    PlaceDescriptors,
    /// Execute the program.
    Execute,
}

/// User and group id of a process inside its user namespace.
pub const INSIDE_ID: u32 = 1;
/// The user of processes when the range is not available to the broker (in a container).
pub const USER_FALLBACK: u32 = 65534;

/// Who a newborn becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewUser {
    /// The first id of the range plus the newborn's pid, which no other living process is.
    Own(UserRange),
    /// This id, which others have as well.
    Shared(u32),
}

impl NewUser {
    /// User and group of the process `pid`; none when the range has no id for it.
    #[must_use]
    pub fn id(self, pid: u32) -> Option<u32> {
        match self {
            Self::Own(users) => users.user_of(pid),
            Self::Shared(id) => Some(id),
        }
    }
}

/// What the broker may do on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Means {
    /// Whether it is root, with the capabilities of root.
    pub root: bool,
    /// The ids of users that processes have, where they exist for it.
    pub users: Option<UserRange>,
}

/// What is done, in order, and the namespaces that `clone` makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchPlan {
    /// CLONE_NEW* flags for `clone3`.
    pub clone_flags: u32,
    /// The newborn's steps.
    pub steps: Vec<Step>,
}

const fn flag(namespace: Namespace) -> i32 {
    match namespace {
        Namespace::User => libc::CLONE_NEWUSER,
        Namespace::Pid => libc::CLONE_NEWPID,
        Namespace::Mount => libc::CLONE_NEWNS,
        Namespace::Ipc => libc::CLONE_NEWIPC,
        Namespace::Uts => libc::CLONE_NEWUTS,
        Namespace::Cgroup => libc::CLONE_NEWCGROUP,
    }
}

fn flags(namespaces: &[Namespace], without: &[Namespace]) -> u32 {
    namespaces
        .iter()
        .filter(|n| !without.contains(n))
        .fold(0, |all, &n| all | flag(n).cast_unsigned())
}

impl LaunchPlan {
    /// The plan for a process of `policy` whose disk image, if it has one, has `disk_bytes`.
    #[must_use]
    pub fn new(policy: &Policy, disk_bytes: Option<u64>, means: Means) -> Self {
        let namespaces = &policy.namespaces;
        let limits = &Limits {
            file_size_bytes: match policy.limits.file_size_of_disk {
                true => disk_bytes,
                false => policy.limits.file_size_bytes,
            },
            ..policy.limits
        };
        let adjust = limits.oom_score_adj;
        let mut steps = vec![
            Step::NewSession,
            Step::OutOfMemory { adjust },
            Step::NeverMerge,
        ];
        steps.extend(policy.speculation.iter().map(|speculation| {
            let which = match speculation {
                Speculation::StoreBypass => libc::PR_SPEC_STORE_BYPASS,
                Speculation::IndirectBranch => libc::PR_SPEC_INDIRECT_BRANCH,
            };
            Step::GiveUpSpeculation {
                which: which.cast_unsigned(),
            }
        }));
        let clone_flags;
        if means.root {
            // Joining needs the rights of root, so it comes before the user is given up; the user
            // namespace comes after, so that it belongs to a user without rights.
            clone_flags = flags(&[Namespace::Pid], &[]);
            let shared = NewUser::Shared(USER_FALLBACK);
            let user = means.users.map_or(shared, NewUser::Own);
            // Root may raise a limit of the host's; the user that it becomes may not.
            steps.extend(limit_steps(limits));
            steps.extend([
                Step::JoinNetwork,
                Step::JoinEmptyRoot,
                Step::BecomeUser(user),
                Step::Unshare {
                    flags: flags(namespaces, &[Namespace::Pid, Namespace::Mount]),
                },
                Step::MapUser,
            ]);
        } else {
            clone_flags = flags(namespaces, &[]) | libc::CLONE_NEWNET.cast_unsigned();
            steps.push(Step::MapUser);
            if policy.fds.iter().any(|grant| grant.is == FdType::Folder) {
                steps.push(Step::TakeFolder);
            }
            steps.push(Step::EmptyRoot);
            steps.extend(limit_steps(limits));
        }
        steps.extend([
            Step::DropCapabilities,
            Step::NoNewPrivileges,
            Step::PlaceDescriptors,
            // Placing needs numbers beyond the limit.
            Step::Limit {
                resource: libc::RLIMIT_NOFILE,
                value: u64::from(limits.open_files),
            },
            Step::Execute,
        ]);
        Self { clone_flags, steps }
    }
}

fn limit_steps(limits: &Limits) -> impl Iterator<Item = Step> {
    let always = [
        (libc::RLIMIT_CORE, 0),
        (libc::RLIMIT_MEMLOCK, limits.locked_memory_bytes),
        (libc::RLIMIT_STACK, limits.stack_bytes),
        (libc::RLIMIT_MSGQUEUE, 0),
    ];
    let some = [
        limits.file_size_bytes.map(|n| (libc::RLIMIT_FSIZE, n)),
        limits.address_space_bytes.map(|n| (libc::RLIMIT_AS, n)),
    ];
    let all = always.into_iter().chain(some.into_iter().flatten());
    all.map(|(resource, value)| Step::Limit { resource, value })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_ipc::ident::ProcKind;

    fn plan(kind: ProcKind, means: Means) -> LaunchPlan {
        let policy = bulkhead_policies::load(kind, None, false).unwrap();
        LaunchPlan::new(&policy, None, means)
    }

    fn place(plan: &LaunchPlan, step: impl Fn(&Step) -> bool) -> Option<usize> {
        plan.steps.iter().position(step)
    }

    const ROOT: Means = Means {
        root: true,
        users: Some(UserRange::DEFAULT),
    };
    const USER: Means = Means {
        root: false,
        users: None,
    };

    #[test]
    fn root_is_given_up_before_the_user_namespace_and_after_joining() {
        for kind in ProcKind::ALL {
            let plan = plan(kind, ROOT);
            let join = place(&plan, |s| *s == Step::JoinEmptyRoot).unwrap();
            let drop = place(&plan, |s| matches!(s, Step::BecomeUser(_))).unwrap();
            let unshare = place(&plan, |s| matches!(s, Step::Unshare { .. })).unwrap();
            assert!(join < drop && drop < unshare);
            let own = NewUser::Own(UserRange::DEFAULT);
            assert_eq!(plan.steps[drop], Step::BecomeUser(own));
        }
    }

    #[test]
    fn users_are_those_of_the_range_and_one_for_all_without_it() {
        let users: UserRange = "100000-200000".parse().unwrap();
        let user = |users| {
            let plan = plan(ProcKind::Rng, Means { users, ..ROOT });
            plan.steps.iter().find_map(|step| match step {
                Step::BecomeUser(user) => Some(*user),
                _ => None,
            })
        };
        let own = user(Some(users)).unwrap();
        assert_eq!((own.id(7), own.id(100_001)), (Some(100_007), None));
        let shared = user(None).unwrap();
        assert_eq!((shared.id(7), shared.id(8)), (Some(65534), Some(65534)));
    }

    #[test]
    fn every_plan_ends_locked_down_and_executes() {
        for kind in ProcKind::ALL {
            for means in [ROOT, USER] {
                let plan = plan(kind, means);
                let tail = &plan.steps[plan.steps.len() - 5..];
                assert!(matches!(
                    tail,
                    [
                        Step::DropCapabilities,
                        Step::NoNewPrivileges,
                        Step::PlaceDescriptors,
                        Step::Limit { .. },
                        Step::Execute,
                    ]
                ));
            }
        }
    }

    #[test]
    fn every_namespace_of_the_policy_is_left_by_either_means() {
        let every = [
            libc::CLONE_NEWUSER,
            libc::CLONE_NEWPID,
            libc::CLONE_NEWIPC,
            libc::CLONE_NEWUTS,
            libc::CLONE_NEWCGROUP,
        ]
        .into_iter()
        .fold(0, |all, f| all | f.cast_unsigned());
        for means in [ROOT, USER] {
            let plan = plan(ProcKind::Blk, means);
            let unshared = plan.steps.iter().fold(plan.clone_flags, |all, s| match s {
                Step::Unshare { flags } => all | flags,
                _ => all,
            });
            assert_eq!(unshared & every, every);
            let joins = plan.steps.contains(&Step::JoinEmptyRoot)
                && plan.steps.contains(&Step::JoinNetwork);
            let mount_and_net = (libc::CLONE_NEWNS | libc::CLONE_NEWNET).cast_unsigned();
            assert!(joins || unshared & mount_and_net == mount_and_net);
        }
    }

    #[test]
    fn files_of_a_disk_process_end_where_its_disk_ends() {
        let policy = bulkhead_policies::load(ProcKind::Blk, None, false).unwrap();
        let limits = |disk_bytes| {
            let plan = LaunchPlan::new(&policy, disk_bytes, ROOT);
            plan.steps.iter().find_map(|step| match *step {
                Step::Limit { resource, value } if resource == libc::RLIMIT_FSIZE => Some(value),
                _ => None,
            })
        };
        assert_eq!(limits(Some(12345)), Some(12345));
        // A block device has an end of its own.
        assert_eq!(limits(None), None);
    }

    #[test]
    fn host_ends_every_kind_before_a_broker_and_never_merges_its_pages() {
        for kind in ProcKind::ALL {
            for means in [ROOT, USER] {
                let plan = plan(kind, means);
                let more = |s: &Step| matches!(s, Step::OutOfMemory { adjust: 1.. });
                assert!(place(&plan, more).is_some(), "{kind}");
                assert!(plan.steps.contains(&Step::NeverMerge), "{kind}");
            }
        }
    }

    #[test]
    fn core_files_are_never_dumped() {
        let plan = plan(ProcKind::Vcpu, ROOT);
        assert!(plan.steps.contains(&Step::Limit {
            resource: libc::RLIMIT_CORE,
            value: 0
        }));
    }
}
