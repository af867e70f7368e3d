//! What the command line accepts. Help texts are the documentation of the commands, so they are
//! written for the person who types them.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use pando_engine::units::BLOCK_BYTES;
use pando_proto::parse_size;

/// Heading of the options that every command has.
const GLOBAL: &str = "Global options";

/// Thin volumes with instant clones.
///
/// Exit codes: 0 success, 1 failure (the reason is on stderr), 2 wrong usage.
#[derive(Debug, Parser)]
#[command(name = "pando", version, propagate_version = true, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub daemon: Daemon,

    /// Tables for people, JSON for programs
    #[arg(long, short, global = true, value_enum, default_value_t, help_heading = GLOBAL)]
    pub output: Output,

    #[command(subcommand)]
    pub command: Command,
}

/// Where the daemon is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub(crate) struct Daemon {
    /// Socket of the daemon [env: PANDO_SOCKET] [default: RUN_DIR/pando.sock]
    // Not clap's `env`: it would win over --run-dir.
    #[arg(long, global = true, value_name = "PATH", help_heading = GLOBAL)]
    pub socket: Option<PathBuf>,

    /// Run directory of the daemon [default: /run/pando for root, else $XDG_RUNTIME_DIR/pando]
    #[arg(long, global = true, value_name = "DIR", conflicts_with = "socket", help_heading = GLOBAL)]
    pub run_dir: Option<PathBuf>,
}

/// How answers are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    #[default]
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create, watch and verify the pool
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Create, clone, serve and copy volumes
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Clone a volume or snapshot (short for `volume clone`)
    Clone(CloneArgs),
    /// Take a snapshot of a volume (short for `volume snapshot`)
    Snapshot(SnapshotArgs),
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        shell: Shell,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum PoolCommand {
    /// Make a file or block device a new, empty pool
    Create(PoolCreateArgs),
    /// Show size, free space and health
    Status,
    /// Make the pool larger
    Grow {
        /// New size; the present length of the pool's device or file if left out
        #[arg(long, value_parser = parse_blocks, value_name = "SIZE")]
        size: Option<u64>,
    },
    /// Verify the structures of the pool; exit code 1 if anything is wrong
    Check {
        /// Check this pool without the daemon, which must not be running on it
        #[arg(long, value_name = "PATH")]
        offline: Option<PathBuf>,
    },
    /// Read all data and verify its checksums; exit code 1 if anything is wrong
    Scrub {
        /// Bytes to read in a second, for example 200MiB [default: 64MiB]
        #[arg(long, value_parser = parse_size, value_name = "SIZE")]
        rate: Option<u64>,
    },
    /// Print the structures of the pool, for reports of bugs
    Dump {
        /// Dump this pool without the daemon, which must not be running on it
        #[arg(long, value_name = "PATH")]
        offline: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct PoolCreateArgs {
    /// A new file, or a block device
    pub path: PathBuf,
    /// Size of the file, for example 10GiB; a block device is used whole if left out
    #[arg(long, value_parser = parse_blocks, value_name = "SIZE")]
    pub size: Option<u64>,
    /// How the space of a new file is taken from the file system
    #[arg(long, value_enum, default_value_t = Allocation::Reserve)]
    pub allocate: Allocation,
    /// Size of the journal [default: chosen by the size of the pool]
    #[arg(long, value_parser = parse_blocks, value_name = "SIZE")]
    pub journal: Option<u64>,
    /// Overwrite what is there: an existing file, a file system, another pool
    #[arg(long)]
    pub force: bool,
}

/// How the space of a pool's file is taken from the file system below.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Allocation {
    /// As it is written; the file system can run full under the pool
    Sparse,
    /// At once, without writing it
    Reserve,
    /// At once, by writing zeros: slow, and the most even speed later
    Write,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Make an empty volume
    Create(VolumeCreateArgs),
    /// Make a writable copy of a volume or snapshot, at once and whatever its size
    Clone(CloneArgs),
    /// Freeze the state of a volume under a new name
    Snapshot(SnapshotArgs),
    /// List volumes and snapshots
    ///
    /// In a terminal, columns that do not fit into a line are left out, the labels first; `-o json`,
    /// `volume show` and a pipe have all.
    List(ListArgs),
    /// Show one volume
    Show {
        /// Name of the volume or snapshot
        name: String,
        /// Walk its map for the exact space it holds and shares
        #[arg(long)]
        space: bool,
    },
    /// Make a volume larger
    Grow {
        /// Name of the volume
        name: String,
        /// New size, for example 20GiB
        #[arg(value_parser = parse_size, value_name = "SIZE")]
        size: u64,
    },
    /// Change properties of a volume
    Set(SetArgs),
    /// Delete volumes and snapshots; what was cloned from them stays
    Delete {
        /// Names
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// List the extents in which two volumes differ
    Diff {
        /// The older side
        base: String,
        /// The newer side
        name: String,
    },
    /// List the allocated extents of a volume
    Extents {
        /// Name of the volume or snapshot
        name: String,
    },
    /// Copy a volume, as it is at one instant, into a sparse file, a block device or a pipe
    Export(ExportArgs),
    /// Make a volume from a file, a block device or a pipe
    Import(ImportArgs),
    /// Offer a volume over NBD and print its address; without a name, list what is offered
    Serve {
        /// Name of the volume or snapshot
        name: Option<String>,
        /// Refuse writes
        #[arg(long, requires = "name")]
        read_only: bool,
        /// End the export instead
        #[arg(long, requires = "name", conflicts_with = "read_only")]
        stop: bool,
    },
    /// Make a volume a block device of this machine and print its path
    Attach(AttachArgs),
    /// Remove the block devices of volumes; they must not be mounted or open
    Detach {
        /// Names of the volumes or snapshots
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// List the block devices
    Attachments,
}

#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// Name of the volume or snapshot
    pub name: String,
    /// What makes the device
    #[arg(long, value_enum, default_value_t)]
    pub kind: DeviceKind,
    /// Refuse writes
    #[arg(long)]
    pub read_only: bool,
    /// Bytes of a logical sector: 512 or 4096
    #[arg(long, default_value_t = 512, value_name = "BYTES")]
    pub sector_bytes: u32,
}

/// What makes a volume a block device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeviceKind {
    /// The first of the others that works here
    #[default]
    Auto,
    /// /dev/ublkbN, outlives the daemon
    Ublk,
    /// /dev/nbdN, the kernel's NBD client
    Nbd,
    /// /dev/loopN on a file that the daemon serves over FUSE
    Loop,
}

/// Properties that a new volume can be given.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Properties {
    /// Space promised to the volume: within it, it never meets a full pool
    #[arg(long, value_parser = parse_size, value_name = "SIZE", default_value = "0", hide_default_value = true)]
    pub reservation: u64,
    /// Space that the volume may add to the pool
    #[arg(long, value_parser = parse_size, value_name = "SIZE", default_value = "0", hide_default_value = true)]
    pub growth_limit: u64,
    /// Requests in a second that the volume serves at most, reads and writes together
    #[arg(long, value_name = "COUNT", default_value = "0", hide_default_value = true)]
    pub iops_limit: u64,
    /// Bytes in a second that the volume moves at most, for example 200MiB
    #[arg(long, value_parser = parse_size, value_name = "SIZE", default_value = "0", hide_default_value = true)]
    pub bandwidth_limit: u64,
    /// Label, as key=value; may be given several times
    #[arg(long = "label", value_parser = parse_pair, value_name = "KEY=VALUE")]
    pub labels: Vec<(String, String)>,
}

