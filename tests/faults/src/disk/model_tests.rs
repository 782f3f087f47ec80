#![allow(
    clippy::cast_possible_truncation,
    reason = "the disks of these tests are small"
)]

use super::*;
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::BTreeSet;

const SECTORS: u64 = 16;
const DISK: usize = (SECTORS * SECTOR_BYTES) as usize;

/// Something that a guest or the disk does.
#[derive(Debug, Clone)]
enum Act {
    /// Sectors from the first on, with this byte; torn after so many bytes.
    Write(u64, u64, u8, Option<u64>),
    Zero(u64, u64),
    Flush,
    /// A flush that is said to be done.
    Lie,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let range = || (0..SECTORS, 1..=4_u64).prop_map(|(at, n)| (at, n.min(SECTORS - at)));
    let torn = proptest::option::weighted(0.2, 0..2048_u64);
    let act = prop_oneof![
        6 => (range(), 1..=255_u8, torn).prop_map(|((at, n), byte, torn)| Act::Write(at, n, byte, torn)),
        1 => range().prop_map(|(at, n)| Act::Zero(at, n)),
        2 => Just(Act::Flush),
        1 => Just(Act::Lie),
    ];
    vec(act, 0..40)
}

fn perform(model: &mut Model, act: &Act) {
    match *act {
        Act::Write(at, n, byte, torn) => {
            let data = vec![byte; (n * SECTOR_BYTES) as usize];
            model.write(at * SECTOR_BYTES, &data, torn).unwrap();
        }
        Act::Zero(at, n) => model.zero(at * SECTOR_BYTES, n * SECTOR_BYTES).unwrap(),
        Act::Flush => model.flush(),
        Act::Lie => {}
    }
}

/// What is read after some acts, computed byte for byte.
fn reference(acts: &[Act]) -> Vec<u8> {
    let mut image = vec![0; DISK];
    for act in acts {
        let (at, n, byte) = match *act {
            Act::Write(at, n, byte, _) => (at, n, byte),
            Act::Zero(at, n) => (at, n, 0),
            Act::Flush | Act::Lie => continue,
        };
        for sector in at..at + n {
            let start = (sector * SECTOR_BYTES) as usize;
            image[start..start + 512].fill(byte);
        }
    }
    image
}

/// The acts up to the last honest flush.
fn flushed(acts: &[Act]) -> usize {
    let last = acts.iter().rposition(|act| matches!(act, Act::Flush));
    last.map_or(0, |at| at + 1)
}

fn model_of(acts: &[Act]) -> Model {
    let mut model = Model::new(vec![0; DISK]);
    acts.iter().for_each(|act| perform(&mut model, act));
    model
}

proptest! {
    #[test]
    fn reads_give_what_was_written_last(acts in acts()) {
        let model = model_of(&acts);
        prop_assert_eq!(model.content(), reference(&acts));
        prop_assert_eq!(model.read(512, 1024), &reference(&acts)[512..1536]);
    }

    #[test]
    fn what_was_flushed_survives_and_nothing_else_does(acts in acts()) {
        let mut model = model_of(&acts);
        let stable = reference(&acts[..flushed(&acts)]);
        prop_assert_eq!(model.medium(), &stable[..]);
        let is_torn = |act: &Act| matches!(act, Act::Write(_, _, _, Some(_)));
        if !acts[flushed(&acts)..].iter().any(is_torn) {
            prop_assert_eq!(&model.survivors(Cut::Everything), &stable);
        }
        model.power_cut(Cut::Everything);
        prop_assert!(model.is_flushed());
        prop_assert_eq!(model.content(), model.medium());
    }

    /// Each byte is what it was when it was flushed, or what something after that has made of it.
    #[test]
    fn no_cut_leaves_what_was_never_written(acts in acts(), seed: u64) {
        let model = model_of(&acts);
        let from = flushed(&acts);
        let mut may_be: Vec<BTreeSet<u8>> =
            reference(&acts[..from]).into_iter().map(|byte| BTreeSet::from([byte])).collect();
        for end in from..acts.len() {
            let after = reference(&acts[..=end]);
            may_be.iter_mut().zip(after).for_each(|(set, byte)| { set.insert(byte); });
        }
        for cut in [Cut::Everything, Cut::Seeded(seed)] {
            let left = model.survivors(cut);
            let wrong = left.iter().zip(&may_be).position(|(byte, set)| !set.contains(byte));
            prop_assert_eq!(wrong, None);
        }
    }

    #[test]
    fn sector_survives_whole_or_not_at_all(mut acts in acts(), seed: u64) {
        for act in &mut acts {
            if let Act::Write(_, _, _, torn) = act {
                *torn = None;
            }
        }
        let left = model_of(&acts).survivors(Cut::Seeded(seed));
        for sector in left.chunks_exact(512) {
            prop_assert!(sector.iter().all(|byte| *byte == sector[0]));
        }
    }

    #[test]
    fn small_cache_loses_less_and_reads_the_same(acts in acts()) {
        let mut small = Model::with_cache(vec![0; DISK], 2048);
        acts.iter().for_each(|act| perform(&mut small, act));
        prop_assert!(small.unflushed_bytes <= 2048);
        prop_assert_eq!(small.content(), reference(&acts));
        small.flush();
        prop_assert_eq!(small.medium(), reference(&acts));
    }
}

fn written(at: u64, bytes: usize, torn: Option<u64>) -> Model {
    let mut model = Model::new(vec![0; DISK]);
    model.write(at, &vec![7; bytes], torn).unwrap();
    model
}

#[test]
fn torn_write_leaves_exactly_its_first_bytes() {
    let model = written(512, 1024, Some(700));
    let left = model.survivors(Cut::Everything);
    assert_eq!(left[512..1212], [7; 700]);
    assert!(left[1212..].iter().all(|byte| *byte == 0));
    assert_eq!(model.content()[512..1536], [7; 1024]);
}

#[test]
fn torn_write_is_whole_once_it_is_flushed() {
    let mut model = written(512, 1024, Some(700));
    model.flush();
    assert_eq!(model.survivors(Cut::Everything)[512..1536], [7; 1024]);
}

#[test]
fn flush_after_a_lie_makes_up_for_it() {
    // A lie is a flush that does not take place.
    let mut model = written(0, 512, None);
    assert_eq!(model.survivors(Cut::Everything)[..512], [0; 512]);
    model.flush();
    assert_eq!(model.survivors(Cut::Everything)[..512], [7; 512]);
}

#[test]
fn seed_decides_what_survives_and_repeats_it() {
    let model = written(0, DISK, None);
    let left = |seed| model.survivors(Cut::Seeded(seed));
    assert_eq!(left(1), left(1));
    assert_ne!(left(1), left(2));
    let survived = left(3).chunks_exact(512).filter(|s| s[0] == 7).count();
    assert!((1..16).contains(&survived), "{survived} sectors of 16");
}

#[test]
fn what_is_not_on_the_disk_is_refused_and_changes_nothing() {
    let mut model = Model::new(vec![0; DISK]);
    let end = DISK as u64;
    assert!(model.write(end - 1, &[1, 2], None).is_err());
    assert!(model.write(u64::MAX, &[1, 2], None).is_err());
    assert!(model.zero(end, 1).is_err());
    assert!(model.is_flushed());
    assert_eq!(model.read(end - 1, 10), [0]);
    assert_eq!(model.read(u64::MAX, u64::MAX), [0; 0]);
}
