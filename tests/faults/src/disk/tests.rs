use super::*;
use nix::fcntl::{FallocateFlags, fallocate};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::time::Instant;

const BYTES: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

type Told = Arc<Mutex<Vec<DiskEvent>>>;

fn mounted(rules: DiskRules) -> (FaultyDisk, File, Told) {
    let told = Told::default();
    let events = Arc::clone(&told);
    let tell = move |event| events.lock().unwrap().push(event);
    let disk = FaultyDisk::mount(BYTES, rules, tell).expect("FUSE, for root");
    let file = open(&disk);
    (disk, file, told)
}

fn open(disk: &FaultyDisk) -> File {
    File::options()
        .read(true)
        .write(true)
        .open(disk.path())
        .unwrap()
}

fn rule(op: DiskOp, action: DiskAction) -> DiskRules {
    DiskRules::new().with(DiskRule::next(op, action)).unwrap()
}

fn errno<T: fmt::Debug>(result: io::Result<T>) -> Option<i32> {
    result.unwrap_err().raw_os_error()
}

#[test]
fn what_was_flushed_survives_a_power_cut_and_the_rest_is_lost() {
    let (disk, file, _) = mounted(DiskRules::new());
    file.write_all_at(&[1; 4096], 0).unwrap();
    file.sync_data().unwrap();
    file.write_all_at(&[2; 4096], 4096).unwrap();
    let mut read = [0; 8192];
    file.read_exact_at(&mut read, 0).unwrap();
    assert_eq!(read[4096..], [2; 4096]);
    assert_eq!(disk.flushed_image()[4096..8192], [0; 4096]);
    disk.power_cut();
    assert_eq!(errno(file.sync_data()), Some(libc::EIO), "its host is dead");
    open(&disk).read_exact_at(&mut read, 0).unwrap();
    assert_eq!(read[..4096], [1; 4096]);
    assert_eq!(read[4096..], [0; 4096]);
    assert_eq!(disk.image(), disk.flushed_image());
}

#[test]
fn errors_are_given_once_and_told_with_their_place() {
    let (_disk, file, told) = mounted(rule(DiskOp::Write, DiskAction::Full));
    assert_eq!(errno(file.write_at(&[1; 512], 1024)), Some(libc::ENOSPC));
    assert_eq!(file.write_at(&[1; 512], 1024).unwrap(), 512);
    let told = told.lock().unwrap();
    let [event] = told[..] else {
        panic!("{told:?}");
    };
    assert_eq!(
        (event.op, event.offset, event.bytes),
        (DiskOp::Write, 1024, 512)
    );
    assert_eq!((event.action, event.handle), (DiskAction::Full, 1));
}

#[test]
fn rules_can_be_added_while_it_is_used() {
    let (disk, file, told) = mounted(DiskRules::new());
    file.sync_data().unwrap();
    disk.add(DiskRule::next(DiskOp::Flush, DiskAction::Error))
        .unwrap();
    assert_eq!(errno(file.sync_data()), Some(libc::EIO));
    file.sync_data().unwrap();
    disk.add(DiskRule::always(DiskOp::Read, DiskAction::Error))
        .unwrap();
    let mut read = [0; 512];
    assert_eq!(errno(file.read_at(&mut read, 0)), Some(libc::EIO));
    disk.heal();
    file.read_exact_at(&mut read, 0).unwrap();
    assert_eq!(told.lock().unwrap().len(), 2);
}

#[test]
fn lying_flush_loses_what_it_said_to_have_kept() {
    let (disk, file, _) = mounted(rule(DiskOp::Flush, DiskAction::Lie));
    file.write_all_at(&[1; 512], 0).unwrap();
    file.sync_data().unwrap();
    disk.power_cut();
    assert_eq!(disk.image()[..512], [0; 512]);
}

#[test]
fn torn_write_survives_in_part() {
    let (disk, file, _) = mounted(rule(DiskOp::Write, DiskAction::Torn { bytes: 700 }));
    file.write_all_at(&[1; 4096], 0).unwrap();
    disk.power_cut();
    assert_eq!(disk.image()[..700], [1; 700]);
    assert_eq!(disk.image()[700..4096], [0; 4096 - 700]);
}

