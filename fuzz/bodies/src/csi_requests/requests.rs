//! The requests, and the oracle for their answers.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use pando_csi::proto::csi::volume_content_source::{SnapshotSource, Type as Source, VolumeSource};
use pando_csi::proto::csi::{
    ControllerExpandVolumeRequest, ControllerGetVolumeRequest, ControllerModifyVolumeRequest,
    CreateSnapshotRequest, CreateVolumeGroupSnapshotRequest, CreateVolumeGroupSnapshotResponse,
    CreateVolumeRequest, DeleteSnapshotRequest, DeleteVolumeGroupSnapshotRequest,
    DeleteVolumeRequest, GetCapacityRequest, GetSnapshotRequest, GetVolumeGroupSnapshotRequest,
    ListSnapshotsRequest, ListVolumesRequest, NodeExpandVolumeRequest, NodeGetVolumeStatsRequest,
    NodePublishVolumeRequest, NodeStageVolumeRequest, NodeUnpublishVolumeRequest,
    NodeUnstageVolumeRequest, ValidateVolumeCapabilitiesRequest, VolumeContentSource,
};
use pando_csi::{Services, labels};
use tonic::{Code, Request, Status};

use super::NODE;
use super::fake_daemon::{Catalogue, FakeDaemon};
use super::raw::Raw;
use crate::Reached;

/// A secret of every request. No answer may contain it.
const SECRET: &str = "hunter2-is-no-secret";
/// Failures of the daemon: kind, code, and the code of CSI that the adapter must answer.
const FAILURES: [(&str, Code, Code); 5] = [
    ("io", Code::Internal, Code::Unavailable),
    ("no_space", Code::ResourceExhausted, Code::ResourceExhausted),
    ("poisoned", Code::FailedPrecondition, Code::Unavailable),
    ("corrupt", Code::DataLoss, Code::DataLoss),
    ("new_kind", Code::Unknown, Code::Unavailable),
];

/// The UUID of the pool, as ids contain it.
const POOL: &str = "0f3c00001111222233334444555566e1";

/// What a request names: the same when it is repeated.
struct Subject {
    raw: Raw,
    id: String,
    /// Volumes for a group.
    ids: Vec<String>,
    /// A group, and its members.
    group: (String, Vec<String>),
}

/// The outcome of a call, to be compared with that of its repetition.
type Outcome = Result<String, (Code, String)>;

/// The services, their daemon, and the directory for paths.
pub(super) struct Calls<'a> {
    services: &'a Services,
    daemon: &'a FakeDaemon,
    inside: &'a Path,
    reached: &'a mut Reached,
}

impl<'a> Calls<'a> {
    pub(super) fn new(
        services: &'a Services,
        daemon: &'a FakeDaemon,
        inside: &'a Path,
        reached: &'a mut Reached,
    ) -> Self {
        Self { services, daemon, inside, reached }
    }

    /// The id that a request names, and whether it is one that the adapter never issued.
    fn id(&self, raw: Raw) -> (String, bool) {
        let hostile = match raw.id {
            0xE0 => "../../etc/passwd".into(),
            0xE1 => "..".into(),
            0xE2 => format!("{NODE}.{POOL}.+1"),
            0xE3 => format!("{NODE}.{POOL}.01"),
            0xE4 => format!("{NODE}.{}.1", POOL.to_uppercase()),
            0xE5 => format!("{NODE}.{POOL}.18446744073709551616"),
            0xE6 => format!("{NODE}.{POOL}.1\0"),
            0xE7 => format!("{POOL}.1"),
            0xE8 => format!("{NODE}.{}.1", "0".repeat(32)),
            0xE9 => "i".repeat(129),
            0xEA => String::new(),
            0xEB => "csi-vol-name-1".into(),
            0xEC => format!("{NODE}.{POOL}.999999"),
            0xED => "a\r\nb\u{1b}[2J".into(),
            0xEE => format!("{NODE}.{POOL}.g1"),
            0xEF => format!("node-2.{}.1", "0".repeat(32)),
            id => {
                let catalogue = self.daemon.catalogue();
                let at = usize::from(id).checked_rem(catalogue.volumes.len());
                let number = at.and_then(|at| catalogue.volumes.keys().nth(at).copied());
                return (format!("{NODE}.{POOL}.{}", number.unwrap_or(1)), number.is_none());
            }
        };
        (hostile, true)
    }

