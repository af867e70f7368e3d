//! Copying a volume into a file, a block device or a pipe, and back.
//!
//! Only data travels: holes of a sparse file and blocks of zeros become holes of the volume, and
//! unmapped runs of the volume become holes of the file. Whatever goes wrong ends in an error;
//! a copy that is not whole is removed, not left to be taken for a good one.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use indicatif::ProgressBar;
use pando_engine::units::{to_u64, to_usize};
use pando_proto::v1::{
    CreateVolumeRequest, DeleteVolumeRequest, GetVolumeRequest, ModifyVolumeRequest,
    ReadVolumeRequest, Volume, VolumeRef, WriteVolumeRequest, read_volume_response, volume_ref,
    write_volume_request,
};
use rustix::fs::{FallocateFlags, SeekFrom};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::args::{ExportArgs, ImportArgs};
use crate::client::{Client, by_name};
use crate::error::{Error, Result};
use crate::{table, volume};

/// Bytes of one piece on the wire.
const PIECE_BYTES: usize = 1 << 20;
/// Pieces between the reader of the file and the connection.
const PIECES_AHEAD: usize = 4;
/// Runs of zeros of at least this size are not sent.
const ZEROS_BYTES: usize = 64 << 10;
/// Unit of a volume's size.
const SECTOR_BYTES: u64 = 512;
/// Label on what is not whole yet or not to stay: the snapshot that an export of a live volume
/// reads from, and a volume that is being imported.
const TEMPORARY_LABEL: &str = "pando/temporary";

fn is_pipe(path: &Path) -> bool {
    path.as_os_str() == "-"
}

fn by_id(volume: &Volume) -> Option<VolumeRef> {
    Some(VolumeRef { by: Some(volume_ref::By::Id(volume.id)) })
}

async fn delete(client: &mut Client, volume: &Volume) -> Result<()> {
    client.delete_volume(DeleteVolumeRequest { volume: by_id(volume) }).await?;
    Ok(())
}

// ---- Export -----------------------------------------------------------------------------------

/// Copies a volume out. A volume that can be written meanwhile is read from a snapshot, so that
/// the copy is of one instant.
pub(crate) async fn export(mut client: Client, args: ExportArgs) -> Result<()> {
    let request = GetVolumeRequest { volume: by_name(&args.name), with_space: false };
    let answer = client.get_volume(request).await?.into_inner();
    let volume = answer.volume.unwrap_or_default();
    // The target first: a snapshot is not worth taking for a file that cannot be written.
    let mut target = Target::open(&args.target, args.force, volume.size_bytes)?;
    let copied = if volume.snapshot || volume.read_only {
        copy_out(&mut client, &volume, &mut target).await
    } else {
        let frozen = freeze(&mut client, &volume).await?;
        let copied = copy_out(&mut client, &frozen, &mut target).await;
        copied.and(delete(&mut client, &frozen).await)
    };
    copied.inspect_err(|_| target.remove_partial())
}

async fn freeze(client: &mut Client, volume: &Volume) -> Result<Volume> {
    let request = CreateVolumeRequest {
        // Ids are short and unique, names may already be as long as they can be.
        name: format!("export-{}-{}", volume.id, std::process::id()),
        source: by_id(volume),
        snapshot: true,
        labels: [(TEMPORARY_LABEL.to_owned(), "export".to_owned())].into(),
        must_be_new: true,
        ..CreateVolumeRequest::default()
    };
    let answer = client.create_volume(request).await?.into_inner();
    Ok(answer.volume.unwrap_or_default())
}

/// Copies all of `volume`, or stops at Ctrl-C so that the caller can clean up.
async fn copy_out(client: &mut Client, volume: &Volume, target: &mut Target) -> Result<()> {
    tokio::select! {
        copied = copy_pieces(client, volume, target) => copied,
        _ = tokio::signal::ctrl_c() => Err(Error::new("interrupted")),
    }
}

