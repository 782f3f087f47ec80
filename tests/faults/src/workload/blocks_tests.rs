#![allow(
    clippy::cast_possible_truncation,
    reason = "the disks of these tests are small"
)]

use super::*;

const SEED: u64 = 11;
const SECTORS: u64 = 256;

/// A guest and its disk, which the tests let go wrong.
struct Guest {
    checker: Blocks,
    disk: Vec<u8>,
}

impl Guest {
    fn new() -> Self {
        let disk = vec![0; SECTORS as usize * SECTOR];
        let checker = Blocks::new(SEED);
        let mut guest = Self { checker, disk };
        guest.boot(1);
        guest
    }

    fn says(&mut self, line: &str) {
        self.checker.record(Duration::ZERO, line);
    }

    fn boot(&mut self, first: u64) {
        self.says("BH hello version=1 mode=blocks");
        self.says(&format!(
            "BH blocks.begin sectors={SECTORS} seed={SEED} first={first} seconds=5"
        ));
    }

    fn begins(&mut self, round: u64) {
        self.says(&format!("BH blocks.round round={round} whole=1"));
    }

    fn writes(&mut self, round: u64) {
        self.begins(round);
        for extent in blocks::extents(SEED, round, SECTORS) {
            self.write(round, extent);
        }
    }

    fn write(&mut self, round: u64, Extent { sector, count }: Extent) {
        let (from, to) = (sector as usize * SECTOR, (sector + count) as usize * SECTOR);
        blocks::fill(SEED, round, sector, &mut self.disk[from..to]);
    }

    fn flushes(&mut self, round: u64, refused: u64) {
        self.says(&format!(
            "BH blocks.flushed round={round} refused={refused} whole=1"
        ));
    }

    fn refused(&mut self, round: u64, op: &str, Extent { sector, count }: Extent) {
        self.says(&format!(
            "BH blocks.refused round={round} op={op} sector={sector} count={count} status=1 whole=1"
        ));
    }

    fn rounds(&mut self, rounds: std::ops::RangeInclusive<u64>) {
        for round in rounds {
            self.writes(round);
            self.flushes(round, 0);
        }
    }

    fn looks(&mut self) {
        let disk = self.disk.clone();
        self.checker.image(&disk);
    }

    fn ends(mut self) -> Verified {
        self.looks();
        Box::new(self.checker).finish()
    }
}

/// The first error holds this text.
fn refuses(verified: &Verified, text: &str) {
    assert!(
        verified.errors.first().is_some_and(|e| e.contains(text)),
        "{verified:?}"
    );
    assert!(!verified.held());
}

/// A sector that the first round wrote and the second did not, or the other way round.
fn only_in(round: u64, other: u64) -> usize {
    let covers = |round, sector| {
        let mut extents = blocks::extents(SEED, round, SECTORS);
        extents.any(|e| (e.sector..e.sector + e.count).contains(&sector))
    };
    let found = (0..SECTORS).find(|s| covers(round, *s) && !covers(other, *s));
    usize::try_from(found.expect("the seed has one")).unwrap()
}

fn put(guest: &mut Guest, at: usize, round: u64) {
    let sector = at as u64;
    guest.write(round, Extent { sector, count: 1 });
}

#[test]
fn undisturbed_run_is_accepted() {
    let mut guest = Guest::new();
    guest.rounds(1..=9);
    let verified = guest.ends();
    assert!(verified.held(), "{verified:?}");
    assert!(verified.count > 100, "{verified:?}");
}

#[test]
fn nothing_flushed_or_no_image_verifies_nothing() {
    let mut guest = Guest::new();
    guest.writes(1);
    refuses(&guest.ends(), "nothing was verified");
    let mut guest = Guest::new();
    guest.rounds(1..=3);
    refuses(&Box::new(guest.checker).finish(), "nothing was verified");
    refuses(&Box::new(Blocks::new(1)).finish(), "nothing was verified");
}

#[test]
fn unflushed_round_may_be_there_in_part_and_need_not() {
    let mut guest = Guest::new();
    guest.rounds(1..=3);
    guest.begins(4);
    let mut half = Guest {
        disk: guest.disk.clone(),
        checker: Blocks::new(SEED),
    };
    half.boot(1);
    half.rounds(1..=3);
    half.begins(4);
    let extent = blocks::extents(SEED, 4, SECTORS).next().unwrap();
    half.write(4, Extent { count: 1, ..extent });
    assert!(guest.ends().held());
    assert!(half.ends().held());
}

#[test]
fn lost_flush_is_refused() {
    let mut guest = Guest::new();
    guest.rounds(1..=2);
    let before = guest.disk.clone();
    guest.rounds(3..=3);
    guest.disk = before;
    refuses(&guest.ends(), "which is older");
}

#[test]
fn one_sector_that_is_older_is_refused() {
    let mut guest = Guest::new();
    guest.rounds(1..=2);
    let at = only_in(2, 1);
    guest.disk[at * SECTOR..(at + 1) * SECTOR].fill(0);
    refuses(
        &guest.ends(),
        &format!("sector {at}: round 2 was flushed, 0 is there"),
    );
}

