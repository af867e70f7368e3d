//! The whole daemon in this process: a real pool in a temporary file, the API over its socket.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pando_proto::v1::pando_client::PandoClient;
use pando_proto::v1::volume_ref::By;
use pando_proto::v1::{
    CreateVolumeRequest, CreateVolumesRequest, DeleteVolumeRequest, DiffVolumesRequest,
    GetVolumeRequest, ListExportsRequest, ListVolumesRequest, ListVolumesResponse,
    ModifyVolumeRequest, PoolCheckRequest, PoolDumpRequest, PoolScrubRequest, PoolStatusRequest,
    ReadVolumeRequest, StartExportRequest, StopExportRequest, VolumeKind, VolumeRef,
    WriteVolumeRequest, read_volume_response, write_volume_request,
};
use pando_proto::{ERRNO_KEY, ERROR_KIND_KEY};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::config::Config;
use super::serve;
use crate::disk::{Allocate, PoolFile};
use crate::error::{ErrorKind, Result};
use crate::pool::{FormatOptions, Pool};
use crate::runtime::shard::Shard;

const MIB: u64 = 1 << 20;

/// A directory with a pool and what the daemon makes beside it.
struct Home {
    dir: TempDir,
    config: Config,
}

impl Home {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::for_pool(dir.path().join("pool"));
        config.run_dir = Some(dir.path().join("run"));
        config.cache_bytes = 8 * MIB;
        config.shards = 2;
        config.validate().unwrap();
        format(&config.pool).await;
        Self { dir, config }
    }

    /// Starts a daemon and connects to it.
    async fn start(&self) -> (Daemon, PandoClient<Channel>) {
        let (stop, stopped) = oneshot::channel();
        let config = self.config.clone();
        let task = tokio::spawn(async move {
            serve(&config, async { stopped.await.unwrap_or("the test has ended") }).await
        });
        // The socket is there before the pool is open; calls wait until it is.
        let socket = self.config.paths().unwrap().socket;
        let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display()));
        let endpoint = endpoint.unwrap();
        loop {
            if let Ok(channel) = endpoint.connect().await {
                return (Daemon { stop, task }, PandoClient::new(channel));
            }
            assert!(!task.is_finished(), "the daemon has ended: {:?}", task.await);
            tokio::task::yield_now().await;
        }
    }
}

struct Daemon {
    stop: oneshot::Sender<&'static str>,
    task: JoinHandle<Result<()>>,
}

impl Daemon {
    async fn end(self) {
        self.stop.send("the test says so").unwrap();
        self.task.await.unwrap().unwrap();
    }
}

async fn format(path: &Path) {
    let file = Arc::new(PoolFile::create(path, 64 * MIB, Allocate::Sparse).unwrap());
    let options = FormatOptions {
        size_bytes: 64 * MIB,
        journal_bytes: Some(4 * MIB),
        force: false,
        uuid: [7; 16],
    };
    let shard = Shard::start("format".to_owned(), || async {}).unwrap();
    let formatted = shard.call(move || async move { Pool::format(&file.disk(), &options).await });
    formatted.await.unwrap().unwrap();
    shard.stop();
    shard.join().unwrap();
}

fn named(name: &str) -> Option<VolumeRef> {
    Some(VolumeRef { by: Some(By::Name(name.to_owned())) })
}

fn new_volume(name: &str) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name.to_owned(),
        size_bytes: Some(8 * MIB),
        ..CreateVolumeRequest::default()
    }
}

fn clone_of(source: &str, name: &str) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name.to_owned(),
        source: named(source),
        ..CreateVolumeRequest::default()
    }
}

fn trailer<'a>(status: &'a Status, key: &str) -> &'a str {
    status.metadata().get(key).unwrap().to_str().unwrap()
}

async fn write(client: &mut PandoClient<Channel>, name: &str, offset: u64, data: Vec<u8>) {
    let request = WriteVolumeRequest {
        volume: named(name),
        offset,
        content: Some(write_volume_request::Content::Data(data.into())),
        ..WriteVolumeRequest::default()
    };
    client.write_volume(tokio_stream::once(request)).await.unwrap();
}