async fn copy_pieces(client: &mut Client, volume: &Volume, target: &mut Target) -> Result<()> {
    let request = ReadVolumeRequest { volume: by_id(volume), offset: 0, length: 0 };
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
    target.finish()?;
    bar.finish_and_clear();
    Ok(())
}

/// Where an export goes.
struct Target {
    kind: TargetKind,
    shown: String,
    path: std::path::PathBuf,
}

enum TargetKind {
    /// A regular file, empty at first: what is not written stays a hole.
    File { file: File, made_here: bool },
    /// A block device with old content: holes must be made.
    Device(File),
    /// Standard output: holes are written as zeros.
    Pipe,
}

impl Target {
    fn open(path: &Path, force: bool, size: u64) -> Result<Self> {
        if is_pipe(path) {
            let shown = "standard output".to_owned();
            return Ok(Self { kind: TargetKind::Pipe, shown, path: path.to_owned() });
        }
        let shown = path.display().to_string();
        let failed = |error: io::Error| Error::io(&shown, &error);
        let kind = match std::fs::metadata(path) {
            Ok(_) if !force => {
                return Err(Error::new(format!("{shown} exists"))
                    .hint("choose another file, or overwrite it with --force"));
            }
            Ok(found) if found.file_type().is_block_device() => {
                let file = OpenOptions::new().write(true).open(path).map_err(failed)?;
                let length = rustix::fs::seek(&file, SeekFrom::End(0))
                    .map_err(|error| failed(error.into()))?;
                if length < size {
                    return Err(Error::new(format!(
                        "{shown} has {length} bytes, the volume has {size}"
                    )));
                }
                TargetKind::Device(file)
            }
            found => {
                let mut options = OpenOptions::new();
                options.write(true).create_new(found.is_err()).truncate(found.is_ok());
                let file = options.open(path).map_err(failed)?;
                file.set_len(size).map_err(failed)?;
                TargetKind::File { file, made_here: found.is_err() }
            }
        };
        Ok(Self { kind, shown, path: path.to_owned() })
    }

    /// Writes `data` at `offset`; returns its length.
    fn data(&mut self, offset: u64, data: &[u8]) -> Result<u64> {
        let written = match &self.kind {
            TargetKind::File { file, .. } | TargetKind::Device(file) => {
                file.write_all_at(data, offset)
            }
            TargetKind::Pipe => io::stdout().lock().write_all(data),
        };
        written.map_err(|error| Error::io(&self.shown, &error))?;
        Ok(to_u64(data.len()))
    }

    /// Makes `bytes` at `offset` read as zeros; returns `bytes`.
    fn hole(&mut self, offset: u64, bytes: u64) -> Result<u64> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match &self.kind {
            TargetKind::File { .. } => return Ok(bytes),
            TargetKind::Device(file)
                if rustix::fs::fallocate(file, punch, offset, bytes).is_ok() =>
            {
                return Ok(bytes);
            }
            TargetKind::Device(_) | TargetKind::Pipe => {}
        }
        let zeros = vec![0; PIECE_BYTES];
        let end = offset + bytes;
        let mut at = offset;
        while at < end {
            let piece = (end - at).min(to_u64(zeros.len()));
            at += self.data(at, &zeros[..to_usize(piece)])?;
        }
        Ok(bytes)
    }

    fn finish(&mut self) -> Result<()> {
        match &self.kind {
            TargetKind::File { file, .. } | TargetKind::Device(file) => file.sync_all(),
            TargetKind::Pipe => io::stdout().lock().flush(),
        }
        .map_err(|error| Error::io(&self.shown, &error))
    }

    /// Removes a file that this export made and could not complete.
    fn remove_partial(&self) {
        if matches!(self.kind, TargetKind::File { made_here: true, .. }) {
            // The failure that led here is the one to tell.
            std::fs::remove_file(&self.path).unwrap_or_default();
        }
    }
}

// ---- Import -----------------------------------------------------------------------------------