#[test]
fn write_that_comes_back_from_the_past_is_refused() {
    let mut guest = Guest::new();
    guest.rounds(1..=20);
    let both = |at: &usize| guest.checker.sectors[*at].base == 20;
    let at = (0..SECTORS as usize).find(both).unwrap();
    put(&mut guest, at, 3);
    refuses(&guest.ends(), "which is older");
}

#[test]
fn round_that_had_not_begun_is_refused() {
    let mut guest = Guest::new();
    guest.rounds(1..=2);
    put(&mut guest, 5, 3);
    refuses(&guest.ends(), "which had not begun");
}

#[test]
fn round_at_a_place_that_it_did_not_write_is_refused() {
    let mut guest = Guest::new();
    guest.rounds(1..=2);
    put(&mut guest, only_in(1, 2), 2);
    refuses(&guest.ends(), "which did not write there");
}

#[test]
fn torn_sector_and_foreign_bytes_are_refused() {
    for spoilt in [0, 100, SECTOR - 1] {
        let mut guest = Guest::new();
        guest.rounds(1..=2);
        guest.disk[only_in(2, 1) * SECTOR + spoilt] ^= 1;
        refuses(&guest.ends(), "nobody has ever written");
    }
    let mut guest = Guest::new();
    guest.rounds(1..=2);
    guest.disk.extend([1; SECTOR]);
    refuses(&guest.ends(), "none of the guest's");
}

#[test]
fn refused_write_leaves_its_place_open_until_it_is_written_again() {
    let extent = blocks::extents(SEED, 2, SECTORS).next().unwrap();
    for landed in [false, true] {
        let mut guest = Guest::new();
        guest.rounds(1..=1);
        let before = guest.disk.clone();
        guest.writes(2);
        guest.refused(2, "write", extent);
        guest.flushes(2, 1);
        if !landed {
            let from = extent.sector as usize * SECTOR;
            let to = from + extent.count as usize * SECTOR;
            guest.disk[from..to].copy_from_slice(&before[from..to]);
        }
        let verified = guest.ends();
        assert_eq!(
            (verified.errors.len(), verified.refused),
            (0, 1),
            "{verified:?}"
        );
        assert!(
            !verified.held(),
            "an error that the guest has seen needs a fault"
        );
    }
}

#[test]
fn refused_flush_makes_nothing_certain_and_the_next_one_not_what_was_before() {
    let mut guest = Guest::new();
    guest.rounds(1..=1);
    let before = guest.disk.clone();
    guest.writes(2);
    guest.refused(
        2,
        "flush",
        Extent {
            sector: 0,
            count: 0,
        },
    );
    guest.begins(3);
    guest.disk = before;
    for extent in blocks::extents(SEED, 3, SECTORS) {
        guest.write(3, extent);
    }
    guest.flushes(3, 1);
    assert_eq!(guest.ends().errors, [""; 0]);
}

#[test]
fn refused_request_that_was_not_told_is_missed() {
    let mut guest = Guest::new();
    guest.writes(1);
    guest.flushes(1, 1);
    refuses(&guest.ends(), "1 requests were refused, 0 were told");
}

#[test]
fn missing_records_are_missed() {
    let mut guest = Guest::new();
    guest.rounds(1..=1);
    guest.rounds(3..=3);
    refuses(&guest.ends(), "round 3 after round 1");
}

#[test]
fn next_life_goes_on_with_what_survived() {
    let mut guest = Guest::new();
    guest.rounds(1..=2);
    let flushed = guest.disk.clone();
    guest.writes(3);
    guest.disk = flushed;
    guest.looks();
    guest.boot(3);
    guest.rounds(3..=5);
    let verified = guest.ends();
    assert!(verified.held(), "{verified:?}");
}

#[test]
fn next_life_that_finds_less_than_was_flushed_is_refused() {
    let mut guest = Guest::new();
    guest.rounds(1..=4);
    guest.boot(4);
    refuses(&guest.ends(), "the guest finds round 3");
    let mut guest = Guest::new();
    guest.rounds(1..=4);
    guest.boot(6);
    refuses(&guest.ends(), "the guest finds round 5");
}

#[test]
fn unflushed_round_of_a_past_life_is_not_made_certain_by_the_next() {
    let mut guest = Guest::new();
    guest.rounds(1..=2);
    let flushed = guest.disk.clone();
    guest.writes(3);
    guest.boot(3);
    guest.disk = flushed;
    guest.rounds(3..=4);
    assert!(guest.ends().held());
}

#[test]
fn what_survived_one_power_cut_must_survive_the_next() {
    let mut guest = Guest::new();
    guest.rounds(1..=2);
    let flushed = guest.disk.clone();
    guest.writes(3);
    guest.looks();
    guest.boot(4);
    guest.disk = flushed;
    refuses(&guest.ends(), "round 3 was flushed");
}

#[test]
fn errors_that_the_guest_found_are_errors() {
    let mut guest = Guest::new();
    guest.rounds(1..=2);
    guest.says("BH error mode=blocks kind=data sector=5 expected=1 found=0");
    refuses(&guest.ends(), "kind=data sector=5");
}
