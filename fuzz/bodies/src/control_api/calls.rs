//! Calls about volumes, and what the model predicts of their answers.

use std::collections::BTreeMap;

use pando_engine::units::to_usize;
use pando_proto::ERROR_KIND_KEY;
use pando_proto::v1;
use pando_proto::v1::pando_client::PandoClient;
use pando_proto::v1::volume_ref::By;
use tonic::Status;
use tonic::transport::Channel;

use super::{AllowedErrors, ModelVolume, Raw, are_labels, is_name, is_size, name, named};
use crate::Reached;

/// A client and its model of the pool.
pub(super) struct Calls<'a> {
    pub(super) client: PandoClient<Channel>,
    pub(super) volumes: BTreeMap<String, ModelVolume>,
    pub(super) reached: &'a mut Reached,
}

impl Calls<'_> {
    /// Deletes everything.
    pub(super) async fn empty(&mut self) {
        let all = self.client.list_volumes(v1::ListVolumesRequest::default()).await;
        for volume in all.expect("a list").into_inner().volumes {
            let request = v1::DeleteVolumeRequest { volume: named(&volume.name) };
            self.client.delete_volume(request).await.expect("it exists");
        }
    }

    /// Checks that a call succeeded or failed as the request allows. Returns the answer of a
    /// success.
    pub(super) fn judge<T>(
        &mut self,
        answer: Result<tonic::Response<T>, Status>,
        allowed: &AllowedErrors,
    ) -> Option<T> {
        match answer {
            Ok(answer) => {
                assert!(allowed.0.is_empty(), "it succeeds, in spite of {allowed:?}");
                Some(answer.into_inner())
            }
            Err(error) => {
                let kind = error.metadata().get(ERROR_KIND_KEY).and_then(|kind| kind.to_str().ok());
                let kind = kind.unwrap_or("none");
                assert!(allowed.0.contains(&kind), "{error}: {kind}, not one of {allowed:?}");
                let message = error.message();
                assert!(!message.is_empty() && !message.contains('\n'), "{message:?}");
                self.reached.note("refused");
                None
            }
        }
    }

    pub(super) async fn call(&mut self, raw: Raw) {
        match raw.call % 14 {
            0 | 1 => self.create(raw).await,
            2 => self.group(raw).await,
            3 => self.get(raw).await,
            4 => self.list(raw).await,
            5 => self.modify(raw).await,
            6 => self.delete(raw).await,
            7 | 8 => self.write(raw).await,
            9 => self.read(raw).await,
            10 => self.differences(raw).await,
            11 => self.exports(raw).await,
            12 => self.configuration(raw),
            _ => self.compare(&name(raw.name)).await,
        }
    }

    fn request(&self, raw: Raw) -> v1::CreateVolumeRequest {
        let source = match raw.flags % 4 {
            0 => None,
            1 => Some(v1::VolumeRef { by: None }),
            _ => named(&name(raw.other)),
        };
        let (iops_limit, bandwidth_limit_bytes) = raw.limits();
        v1::CreateVolumeRequest {
            name: name(raw.name),
            size_bytes: raw.size(),
            source,
            snapshot: raw.flags & 4 == 4,
            read_only: raw.flags & 8 == 8,
            reservation_bytes: if raw.more >= 0xF0 { u64::MAX - u64::from(raw.more) } else { 0 },
            labels: raw.labels(),
            must_be_new: raw.flags & 16 == 16,
            iops_limit,
            bandwidth_limit_bytes,
            ..v1::CreateVolumeRequest::default()
        }
    }

    /// The errors that a creation may fail with, and the volume that exists if it succeeds.
    fn predict(&self, request: &v1::CreateVolumeRequest) -> (AllowedErrors, Option<ModelVolume>) {
        let mut allowed = AllowedErrors::default();
        let mut source = None;
        match request.source.as_ref().map(|source| &source.by) {
            None => {}
            Some(Some(By::Name(name))) => {
                source = self.volumes.get(name);
                allowed.allow_if(source.is_none(), "not_found");
            }
            Some(_) => allowed.allow_if(true, "invalid"),
        }
        let from = source.map(|source| source.size);
        if let Some(old) = self.volumes.get(&request.name) {
            let same = old.source == source.map(|source| source.id)
                && old.snapshot == request.snapshot
                && request.size_bytes.is_none_or(|size| size == old.size);
            allowed.allow_if(!same || request.must_be_new, "exists");
            return (allowed, Some(old.clone()));
        }
        let size = request.size_bytes.or(from);
        allowed.allow_if(!is_name(&request.name), "invalid");
        allowed.allow_if(request.snapshot && source.is_none(), "invalid");
        allowed.allow_if(request.snapshot && size != from, "invalid");
        allowed.allow_if(!size.is_some_and(is_size), "invalid");
        allowed.allow_if(size.is_some() && from > size, "invalid");
        allowed.allow_if(!are_labels(&request.labels), "limit");
        if request.reservation_bytes > 0 {
            allowed.0.extend(["no_space", "limit"]);
        }
        let known = ModelVolume {
            id: 0,
            size: size.unwrap_or(0),
            snapshot: request.snapshot,
            read_only: request.read_only || request.snapshot,
            source: source.map(|source| source.id),
            labels: request.labels.clone(),
            sectors: source.map(|source| source.sectors.clone()).unwrap_or_default(),
        };
        (allowed, Some(known))
    }

    fn created(&mut self, volume: &v1::Volume, mut known: ModelVolume) {
        known.id = volume.id;
        Self::same(volume, &known);
        self.reached.note(if known.source.is_some() { "clones" } else { "created" });
        self.volumes.insert(volume.name.clone(), known);
    }

    /// Compares a volume of the daemon with the model.
    fn same(volume: &v1::Volume, known: &ModelVolume) {
        let found = (volume.id, volume.size_bytes, volume.snapshot, volume.read_only);
        let expected = (known.id, known.size, known.snapshot, known.read_only);
        assert_eq!(found, expected, "{}", volume.name);
        assert_eq!(volume.source_id, known.source, "{}", volume.name);
        assert_eq!(volume.labels, known.labels, "{}", volume.name);
    }

    async fn create(&mut self, raw: Raw) {
        let request = self.request(raw);
        let (allowed, known) = self.predict(&request);
        let answer = self.client.create_volume(request).await;
        if let Some(answer) = self.judge(answer, &allowed) {
            self.created(&answer.volume.expect("a volume"), known.expect("it can be created"));
        }
    }

    /// Creates a group of volumes: all of it or nothing.
    async fn group(&mut self, raw: Raw) {
        let second = Raw { name: raw.name.wrapping_add(1), ..raw };
        let count = if raw.more == 0xEF { 65 } else { usize::from(raw.more % 3) };
        let volumes: Vec<_> =
            [raw, second].into_iter().cycle().take(count).map(|raw| self.request(raw)).collect();
        let mut allowed = AllowedErrors::default();
        allowed.allow_if(count == 0 || count > 64, "invalid");
        let mut all = Vec::new();
        for request in &volumes {
            let (errors, known) = self.predict(request);
            allowed.0.extend(errors.0);
            all.extend(known);
        }
        let old = volumes.iter().filter(|r| self.volumes.contains_key(&r.name)).count();
        allowed.allow_if(old > 0 && old < count, "exists");
        allowed.allow_if(count == 65, "exists");
        let answer = self.client.create_volumes(v1::CreateVolumesRequest { volumes }).await;
        if let Some(answer) = self.judge(answer, &allowed) {
            assert_eq!(answer.volumes.len(), count, "all of them");
            for (volume, known) in answer.volumes.iter().zip(all) {
                self.created(volume, known);
            }
            self.reached.note("groups");
        }
    }

    async fn get(&mut self, raw: Raw) {
        let name = name(raw.name);
        let mut allowed = AllowedErrors::default();
        let by = match raw.flags % 4 {
            0 => None,
            1 => Some(By::Id(self.volumes.get(&name).map_or(u64::from(raw.more), |v| v.id))),
            _ => Some(By::Name(name.clone())),
        };
        allowed.allow_if(by.is_none(), "invalid");
        allowed.allow_if(by.is_some() && !self.volumes.contains_key(&name), "not_found");
        let other_has_id =
            matches!(by, Some(By::Id(id)) if self.volumes.values().any(|v| v.id == id));
        if other_has_id && !self.volumes.contains_key(&name) {
            return;
        }
        let with_space = raw.flags & 4 == 4;
        let request = v1::GetVolumeRequest { volume: Some(v1::VolumeRef { by }), with_space };
        let answer = self.client.get_volume(request).await;
        if let Some(answer) = self.judge(answer, &allowed) {
            Self::same(&answer.volume.expect("a volume"), &self.volumes[&name]);
            assert_eq!(answer.space.is_some(), with_space);
        }
    }

    /// Lists volumes. All pages together contain what passes the filter, ordered by name.
    async fn list(&mut self, raw: Raw) {
        let prefix = if raw.flags & 1 == 1 { "v" } else { "" };
        let labels = if raw.flags & 2 == 2 { raw.labels() } else { BTreeMap::new() };
        let kind = i32::from(raw.flags >> 2 & 3);
        let mut request = v1::ListVolumesRequest {
            page_size: u32::from(raw.more % 5),
            page_token: String::new(),
            name_prefix: prefix.to_owned(),
            labels: labels.clone(),
            source: None,
            kind,
        };
        let mut allowed = AllowedErrors::default();
        allowed.allow_if(kind == 3, "invalid");
        let mut found = Vec::new();
        loop {
            let answer = self.client.list_volumes(request.clone()).await;
            let Some(answer) = self.judge(answer, &allowed) else { return };
            let page = to_usize(request.page_size.into());
            assert!(page == 0 || answer.volumes.len() <= page, "a page is too long");
            found.extend(answer.volumes);
            if answer.next_page_token.is_empty() {
                break;
            }
            assert!(answer.next_page_token > request.page_token, "no progress");
            request.page_token = answer.next_page_token;
        }
        let passes = |(name, known): &(&String, &ModelVolume)| {
            name.starts_with(prefix)
                && labels.iter().all(|(key, value)| known.labels.get(key) == Some(value))
                && (kind == 0 || known.snapshot == (kind == 2))
        };
        let expected: Vec<&String> =
            self.volumes.iter().filter(passes).map(|(name, _)| name).collect();
        assert!(found.iter().map(|volume| &volume.name).eq(expected), "{request:?}");
        for volume in &found {
            Self::same(volume, &self.volumes[&volume.name]);
        }
        self.reached.note("lists");
    }

    async fn modify(&mut self, raw: Raw) {
        let name = name(raw.name);
        let read_only = [None, Some(true), Some(false)][usize::from(raw.flags % 3)];
        let size_bytes = raw.size();
        let mut allowed = AllowedErrors::default();
        let known = self.volumes.get(&name).cloned();
        allowed.allow_if(known.is_none(), "not_found");
        let mut labels = BTreeMap::new();
        if let Some(known) = &known {
            labels.clone_from(&known.labels);
            let change = raw.labels();
            labels.extend(change.clone());
            labels.retain(|key, value| !value.is_empty() || !change.contains_key(key));
            allowed.allow_if(!are_labels(&labels), "limit");
            allowed.allow_if(known.snapshot && read_only == Some(false), "read_only");
            if let Some(size) = size_bytes {
                allowed.allow_if(!is_size(size) || size < known.size, "invalid");
                allowed.allow_if(known.snapshot && size != known.size, "read_only");
            }
        }
        let request = v1::ModifyVolumeRequest {
            volume: named(&name),
            size_bytes,
            read_only,
            labels: raw.labels(),
            ..v1::ModifyVolumeRequest::default()
        };
        let answer = self.client.modify_volume(request).await;
        if let Some(answer) = self.judge(answer, &allowed) {
            let known = self.volumes.get_mut(&name).expect("it exists");
            known.size = size_bytes.unwrap_or(known.size);
            known.read_only = known.snapshot || read_only.unwrap_or(known.read_only);
            known.labels = labels;
            Self::same(&answer.volume.expect("a volume"), known);
            self.reached.note("modified");
        }
    }

    async fn delete(&mut self, raw: Raw) {
        let name = name(raw.name);
        let mut allowed = AllowedErrors::default();
        allowed.allow_if(!self.volumes.contains_key(&name), "not_found");
        let answer =
            self.client.delete_volume(v1::DeleteVolumeRequest { volume: named(&name) }).await;
        if self.judge(answer, &allowed).is_some() {
            self.volumes.remove(&name);
            self.reached.note("deletions");
        }
    }
}
