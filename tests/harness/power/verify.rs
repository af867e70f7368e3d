//! Opens the pool that is left, and finds the one batch after which it was.

use std::collections::BTreeMap;
use std::path::Path;

use super::model::{BLOCK, BLOCKS, Batch, Model, Stamp, Stream, UNFLUSHED_MAX, Volume, Work};
use crate::System;

/// What a pool was found to hold.
type Found = BTreeMap<String, (bool, Vec<Stamp>)>;

/// Opens the pool at `path`, as after a failure of the power: nothing of the dead daemon's memory is
/// there.
///
/// # Errors
/// What is wrong with it, before or after it is opened.
pub fn open(path: &Path) -> Result<System, String> {
    let mut system = System::empty();
    system.move_pool(path.to_owned());
    let report = system.cli().output(&[
        "--output",
        "json",
        "pool",
        "check",
        "--offline",
        path.to_str().expect("paths of tests are text"),
    ]);
    let report: serde_json::Value = serde_json::from_slice(&report.stdout)
        .map_err(|_| String::from_utf8_lossy(&report.stderr).into_owned())?;
    let findings = report["findings"].as_array().ok_or("a report without findings")?;
    // Of a superblock's two copies the second one may be missing.
    if findings.iter().any(|finding| finding["code"] != "K11") {
        return Err(format!("check of what is left: {findings:?}"));
    }
    system.try_spawn().map_err(|log| format!("the pool does not open: {log}"))?;
    Ok(system)
}

/// Finds the batch after which the pool is, no less than `durable`, and leaves `stream` there: its
/// next batch is the first of which something may be missing. Returns the batches of which nothing is
/// left.
///
/// `stream` must be in the state that the pool was in for sure, before batch `durable`.
///
/// # Errors
/// There is none; what differs.
pub fn find(system: &System, stream: &mut Stream, durable: u32) -> Result<(), String> {
    let found = read(system)?;
    while stream.number < durable {
        stream.advance();
    }
    let mut why = String::new();
    for _ in 0..=UNFLUSHED_MAX {
        let mut after = stream.clone();
        let batch = after.advance();
        match settle(&found, &stream.model, &batch, &after.model) {
            Ok(model) => {
                stream.model = model;
                return Ok(());
            }
            Err(different) if why.is_empty() => why = different,
            Err(_) => {}
        }
        *stream = after;
    }
    Err(format!("not one state from batch {durable} on; there, {why}"))
}

fn read(system: &System) -> Result<Found, String> {
    let listed = system.cli().json(&["volume", "list"]);
    let mut found = Found::new();
    for volume in listed.as_array().ok_or("a list")? {
        let name = volume["name"].as_str().ok_or("a name")?;
        let export = system.cli().serve(name);
        let mut nbd = crate::Nbd::open(&export, name).map_err(|error| error.to_string())?;
        let length = u32::try_from(nbd.size).map_err(|_| "its size")?;
        let answer = nbd.try_read(0, length).map_err(|error| error.to_string())?;
        let bytes = answer.map_err(|errno| format!("read of {name}: errno {errno}"))?;
        nbd.close();
        system.cli().run(&["volume", "serve", "--stop", name]);
        let stamps = bytes.chunks(BLOCK).zip(0..).map(|(block, lba)| {
            Stamp::of(block, lba).map_err(|what| format!("{name}, block {lba}: {what}"))
        });
        let stamps: Result<Vec<Stamp>, String> = stamps.collect();
        found.insert(name.to_owned(), (volume["kind"] == "snapshot", stamps?));
    }
    Ok(found)
}

/// The state that was found, if it is that of `before` with a part of `batch` done, whose end is
/// `after`.
fn settle(found: &Found, before: &Model, batch: &Batch, after: &Model) -> Result<Model, String> {
    // A volume is there or not.
    if !matches!(batch.work, Work::Blocks(..)) {
        return [before, after]
            .into_iter()
            .find(|model| differs(found, model, model).is_none())
            .cloned()
            .ok_or_else(|| differs(found, before, before).unwrap_or_default());
    }
    if let Some(different) = differs(found, before, after) {
        return Err(different);
    }
    let mut model = before.clone();
    for (name, volume) in &mut model.volumes {
        volume.blocks.clone_from(&found[name].1);
    }
    Ok(model)
}

