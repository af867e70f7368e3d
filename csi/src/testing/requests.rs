//! The requests, and what their answers are held against.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use tonic::{Code, Request, Status};

use super::Reached;
use super::pandod::{Catalogue, Pandod};
use super::raw::Raw;
use crate::adapter::Adapter;
use crate::controller::ControllerService;
use crate::group::GroupService;
use crate::ids;
use crate::labels;
use crate::node::NodeService;
use crate::proto::csi::controller_server::Controller;
use crate::proto::csi::group_controller_server::GroupController;
use crate::proto::csi::node_server::Node;
use crate::proto::csi::volume_content_source::{SnapshotSource, Type as Source, VolumeSource};
use crate::proto::csi::{
    ControllerExpandVolumeRequest, ControllerGetVolumeRequest, ControllerModifyVolumeRequest,
    CreateSnapshotRequest, CreateVolumeGroupSnapshotRequest, CreateVolumeGroupSnapshotResponse,
    CreateVolumeRequest, DeleteSnapshotRequest, DeleteVolumeGroupSnapshotRequest,
    DeleteVolumeRequest, GetCapacityRequest, GetSnapshotRequest, GetVolumeGroupSnapshotRequest,
    ListSnapshotsRequest, ListVolumesRequest, NodeExpandVolumeRequest, NodeGetVolumeStatsRequest,
    NodePublishVolumeRequest, NodeStageVolumeRequest, NodeUnpublishVolumeRequest,
    NodeUnstageVolumeRequest, ValidateVolumeCapabilitiesRequest, VolumeContentSource,
};

/// What no answer may contain.
const SECRET: &str = "hunter2-is-no-secret";
/// How the daemon fails, and what becomes of it.
const FAILURES: [(&str, Code, Code); 5] = [
    ("io", Code::Internal, Code::Unavailable),
    ("no_space", Code::ResourceExhausted, Code::ResourceExhausted),
    ("poisoned", Code::FailedPrecondition, Code::Unavailable),
    ("corrupt", Code::DataLoss, Code::DataLoss),
    ("new_kind", Code::Unknown, Code::Unavailable),
];

/// The identity of the pool, as it is in ids.
const POOL: &str = "0f3c00001111222233334444555566e1";

/// What a request names, the same both times.
struct Asked {
    raw: Raw,
    id: String,
    /// Volumes for a group.
    ids: Vec<String>,
    /// A group, and its members.
    group: (String, Vec<String>),
}

/// What a call came to, to be compared with another time.
type Said = Result<String, (Code, String)>;

/// The services and what is known of them.
pub(super) struct Calls<'a> {
    adapter: &'a Arc<Adapter>,
    pandod: &'a Pandod,
    inside: &'a Path,
    reached: &'a mut Reached,
}

impl<'a> Calls<'a> {
    pub(super) fn new(
        adapter: &'a Arc<Adapter>,
        pandod: &'a Pandod,
        inside: &'a Path,
        reached: &'a mut Reached,
    ) -> Self {
        Self { adapter, pandod, inside, reached }
    }

    fn note(&mut self, what: &'static str) {
        *self.reached.entry(what).or_default() += 1;
    }

    /// The id that a request names; whether it is one that nobody ever gave.
    fn id(&self, raw: Raw) -> (String, bool) {
        let hostile = match raw.id {
            0xE0 => "../../etc/passwd".into(),
            0xE1 => "..".into(),
            0xE2 => format!("node-1.{POOL}.+1"),
            0xE3 => format!("node-1.{POOL}.01"),
            0xE4 => format!("node-1.{}.1", POOL.to_uppercase()),
            0xE5 => format!("node-1.{POOL}.18446744073709551616"),
            0xE6 => format!("node-1.{POOL}.1\0"),
            0xE7 => format!("{POOL}.1"),
            0xE8 => format!("node-1.{}.1", "0".repeat(32)),
            0xE9 => "i".repeat(129),
            0xEA => String::new(),
            0xEB => "csi-vol-name-1".into(),
            0xEC => format!("node-1.{POOL}.999999"),
            0xED => "a\r\nb\u{1b}[2J".into(),
            0xEE => format!("node-1.{POOL}.g1"),
            0xEF => format!("node-2.{}.1", "0".repeat(32)),
            id => {
                let catalogue = self.pandod.catalogue();
                let at = usize::from(id).checked_rem(catalogue.volumes.len());
                let number = at.and_then(|at| catalogue.volumes.keys().nth(at).copied());
                return (format!("node-1.{POOL}.{}", number.unwrap_or(1)), number.is_none());
            }
        };
        (hostile, true)
    }

