//! Making a volume from a file, a block device or a stream.
//!
//! Only data travels: holes of a sparse file and blocks of zeros become holes of the volume. A
//! volume that is not whole is deleted: by this program, or if it is killed by the daemon, which
//! recognises it by its label.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::PathBuf;

use indicatif::ProgressBar;
use pando_engine::units::{SECTOR_BYTES, Size, to_u64, to_usize};
use pando_proto::TEMPORARY_LABEL;
use pando_proto::v1::{
    CreateVolumeRequest, DeleteVolumeRequest, ModifyVolumeRequest, Volume, WriteVolumeRequest,
    write_volume_request,
};
use rustix::fs::SeekFrom;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::args::ImportArgs;
use crate::client::{Client, by_id, interrupted};
use crate::error::{Error, Result};
use crate::image::{Format, HEAD_BYTES, TAIL_BYTES};
use crate::{table, volume};

/// Bytes of one piece on the wire.
const PIECE_BYTES: usize = 1 << 20;
/// Pieces between the reader of the file and the connection.
const PIECES_AHEAD: usize = 4;
/// Runs of zeros of at least this size are not sent.
const ZEROS_BYTES: usize = 64 << 10;

/// Makes a volume from a file. If anything goes wrong, the volume is deleted again.
pub(crate) async fn run(mut client: Client, args: ImportArgs) -> Result<Volume> {
    let source = Source::open(&args)?;
    let length = source.length.unwrap_or(0).max(args.size.unwrap_or(0));
    if args.size.is_some_and(|size| size < source.length.unwrap_or(0)) {
        return Err(Error::new(format!(
            "{} has {}, more than --size",
            source.shown,
            Size(source.length.unwrap_or(0))
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
        () = interrupted() => Err(Error::new("interrupted")),
    };
    if let Err(error) = copied {
        // If this fails the daemon does it, now or at its next start.
        let request = DeleteVolumeRequest { volume: by_id(&made) };
        client.delete_volume(request).await.map(|_| ()).unwrap_or_default();
        return Err(error);
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
    /// Bytes; unknown of a stream.
    length: Option<u64>,
    /// Asked at the end of a stream.
    disguise: Disguise,
}

enum Reader {
    File(File),
    /// Standard input, or a named pipe.
    Stream(Box<dyn Read + Send>),
}

/// Looks for content that is not that of a disk.
struct Disguise {
    /// `None` is standard input.
    path: Option<PathBuf>,
    volume: String,
    /// Take everything as it is.
    raw: bool,
}

impl Disguise {
    fn check(&self, found: Option<&'static Format>) -> Result<()> {
        match found.filter(|_| !self.raw) {
            Some(format) => Err(format.refusal(self.path.as_deref(), &self.volume)),
            None => Ok(()),
        }
    }
}

impl Source {
    fn open(args: &ImportArgs) -> Result<Self> {
        let is_stdin = args.file.as_os_str() == "-";
        let path = Some(args.file.clone()).filter(|_| !is_stdin);
        let disguise = Disguise { path, volume: args.name.clone(), raw: args.raw };
        if is_stdin {
            return Self::stream(io::stdin(), "standard input".to_owned(), disguise);
        }
        let shown = args.file.display().to_string();
        let failed = |error: io::Error| Error::io(&shown, &error);
        let file = File::open(&args.file).map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Self::stream(file, shown, disguise);
        }
        let length =
            rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|error| failed(error.into()))?;
        let mut head = vec![0; to_usize(length.min(to_u64(HEAD_BYTES)))];
        file.read_exact_at(&mut head, 0).map_err(failed)?;
        refuse_empty(&shown, &head)?;
        disguise.check(Format::of_head(&head))?;
        if let Some(at) = length.checked_sub(to_u64(TAIL_BYTES)) {
            let mut tail = [0; TAIL_BYTES];
            file.read_exact_at(&mut tail, at).map_err(failed)?;
            disguise.check(Format::of_tail(&tail))?;
        }
        Ok(Self { reader: Reader::File(file), shown, length: Some(length), disguise })
    }

    /// Looks at the first bytes of a stream, before there is a volume for it.
    fn stream(
        mut stream: impl Read + Send + 'static,
        shown: String,
        disguise: Disguise,
    ) -> Result<Self> {
        let mut head = Vec::new();
        let read = stream.by_ref().take(to_u64(HEAD_BYTES)).read_to_end(&mut head);
        read.map_err(|error| Error::io(&shown, &error))?;
        refuse_empty(&shown, &head)?;
        disguise.check(Format::of_head(&head))?;
        let reader = Reader::Stream(Box::new(io::Cursor::new(head).chain(stream)));
        Ok(Self { reader, shown, length: None, disguise })
    }

    fn read_all(self, feed: &mut Feed) -> std::result::Result<(), Stop> {
        let Self { reader, shown, length, disguise } = self;
        let failed = |error: &io::Error| Stop::Failed(Error::io(&shown, error));
        match reader {
            Reader::Stream(stream) => {
                let tail = read_stream(stream, feed, failed)?;
                disguise.check(Format::of_tail(&tail)).map_err(Stop::Failed)
            }
            Reader::File(file) => read_file(&file, length.unwrap_or(0), feed, failed),
        }
    }
}

fn refuse_empty(shown: &str, head: &[u8]) -> Result<()> {
    match head.is_empty() {
        true => Err(Error::new(format!("{shown} is empty"))),
        false => Ok(()),
    }
}

/// Sends a stream; returns its last bytes, at most [`TAIL_BYTES`].
fn read_stream(
    mut stream: Box<dyn Read + Send>,
    feed: &mut Feed,
    failed: impl Fn(&io::Error) -> Stop,
) -> std::result::Result<Vec<u8>, Stop> {
    let mut piece = Vec::with_capacity(PIECE_BYTES);
    let mut tail = Vec::new();
    let mut offset = 0;
    loop {
        piece.clear();
        let limit = to_u64(PIECE_BYTES);
        (&mut stream).take(limit).read_to_end(&mut piece).map_err(|error| failed(&error))?;
        if piece.is_empty() {
            feed.extend(offset)?;
            return Ok(tail);
        }
        tail.extend_from_slice(&piece[piece.len().saturating_sub(TAIL_BYTES)..]);
        tail.drain(..tail.len().saturating_sub(TAIL_BYTES));
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
    use std::path::Path;

    use crate::args::Properties;

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

    fn args(path: &Path) -> ImportArgs {
        ImportArgs {
            name: "db".to_owned(),
            file: path.to_owned(),
            size: None,
            raw: false,
            properties: Properties::default(),
        }
    }

    fn stream(bytes: Vec<u8>) -> Result<Source> {
        let disguise = Disguise { path: None, volume: "db".to_owned(), raw: false };
        Source::stream(io::Cursor::new(bytes), "test".to_owned(), disguise)
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
        let source = Source::open(&args(&path)).unwrap();
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
        let sent = collect(stream(vec![0; 3 << 20]).unwrap());
        assert_eq!(sent.len(), 1, "zeros are not sent");
        assert_eq!(sent[0].offset, 3 << 20, "but the volume is as long as the stream");
    }

    #[test]
    fn nothing_is_no_volume() {
        let told = |source: Result<Source>| source.err().unwrap().to_string();
        assert_eq!(told(stream(Vec::new())), "error: test is empty");
        assert_eq!(told(Source::open(&args(Path::new("/dev/null")))), "error: /dev/null is empty");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("empty");
        File::create(&path).unwrap();
        assert!(told(Source::open(&args(&path))).ends_with("empty is empty"));
    }

    #[test]
    fn what_contains_a_disk_is_not_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, [&b"QFI\xFB"[..], &[0; 5000]].concat()).unwrap();
        let told = Source::open(&args(&path)).err().unwrap().to_string();
        assert!(told.contains("is a qcow2 image, not the content of a disk"), "{told}");
        Source::open(&ImportArgs { raw: true, ..args(&path) }).unwrap();
        assert!(stream(std::fs::read(&path).unwrap()).is_err());

        // A fixed VHD shows at its end, which a stream has only when all of it is read.
        let mut vhd = vec![7; (2 << 20) - 100];
        vhd.extend(b"conectix");
        vhd.resize((2 << 20) - 100 + TAIL_BYTES, 0);
        std::fs::write(&path, &vhd).unwrap();
        let told = Source::open(&args(&path)).err().unwrap().to_string();
        assert!(told.contains("is a VHD image") && told.contains("-f vpc"), "{told}");
        let (sender, _receiver) = mpsc::channel(64);
        let mut feed = Feed { sender, bar: ProgressBar::hidden() };
        let Err(Stop::Failed(error)) = stream(vhd).unwrap().read_all(&mut feed) else {
            panic!("taken for the content of a disk");
        };
        assert!(error.to_string().contains("is a VHD image"), "{error}");
    }
}
