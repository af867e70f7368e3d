//! SIGKILL of the adapter, or of the daemon, in the middle of every call of the controller. The
//! caller does what the sidecars of Kubernetes do: it asks again. It must get the one object that
//! the request made, whether it was made before the kill or is made now, and find none left over.

use std::time::Duration;

use pando_csi::proto::csi;
use pando_csi::proto::csi::controller_client::ControllerClient;
use pando_csi::proto::csi::group_controller_client::GroupControllerClient;
use pando_tests::csi::{block, from_snapshot, from_volume, request};
use pando_tests::data::number;
use pando_tests::noise::Noise;
use pando_tests::{Csi, Data, System};
use tonic::transport::Channel;
use tonic::{Code, Status};

const SIZE: i64 = 1 << 20;
/// Times that all calls are gone through.
const ROUNDS: u64 = 4;
/// Longest time between the start of a call and the kill: calls take one or two.
const DELAY_US_MAX: u64 = 4000;
/// Times that a call is repeated before the test gives up.
const TRIES_MAX: usize = 100;
const PAUSE: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Adapter,
    Daemon,
}

#[derive(Clone, Debug)]
enum Call {
    CreateVolume(csi::CreateVolumeRequest),
    CreateSnapshot(csi::CreateSnapshotRequest),
    CreateGroup(csi::CreateVolumeGroupSnapshotRequest),
    Expand(csi::ControllerExpandVolumeRequest),
    DeleteVolume(csi::DeleteVolumeRequest),
    DeleteSnapshot(csi::DeleteSnapshotRequest),
    DeleteGroup(csi::DeleteVolumeGroupSnapshotRequest),
}

/// What a call answers with, as a text: an id and what else must stay the same.
async fn answer(channel: Channel, call: Call) -> Result<String, Status> {
    let mut controller = ControllerClient::new(channel.clone());
    let mut groups = GroupControllerClient::new(channel);
    Ok(match call {
        Call::CreateVolume(request) => {
            let volume = controller.create_volume(request).await?.into_inner().volume;
            volume.expect("an answer has a volume").volume_id
        }
        Call::CreateSnapshot(request) => {
            let snapshot = controller.create_snapshot(request).await?.into_inner().snapshot;
            snapshot.expect("an answer has a snapshot").snapshot_id
        }
        Call::CreateGroup(request) => {
            let group = groups.create_volume_group_snapshot(request).await?.into_inner();
            let group = group.group_snapshot.expect("an answer has a group");
            let members = group.snapshots.iter().map(|member| member.snapshot_id.as_str());
            let parts: Vec<&str> =
                [group.group_snapshot_id.as_str()].into_iter().chain(members).collect();
            parts.join(" ")
        }
        Call::Expand(request) => controller
            .controller_expand_volume(request)
            .await?
            .into_inner()
            .capacity_bytes
            .to_string(),
        Call::DeleteVolume(request) => {
            controller.delete_volume(request).await?;
            String::new()
        }
        Call::DeleteSnapshot(request) => {
            controller.delete_snapshot(request).await?;
            String::new()
        }
        Call::DeleteGroup(request) => {
            groups.delete_volume_group_snapshot(request).await?;
            String::new()
        }
    })
}

/// A system whose parts are killed.
struct Stage {
    system: System,
    csi: Csi,
    noise: Noise,
    victim: Victim,
    /// How often the killed call had answered already, and how often not.
    outcomes: [usize; 2],
}

impl Stage {
    fn new(victim: Victim) -> Self {
        let system = System::start("256MiB");
        let csi = Csi::start(&system);
        Self { system, csi, noise: Noise::new(7), victim, outcomes: [0, 0] }
    }

    /// Calls, kills meanwhile, and calls again until there is an answer.
    fn survive(&mut self, call: &Call) -> String {
        let started = self.csi.begin(answer(self.csi.channel(), call.clone()));
        std::thread::sleep(Duration::from_micros(self.noise.below(DELAY_US_MAX)));
        match self.victim {
            Victim::Adapter => {
                self.csi.kill();
                self.csi.spawn();
            }
            Victim::Daemon => self.system.crash(),
        }
        let first = self.csi.wait(started).expect("a call ends");
        self.outcomes[usize::from(first.is_err())] += 1;
        if let (Err(error), Victim::Daemon) = (&first, self.victim) {
            // To the sidecars any other code says that nothing has happened.
            assert!(matches!(error.code(), Code::Unavailable | Code::Aborted), "{call:?}: {error}");
        }
        let again = self.repeat(call);
        if let Ok(first) = first {
            assert_eq!(first, again, "{call:?}");
        }
        assert_eq!(self.repeat(call), again, "{call:?}");
        again
    }