    /// One request, twice.
    pub(super) async fn call(&mut self, raw: Raw) {
        self.note("requests");
        let (id, unknown) = self.id(raw);
        let asked = Asked { raw, ids: self.some_ids(raw, &id), group: self.group_of(raw, &id), id };
        let id = &asked.id;
        let before = self.pandod.catalogue();
        let failure = FAILURES.get(usize::from(raw.failure).wrapping_sub(0xF0));
        self.pandod.fail(failure.map(|(kind, code, _)| (raw.more % 3, *kind, *code)));
        let failed = self.pandod.failed();
        let first = self.answer(&asked).await;
        self.pandod.fail(None);
        let told = self.check_errors(&first);
        if self.pandod.failed() > failed {
            self.note("failures of the daemon");
            let (_, _, expected) = failure.expect("it was told to");
            // A node without a daemon has no capacity: an error would leave what was published.
            let none = Self::asks_capacity(raw) && *expected == Code::Unavailable;
            assert_eq!(told, Some(*expected).filter(|_| !none), "{raw:?}: {first:?}");
            // Asked again, it is done or not done, and says so as if nothing had been.
            let again = self.answer(&asked).await;
            self.check_errors(&again);
            return;
        }
        if unknown && Self::has_source(raw) {
            assert!(told.is_some(), "{raw:?}, id {id:?}: {first:?}");
            assert_eq!(self.pandod.catalogue(), before, "made of nothing: {raw:?}");
        }
        if unknown && Self::needs_id(raw) {
            self.note("hostile ids");
            let empty = id.is_empty() || id.len() > 128;
            let ends = matches!(raw.call % 22, 1 | 3 | 10 | 14 | 16);
            match told {
                None => assert!(ends && !empty, "{raw:?}, id {id:?}: {first:?}"),
                Some(Code::InvalidArgument) => {}
                Some(Code::NotFound) => assert!(!ends, "{raw:?}, id {id:?}: {first:?}"),
                // Of another node; or a path that cannot be.
                Some(Code::ResourceExhausted | Code::FailedPrecondition | Code::Internal) => {}
                Some(code) => panic!("{raw:?}, id {id:?}: {code:?}"),
            }
            assert_eq!(self.pandod.catalogue(), before, "an unknown id changes the pool: {raw:?}");
        }
        if raw.hostile_path() && (11..=16).contains(&(raw.call % 22)) {
            self.note("hostile paths");
        }
        if told.is_some() {
            self.note("refused");
        }
        let between = self.pandod.catalogue();
        let second = self.answer(&asked).await;
        let gone = matches!(raw.call % 22, 1 | 3 | 10) && first.is_ok();
        assert!(gone || first == second, "{raw:?}: {first:?}, then {second:?}");
        assert!(second.is_ok() || !gone, "{raw:?}: what is gone is gone: {second:?}");
        let changes_again = self.pandod.catalogue() != between;
        assert!(!changes_again, "{raw:?}: the second time it does something again");
        self.check_catalogue(&before, &between, raw);
    }

    /// Whether a call is about the object of an id, and nothing else.
    fn needs_id(raw: Raw) -> bool {
        matches!(raw.call % 22, 1 | 3..=7 | 9..=16 | 21)
    }

    /// Whether a call asks how much can be given.
    fn asks_capacity(raw: Raw) -> bool {
        matches!(raw.call % 22, 19 | 20)
    }

    /// Whether something is to be made of the object of an id.
    fn has_source(raw: Raw) -> bool {
        match raw.call % 22 {
            0 => matches!(raw.more % 4, 1 | 2),
            call => matches!(call, 2 | 8),
        }
    }