/// Makes a volume from a file. If anything goes wrong, the volume is deleted again.
pub(crate) async fn import(mut client: Client, args: ImportArgs) -> Result<Volume> {
    let source = Source::open(&args.file)?;
    let length = source.length.unwrap_or(0).max(args.size.unwrap_or(0));
    if args.size.is_some_and(|size| size < source.length.unwrap_or(0)) {
        return Err(Error::new(format!(
            "{} has {} bytes, more than --size",
            source.shown,
            source.length.unwrap_or(0)
        )));
    }
    let mut request = CreateVolumeRequest {
        // A pipe without --size: one block at first, the writes make it grow.
        size_bytes: Some(if length == 0 { 4096 } else { length.next_multiple_of(SECTOR_BYTES) }),
        ..volume::request(&args.name, &args.properties)
    };
    request.labels.insert(TEMPORARY_LABEL.to_owned(), "import".to_owned());
    let made = client.create_volume(request).await?.into_inner().volume.unwrap_or_default();
    let grow = source.length.is_none() && args.size.is_none();
    let copied = tokio::select! {
        copied = copy_in(&mut client, source, &made, grow) => copied,
        _ = tokio::signal::ctrl_c() => Err(Error::new("interrupted")),
    };
    if let Err(error) = copied {
        return Err(match delete(&mut client, &made).await {
            Ok(()) => error,
            Err(_) => error.hint(format!(
                "volume {0} is not whole: `pando volume delete {0}` when pandod is back",
                args.name
            )),
        });
    }
    let request = ModifyVolumeRequest {
        volume: by_id(&made),
        labels: [(TEMPORARY_LABEL.to_owned(), String::new())].into(),
        ..ModifyVolumeRequest::default()
    };
    Ok(client.modify_volume(request).await?.into_inner().volume.unwrap_or(made))
}

async fn copy_in(client: &mut Client, source: Source, made: &Volume, grow: bool) -> Result<()> {
    let bar = table::progress(source.length);
    let (sender, receiver) = mpsc::channel(PIECES_AHEAD);
    let head = WriteVolumeRequest { volume: by_id(made), grow, ..WriteVolumeRequest::default() };
    // The sender fails only when the call has ended, and then the call says why.
    let reader = tokio::task::spawn_blocking({
        let bar = bar.clone();
        move || {
            let mut feed = Feed { sender, bar };
            feed.send(head).and_then(|()| source.read_all(&mut feed))
        }
    });
    let written = client.write_volume(ReceiverStream::new(receiver)).await;
    let read = reader.await.map_err(|error| Error::new(format!("reader failed: {error}")))?;
    bar.finish_and_clear();
    match read {
        Err(Stop::Failed(error)) => Err(error),
        Err(Stop::CallEnded) => {
            written?;
            Err(Error::new("pandod ended the import early"))
        }
        Ok(()) => {
            written?;
            Ok(())
        }
    }
}

/// Why the reader stopped before the end of the file.
#[derive(Debug)]
enum Stop {
    CallEnded,
    Failed(Error),
}

/// The sending side of an import.
struct Feed {
    sender: mpsc::Sender<WriteVolumeRequest>,
    bar: ProgressBar,
}

impl Feed {
    fn send(&mut self, request: WriteVolumeRequest) -> std::result::Result<(), Stop> {
        self.sender.blocking_send(request).map_err(|_| Stop::CallEnded)
    }

    /// Sends a piece of the file, without its longer runs of zeros, which a new volume has
    /// already.
    fn piece(&mut self, offset: u64, piece: &[u8]) -> std::result::Result<(), Stop> {
        for run in runs(piece) {
            if let Run::Data { start, end } = run {
                let mut data = piece[start..end].to_vec();
                let odd = data.len() % to_usize(SECTOR_BYTES);
                if odd != 0 {
                    // Only the end of a file can be odd; the volume was rounded up.
                    data.resize(data.len() + to_usize(SECTOR_BYTES) - odd, 0);
                }
                self.send(WriteVolumeRequest {
                    offset: offset + to_u64(start),
                    content: Some(write_volume_request::Content::Data(data.into())),
                    ..WriteVolumeRequest::default()
                })?;
            }
        }
        self.bar.set_position(offset + to_u64(piece.len()));
        Ok(())
    }