#[test]
fn delayed_write_takes_its_time_and_others_do_not() {
    let delay = Duration::from_millis(400);
    let (disk, file, told) = mounted(rule(DiskOp::Write, DiskAction::Delay(delay)));
    let began = Instant::now();
    std::thread::scope(|scope| {
        let delayed = scope.spawn(|| file.write_at(&[1; 512], 0).unwrap());
        while told.lock().unwrap().is_empty() {
            std::thread::yield_now();
        }
        file.write_all_at(&[2; 512], 512).unwrap();
        let mut read = [9; 1024];
        file.read_exact_at(&mut read, 0).unwrap();
        assert!(began.elapsed() < delay, "others are not delayed");
        assert_eq!((read[0], read[512]), (0, 2));
        assert_eq!(delayed.join().unwrap(), 512);
    });
    assert!(began.elapsed() >= delay);
    assert_eq!(disk.image()[..512], [1; 512]);
}

#[test]
fn what_hangs_is_let_go() {
    let (disk, file, _) = mounted(rule(DiskOp::Write, DiskAction::Hang));
    disk.keep_log();
    std::thread::scope(|scope| {
        let hung = scope.spawn(|| file.write_at(&[1; 512], 0).unwrap());
        assert!(disk.until_hung(PATIENCE));
        let mut read = [9; 512];
        file.read_exact_at(&mut read, 0).unwrap();
        assert_eq!(read, [0; 512], "it is not done yet");
        assert_eq!((disk.hung(), disk.let_go()), (1, 1));
        assert_eq!(hung.join().unwrap(), 512);
    });
    assert_eq!(disk.image()[..512], [1; 512]);
    let ops: Vec<DiskOp> = disk.log().iter().map(|access| access.op).collect();
    assert_eq!(
        ops,
        [DiskOp::Read, DiskOp::Write],
        "in the order of their effect"
    );
}

#[test]
fn power_cut_ends_what_hangs_and_it_never_lands() {
    let (disk, file, _) = mounted(rule(DiskOp::Write, DiskAction::Hang));
    std::thread::scope(|scope| {
        let hung = scope.spawn(|| errno(file.write_at(&[1; 512], 0)));
        assert!(disk.until_hung(PATIENCE));
        disk.power_cut();
        assert_eq!(hung.join().unwrap(), Some(libc::EIO));
    });
    assert_eq!(disk.image()[..512], [0; 512]);
}

#[test]
fn dropping_it_answers_what_hangs_and_leaves_no_mount() {
    let (disk, file, _) = mounted(rule(DiskOp::Flush, DiskAction::Hang));
    let place = disk.mountpoint.path().to_owned();
    std::thread::scope(|scope| {
        let hung = scope.spawn(|| errno(file.sync_data()));
        assert!(disk.until_hung(PATIENCE));
        drop(disk);
        assert_eq!(hung.join().unwrap(), Some(libc::EIO));
    });
    assert_eq!(errno(file.write_at(&[1; 512], 0)), Some(libc::EIO));
    drop(file);
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(place.to_str().unwrap()), "{mounts}");
    assert!(!place.exists());
}

#[test]
fn ranges_are_made_zero_and_that_counts_as_a_write() {
    let (disk, file, told) = mounted(DiskRules::new());
    file.write_all_at(&[1; 8192], 0).unwrap();
    file.sync_data().unwrap();
    disk.add(DiskRule::next(DiskOp::Write, DiskAction::Error))
        .unwrap();
    let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    for mode in [
        FallocateFlags::FALLOC_FL_PUNCH_HOLE,
        FallocateFlags::FALLOC_FL_ZERO_RANGE,
    ] {
        let refused = fallocate(&file, keep | mode, 0, 4096);
        assert_eq!(
            refused.is_err(),
            mode == FallocateFlags::FALLOC_FL_PUNCH_HOLE
        );
    }
    assert_eq!(disk.image()[..4096], [0; 4096]);
    assert_eq!(disk.image()[4096..8192], [1; 4096]);
    assert_eq!(told.lock().unwrap().len(), 1);
    disk.power_cut();
    assert_eq!(disk.image()[..8192], [1; 8192], "it was not flushed");
}

#[test]
fn disk_keeps_its_size() {
    let (disk, file, _) = mounted(DiskRules::new());
    assert_eq!(file.metadata().unwrap().len(), BYTES);
    assert_eq!(
        errno(file.write_at(&[1; 1024], BYTES - 512)),
        Some(libc::EFBIG)
    );
    assert_eq!(disk.image().len() as u64, BYTES);
}