    /// Sends a request, and sends it again.
    pub(super) async fn call(&mut self, raw: Raw) {
        self.reached.note("requests");
        let (id, unknown) = self.id(raw);
        let subject =
            Subject { raw, ids: self.some_ids(raw, &id), group: self.group_of(raw, &id), id };
        let id = &subject.id;
        let before = self.daemon.catalogue();
        let failure = FAILURES.get(usize::from(raw.failure).wrapping_sub(0xF0));
        self.daemon.fail(failure.map(|(kind, code, _)| (raw.more % 3, *kind, *code)));
        let failed = self.daemon.failed();
        let first = self.send(&subject).await;
        self.daemon.fail(None);
        let code = self.check_errors(&first);
        if self.daemon.failed() > failed {
            self.reached.note("failures of the daemon");
            let (_, _, expected) = failure.expect("a failure was injected");
            // A node without a daemon reports no capacity: after an error the capacity that was
            // published before would remain.
            let no_capacity = Self::asks_capacity(raw) && *expected == Code::Unavailable;
            assert_eq!(code, Some(*expected).filter(|_| !no_capacity), "{raw:?}: {first:?}");
            // The call was done or not; its repetition answers as if nothing had failed.
            let again = self.send(&subject).await;
            self.check_errors(&again);
            return;
        }
        if unknown && Self::has_source(raw) {
            assert!(code.is_some(), "{raw:?}, id {id:?}: {first:?}");
            assert_eq!(self.daemon.catalogue(), before, "created without a source: {raw:?}");
        }
        if unknown && Self::needs_id(raw) {
            self.reached.note("hostile ids");
            let empty = id.is_empty() || id.len() > 128;
            let ends = matches!(raw.call % 22, 1 | 3 | 10 | 14 | 16);
            match code {
                None => assert!(ends && !empty, "{raw:?}, id {id:?}: {first:?}"),
                Some(Code::InvalidArgument) => {}
                Some(Code::NotFound) => assert!(!ends, "{raw:?}, id {id:?}: {first:?}"),
                // The id belongs to another node, or the path is impossible.
                Some(Code::ResourceExhausted | Code::FailedPrecondition | Code::Internal) => {}
                Some(code) => panic!("{raw:?}, id {id:?}: {code:?}"),
            }
            assert_eq!(self.daemon.catalogue(), before, "an unknown id changes the pool: {raw:?}");
        }
        if raw.hostile_path() && (11..=16).contains(&(raw.call % 22)) {
            self.reached.note("hostile paths");
        }
        if code.is_some() {
            self.reached.note("refused");
        }
        let between = self.daemon.catalogue();
        let second = self.send(&subject).await;
        let gone = matches!(raw.call % 22, 1 | 3 | 10) && first.is_ok();
        assert!(gone || first == second, "{raw:?}: {first:?}, then {second:?}");
        assert!(second.is_ok() || !gone, "{raw:?}: a repeated deletion fails: {second:?}");
        let changes_again = self.daemon.catalogue() != between;
        assert!(!changes_again, "{raw:?}: the repetition changes the pool");
        self.check_catalogue(&before, &between, raw);
    }

    /// Whether a call needs the object of its id.
    fn needs_id(raw: Raw) -> bool {
        matches!(raw.call % 22, 1 | 3..=7 | 9..=16 | 21)
    }

    /// Whether a call asks for the capacity.
    fn asks_capacity(raw: Raw) -> bool {
        matches!(raw.call % 22, 19 | 20)
    }

    /// Whether a call creates something from the object of its id.
    fn has_source(raw: Raw) -> bool {
        match raw.call % 22 {
            0 => matches!(raw.more % 4, 1 | 2),
            call => matches!(call, 2 | 8),
        }
    }