    /// Makes the volume reach to `end` without data there.
    fn extend(&mut self, end: u64) -> std::result::Result<(), Stop> {
        let end = end.next_multiple_of(SECTOR_BYTES);
        if end == 0 {
            return Ok(());
        }
        self.send(WriteVolumeRequest {
            offset: end,
            content: Some(write_volume_request::Content::HoleBytes(0)),
            ..WriteVolumeRequest::default()
        })
    }
}

/// A part of a piece.
#[derive(Debug, PartialEq, Eq)]
enum Run {
    Data { start: usize, end: usize },
    Zeros { end: usize },
}

/// Cuts `piece` into data and zeros, at multiples of [`ZEROS_BYTES`].
fn runs(piece: &[u8]) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut at = 0;
    for part in piece.chunks(ZEROS_BYTES) {
        let end = at + part.len();
        let zeros = part.iter().all(|&byte| byte == 0);
        match runs.last_mut() {
            Some(Run::Data { end: last, .. }) if !zeros => *last = end,
            Some(Run::Zeros { end: last }) if zeros => *last = end,
            _ if zeros => runs.push(Run::Zeros { end }),
            _ => runs.push(Run::Data { start: at, end }),
        }
        at = end;
    }
    runs
}

/// Where an import comes from.
struct Source {
    reader: Reader,
    shown: String,
    /// Bytes; unknown of a pipe.
    length: Option<u64>,
}

enum Reader {
    File(File),
    /// Standard input, or a named pipe.
    Stream(Box<dyn Read + Send>),
}

impl Source {
    fn open(path: &Path) -> Result<Self> {
        if is_pipe(path) {
            let reader = Reader::Stream(Box::new(io::stdin()));
            return Ok(Self { reader, shown: "standard input".to_owned(), length: None });
        }
        let shown = path.display().to_string();
        let failed = |error: io::Error| Error::io(&shown, &error);
        let file = File::open(path).map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Ok(Self { reader: Reader::Stream(Box::new(file)), shown, length: None });
        }
        let length =
            rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|error| failed(error.into()))?;
        if length == 0 {
            return Err(Error::new(format!("{shown} is empty")));
        }
        Ok(Self { reader: Reader::File(file), shown, length: Some(length) })
    }

    fn read_all(self, feed: &mut Feed) -> std::result::Result<(), Stop> {
        let Self { reader, shown, length } = self;
        let failed = |error: &io::Error| Stop::Failed(Error::io(&shown, error));
        match reader {
            Reader::Stream(stream) => read_stream(stream, feed, failed),
            Reader::File(file) => read_file(&file, length.unwrap_or(0), feed, failed),
        }
    }
}

fn read_stream(
    mut stream: Box<dyn Read + Send>,
    feed: &mut Feed,
    failed: impl Fn(&io::Error) -> Stop,
) -> std::result::Result<(), Stop> {
    let mut piece = Vec::with_capacity(PIECE_BYTES);
    let mut offset = 0;
    loop {
        piece.clear();
        let limit = to_u64(PIECE_BYTES);
        (&mut stream).take(limit).read_to_end(&mut piece).map_err(|error| failed(&error))?;
        if piece.is_empty() {
            return feed.extend(offset);
        }
        feed.piece(offset, &piece)?;
        offset += to_u64(piece.len());
    }
}

fn read_file(
    file: &File,
    length: u64,
    feed: &mut Feed,
    failed: impl Fn(&io::Error) -> Stop,
) -> std::result::Result<(), Stop> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut offset = 0;
    while let Some((start, end)) =
        next_data(file, offset, length).map_err(|error| failed(&error))?
    {
        offset = start;
        while offset < end {
            let want = to_usize((end - offset).min(to_u64(PIECE_BYTES)));
            file.read_exact_at(&mut piece[..want], offset).map_err(|error| failed(&error))?;
            feed.piece(offset, &piece[..want])?;
            offset += to_u64(want);
        }
    }
    Ok(())
}

