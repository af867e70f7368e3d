//! The table of what a campaign consists of.

/// How many processes run a part side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spread {
    /// One for each core, with seeds and a part of the work of its own.
    Cores,
    /// One for each fuzz target, as many at a time as there are cores.
    Targets,
    /// One that uses the cores by itself.
    One,
}

/// A part of the campaign.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) name: &'static str,
    /// Percent of the time; 0 for a part that takes as long as it takes.
    pub(crate) share: u32,
    pub(crate) spread: Spread,
    /// Words of a command, with `{}` places: see [`crate::run::Setting`].
    pub(crate) command: &'static str,
}

const fn part(name: &'static str, share: u32, spread: Spread, command: &'static str) -> Part {
    Part { name, share, spread, command }
}

/// All parts. The shares are of the hours that were asked for; the last two are beside them.
pub(crate) const PARTS: [Part; 13] = [
    part(
        "simulation, short sequences",
        8,
        Spread::Cores,
        "{programs}/pando-sim exhaustive --shortest 0 --length 2 --part {part}/{parts} \
         --order {order} --seconds {seconds} --json",
    ),
    part(
        "simulation, exhaustive",
        16,
        Spread::Cores,
        "{programs}/pando-sim exhaustive --length 3 --part {part}/{parts} \
         --order {order} --seconds {seconds} --json",
    ),
    part(
        "simulation, random",
        13,
        Spread::Cores,
        "{programs}/pando-sim random --seeds {seeds} --seconds {seconds} --json",
    ),
    part(
        "simulation, faults",
        10,
        Spread::Cores,
        "{programs}/pando-sim faults --seeds {seeds} --seconds {seconds} --json",
    ),
    part("schedules", 6, Spread::One, "scripts/shuttle --seconds {seconds} --seed {seed} --json"),
    part(
        "damage",
        8,
        Spread::Cores,
        "{programs}/pando-damage --seeds 1000000 --bits 997 --part {number}/{parts} \
         --seconds {seconds} --json",
    ),
    part("fuzz", 17, Spread::Targets, "scripts/fuzz {target} {seconds_each}"),
    part(
        "kills",
        12,
        Spread::One,
        "{programs}/pando-hammer campaign --kills 1000000 --seconds {seconds} --seed {seed} {old} \
         --json",
    ),
    part(
        "kills, mounted ext4",
        2,
        Spread::One,
        "{programs}/pando-hammer mounted --fs ext4 --kills 1000000 --seconds {seconds} \
         --seed {seed} --json",
    ),
    part(
        "kills, mounted xfs",
        2,
        Spread::One,
        "{programs}/pando-hammer mounted --fs xfs --kills 1000000 --seconds {seconds} \
         --seed {seed} --json",
    ),
    part("power-offs", 6, Spread::One, "scripts/vm-campaign {power_offs} --seed {seed} --json"),
    part("mutants", 0, Spread::One, "scripts/mutants --json"),
    part("coverage", 0, Spread::One, "scripts/coverage"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_are_a_whole() {
        assert_eq!(PARTS.iter().map(|part| part.share).sum::<u32>(), 100);
    }
}