    /// Checks that an error has a code of CSI and contains no secret. Returns the code.
    fn check_errors(&self, outcome: &Outcome) -> Option<Code> {
        let (code, message) = outcome.as_ref().err()?;
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

    /// Checks that a call deletes only what it names, and creates no more than it requests.
    fn check_catalogue(&mut self, before: &Catalogue, after: &Catalogue, raw: Raw) {
        let created = after.volumes.keys().filter(|id| !before.volumes.contains_key(id)).count();
        let gone = before.volumes.keys().filter(|id| !after.volumes.contains_key(id)).count();
        let call = raw.call % 22;
        assert!(created == 0 || matches!(call, 0 | 2 | 8), "{raw:?} creates something");
        assert!(gone == 0 || matches!(call, 1 | 3 | 10), "{raw:?} deletes something");
        assert!(created <= 1 || call == 8, "{raw:?} creates {created}");
        assert!(gone <= 1 || call == 10, "{raw:?} deletes {gone}");
        if gone > 0 {
            self.reached.note("deletions");
        }
        if created > 0 {
            let what = match call {
                0 => "volumes",
                2 => "snapshots",
                _ => "groups",
            };
            self.reached.note(what);
        }
    }

    async fn send(&mut self, subject: &Subject) -> Outcome {
        match subject.raw.call % 22 {
            0 => self.create_volume(subject.raw, &subject.id).await,
            8 | 10 | 21 => self.group(subject).await,
            1..=9 | 17..=20 => self.controller(subject.raw, &subject.id).await,
            _ => self.node(subject.raw, &subject.id).await,
        }
    }

    async fn create_volume(&mut self, raw: Raw, id: &str) -> Outcome {
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
        let controller = &self.services.controller;
        let answer = controller
            .create_volume(Request::new(request))
            .await
            .map_err(|status| code_and_message(&status))?;
        let volume = answer.into_inner().volume.expect("the object created");
        let bytes = volume.capacity_bytes;
        assert!(bytes >= range.required_bytes, "{bytes} bytes of {range:?}");
        assert!(range.limit_bytes == 0 || bytes <= range.limit_bytes, "{bytes} bytes of {range:?}");
        let answered = volume.content_source.clone().and_then(|source| source.r#type);
        assert_eq!(answered, source, "its source");
        let number = volume.volume_id.strip_prefix(&format!("{NODE}.{POOL}."));
        let number: u64 = number.and_then(|n| n.parse().ok()).expect("an id of this pool");
        let kept = &self.daemon.catalogue().volumes[&number];
        assert_eq!(kept.name, volume_name(&raw.name()));
        assert_eq!(i64::try_from(kept.size_bytes), Ok(bytes));
        if source.is_some() {
            self.reached.note("clones");
        }
        Ok(format!("{volume:?}"))
    }

    async fn controller(&mut self, raw: Raw, id: &str) -> Outcome {
        let controller = &self.services.controller;
        let (volume_id, snapshot_id) = (id.to_owned(), id.to_owned());
        let secrets = BTreeMap::from([("key".to_owned(), SECRET.to_owned())]);
        match raw.call % 22 {
            1 => outcome(
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
                outcome(controller.create_snapshot(Request::new(request)).await)
            }
            3 => outcome(
                controller
                    .delete_snapshot(Request::new(DeleteSnapshotRequest { snapshot_id, secrets }))
                    .await,
            ),
            4 => {
                let request = ControllerGetVolumeRequest { volume_id };
                outcome(controller.controller_get_volume(Request::new(request)).await)
            }
            5 => {
                let request = ControllerExpandVolumeRequest {
                    volume_id,
                    capacity_range: raw.range(),
                    secrets,
                    volume_capability: None,
                };
                outcome(controller.controller_expand_volume(Request::new(request)).await)
            }
            6 => {
                let mutable_parameters = raw.parameters();
                let request =
                    ControllerModifyVolumeRequest { volume_id, secrets, mutable_parameters };
                outcome(controller.controller_modify_volume(Request::new(request)).await)
            }
            7 => {
                let request = ValidateVolumeCapabilitiesRequest {
                    volume_id,
                    volume_capabilities: raw.capability().into_iter().collect(),
                    parameters: raw.parameters(),
                    secrets,
                    ..ValidateVolumeCapabilitiesRequest::default()
                };
                outcome(controller.validate_volume_capabilities(Request::new(request)).await)
            }
            9 => {
                let request = GetSnapshotRequest { snapshot_id, secrets };
                outcome(controller.get_snapshot(Request::new(request)).await)
            }
            _ => self.lists(raw, id).await,
        }
    }

    /// Ids of the volumes for a group: the given one and those that follow it.
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

    /// The first group in the pool, unless the request has a hostile id.
    fn group_of(&self, raw: Raw, id: &str) -> (String, Vec<String>) {
        let catalogue = self.daemon.catalogue();
        let mut members = catalogue.volumes.values().filter_map(|volume| {
            let number = volume.labels.get(labels::GROUP_ID)?;
            Some((number.clone(), volume.id))
        });
        match members.next() {
            Some((number, first)) if raw.id < 0xE0 => {
                let all = members.filter(|(other, _)| *other == number).map(|(_, id)| id);
                let ids = all.chain([first]).map(|id| format!("{NODE}.{POOL}.{id}"));
                (format!("{NODE}.{POOL}.g{number}"), ids.collect())
            }
            _ => (id.to_owned(), vec![]),
        }
    }

    /// Creates, gets or deletes a group.
    async fn group(&self, subject: &Subject) -> Outcome {
        let groups = &self.services.group;
        let (group_snapshot_id, snapshot_ids) = subject.group.clone();
        let secrets = BTreeMap::from([("key".to_owned(), SECRET.to_owned())]);
        match subject.raw.call % 22 {
            8 => {
                let request = CreateVolumeGroupSnapshotRequest {
                    name: subject.raw.name(),
                    source_volume_ids: subject.ids.clone(),
                    secrets,
                    parameters: subject.raw.parameters(),
                };
                let answer = groups.create_volume_group_snapshot(Request::new(request)).await;
                if let Ok(answer) = &answer {
                    self.check_group(subject, answer.get_ref());
                }
                outcome(answer)
            }
            10 => {
                let request =
                    DeleteVolumeGroupSnapshotRequest { group_snapshot_id, snapshot_ids, secrets };
                outcome(groups.delete_volume_group_snapshot(Request::new(request)).await)
            }
            _ => {
                let request =
                    GetVolumeGroupSnapshotRequest { group_snapshot_id, snapshot_ids, secrets };
                outcome(groups.get_volume_group_snapshot(Request::new(request)).await)
            }
        }
    }

    /// Checks that a group has one snapshot of each volume of the request, and no others.
    fn check_group(&self, subject: &Subject, answer: &CreateVolumeGroupSnapshotResponse) {
        let group = answer.group_snapshot.as_ref().expect("the object created");
        let sources = group.snapshots.iter().map(|snapshot| &snapshot.source_volume_id);
        assert!(sources.collect::<BTreeSet<_>>() == subject.ids.iter().collect(), "{group:?}");
        let name = subject.raw.name();
        let catalogue = self.daemon.catalogue();
        let volumes = catalogue.volumes.values();
        let kept = volumes.filter(|volume| volume.labels.get(labels::GROUP) == Some(&name));
        assert_eq!(kept.count(), group.snapshots.len(), "{group:?}");
    }

    async fn lists(&mut self, raw: Raw, id: &str) -> Outcome {
        let controller = &self.services.controller;
        let max_entries = i32::from(raw.size[0]) - 0x40;
        let starting_token = match raw.size[1] {
            0..=0x9F => String::new(),
            0xA0..=0xBF => "invalid-token".into(),
            0xC0..=0xCF => "csi-../../x".into(),
            0xD0..=0xDF => "csi-".repeat(100),
            _ => "csi-vol-name-2".into(),
        };
        self.reached.note("lists");
        match raw.call % 22 {
            17 => {
                let request = ListVolumesRequest { max_entries, starting_token };
                outcome(controller.list_volumes(Request::new(request)).await)
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
                outcome(controller.list_snapshots(Request::new(request)).await)
            }
            _ => {
                let request = GetCapacityRequest {
                    volume_capabilities: raw.capability().into_iter().collect(),
                    parameters: raw.parameters(),
                    ..GetCapacityRequest::default()
                };
                outcome(controller.get_capacity(Request::new(request)).await)
            }
        }
    }

    async fn node(&self, raw: Raw, id: &str) -> Outcome {
        let node = &self.services.node;
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
                outcome(node.node_stage_volume(Request::new(request)).await)
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
                outcome(node.node_publish_volume(Request::new(request)).await)
            }
            13 => {
                let request = NodeGetVolumeStatsRequest {
                    volume_id,
                    volume_path: path,
                    ..NodeGetVolumeStatsRequest::default()
                };
                outcome(node.node_get_volume_stats(Request::new(request)).await)
            }
            14 => {
                let request = NodeUnstageVolumeRequest { volume_id, staging_target_path: path };
                outcome(node.node_unstage_volume(Request::new(request)).await)
            }
            15 => {
                let request = NodeExpandVolumeRequest {
                    volume_id,
                    volume_path: path,
                    capacity_range: raw.range(),
                    secrets,
                    ..NodeExpandVolumeRequest::default()
                };
                outcome(node.node_expand_volume(Request::new(request)).await)
            }
            _ => {
                let request = NodeUnpublishVolumeRequest { volume_id, target_path: path };
                outcome(node.node_unpublish_volume(Request::new(request)).await)
            }
        }
    }
}

fn code_and_message(status: &Status) -> (Code, String) {
    (status.code(), status.message().to_owned())
}

fn outcome<T: std::fmt::Debug>(answer: Result<tonic::Response<T>, Status>) -> Outcome {
    answer
        .map(|answer| format!("{:?}", answer.into_inner()))
        .map_err(|status| code_and_message(&status))
}

/// The name in the pool of the volume that CSI calls `name`.
fn volume_name(name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.chars().all(plain) {
        format!("csi-vol-{name}")
    } else {
        format!("csi-vol_{}", URL_SAFE_NO_PAD.encode(name))
    }
}
