//! The report of `make bench`: every figure that Pando aims at, measured here, as Markdown.
//!
//! ```text
//! report [--dir DIR] [--quick] [SECTION ...]     sections: memory ram map clone first disk open
//! ```
//! Ratios compare within one run; cells are medians of repetitions that alternate between the
//! contenders.

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use pando_benches::report::{Context, Table, sections};

fn main() -> Result<()> {
    let mut context = Context { dir: std::env::temp_dir(), quick: false };
    let mut wanted = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--dir" => context.dir = arguments.next().map(PathBuf::from).unwrap_or_default(),
            "--quick" => context.quick = true,
            section => wanted.push(section.to_owned()),
        }
    }
    let mut out = std::io::stdout();
    for (name, measure) in sections() {
        if !wanted.is_empty() && !wanted.iter().any(|w| w == name) {
            continue;
        }
        let table: Table = measure(&context)?;
        writeln!(out, "{table}")?;
        out.flush()?;
    }
    Ok(())
}