/// What is neither as in the one nor as in the other state, in the first place where that is so.
fn differs(found: &Found, one: &Model, other: &Model) -> Option<String> {
    let names = |model: &Model| model.volumes.keys().cloned().collect::<Vec<_>>();
    let there: Vec<String> = found.keys().cloned().collect();
    if there != names(one) {
        return Some(format!("volumes {there:?} instead of {:?}", names(one)));
    }
    one.volumes.iter().find_map(|(name, volume)| {
        let (frozen, blocks) = &found[name];
        let other: &Volume = &other.volumes[name];
        if *frozen != volume.frozen || blocks.len() != usize::try_from(BLOCKS).expect("few") {
            return Some(format!("{name} is of another kind or size"));
        }
        let mut places = (0..).zip(blocks).zip(volume.blocks.iter().zip(&other.blocks));
        let place = places.find(|((_, found), (one, other))| found != one && found != other);
        place.map(|((lba, found), (one, other))| {
            format!("{name}, block {lba}: {found:?}, neither {one:?} nor {other:?}")
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(model: &Model) -> Found {
        let one = |(name, v): (&String, &Volume)| (name.clone(), (v.frozen, v.blocks.clone()));
        model.volumes.iter().map(one).collect()
    }

    /// Batches until one of many blocks, and the states before and after it.
    fn upto_blocks(stream: &mut Stream) -> (Model, Batch) {
        loop {
            let before = stream.model.clone();
            let batch = stream.advance();
            if matches!(&batch.work, Work::Blocks(requests, _) if requests.len() > 3) {
                return (before, batch);
            }
        }
    }

    #[test]
    fn any_part_of_one_batch_is_right_and_nothing_else() {
        let mut stream = Stream::new(7, Model::default(), 0);
        for _ in 0..50 {
            let (before, batch) = upto_blocks(&mut stream);
            let (all, none) = (found(&stream.model), found(&before));
            assert!(settle(&all, &before, &batch, &stream.model).is_ok());
            assert!(settle(&none, &before, &batch, &stream.model).is_ok());
            let Work::Blocks(requests, _) = &batch.work else { panic!("blocks") };
            let place = usize::try_from(requests[0].first).unwrap();
            let mut part = all.clone();
            let after = part[&requests[0].volume].1[place];
            let mix = |part: &mut Found, stamp| {
                part.get_mut(&requests[0].volume).unwrap().1[place] = stamp;
            };
            mix(&mut part, before.volumes[&requests[0].volume].blocks[place]);
            let settled = settle(&part, &before, &batch, &stream.model).unwrap();
            assert_eq!(found(&settled), part);
            mix(&mut part, Stamp { batch: after.batch + 1, origin: after.origin });
            assert!(settle(&part, &before, &batch, &stream.model).is_err());
            // A block of the batch before it is missing.
            let mut old = all.clone();
            let volume = old.get_mut(&requests[0].volume).unwrap();
            let touched = |lba: u64| {
                requests.iter().any(|r| {
                    r.volume == requests[0].volume && (r.first..r.first + r.count).contains(&lba)
                })
            };
            let other = (0..BLOCKS).find(|lba| !touched(*lba)).unwrap();
            volume.1[usize::try_from(other).unwrap()] = Stamp { batch: 1, origin: 99 };
            assert!(settle(&old, &before, &batch, &stream.model).is_err());
        }
    }

    #[test]
    fn a_shape_makes_the_same_batches() {
        let mut stream = Stream::new(3, Model::default(), 0);
        for _ in 0..300 {
            stream.advance();
        }
        let shape = Model::of_shape(&stream.model.shape());
        let mut one = Stream::new(5, stream.model.clone(), stream.number);
        let mut other = Stream::new(5, shape, stream.number);
        for _ in 0..300 {
            assert_eq!(format!("{:?}", one.advance()), format!("{:?}", other.advance()));
        }
        assert_eq!(one.model.shape(), other.model.shape());
    }

    #[test]
    fn stamps_are_told_apart() {
        let stamp = Stamp { batch: 7, origin: 3 };
        let mut block = stamp.block(9);
        assert_eq!(Stamp::of(&block, 9), Ok(stamp));
        assert!(Stamp::of(&block, 8).is_err());
        block[2048..].copy_from_slice(&Stamp { batch: 6, origin: 3 }.block(9)[2048..]);
        assert!(Stamp::of(&block, 9).is_err(), "torn");
        block[2048..].fill(0);
        assert!(Stamp::of(&block, 9).is_err(), "torn");
        assert_eq!(Stamp::of(&[0; BLOCK], 9), Ok(Stamp::default()));
    }
}