    fn repeat(&self, call: &Call) -> String {
        for _ in 0..TRIES_MAX {
            match self.csi.wait(answer(self.csi.channel(), call.clone())) {
                Ok(text) => return text,
                Err(error) => {
                    let open = matches!(error.code(), Code::Unavailable | Code::Aborted);
                    assert!(open, "{call:?}: {error}");
                    std::thread::sleep(PAUSE);
                }
            }
        }
        panic!("{call:?} does not come through");
    }
}

fn clone_of(name: &str, source: Option<csi::VolumeContentSource>) -> Call {
    Call::CreateVolume(csi::CreateVolumeRequest {
        volume_content_source: source,
        ..request(name, SIZE, &block())
    })
}

/// Makes one of everything, and deletes it again, with a kill in every call.
fn round(stage: &mut Stage, data: &Data, index: u64) {
    let name = |what: &str| format!("{what}-{index}");
    let source = stage.survive(&Call::CreateVolume(request(&name("source"), SIZE, &block())));
    let content = stage.noise.bytes(SIZE.try_into().expect("small"));
    data.write(number(&source), 0, &content);
    let clone = stage.survive(&clone_of(&name("clone"), from_volume(&source)));
    let snapshot = stage.survive(&Call::CreateSnapshot(csi::CreateSnapshotRequest {
        source_volume_id: source.clone(),
        name: name("snapshot"),
        ..Default::default()
    }));
    let restored = stage.survive(&clone_of(&name("restored"), from_snapshot(&snapshot)));
    let group = stage.survive(&Call::CreateGroup(csi::CreateVolumeGroupSnapshotRequest {
        name: name("group"),
        source_volume_ids: vec![source.clone(), clone.clone()],
        ..Default::default()
    }));
    let grown = stage.survive(&Call::Expand(csi::ControllerExpandVolumeRequest {
        volume_id: restored.clone(),
        capacity_range: Some(csi::CapacityRange { required_bytes: 2 * SIZE, limit_bytes: 0 }),
        ..Default::default()
    }));
    assert_eq!(grown, (2 * SIZE).to_string());
    let pool = data.pool();
    assert_eq!((pool.volumes, pool.snapshots), (3, 3), "one of each, and none left over");
    for id in [&source, &clone, &snapshot] {
        assert_eq!(data.read(number(id)), content, "{id}");
    }

    let ids: Vec<String> = group.split(' ').map(str::to_owned).collect();
    let (group_snapshot_id, members) = ids.split_first().expect("a group has an id");
    for volume_id in [source, clone] {
        let request = csi::DeleteVolumeRequest { volume_id, ..Default::default() };
        stage.survive(&Call::DeleteVolume(request));
    }
    stage.survive(&Call::DeleteGroup(csi::DeleteVolumeGroupSnapshotRequest {
        group_snapshot_id: group_snapshot_id.clone(),
        snapshot_ids: members.to_vec(),
        ..Default::default()
    }));
    let request = csi::DeleteSnapshotRequest { snapshot_id: snapshot, ..Default::default() };
    stage.survive(&Call::DeleteSnapshot(request));
    let read = data.read(number(&restored));
    assert_eq!(read[..content.len()], content, "the last one holds all of it");
    let request = csi::DeleteVolumeRequest { volume_id: restored, ..Default::default() };
    stage.survive(&Call::DeleteVolume(request));
    assert_eq!(data.pool().provisioned_bytes, 0);
}

fn kill_in_every_call(victim: Victim) {
    let mut stage = Stage::new(victim);
    let data = Data::new(&stage.system);
    for index in 0..ROUNDS {
        round(&mut stage, &data, index);
    }
    stage.system.check();
    let [answered, lost] = stage.outcomes;
    eprintln!("{victim:?} killed {} times: {answered} calls had answered", answered + lost);
    assert!(lost > 0, "no kill met a call; this proves nothing");
}

#[test]
fn the_adapter_is_killed_in_every_call() {
    kill_in_every_call(Victim::Adapter);
}

#[test]
fn the_daemon_is_killed_in_every_call() {
    kill_in_every_call(Victim::Daemon);
}

#[test]
fn without_the_daemon_nothing_is_decided() {
    let mut system = System::start("256MiB");
    let csi = Csi::start(&system);
    let made = csi.create(request("one", SIZE, &block())).expect("a volume");
    system.kill();
    let code = |result: Result<(), Status>| result.expect_err("no daemon").code();
    assert_eq!(code(csi.delete(&made.volume_id)), Code::Unavailable);
    let two = csi.create(request("two", SIZE, &block())).map(drop);
    assert_eq!(code(two), Code::Unavailable);
    system.spawn();
    csi.delete(&made.volume_id).expect("the daemon is back, the adapter finds it");
}