/// The data of a volume as (offset, bytes), and the bytes in holes.
async fn read(client: &mut PandoClient<Channel>, name: &str) -> (Vec<(u64, Vec<u8>)>, u64) {
    let request = ReadVolumeRequest { volume: named(name), ..ReadVolumeRequest::default() };
    let mut pieces = client.read_volume(request).await.unwrap().into_inner();
    let (mut data, mut holes, mut end) = (Vec::new(), 0, 0);
    while let Some(piece) = pieces.message().await.unwrap() {
        assert_eq!(piece.offset, end, "no gap, no overlap");
        match piece.content.unwrap() {
            read_volume_response::Content::Data(bytes) => {
                end += bytes.len() as u64;
                data.push((piece.offset, bytes.to_vec()));
            }
            read_volume_response::Content::HoleBytes(bytes) => {
                end += bytes;
                holes += bytes;
            }
        }
    }
    (data, holes)
}

async fn changed(
    client: &mut PandoClient<Channel>,
    base: &str,
    name: &str,
) -> Vec<(u64, u64, bool)> {
    let request = DiffVolumesRequest { base: named(base), volume: named(name) };
    let mut answers = client.diff_volumes(request).await.unwrap().into_inner();
    let mut runs = Vec::new();
    while let Some(answer) = answers.message().await.unwrap() {
        runs.extend(answer.extents.iter().map(|run| (run.offset, run.length, run.mapped)));
    }
    runs
}

async fn names(
    client: &mut PandoClient<Channel>,
    request: ListVolumesRequest,
) -> (Vec<String>, String) {
    let ListVolumesResponse { volumes, next_page_token } =
        client.list_volumes(request).await.unwrap().into_inner();
    (volumes.into_iter().map(|volume| volume.name).collect(), next_page_token)
}

#[tokio::test]
async fn volumes_live_and_survive_a_restart() {
    let home = Home::new().await;
    let (daemon, mut client) = home.start().await;
    let made = client.create_volume(new_volume("db")).await.unwrap().into_inner().volume.unwrap();
    assert_eq!((made.size_bytes, made.source_id, made.snapshot), (8 * MIB, None, false));
    write(&mut client, "db", 4096, vec![1; 8192]).await;
    client.create_volume(clone_of("db", "db-test")).await.unwrap();
    write(&mut client, "db", 4096, vec![2; 4096]).await;
    let (data, holes) = read(&mut client, "db-test").await;
    assert_eq!((data, holes), (vec![(4096, vec![1; 8192])], 8 * MIB - 8192));
    assert_eq!(changed(&mut client, "db", "db-test").await, [(4096, 4096, true)]);
    let request = GetVolumeRequest { volume: named("db-test"), with_space: true };
    let space = client.get_volume(request).await.unwrap().into_inner().space.unwrap();
    assert_eq!((space.mapped_bytes, space.exclusive_bytes, space.shared_bytes), (8192, 4096, 4096));

    let grown = ModifyVolumeRequest {
        volume: named("db-test"),
        size_bytes: Some(16 * MIB),
        ..ModifyVolumeRequest::default()
    };
    client.modify_volume(grown).await.unwrap();
    let status = client.pool_status(PoolStatusRequest {}).await.unwrap().into_inner();
    let pool = status.pool.unwrap();
    assert_eq!((pool.volumes, pool.snapshots, pool.provisioned_bytes), (2, 0, 24 * MIB));
    assert_eq!(pool.uuid, "07070707-0707-0707-0707-070707070707");
    assert!(status.counters.unwrap().written_bytes >= 12288);
    daemon.end().await;
    assert!(!home.config.paths().unwrap().socket.exists(), "the socket is gone with the daemon");

    let (daemon, mut client) = home.start().await;
    let (data, _) = read(&mut client, "db").await;
    let content: Vec<u8> = data.into_iter().flat_map(|(_, bytes)| bytes).collect();
    assert_eq!(content, [[2; 4096], [1; 4096]].concat());
    let found = client.get_volume(GetVolumeRequest { volume: named("db-test"), with_space: false });
    let found = found.await.unwrap().into_inner().volume.unwrap();
    assert_eq!((found.size_bytes, found.source_name.as_str()), (16 * MIB, "db"));
    daemon.end().await;
}