/// The next run of data in `[from, length)`. What cannot tell holes is one run of data.
fn next_data(file: &File, from: u64, length: u64) -> io::Result<Option<(u64, u64)>> {
    if from >= length {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Ok(start) => start,
        Err(rustix::io::Errno::NXIO) => return Ok(None),
        Err(rustix::io::Errno::INVAL) => return Ok(Some((from, length))),
        Err(error) => return Err(error.into()),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    // File systems report holes in units of their own; the volume wants whole sectors.
    let start = (start - start % SECTOR_BYTES).max(from);
    let end = end.next_multiple_of(SECTOR_BYTES).min(length);
    Ok((start < end).then_some((start, end)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_zeros_are_found() {
        let mut piece = vec![0; 4 * ZEROS_BYTES + 100];
        assert_eq!(runs(&piece), [Run::Zeros { end: piece.len() }]);
        piece[ZEROS_BYTES] = 1;
        piece[3 * ZEROS_BYTES - 1] = 1;
        assert_eq!(
            runs(&piece),
            [
                Run::Zeros { end: ZEROS_BYTES },
                Run::Data { start: ZEROS_BYTES, end: 3 * ZEROS_BYTES },
                Run::Zeros { end: piece.len() },
            ]
        );
        assert!(runs(&[]).is_empty());
    }

    fn collect(source: Source) -> Vec<WriteVolumeRequest> {
        let (sender, mut receiver) = mpsc::channel(64);
        let mut feed = Feed { sender, bar: ProgressBar::hidden() };
        source.read_all(&mut feed).unwrap();
        drop(feed);
        std::iter::from_fn(|| receiver.blocking_recv()).collect()
    }

    fn data_of(request: &WriteVolumeRequest) -> &[u8] {
        match &request.content {
            Some(write_volume_request::Content::Data(data)) => data,
            other => panic!("not data: {other:?}"),
        }
    }

    #[test]
    fn holes_of_a_file_are_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sparse");
        let file = File::create(&path).unwrap();
        file.write_all_at(&[7; 4096], 8 << 20).unwrap();
        file.write_all_at(&[9; 100], 16 << 20).unwrap();
        let source = Source::open(&path).unwrap();
        assert_eq!(source.length, Some((16 << 20) + 100));
        let sent = collect(source);
        let firsts: Vec<u64> = sent.iter().map(|request| request.offset).collect();
        assert_eq!(firsts, [8 << 20, 16 << 20]);
        assert_eq!(data_of(&sent[0]), [7; 4096]);
        assert_eq!(data_of(&sent[1]).len(), 512, "the end is filled up to a sector");
        assert_eq!(data_of(&sent[1])[..100], [9; 100]);
    }

    #[test]
    fn a_stream_ends_where_it_ends() {
        let reader = Reader::Stream(Box::new(io::Cursor::new(vec![0; 3 << 20])));
        let sent = collect(Source { reader, shown: "test".to_owned(), length: None });
        assert_eq!(sent.len(), 1, "zeros are not sent");
        assert_eq!(sent[0].offset, 3 << 20, "but the volume is as long as the stream");
    }

    #[test]
    fn export_does_not_overwrite_unasked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        std::fs::write(&path, "precious").unwrap();
        assert!(Target::open(&path, false, 4096).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        let mut target = Target::open(&path, true, 8192).unwrap();
        assert_eq!(target.hole(0, 4096).unwrap(), 4096);
        assert_eq!(target.data(4096, &[5; 4096]).unwrap(), 4096);
        target.finish().unwrap();
        let content = std::fs::read(&path).unwrap();
        assert_eq!((&content[..4096], &content[4096..]), (&[0; 4096][..], &[5; 4096][..]));
        target.remove_partial();
        assert!(path.exists(), "a file that was there before is not removed");
    }
}
