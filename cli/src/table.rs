//! Printing: tables for people, JSON for programs, progress bars for long work.

use std::io::{self, IsTerminal, Write};

use bytesize::ByteSize;
use comfy_table::{CellAlignment, Table, presets};
use console::{Term, measure_text_width};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::args::Output;
use crate::error::{Error, Result};
use crate::view::{Attachment, Export, Extent, Pool, Volume};

/// Prints `value` as JSON, or what `table` makes of it.
pub(crate) fn print<T: Serialize>(
    output: Output,
    value: &T,
    table: impl FnOnce(&T) -> String,
) -> Result<()> {
    let text = match output {
        Output::Table => table(value),
        Output::Json => serde_json::to_string_pretty(value)
            .map_err(|error| Error::new(format!("cannot write JSON: {error}")))?,
    };
    print_text(&text)
}

/// Prints `value` for programs; people see that the command has succeeded.
pub(crate) fn print_json<T: Serialize>(output: Output, value: &T) -> Result<()> {
    match output {
        Output::Table => Ok(()),
        Output::Json => print(output, value, |_| String::new()),
    }
}

/// Prints `text` and ends the line. A reader that went away (`| head`) is no failure.
pub(crate) fn print_text(text: &str) -> Result<()> {
    match writeln!(io::stdout().lock(), "{}", text.trim_end()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::io("standard output", &error))
        }
        _ => Ok(()),
    }
}

/// Spaces behind the cells of a column.
const GAP: u16 = 2;

/// A size for people.
pub(crate) fn size(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

/// Rows with titles.
struct List<const N: usize> {
    titles: [&'static str; N],
    /// Titles of the columns that hold numbers.
    numbers: &'static [&'static str],
    /// Titles of the columns that a reader can do without, the first to go first.
    spare: &'static [&'static str],
}

impl<const N: usize> List<N> {
    /// The table, in lines of `width` characters if there is one: columns that do not fit are left
    /// out. A line that a terminal breaks is hard to read.
    fn show(&self, rows: &[[String; N]], width: Option<usize>) -> String {
        let widest = |column: usize| {
            let cells = rows.iter().map(|row| measure_text_width(&row[column]));
            cells.chain([self.titles[column].len()]).max().unwrap_or(0)
        };
        let gap = usize::from(GAP);
        let mut shown: Vec<usize> = (0..N).collect();
        for spare in self.spare {
            let line = shown.iter().map(|&column| widest(column) + gap).sum::<usize>() - gap;
            if width.is_none_or(|width| line <= width) {
                break;
            }
            shown.retain(|&column| self.titles[column] != *spare);
        }
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        table.set_header(shown.iter().map(|&column| self.titles[column]));
        for row in rows {
            table.add_row(shown.iter().map(|&column| row[column].as_str()));
        }
        for (place, &column) in shown.iter().enumerate() {
            if let Some(made) = table.column_mut(place)
                && self.numbers.contains(&self.titles[column])
            {
                made.set_cell_alignment(CellAlignment::Right);
            }
        }
        finish(table)
    }
}

/// Characters in a line of the terminal, if the output goes to one.
fn terminal_width() -> Option<usize> {
    let (_, width) = Term::stdout().size_checked().filter(|_| io::stdout().is_terminal())?;
    Some(usize::from(width)).filter(|width| *width > 0)
}