#[tokio::test]
async fn creating_twice_is_for_programs_not_for_people() {
    let home = Home::new().await;
    let (daemon, mut client) = home.start().await;
    let first = client.create_volume(new_volume("db")).await.unwrap().into_inner();
    let again = client.create_volume(new_volume("db")).await.unwrap().into_inner();
    assert_eq!(first.volume.unwrap().id, again.volume.unwrap().id);
    let strict = CreateVolumeRequest { must_be_new: true, ..new_volume("db") };
    let refused = client.create_volume(strict).await.unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists);
    assert_eq!(trailer(&refused, ERROR_KIND_KEY), "exists");
    assert_eq!(trailer(&refused, ERRNO_KEY), "17");
    // All or none.
    let volumes = vec![clone_of("db", "a"), clone_of("missing", "b")];
    let refused = client.create_volumes(CreateVolumesRequest { volumes }).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    let volumes = vec![clone_of("db", "a"), clone_of("db", "b")];
    let made = client.create_volumes(CreateVolumesRequest { volumes }).await.unwrap().into_inner();
    assert_eq!(made.volumes.len(), 2);
    let empty = client.create_volumes(CreateVolumesRequest::default()).await.unwrap_err();
    assert_eq!(empty.code(), Code::InvalidArgument);
    daemon.end().await;
}

#[tokio::test]
async fn a_clone_keeps_the_name_of_its_source() {
    let home = Home::new().await;
    let (daemon, mut client) = home.start().await;
    client.create_volume(new_volume("db")).await.unwrap();
    let labels: BTreeMap<_, _> = (0..32).map(|n| (format!("k{n}"), "v".to_owned())).collect();
    for (name, labels) in [("few", BTreeMap::new()), ("many", labels.clone())] {
        let clone = CreateVolumeRequest { labels, ..clone_of("db", name) };
        client.create_volume(clone).await.unwrap();
    }
    client.delete_volume(DeleteVolumeRequest { volume: named("db") }).await.unwrap();
    let source = async |client: &mut PandoClient<Channel>, name: &str| {
        let request = GetVolumeRequest { volume: named(name), with_space: false };
        let volume = client.get_volume(request).await.unwrap().into_inner().volume.unwrap();
        assert!(volume.source_deleted && volume.source_id.is_some(), "{volume:?}");
        (volume.source_name, volume.labels.len())
    };
    assert_eq!(source(&mut client, "few").await, ("db".to_owned(), 0));
    // Where the labels of the user take all the room there is, the name gives way.
    assert_eq!(source(&mut client, "many").await, (String::new(), 32));
    let request =
        ModifyVolumeRequest { volume: named("few"), labels, ..ModifyVolumeRequest::default() };
    client.modify_volume(request).await.unwrap();
    assert_eq!(source(&mut client, "few").await, (String::new(), 32));
    daemon.end().await;
}

#[tokio::test]
async fn lists_are_paged_and_filtered() {
    let home = Home::new().await;
    let (daemon, mut client) = home.start().await;
    for name in ["a1", "a2", "b1"] {
        client.create_volume(new_volume(name)).await.unwrap();
    }
    let labels = [("app".to_owned(), "db".to_owned())];
    let snapshot = CreateVolumeRequest {
        snapshot: true,
        labels: labels.clone().into(),
        ..clone_of("b1", "a3")
    };
    client.create_volume(snapshot).await.unwrap();
    let all = ListVolumesRequest::default;
    let page = names(&mut client, ListVolumesRequest { page_size: 2, ..all() }).await;
    assert_eq!(page, (vec!["a1".to_owned(), "a2".to_owned()], "a2".to_owned()));
    let next = ListVolumesRequest { page_size: 2, page_token: page.1, ..all() };
    assert_eq!(
        names(&mut client, next).await,
        (vec!["a3".to_owned(), "b1".to_owned()], String::new())
    );
    let only_a3 = [
        ListVolumesRequest { kind: VolumeKind::Snapshot.into(), ..all() },
        ListVolumesRequest { labels: labels.into(), ..all() },
        ListVolumesRequest { source: named("b1"), ..all() },
        ListVolumesRequest { name_prefix: "a3".to_owned(), page_size: 1, ..all() },
    ];
    for request in only_a3 {
        assert_eq!(names(&mut client, request.clone()).await.0, ["a3"], "{request:?}");
    }
    daemon.end().await;
}

