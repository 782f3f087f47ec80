//! The broker's part: a VM is configured, born, talked to and waited for.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::Channel;
use bulkhead_ipc::host::host_needs_quirks;
use bulkhead_ipc::legacy_page::{LEGACY_PAGE_BYTES, LegacyPage};
use bulkhead_ipc::protocol::birth::{HugePages, VcpuConfig};
use bulkhead_ipc::protocol::vcpu::{FromVcpu, Outcome, ToVcpu};
use bulkhead_ipc::shared::{Doorbell, sealed_memfd};
use bulkhead_vcpu::setup::{LegacyFds, Resources};
use bulkhead_vcpu::start::{self, Remains, StartError, Walls};

use crate::guest;
use crate::legacy::{Legacy, Manners};
use crate::program::{self, Program};

/// Longest time that anything in these tests takes on a slow host.
const PATIENCE: Duration = Duration::from_secs(30);

/// Walls that only count.
#[derive(Debug, Default)]
pub(crate) struct CountingWalls {
    pub(crate) locked: Mutex<Vec<&'static str>>,
}

impl Walls for CountingWalls {
    fn lock_thread(&self, thread: &'static str) -> Result<(), String> {
        self.locked.lock().unwrap().push(thread);
        Ok(())
    }

    fn announce(&self) -> Result<(), String> {
        Ok(())
    }
}

/// The VM as a test configures it.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) vcpus: u8,
    pub(crate) memory_bytes: u64,
    pub(crate) cmdline: &'static str,
    pub(crate) manners: Manners,
    pub(crate) core: Option<File>,
    /// Run the program, behind the walls of its policy, instead of its library.
    pub(crate) program: bool,
    /// Do as on a host whose KVM lacks nothing; the guest of these tests needs nothing more.
    pub(crate) complete_kvm: bool,
}

impl Plan {
    /// One vCPU and 64 MiB, for a guest that does `cmdline`.
    pub(crate) fn of(cmdline: &'static str) -> Self {
        Self {
            vcpus: 1,
            memory_bytes: 64 << 20,
            cmdline,
            manners: Manners::Honest,
            core: None,
            program: false,
            complete_kvm: false,
        }
    }
}

/// A VM that runs.
#[derive(Debug)]
pub(crate) struct Vm {
    channel: Option<Channel>,
    output: Arc<Mutex<Vec<u8>>>,
    pub(crate) walls: Arc<CountingWalls>,
    stop: Arc<AtomicBool>,
    life: Life,
    legacy: JoinHandle<()>,
}

#[derive(Debug)]
enum Life {
    Thread(JoinHandle<Result<Remains, StartError>>),
    Program(Program),
}

impl Life {
    fn is_over(&mut self) -> bool {
        match self {
            Self::Thread(thread) => thread.is_finished(),
            Self::Program(program) => program.is_over(),
        }
    }
}

/// How a VM ended, with everything else that it said.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) outcome: Outcome,
    pub(crate) output: String,
    pub(crate) said: Vec<FromVcpu>,
}

impl Vm {
    pub(crate) fn start(plan: Plan) -> Self {
        let page = sealed_memfd("legacy", LEGACY_PAGE_BYTES).unwrap();
        let [kick, interrupt, reply] = std::array::from_fn(|_| Doorbell::new().unwrap());
        let (output, stop) = (Arc::default(), Arc::new(AtomicBool::new(false)));
        let legacy = Legacy {
            page: LegacyPage::map(page.try_clone().unwrap()).unwrap(),
            kick: kick.try_clone().unwrap(),
            interrupt: interrupt.try_clone().unwrap(),
            reply: reply.try_clone().unwrap(),
            output: Arc::clone(&output),
            stop: Arc::clone(&stop),
        };
        let manners = plan.manners;
        let legacy = std::thread::spawn(move || legacy.serve(manners));
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        let resources = Resources {
            kvm: kvm.expect("these tests need /dev/kvm").into(),
            kernel: guest::kernel(),
            initrd: None,
            core: plan.core,
            legacy: LegacyFds {
                page,
                kick: fd(kick),
                interrupt: fd(interrupt),
                reply: fd(reply),
            },
            devices: Vec::new(),
            adoption: None,
        };
        let config = VcpuConfig {
            vcpus: plan.vcpus,
            memory_bytes: plan.memory_bytes,
            huge_pages: HugePages::Transparent,
            cmdline: plan.cmdline.to_owned(),
            quirks: !plan.complete_kvm && host_needs_quirks(Path::new("/sys")),
            devices: Vec::new(),
            legacy_generation: 1,
            legacy_output_position: 0,
        };
        let (broker, process) = Channel::pair().unwrap();
        let walls = Arc::new(CountingWalls::default());
        let life = if plan.program {
            Life::Program(program::start(config, resources, &broker, process))
        } else {
            let its_walls = Arc::clone(&walls);
            Life::Thread(std::thread::spawn(move || {
                start::run(config, resources, &process, &its_walls)
            }))
        };
        Self {
            channel: Some(broker),
            output,
            walls,
            stop,
            life,
            legacy,
        }
    }