/// Cells are padded to the width of their column; the padding of the last one is noise.
fn finish(mut table: Table) -> String {
    for column in table.column_iter_mut() {
        column.set_padding((0, GAP));
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

/// Volumes, one a line.
pub(crate) fn volumes(volumes: &[Volume]) -> String {
    volumes_within(volumes, terminal_width())
}

fn volumes_within(volumes: &[Volume], width: Option<usize>) -> String {
    let list = List {
        titles: ["NAME", "KIND", "SIZE", "MAPPED", "OWN", "SOURCE", "CREATED", "LABELS"],
        numbers: &["SIZE", "MAPPED", "OWN"],
        spare: &["LABELS", "CREATED", "OWN", "SOURCE", "MAPPED", "KIND", "SIZE"],
    };
    let row = |volume: &Volume| {
        [
            volume.name.clone(),
            kind_of(volume),
            size(volume.size_bytes),
            size(volume.mapped_bytes),
            size(volume.own_bytes),
            source_of(volume),
            time(volume.created_at),
            labels_of(volume),
        ]
    };
    list.show(&volumes.iter().map(row).collect::<Vec<_>>(), width)
}

fn kind_of(volume: &Volume) -> String {
    let frozen = if volume.read_only && volume.kind != crate::view::Kind::Snapshot {
        " (read-only)"
    } else {
        ""
    };
    format!("{}{frozen}", volume.kind.name())
}

fn source_of(volume: &Volume) -> String {
    match (&volume.source_name, volume.source_id) {
        (Some(name), _) if volume.source_deleted => format!("{name} (deleted)"),
        (Some(name), _) => name.clone(),
        (None, Some(id)) => format!("(deleted, id {id})"),
        (None, None) => "-".to_owned(),
    }
}

fn labels_of(volume: &Volume) -> String {
    let labels: Vec<String> =
        volume.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    if labels.is_empty() { "-".to_owned() } else { labels.join(",") }
}

/// Everything about one volume, one property a line.
pub(crate) fn volume(volume: &Volume) -> String {
    let mut table = properties();
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    row("name", volume.name.clone());
    row("id", volume.id.to_string());
    row("kind", kind_of(volume));
    row("size", size(volume.size_bytes));
    row("source", source_of(volume));
    row("created", time(volume.created_at));
    row("reservation", or_none(volume.reservation_bytes));
    row("growth limit", or_none(volume.growth_limit_bytes));
    row("IOPS limit", if_any(volume.iops_limit, |iops| iops.to_string()));
    row(
        "bandwidth limit",
        if_any(volume.bandwidth_limit_bytes, |rate| format!("{}/s", size(rate))),
    );
    row("labels", labels_of(volume));
    row("mapped", size(volume.mapped_bytes));
    row("own, at least", size(volume.own_bytes));
    if let Some(space) = &volume.space {
        row("exclusive", size(space.exclusive_bytes));
        row("shared", size(space.shared_bytes));
        row("freed if deleted", size(space.freed_if_deleted_bytes));
    }
    for export in &volume.exports {
        row("export", export.uri.clone());
    }
    if let Some(attachment) = &volume.attachment {
        row("device", attachment.device.clone());
    }
    finish(table)
}

fn properties() -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table
}

fn or_none(bytes: u64) -> String {
    if_any(bytes, size)
}

fn if_any(limit: u64, show: impl Fn(u64) -> String) -> String {
    if limit == 0 { "none".to_owned() } else { show(limit) }
}

/// The pool, one property a line.
pub(crate) fn pool(pool: &Pool) -> String {
    let mut table = properties();
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    let used = pool.used_percent();
    let health = match (&pool.poisoned, pool.health) {
        (Some(why), _) => format!("POISONED: {why}"),
        (None, "full") => format!(
            "FULL ({used} %): writes that need new space get ENOSPC; delete volumes or snapshots, or \
             grow the pool"
        ),
        (None, "warning") => format!("warning: {used} % full"),
        (None, health) => health.to_owned(),
    };
    row("pool", pool.path.clone());
    row("uuid", pool.uuid.clone());
    row("health", health);
    row("size", size(pool.size_bytes));
    row("usable", size(pool.usable_bytes));
    row("free", format!("{} ({} % used)", size(pool.free_bytes), pool.used_percent()));
    row("coming back", size(pool.pending_bytes));
    row("kept back", size(pool.reserve_bytes));
    row("provisioned", size(pool.provisioned_bytes));
    row("reserved", size(pool.reserved_bytes));
    row("volumes", pool.volumes.to_string());
    row("snapshots", pool.snapshots.to_string());
    row("deletions", format!("{} pending", pool.deletions_pending));
    row(
        "journal",
        format!("{} of {} in use", size(pool.journal_used_bytes), size(pool.journal_bytes)),
    );
    row("checkpoint", format!("generation {}", pool.generation));
    row("last record", pool.sequence_number.to_string());
    if let Some(version) = &pool.daemon_version {
        row("pandod", version.clone());
    }
    finish(table)
}

/// Block devices, one a line.
pub(crate) fn attachments(attachments: &[Attachment]) -> String {
    let list = List {
        titles: ["VOLUME", "KIND", "DEVICE", "ACCESS", "SECTOR", "IDENTITY"],
        numbers: &[],
        spare: &["IDENTITY", "SECTOR", "ACCESS", "KIND"],
    };
    let row = |attachment: &Attachment| {
        [
            attachment.volume_name.clone(),
            attachment.kind.to_owned(),
            attachment.device.clone(),
            access(attachment.read_only),
            attachment.sector_bytes.to_string(),
            attachment.identity.clone(),
        ]
    };
    list.show(&attachments.iter().map(row).collect::<Vec<_>>(), terminal_width())
}

fn access(read_only: bool) -> String {
    if read_only { "read-only" } else { "read-write" }.to_owned()
}

/// Exports, one a line.
pub(crate) fn exports(exports: &[Export]) -> String {
    let list = List {
        titles: ["VOLUME", "KIND", "ACCESS", "URI"],
        numbers: &[],
        spare: &["KIND", "ACCESS"],
    };
    let row = |export: &Export| {
        [
            export.volume_name.clone(),
            export.kind.to_owned(),
            access(export.read_only),
            export.uri.clone(),
        ]
    };
    list.show(&exports.iter().map(row).collect::<Vec<_>>(), terminal_width())
}

/// Extents, one a line, in bytes: exact numbers are what one lists extents for.
pub(crate) fn extents(extents: &[Extent]) -> String {
    let list =
        List { titles: ["OFFSET", "LENGTH", "STATE"], numbers: &["OFFSET", "LENGTH"], spare: &[] };
    let row = |extent: &Extent| {
        let state = if extent.mapped { "data" } else { "zeros" };
        [extent.offset.to_string(), extent.length.to_string(), state.to_owned()]
    };
    list.show(&extents.iter().map(row).collect::<Vec<_>>(), None)
}

/// Seconds since the epoch as RFC 3339 in UTC.
fn time(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days to a date of the proleptic Gregorian calendar, in eras of 400 years of 146097 days
    // that begin on March 1st, so that the leap day is the last day of its year.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{:02}Z", second % 60)
}

/// A bar on stderr if that is a terminal, else nothing. `total` None: a counter without an end.
pub(crate) fn progress(total: Option<u64>) -> ProgressBar {
    let template = if total.is_some() {
        "{bar:32} {percent:>3} %  {binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}  {eta}"
    } else {
        "{spinner} {binary_bytes}  {binary_bytes_per_sec}"
    };
    bar(total, template)
}

/// The same for work that is not measured in bytes.
pub(crate) fn steps() -> ProgressBar {
    bar(Some(0), "{bar:32} {percent:>3} %  {eta}")
}

fn bar(total: Option<u64>, template: &str) -> ProgressBar {
    let target = if io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let style = ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
    ProgressBar::with_draw_target(total, target).with_style(style)
}

#[cfg(test)]
mod tests {
    use pando_proto::v1;

    use super::*;

    #[test]
    fn times_are_rfc3339() {
        assert_eq!(time(0), "1970-01-01T00:00:00Z");
        assert_eq!(time(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(time(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(time(1_767_225_599), "2025-12-31T23:59:59Z");
        assert_eq!(time(4_107_542_400), "2100-03-01T00:00:00Z");
    }

    fn clone_of_a_deleted_volume() -> Volume {
        Volume::from(v1::Volume {
            id: 9,
            name: "db-test".to_owned(),
            size_bytes: 10 << 30,
            source_id: Some(7),
            source_deleted: true,
            mapped_bytes: 3 << 20,
            own_bytes: 4096,
            labels: [("app".to_owned(), "db".to_owned())].into(),
            ..v1::Volume::default()
        })
    }

    #[test]
    fn list_is_aligned_and_has_no_trailing_spaces() {
        let db = Volume::from(v1::Volume { id: 7, name: "db".to_owned(), ..v1::Volume::default() });
        let text = volumes(&[db, clone_of_a_deleted_volume()]);
        let expected = "\
NAME     KIND        SIZE   MAPPED      OWN  SOURCE           CREATED               LABELS
db       volume       0 B      0 B      0 B  -                1970-01-01T00:00:00Z  -
db-test  clone   10.0 GiB  3.0 MiB  4.0 KiB  (deleted, id 7)  1970-01-01T00:00:00Z  app=db
";
        assert_eq!(text, expected);
    }

    #[test]
    fn lines_fit_into_the_terminal() {
        let named = Volume { source_name: Some("db".repeat(20)), ..clone_of_a_deleted_volume() };
        let all = volumes_within(std::slice::from_ref(&named), None);
        let width = all.lines().map(str::len).max().unwrap();
        assert_eq!(volumes_within(std::slice::from_ref(&named), Some(width)), all);
        assert!(all.contains(&format!("{} (deleted)", "db".repeat(20))), "{all}");
        let mut columns = 8;
        for width in (10..width).rev() {
            let text = volumes_within(std::slice::from_ref(&named), Some(width));
            assert!(text.lines().all(|line| line.len() <= width), "{width}:\n{text}");
            let titles: Vec<&str> = text.lines().next().unwrap().split_whitespace().collect();
            assert!(titles.len() <= columns && titles.contains(&"NAME"), "{titles:?}");
            columns = titles.len();
        }
        assert_eq!(columns, 1);
        // The name is all there is to go by: it is not cut.
        assert_eq!(volumes_within(std::slice::from_ref(&named), Some(3)), "NAME\ndb-test\n");
    }

    #[test]
    fn json_names_are_stable() {
        let value = serde_json::to_value(clone_of_a_deleted_volume()).unwrap();
        assert_eq!(
            value,
            serde_json::json!({
                "id": 9, "name": "db-test", "kind": "clone", "size_bytes": 10_737_418_240_u64,
                "read_only": false, "source_id": 7, "source_name": null,
                "source_deleted": true,
                "reservation_bytes": 0, "growth_limit_bytes": 0,
                "iops_limit": 0, "bandwidth_limit_bytes": 0, "labels": {"app": "db"},
                "created_at": 0, "mapped_bytes": 3_145_728, "own_bytes": 4096,
            })
        );
    }

    #[test]
    fn poisoned_pool_shouts() {
        let pool_view = Pool::from(v1::Pool {
            usable_bytes: 200,
            free_bytes: 50,
            poisoned: "flush failed".to_owned(),
            ..v1::Pool::default()
        });
        assert_eq!(pool_view.used_percent(), 75);
        let text = pool(&pool_view);
        assert!(text.starts_with("pool"), "no margin: {text}");
        assert!(text.contains("\nhealth       POISONED: flush failed\n"), "{text}");
    }

    #[test]
    fn a_pool_that_fills_up_is_not_called_good() {
        let health = |free_bytes, available_bytes, pending_bytes| {
            let view = Pool::from(v1::Pool {
                usable_bytes: 1000,
                free_bytes,
                available_bytes,
                pending_bytes,
                ..v1::Pool::default()
            });
            let text = pool(&view);
            let line = text.lines().find(|line| line.starts_with("health")).expect("a line");
            (view.health, line.to_owned())
        };
        assert_eq!(health(500, 400, 0), ("good", "health       good".to_owned()));
        assert_eq!(health(30, 10, 0), ("warning", "health       warning: 97 % full".to_owned()));
        assert_eq!(health(30, 10, 600).0, "good", "what comes back counts as free");
        let (health, line) = health(30, 0, 0);
        assert_eq!(health, "full");
        assert!(line.starts_with("health       FULL (97 %): writes that need"), "{line}");
    }
}
