//! Copying a volume into a file, a block device or a stream.
//!
//! Only data travels: unmapped runs of the volume become holes of the file. A file gets its name
//! when the copy is whole; until then it has another in the same directory.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use pando_engine::units::{Size, to_u64, to_usize};
use pando_proto::v1::{GetVolumeRequest, ReadVolumeRequest, Volume, read_volume_response};
use rustix::fs::{FallocateFlags, SeekFrom};
use tempfile::NamedTempFile;

use crate::args::{ExportArgs, Output};
use crate::client::{Client, by_id, by_name, interrupted};
use crate::error::{Error, Result};
use crate::{table, view};

/// Bytes of zeros written at once.
const ZEROS_BYTES: usize = 1 << 20;

/// Copies a volume out, as it was at one instant.
pub(crate) async fn run(mut client: Client, output: Output, args: ExportArgs) -> Result<()> {
    let request = GetVolumeRequest { volume: by_name(&args.name), with_space: false };
    let answer = client.get_volume(request).await?.into_inner();
    let volume = answer.volume.unwrap_or_default();
    // The target first: a snapshot is not worth taking for a file that cannot be written.
    let mut target = Target::open(&args.target, args.force, volume.size_bytes)?;
    tokio::select! {
        copied = copy(&mut client, &volume, &mut target) => copied?,
        () = interrupted() => return Err(Error::new("interrupted")),
    }
    let to_stdout = target.is_stdout;
    target.finish()?;
    if to_stdout {
        return Ok(()); // It holds the content: nothing else belongs there.
    }
    let copied = view::Copied {
        volume_id: volume.id,
        volume_name: volume.name,
        path: args.target.display().to_string(),
        size_bytes: volume.size_bytes,
    };
    table::print_json(output, &copied)
}

async fn copy(client: &mut Client, volume: &Volume, target: &mut Target) -> Result<()> {
    let request = ReadVolumeRequest {
        volume: by_id(volume),
        offset: 0,
        // It may grow meanwhile; the target would not.
        length: volume.size_bytes,
        frozen: true,
    };
    let mut pieces = client.read_volume(request).await?.into_inner();
    let bar = table::progress(Some(volume.size_bytes));
    let mut offset = 0;
    while let Some(piece) = pieces.message().await? {
        if piece.offset != offset {
            return Err(Error::new(format!(
                "pandod sent offset {} where {offset} was due: the copy would have a gap",
                piece.offset
            )));
        }
        offset += match piece.content {
            Some(read_volume_response::Content::Data(data)) => target.data(offset, &data)?,
            Some(read_volume_response::Content::HoleBytes(bytes)) => target.hole(offset, bytes)?,
            None => 0,
        };
        bar.set_position(offset);
    }
    if offset < volume.size_bytes {
        return Err(Error::new(format!(
            "the copy ended at {offset} of {} bytes",
            volume.size_bytes
        )));
    }
    bar.finish_and_clear();
    Ok(())
}

/// Where an export goes.
struct Target {
    kind: Kind,
    shown: String,
    is_stdout: bool,
}

enum Kind {
    /// A regular file, empty at first: what is not written stays a hole.
    File { file: NamedTempFile, path: PathBuf, replace: bool },
    /// A block device with old content: holes must be made.
    Device(File),
    /// A pipe or the like: holes are written as zeros.
    Stream(Box<dyn Write>),
}