    pub(crate) fn send(&self, message: &ToVcpu) {
        self.channel.as_ref().unwrap().send(message, &[]).unwrap();
    }

    pub(crate) fn hear(&self) -> FromVcpu {
        let channel = self.channel.as_ref().unwrap();
        match channel.recv_within(PATIENCE) {
            Ok((message, _)) => message,
            Err(error) => panic!("{error}: {:?}", self.life),
        }
    }

    pub(crate) fn output(&self) -> Vec<u8> {
        self.output.lock().unwrap().clone()
    }

    /// Waits until the guest has written at least `bytes` bytes.
    pub(crate) fn wait_for_output(&self, bytes: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.output().len() < bytes {
            assert!(Instant::now() < deadline, "{:?}", self.output());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until the guest writes nothing more; how many bytes there are then.
    pub(crate) fn settled_output(&self) -> usize {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let before = self.output().len();
            std::thread::sleep(Duration::from_millis(30));
            if self.output().len() == before {
                return before;
            }
            assert!(Instant::now() < deadline, "it goes on writing");
        }
    }

    /// The broker dies and another one takes its place.
    pub(crate) fn change_broker(&mut self) {
        self.channel = None;
        let Life::Program(program) = &self.life else {
            panic!("only a program can be adopted");
        };
        self.channel = Some(program.adopt());
    }

    /// Waits for the VM to say how it ended, then lets it go.
    pub(crate) fn end(self) -> End {
        let mut said = Vec::new();
        let outcome = loop {
            match self.hear() {
                FromVcpu::Ended(outcome) => break outcome,
                fault @ FromVcpu::LegacyFault { .. } => {
                    said.push(fault);
                    self.send(&ToVcpu::LegacyLost);
                }
                other => said.push(other),
            }
        };
        // One that was killed is gone already.
        let channel = self.channel.as_ref().unwrap();
        let _told = channel.send(&ToVcpu::Kill, &[]);
        let output = self.leave();
        End {
            outcome,
            output: String::from_utf8_lossy(&output).into_owned(),
            said,
        }
    }

    /// Waits for the process to end by itself; gives what the guest wrote.
    pub(crate) fn leave(mut self) -> Vec<u8> {
        let deadline = Instant::now() + PATIENCE;
        while !self.life.is_over() {
            assert!(Instant::now() < deadline, "the process does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
        if let Life::Thread(thread) = self.life {
            let _remains = thread.join().unwrap().unwrap();
        }
        // The legacy process carries out what was posted before it stops.
        self.stop.store(true, Ordering::Release);
        self.legacy.join().unwrap();
        let output = self.output.lock().unwrap();
        output.clone()
    }
}

/// Repeats what must not wait until it takes less than `limit`: a busy host may be slow, but not each
/// time. What does wait, does it each time.
pub(crate) fn soon(limit: Duration, attempt: impl Fn()) {
    let took = |_| {
        let start = Instant::now();
        attempt();
        start.elapsed()
    };
    let times: Vec<_> = (0..5).map(took).take_while(|took| *took >= limit).collect();
    assert!(times.len() < 5, "never within {limit:?}: {times:?}");
}

fn fd(bell: Doorbell) -> OwnedFd {
    use std::os::fd::AsFd;
    bell.as_fd().try_clone_to_owned().unwrap()
}