    /// The code of an error, which is one of CSI's and says no secret.
    fn check_errors(&self, said: &Said) -> Option<Code> {
        let (code, message) = said.as_ref().err()?;
        let known = matches!(
            code,
            Code::InvalidArgument
                | Code::NotFound
                | Code::AlreadyExists
                | Code::ResourceExhausted
                | Code::FailedPrecondition
                | Code::Aborted
                | Code::OutOfRange
                | Code::Unavailable
                | Code::DataLoss
                | Code::Unimplemented
                | Code::Internal
        );
        assert!(known, "{code:?}: {message}");
        assert!(!message.contains(SECRET), "{message}");
        assert!(!message.chars().any(char::is_control), "{message:?}");
        assert!(message.len() <= 1 << 14, "{} bytes of a message", message.len());
        Some(*code)
    }

    /// No call deletes what it does not name, or makes more than it is asked for.
    fn check_catalogue(&mut self, before: &Catalogue, after: &Catalogue, raw: Raw) {
        let made = after.volumes.keys().filter(|id| !before.volumes.contains_key(id)).count();
        let gone = before.volumes.keys().filter(|id| !after.volumes.contains_key(id)).count();
        let call = raw.call % 22;
        assert!(made == 0 || matches!(call, 0 | 2 | 8), "{raw:?} makes something");
        assert!(gone == 0 || matches!(call, 1 | 3 | 10), "{raw:?} deletes something");
        assert!(made <= 1 || call == 8, "{raw:?} makes {made}");
        assert!(gone <= 1 || call == 10, "{raw:?} deletes {gone}");
        if gone > 0 {
            self.note("deletions");
        }
        if made > 0 {
            let what = match call {
                0 => "volumes",
                2 => "snapshots",
                _ => "groups",
            };
            self.note(what);
        }
    }

    async fn answer(&mut self, asked: &Asked) -> Said {
        match asked.raw.call % 22 {
            0 => self.create_volume(asked.raw, &asked.id).await,
            8 | 10 | 21 => self.group(asked).await,
            1..=9 | 17..=20 => self.controller(asked.raw, &asked.id).await,
            _ => self.node(asked.raw, &asked.id).await,
        }
    }