impl Target {
    /// Opens what `path` names for a copy of `size` bytes.
    fn open(path: &Path, force: bool, size: u64) -> Result<Self> {
        if path.as_os_str() == "-" {
            let shown = "standard output".to_owned();
            refuse_terminal(&shown, io::stdout().is_terminal(), force)?;
            let kind = Kind::Stream(Box::new(io::stdout()));
            return Ok(Self { kind, shown, is_stdout: true });
        }
        let shown = path.display().to_string();
        let failed = |error: io::Error| Error::io(&shown, &error);
        let overwrites = || match force {
            true => Ok(()),
            false => Err(Error::new(format!("{shown} exists"))
                .hint("choose another file, or overwrite it with --force")),
        };
        let writable = || OpenOptions::new().write(true).open(path).map_err(failed);
        let kind = match std::fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                new_file(path.to_owned(), size, None).map_err(failed)?
            }
            Err(error) => return Err(failed(error)),
            Ok(found) if found.is_file() => {
                overwrites()?;
                let path = path.canonicalize().map_err(failed)?;
                new_file(path, size, Some(found.permissions())).map_err(failed)?
            }
            Ok(found) if found.file_type().is_block_device() => {
                overwrites()?;
                Kind::Device(sized_device(writable()?, &shown, size)?)
            }
            Ok(_) => {
                let stream = writable()?;
                refuse_terminal(&shown, stream.is_terminal(), force)?;
                Kind::Stream(Box::new(stream))
            }
        };
        Ok(Self { kind, shown, is_stdout: false })
    }

    /// Writes `data` at `offset`; returns its length.
    fn data(&mut self, offset: u64, data: &[u8]) -> Result<u64> {
        let written = match &mut self.kind {
            Kind::File { file, .. } => file.as_file().write_all_at(data, offset),
            Kind::Device(file) => file.write_all_at(data, offset),
            Kind::Stream(stream) => stream.write_all(data),
        };
        written.map_err(|error| Error::io(&self.shown, &error))?;
        Ok(to_u64(data.len()))
    }

    /// Makes `bytes` at `offset` read as zeros; returns `bytes`.
    fn hole(&mut self, offset: u64, bytes: u64) -> Result<u64> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match &self.kind {
            Kind::File { .. } => return Ok(bytes),
            Kind::Device(file) if rustix::fs::fallocate(file, punch, offset, bytes).is_ok() => {
                return Ok(bytes);
            }
            Kind::Device(_) | Kind::Stream(_) => {}
        }
        let zeros = vec![0; ZEROS_BYTES];
        let end = offset + bytes;
        let mut at = offset;
        while at < end {
            let piece = (end - at).min(to_u64(zeros.len()));
            at += self.data(at, &zeros[..to_usize(piece)])?;
        }
        Ok(bytes)
    }

    /// Makes the copy durable and gives a file its name.
    fn finish(self) -> Result<()> {
        let finished = match self.kind {
            Kind::File { file, path, replace } => name_file(file, &path, replace),
            Kind::Device(file) => file.sync_all(),
            Kind::Stream(mut stream) => stream.flush(),
        };
        finished.map_err(|error| Error::io(&self.shown, &error))
    }
}

fn refuse_terminal(shown: &str, is_terminal: bool, force: bool) -> Result<()> {
    if is_terminal && !force {
        return Err(Error::new(format!("{shown} is a terminal, and a volume is not text"))
            .hint("name a file, or put a pipe behind it; --force writes to the terminal"));
    }
    Ok(())
}

fn sized_device(device: File, shown: &str, size: u64) -> Result<File> {
    let length = rustix::fs::seek(&device, SeekFrom::End(0))
        .map_err(|error| Error::io(shown, &error.into()))?;
    if length < size {
        return Err(Error::new(format!(
            "{shown} has {}, the volume has {}",
            Size(length),
            Size(size)
        )));
    }
    Ok(device)
}

/// The directory of a file; of a bare name it is the present one.
fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A file beside `path`, of `size` bytes of zeros. `replaced` are the permissions of the file that
/// it takes the place of.
fn new_file(path: PathBuf, size: u64, replaced: Option<Permissions>) -> io::Result<Kind> {
    let replace = replaced.is_some();
    // What the umask leaves of it, as for every new file.
    let permissions = Permissions::from_mode(0o666);
    let mut builder = tempfile::Builder::new();
    let file = builder.prefix(".pando-export-").permissions(permissions);
    let file = file.tempfile_in(directory(&path))?;
    if let Some(permissions) = replaced {
        file.as_file().set_permissions(permissions)?;
    }
    file.as_file().set_len(size)?;
    Ok(Kind::File { file, path, replace })
}

fn name_file(file: NamedTempFile, path: &Path, replace: bool) -> io::Result<()> {
    file.as_file().sync_all()?;
    let named = if replace { file.persist(path) } else { file.persist_noclobber(path) };
    named.map_err(|error| error.error)?;
    File::open(directory(path))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn export_does_not_overwrite_unasked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        std::fs::write(&path, "precious").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        assert!(Target::open(&path, false, 4096).is_err());
        // One that is not finished is as if it had not begun.
        let mut target = Target::open(&path, true, 8192).unwrap();
        target.data(0, &[1; 4096]).unwrap();
        drop(target);
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        assert_eq!(names(dir.path()), ["out"]);
        let mut target = Target::open(&path, true, 8192).unwrap();
        assert_eq!(target.hole(0, 4096).unwrap(), 4096);
        assert_eq!(target.data(4096, &[5; 4096]).unwrap(), 4096);
        target.finish().unwrap();
        let content = std::fs::read(&path).unwrap();
        assert_eq!((&content[..4096], &content[4096..]), (&[0; 4096][..], &[5; 4096][..]));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(names(dir.path()), ["out"]);
    }

    #[test]
    fn a_file_that_appears_meanwhile_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let target = Target::open(&path, false, 4096).unwrap();
        std::fs::write(&path, "precious").unwrap();
        assert!(target.finish().unwrap_err().to_string().contains("File exists"));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        assert_eq!(names(dir.path()), ["out"]);
    }

    #[test]
    fn what_is_no_file_is_a_stream() {
        let mut target = Target::open(Path::new("/dev/null"), false, 1 << 40).unwrap();
        assert_eq!(target.hole(0, 8 << 20).unwrap(), 8 << 20);
        target.finish().unwrap();
        assert!(Target::open(Path::new("/dev"), false, 4096).is_err(), "a directory");
    }
}