#[tokio::test]
async fn an_exported_volume_is_neither_deleted_nor_overwritten() {
    let home = Home::new().await;
    let (daemon, mut client) = home.start().await;
    client.create_volume(new_volume("db")).await.unwrap();
    let start = StartExportRequest { volume: named("db"), ..StartExportRequest::default() };
    let export = client.start_export(start.clone()).await.unwrap().into_inner().export.unwrap();
    let path = PathBuf::from(&export.path);
    assert!(path.starts_with(home.dir.path()) && path.exists());
    let again = client.start_export(start.clone()).await.unwrap().into_inner().export.unwrap();
    assert_eq!(again, export, "idempotent");
    let other = StartExportRequest { read_only: true, ..start };
    assert_eq!(client.start_export(other).await.unwrap_err().code(), Code::FailedPrecondition);

    let delete = DeleteVolumeRequest { volume: named("db") };
    let refused = client.delete_volume(delete.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains(&export.uri), "{}", refused.message());
    let overwrite = WriteVolumeRequest { volume: named("db"), ..WriteVolumeRequest::default() };
    let refused = client.write_volume(tokio_stream::once(overwrite)).await.unwrap_err();
    assert_eq!(trailer(&refused, ERROR_KIND_KEY), "busy");

    let stop = StopExportRequest { volume: named("db"), ..StopExportRequest::default() };
    client.stop_export(stop.clone()).await.unwrap();
    assert!(!path.exists());
    assert_eq!(client.stop_export(stop).await.unwrap_err().code(), Code::NotFound);
    let left = client.list_exports(ListExportsRequest {}).await.unwrap().into_inner().exports;
    assert!(left.is_empty());
    client.delete_volume(delete).await.unwrap();
    daemon.end().await;
}

#[tokio::test]
async fn a_pool_has_one_daemon() {
    let home = Home::new().await;
    let (daemon, _client) = home.start().await;
    let mut config = home.config.clone();
    config.run_dir = Some(home.dir.path().join("other"));
    let refused = serve(&config, std::future::pending()).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy);
    assert!(refused.to_string().contains("is another pandod running?"), "{refused}");
    daemon.end().await;
}

#[tokio::test]
async fn a_sound_pool_is_found_sound() {
    use pando_proto::v1::{pool_check_response as check, pool_scrub_response as scrub};
    let home = Home::new().await;
    let (daemon, mut client) = home.start().await;
    client.create_volume(new_volume("db")).await.unwrap();
    write(&mut client, "db", 0, vec![3; 64 << 10]).await;
    client.create_volume(clone_of("db", "db-test")).await.unwrap();

    let mut events = client.pool_check(PoolCheckRequest {}).await.unwrap().into_inner();
    let mut last = None;
    while let Some(answer) = events.message().await.unwrap() {
        assert!(!matches!(answer.event, Some(check::Event::Finding(_))), "{answer:?}");
        last = answer.event;
    }
    let Some(check::Event::Summary(summary)) = last else { panic!("no summary: {last:?}") };
    assert_eq!(summary.findings, 0);

    // The rate of a scrub is a bound on reading; this little is read at once.
    let mut events = client.pool_scrub(PoolScrubRequest { rate_bytes: MIB }).await.unwrap();
    let (mut last, mut shown) = (None, Vec::new());
    while let Some(answer) = events.get_mut().message().await.unwrap() {
        if let Some(scrub::Event::Progress(progress)) = &answer.event {
            shown.push((progress.done, progress.total));
        }
        last = answer.event;
    }
    let Some(scrub::Event::Summary(summary)) = last else { panic!("no summary: {last:?}") };
    assert!(summary.blocks >= 16 && summary.errors == 0, "{summary:?}");
    // What is verified, of what is in use: not of the pool.
    assert_eq!(shown.last(), Some(&(summary.blocks, summary.blocks)), "{shown:?}");
    let near = summary.blocks..=summary.blocks + 8;
    assert!(shown.iter().all(|(done, all)| done <= all && near.contains(all)), "{shown:?}");

    let mut pieces = client.pool_dump(PoolDumpRequest::default()).await.unwrap().into_inner();
    let mut text = String::new();
    while let Some(piece) = pieces.message().await.unwrap() {
        text.push_str(&piece.text);
    }
    assert!(text.contains("db-test"), "{text}");
    daemon.end().await;
}