#[derive(Debug, Args)]
pub(crate) struct VolumeCreateArgs {
    /// Name of the new volume
    pub name: String,
    /// Size, for example 10GiB
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub size: u64,
    #[command(flatten)]
    pub properties: Properties,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct CloneArgs {
    /// Volume or snapshot to clone
    pub source: String,
    /// Name of the clone
    pub name: String,
    /// Size of the clone, if larger than its source
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub size: Option<u64>,
    /// Clone another volume at the same instant; may be given several times
    #[arg(long, value_parser = parse_pair, value_name = "SOURCE=NAME")]
    pub with: Vec<(String, String)>,
    /// Refuse writes
    #[arg(long)]
    pub read_only: bool,
    #[command(flatten)]
    pub properties: Properties,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct SnapshotArgs {
    /// Volume to freeze
    pub source: String,
    /// Name of the snapshot
    pub name: String,
    /// Freeze another volume at the same instant; may be given several times
    #[arg(long, value_parser = parse_pair, value_name = "SOURCE=NAME")]
    pub with: Vec<(String, String)>,
    /// Label, as key=value; may be given several times
    #[arg(long = "label", value_parser = parse_pair, value_name = "KEY=VALUE")]
    pub labels: Vec<(String, String)>,
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Only names that begin with this
    #[arg(long)]
    pub prefix: Option<String>,
    /// Only what has this label; may be given several times
    #[arg(long = "label", value_parser = parse_pair, value_name = "KEY=VALUE")]
    pub labels: Vec<(String, String)>,
    /// Only clones and snapshots of this volume
    #[arg(long)]
    pub source: Option<String>,
    /// Only volumes
    #[arg(long, conflicts_with = "snapshots")]
    pub volumes: bool,
    /// Only snapshots
    #[arg(long)]
    pub snapshots: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(crate) struct Changes {
    /// Refuse writes (true) or accept them (false)
    #[arg(long, value_name = "BOOL")]
    pub read_only: Option<bool>,
    /// New reservation; 0 for none
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub reservation: Option<u64>,
    /// New growth limit; 0 for none
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub growth_limit: Option<u64>,
    /// New limit of requests in a second; 0 for none
    #[arg(long, value_name = "COUNT")]
    pub iops_limit: Option<u64>,
    /// New limit of bytes in a second; 0 for none
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub bandwidth_limit: Option<u64>,
    /// Label to set; without a value (`key=`) it is removed
    #[arg(long = "label", value_parser = parse_pair, value_name = "KEY=VALUE")]
    pub labels: Vec<(String, String)>,
}

#[derive(Debug, Args)]
pub(crate) struct SetArgs {
    /// Name of the volume
    pub name: String,
    #[command(flatten)]
    pub changes: Changes,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// Name of the volume or snapshot
    pub name: String,
    /// File or block device to write, or - for standard output
    pub target: PathBuf,
    /// Overwrite an existing file or a block device, or write to a terminal
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// Name of the new volume
    pub name: String,
    /// File or block device to read, or - for standard input
    pub file: PathBuf,
    /// Size of the volume, if larger than the file
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub size: Option<u64>,
    /// Take the bytes as they are, even those of a disk image (qcow2, VMDK, VHD) or compressed stream
    #[arg(long)]
    pub raw: bool,
    #[command(flatten)]
    pub properties: Properties,
}

/// Reads a size of whole blocks, which a pool consists of.
fn parse_blocks(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    match bytes % BLOCK_BYTES {
        0 => Ok(bytes),
        rest => Err(format!(
            "{bytes} bytes are not a multiple of {BLOCK_BYTES}, the size of a block; {} are",
            (bytes - rest).max(BLOCK_BYTES)
        )),
    }
}

/// Reads `left=right`; the right side may be empty, the left side not.
fn parse_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((left, right)) if !left.is_empty() => Ok((left.to_owned(), right.to_owned())),
        _ => Err("write it as LEFT=RIGHT".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_size_is_read_alike() {
        let size = |text: &str| {
            let line = ["pando", "volume", "create", "db", "--size", text, "--reservation", text];
            let cli = Cli::try_parse_from(line).map_err(|error| error.to_string())?;
            let Command::Volume(VolumeCommand::Create(args)) = cli.command else {
                panic!("not a creation")
            };
            assert_eq!(args.size, args.properties.reservation);
            Ok::<u64, String>(args.size)
        };
        assert_eq!((size("10G"), size("10GiB")), (Ok(10 << 30), Ok(10 << 30)));
        assert_eq!(size("4k"), Ok(4096));
        assert!(size("ten").unwrap_err().contains("powers of 1024"));
    }

    #[test]
    fn pools_have_whole_blocks() {
        assert_eq!(parse_blocks("10G"), Ok(10 << 30));
        let message = parse_blocks("10GB").unwrap_err();
        assert!(message.starts_with("10000000000 bytes are not a multiple of 4096"), "{message}");
        assert!(message.ends_with("9999998976 are"), "{message}");
        assert!(parse_blocks("10").unwrap_err().ends_with("; 4096 are"));
        assert!(parse_blocks("lots").unwrap_err().contains("powers of 1024"));
    }

    #[test]
    fn pairs_need_a_left_side() {
        assert_eq!(parse_pair("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert_eq!(parse_pair("a="), Ok(("a".to_owned(), String::new())));
        assert!(parse_pair("=b").is_err());
        assert!(parse_pair("a").is_err());
    }

    #[test]
    fn clone_stands_at_the_top_as_well() {
        let short = Cli::try_parse_from(["pando", "clone", "db", "db-test"]).unwrap();
        let Command::Clone(short) = short.command else { panic!("not a clone") };
        let long = Cli::try_parse_from([
            "pando",
            "volume",
            "clone",
            "db",
            "db-test",
            "--with",
            "logs=logs-test",
            "-o",
            "json",
        ])
        .unwrap();
        assert_eq!(long.output, Output::Json);
        let Command::Volume(VolumeCommand::Clone(long)) = long.command else {
            panic!("not a clone")
        };
        assert_eq!((&short.source, &short.name), (&long.source, &long.name));
        assert_eq!(long.with, [("logs".to_owned(), "logs-test".to_owned())]);
    }

    #[test]
    fn wrong_usage_is_refused() {
        for line in [
            &["pando", "volume", "create", "db"][..],
            &["pando", "volume", "set", "db"],
            &["pando", "volume", "delete"],
            &["pando", "volume", "serve", "--stop"],
            &["pando", "volume", "list", "--volumes", "--snapshots"],
        ] {
            assert_eq!(Cli::try_parse_from(line).unwrap_err().exit_code(), 2, "{line:?}");
        }
    }
}