    async fn create_volume(&mut self, raw: Raw, id: &str) -> Said {
        let (volume_id, snapshot_id) = (id.to_owned(), id.to_owned());
        let source = match raw.more % 4 {
            1 => Some(Source::Volume(VolumeSource { volume_id })),
            2 => Some(Source::Snapshot(SnapshotSource { snapshot_id })),
            _ => None,
        };
        let request = CreateVolumeRequest {
            name: raw.name(),
            capacity_range: raw.range(),
            volume_capabilities: raw.capability().into_iter().collect(),
            parameters: raw.parameters(),
            secrets: BTreeMap::from([("key".to_owned(), SECRET.to_owned())]),
            volume_content_source: source
                .clone()
                .map(|some| VolumeContentSource { r#type: Some(some) }),
            ..CreateVolumeRequest::default()
        };
        let range = request.capacity_range.unwrap_or_default();
        let controller = ControllerService::new(Arc::clone(self.adapter));
        let answer = controller
            .create_volume(Request::new(request))
            .await
            .map_err(|status| said(&status))?;
        let volume = answer.into_inner().volume.expect("what was made");
        let bytes = volume.capacity_bytes;
        assert!(bytes >= range.required_bytes, "{bytes} bytes of {range:?}");
        assert!(range.limit_bytes == 0 || bytes <= range.limit_bytes, "{bytes} bytes of {range:?}");
        let told = volume.content_source.clone().and_then(|source| source.r#type);
        assert_eq!(told, source, "its source");
        let number = ids::parse(&volume.volume_id).expect("an id of ours").number;
        let kept = &self.pandod.catalogue().volumes[&number];
        assert_eq!(kept.name, ids::volume_name(&raw.name()));
        assert_eq!(i64::try_from(kept.size_bytes), Ok(bytes));
        if source.is_some() {
            self.note("clones");
        }
        Ok(format!("{volume:?}"))
    }

    async fn controller(&mut self, raw: Raw, id: &str) -> Said {
        let controller = ControllerService::new(Arc::clone(self.adapter));
        let (volume_id, snapshot_id) = (id.to_owned(), id.to_owned());
        let secrets = BTreeMap::from([("key".to_owned(), SECRET.to_owned())]);
        match raw.call % 22 {
            1 => shown(
                controller
                    .delete_volume(Request::new(DeleteVolumeRequest { volume_id, secrets }))
                    .await,
            ),
            2 => {
                let (name, source_volume_id, parameters) =
                    (raw.name(), volume_id, raw.parameters());
                let request = CreateSnapshotRequest {
                    name,
                    source_volume_id,
                    parameters,
                    secrets,
                    ..CreateSnapshotRequest::default()
                };
                shown(controller.create_snapshot(Request::new(request)).await)
            }
            3 => shown(
                controller
                    .delete_snapshot(Request::new(DeleteSnapshotRequest { snapshot_id, secrets }))
                    .await,
            ),
            4 => {
                let request = ControllerGetVolumeRequest { volume_id };
                shown(controller.controller_get_volume(Request::new(request)).await)
            }
            5 => {
                let request = ControllerExpandVolumeRequest {
                    volume_id,
                    capacity_range: raw.range(),
                    secrets,
                    volume_capability: None,
                };
                shown(controller.controller_expand_volume(Request::new(request)).await)
            }
            6 => {
                let mutable_parameters = raw.parameters();
                let request =
                    ControllerModifyVolumeRequest { volume_id, secrets, mutable_parameters };
                shown(controller.controller_modify_volume(Request::new(request)).await)
            }
            7 => {
                let request = ValidateVolumeCapabilitiesRequest {
                    volume_id,
                    volume_capabilities: raw.capability().into_iter().collect(),
                    parameters: raw.parameters(),
                    secrets,
                    ..ValidateVolumeCapabilitiesRequest::default()
                };
                shown(controller.validate_volume_capabilities(Request::new(request)).await)
            }
            9 => {
                let request = GetSnapshotRequest { snapshot_id, secrets };
                shown(controller.get_snapshot(Request::new(request)).await)
            }
            _ => self.lists(raw, id).await,
        }
    }

    /// Ids of volumes of a group: the one that is named, and those behind it.
    fn some_ids(&self, raw: Raw, id: &str) -> Vec<String> {
        let mut ids = vec![id.to_owned()];
        for step in 0..raw.more % 3 {
            ids.push(self.id(Raw { id: raw.id.wrapping_add(1 + step), ..raw }).0);
        }
        if raw.more >= 0xF0 {
            ids = (0..70).map(|number| format!("{id}{number}")).collect();
        }
        ids
    }

    /// The first group that there is, unless a hostile id is wanted.
    fn group_of(&self, raw: Raw, id: &str) -> (String, Vec<String>) {
        let catalogue = self.pandod.catalogue();
        let mut members = catalogue.volumes.values().filter_map(|volume| {
            let number = volume.labels.get(labels::GROUP_ID)?;
            Some((number.clone(), volume.id))
        });
        match members.next() {
            Some((number, first)) if raw.id < 0xE0 => {
                let all = members.filter(|(other, _)| *other == number).map(|(_, id)| id);
                let ids = all.chain([first]).map(|id| format!("node-1.{POOL}.{id}"));
                (format!("node-1.{POOL}.g{number}"), ids.collect())
            }
            _ => (id.to_owned(), vec![]),
        }
    }

    /// A group is made, shown or deleted.
    async fn group(&self, asked: &Asked) -> Said {
        let groups = GroupService::new(Arc::clone(self.adapter));
        let (group_snapshot_id, snapshot_ids) = asked.group.clone();
        let secrets = BTreeMap::from([("key".to_owned(), SECRET.to_owned())]);
        match asked.raw.call % 22 {
            8 => {
                let request = CreateVolumeGroupSnapshotRequest {
                    name: asked.raw.name(),
                    source_volume_ids: asked.ids.clone(),
                    secrets,
                    parameters: asked.raw.parameters(),
                };
                let answer = groups.create_volume_group_snapshot(Request::new(request)).await;
                if let Ok(answer) = &answer {
                    self.check_group(asked, answer.get_ref());
                }
                shown(answer)
            }
            10 => {
                let request =
                    DeleteVolumeGroupSnapshotRequest { group_snapshot_id, snapshot_ids, secrets };
                shown(groups.delete_volume_group_snapshot(Request::new(request)).await)
            }
            _ => {
                let request =
                    GetVolumeGroupSnapshotRequest { group_snapshot_id, snapshot_ids, secrets };
                shown(groups.get_volume_group_snapshot(Request::new(request)).await)
            }
        }
    }

    /// A group has a snapshot of each volume that was named, and no others.
    fn check_group(&self, asked: &Asked, answer: &CreateVolumeGroupSnapshotResponse) {
        let group = answer.group_snapshot.as_ref().expect("what was made");
        let sources = group.snapshots.iter().map(|snapshot| &snapshot.source_volume_id);
        assert!(sources.collect::<BTreeSet<_>>() == asked.ids.iter().collect(), "{group:?}");
        let name = asked.raw.name();
        let catalogue = self.pandod.catalogue();
        let volumes = catalogue.volumes.values();
        let kept = volumes.filter(|volume| volume.labels.get(labels::GROUP) == Some(&name));
        assert_eq!(kept.count(), group.snapshots.len(), "{group:?}");
    }

    async fn lists(&mut self, raw: Raw, id: &str) -> Said {
        let controller = ControllerService::new(Arc::clone(self.adapter));
        let max_entries = i32::from(raw.size[0]) - 0x40;
        let starting_token = match raw.size[1] {
            0..=0x9F => String::new(),
            0xA0..=0xBF => "invalid-token".into(),
            0xC0..=0xCF => "csi-../../x".into(),
            0xD0..=0xDF => "csi-".repeat(100),
            _ => "csi-vol-name-2".into(),
        };
        self.note("lists");
        match raw.call % 22 {
            17 => {
                let request = ListVolumesRequest { max_entries, starting_token };
                shown(controller.list_volumes(Request::new(request)).await)
            }
            18 => {
                let filtered = raw.more & 1 == 1;
                let request = ListSnapshotsRequest {
                    max_entries,
                    starting_token,
                    source_volume_id: if filtered { id.to_owned() } else { String::new() },
                    snapshot_id: if raw.more & 2 == 2 { id.to_owned() } else { String::new() },
                    ..ListSnapshotsRequest::default()
                };
                shown(controller.list_snapshots(Request::new(request)).await)
            }
            _ => {
                let request = GetCapacityRequest {
                    volume_capabilities: raw.capability().into_iter().collect(),
                    parameters: raw.parameters(),
                    ..GetCapacityRequest::default()
                };
                shown(controller.get_capacity(Request::new(request)).await)
            }
        }
    }

    async fn node(&self, raw: Raw, id: &str) -> Said {
        let node = NodeService::new(Arc::clone(self.adapter));
        let volume_id = id.to_owned();
        let path = raw.path(self.inside);
        let secrets = BTreeMap::from([("key".to_owned(), SECRET.to_owned())]);
        match raw.call % 22 {
            11 => {
                let request = NodeStageVolumeRequest {
                    volume_id,
                    staging_target_path: path,
                    volume_capability: raw.capability(),
                    secrets,
                    ..NodeStageVolumeRequest::default()
                };
                shown(node.node_stage_volume(Request::new(request)).await)
            }
            12 => {
                let request = NodePublishVolumeRequest {
                    volume_id,
                    staging_target_path: self.inside.join("empty").display().to_string(),
                    target_path: path,
                    volume_capability: raw.capability(),
                    readonly: raw.more & 1 == 1,
                    secrets,
                    ..NodePublishVolumeRequest::default()
                };
                shown(node.node_publish_volume(Request::new(request)).await)
            }
            13 => {
                let request = NodeGetVolumeStatsRequest {
                    volume_id,
                    volume_path: path,
                    ..NodeGetVolumeStatsRequest::default()
                };
                shown(node.node_get_volume_stats(Request::new(request)).await)
            }
            14 => {
                let request = NodeUnstageVolumeRequest { volume_id, staging_target_path: path };
                shown(node.node_unstage_volume(Request::new(request)).await)
            }
            15 => {
                let request = NodeExpandVolumeRequest {
                    volume_id,
                    volume_path: path,
                    capacity_range: raw.range(),
                    secrets,
                    ..NodeExpandVolumeRequest::default()
                };
                shown(node.node_expand_volume(Request::new(request)).await)
            }
            _ => {
                let request = NodeUnpublishVolumeRequest { volume_id, target_path: path };
                shown(node.node_unpublish_volume(Request::new(request)).await)
            }
        }
    }
}

fn said(status: &Status) -> (Code, String) {
    (status.code(), status.message().to_owned())
}

fn shown<T: std::fmt::Debug>(answer: Result<tonic::Response<T>, Status>) -> Said {
    answer.map(|answer| format!("{:?}", answer.into_inner())).map_err(|status| said(&status))
}
