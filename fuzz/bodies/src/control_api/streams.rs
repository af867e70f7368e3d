//! Calls about content, exports and configurations.

use std::collections::BTreeMap;

use pando_engine::daemon::config::Config;
use pando_engine::units::{to_u64, to_usize};
use pando_proto::v1::{self, read_volume_response, write_volume_request};

use super::calls::Calls;
use super::{AllowedErrors, CONTENT_MAX, ModelVolume, Raw, SECTOR, is_size, name, named};

impl Calls<'_> {
    /// The stream of an import: pieces of data and holes, some of them invalid.
    pub(super) async fn write(&mut self, raw: Raw) {
        let name = name(raw.name);
        let grow = raw.flags & 1 == 1;
        let count = u64::from(raw.more % 3);
        let piece = |number: u64| {
            let offset = u64::from(raw.size[0]) % 64 * SECTOR * 3 + number * 8 * SECTOR;
            let offset = match raw.flags {
                0xF0 => offset + 100,
                0xF1 => u64::MAX - 511,
                _ => offset,
            };
            let len = u64::from(1 + raw.size[1] % 24) * SECTOR;
            let hole = ((u64::from(raw.flags) >> 1) + number) & 1 == 1;
            let content = match (hole, raw.flags) {
                (_, 0xF2) => None,
                (_, 0xF3) => Some(vec![1; to_usize(len) + 1])
                    .map(|data| write_volume_request::Content::Data(data.into())),
                (_, 0xF4) => Some(write_volume_request::Content::HoleBytes(u64::MAX - 511)),
                (_, 0xF5) => {
                    Some(write_volume_request::Content::Data(vec![1; (1 << 20) + 512].into()))
                }
                (true, _) => Some(write_volume_request::Content::HoleBytes(len)),
                (false, _) => Some(write_volume_request::Content::Data(
                    vec![raw.label | 1; to_usize(len)].into(),
                )),
            };
            v1::WriteVolumeRequest { volume: named(&name), grow, offset, content }
        };
        let pieces: Vec<_> = (0..count).map(piece).collect();
        let mut allowed = AllowedErrors::default();
        allowed.allow_if(count == 0, "invalid");
        let mut model = self.volumes.get(&name).cloned();
        allowed.allow_if(count > 0 && model.is_none(), "not_found");
        let mut partly = model.clone();
        if let Some(known) = &mut model {
            for piece in &pieces {
                if !allowed.0.is_empty() {
                    break;
                }
                Self::apply(known, piece, grow, &mut allowed);
                if allowed.0.is_empty() {
                    partly = Some(known.clone());
                }
            }
        }
        let answer = self.client.write_volume(tokio_stream::iter(pieces)).await;
        let written = self.judge(answer, &allowed).is_some();
        // The pieces before an invalid one have been written.
        if let Some(known) = if written { model } else { partly } {
            let size = self.size_of(&name).await;
            self.volumes.insert(name, ModelVolume { size, ..known });
            if written {
                self.reached.note("written");
            }
        }
    }

    /// The size of a volume. A piece that is refused may have grown the volume.
    async fn size_of(&mut self, name: &str) -> u64 {
        let request = v1::GetVolumeRequest { volume: named(name), with_space: false };
        let answer = self.client.get_volume(request).await.expect("it exists").into_inner();
        answer.volume.expect("a volume").size_bytes
    }

    fn apply(
        known: &mut ModelVolume,
        piece: &v1::WriteVolumeRequest,
        grow: bool,
        allowed: &mut AllowedErrors,
    ) {
        use write_volume_request::Content;
        let (len, byte) = match &piece.content {
            None => (0, 0),
            Some(Content::Data(data)) => (to_u64(data.len()), data.first().copied().unwrap_or(0)),
            Some(Content::HoleBytes(bytes)) => (*bytes, 0),
        };
        let aligned = piece.offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR);
        let end = piece.offset.checked_add(len);
        allowed.allow_if(!aligned || end.is_none(), "invalid");
        let too_long = matches!(&piece.content, Some(Content::Data(data)) if data.len() > 1 << 20);
        allowed.allow_if(too_long, "invalid");
        let Some(end) = end else { return };
        if grow && end > known.size {
            allowed.allow_if(!is_size(end), "invalid");
            allowed.allow_if(known.snapshot, "read_only");
            known.size = end;
        }
        allowed.allow_if(len > 0 && known.read_only, "read_only");
        allowed.allow_if(len > 0 && end > known.size, "invalid");
        if allowed.0.is_empty() {
            for sector in piece.offset / SECTOR..end / SECTOR {
                known.sectors.remove(&sector);
                if byte != 0 {
                    known.sectors.insert(sector, byte);
                }
            }
        }
    }

    pub(super) async fn read(&mut self, raw: Raw) {
        let name = name(raw.name);
        let (offset, length) = match raw.flags {
            0xF0 => (1, SECTOR),
            0xF1 => (u64::MAX - 511, SECTOR),
            0xF2 => (0, u64::MAX - 511),
            _ => (u64::from(raw.size[0]) % 64 * SECTOR, u64::from(raw.size[1] % 16) * SECTOR),
        };
        let mut allowed = AllowedErrors::default();
        let known = self.volumes.get(&name).cloned();
        allowed.allow_if(known.is_none(), "not_found");
        let size = known.as_ref().map_or(0, |known| known.size);
        let wanted = if length == 0 { size.saturating_sub(offset) } else { length };
        let end = offset.checked_add(wanted);
        let aligned = offset.is_multiple_of(SECTOR) && wanted.is_multiple_of(SECTOR);
        let inside = aligned && end.is_some_and(|end| end <= size);
        allowed.allow_if(known.is_some() && !inside, "invalid");
        if wanted > CONTENT_MAX && inside {
            return; // One long hole for the daemon, but a loop over its sectors for the model.
        }
        let request = v1::ReadVolumeRequest { volume: named(&name), offset, length, frozen: false };
        let answer = self.client.read_volume(request).await;
        let Some(mut pieces) = self.judge(answer, &allowed) else { return };
        let known = known.expect("it exists");
        let mut at = offset;
        while let Some(piece) = pieces.message().await.expect("a sound pool") {
            assert_eq!(piece.offset, at, "pieces are contiguous");
            match piece.content.expect("data or a hole") {
                read_volume_response::Content::Data(data) => {
                    for bytes in data.chunks(512) {
                        let byte = known.sectors.get(&(at / SECTOR)).copied().unwrap_or(0);
                        assert!(bytes.iter().all(|b| *b == byte), "{name}, sector {}", at / SECTOR);
                        at += to_u64(bytes.len());
                    }
                }
                read_volume_response::Content::HoleBytes(bytes) => {
                    let hole = at / SECTOR..(at + bytes) / SECTOR;
                    assert!(known.sectors.range(hole).next().is_none(), "{name}: no hole at {at}");
                    at += bytes;
                }
            }
        }
        assert_eq!(Some(at), end, "the whole range is read");
        self.reached.note("read");
    }

    /// Compares two volumes: every sector in which they differ must be reported.
    pub(super) async fn differences(&mut self, raw: Raw) {
        let (new, old) = (name(raw.name), name(raw.other));
        let mut allowed = AllowedErrors::default();
        let both = (self.volumes.get(&new).cloned(), self.volumes.get(&old).cloned());
        allowed.allow_if(both.0.is_none() || both.1.is_none(), "not_found");
        let request = v1::DiffVolumesRequest { base: named(&old), volume: named(&new) };
        let answer = self.client.diff_volumes(request).await;
        let Some(mut answers) = self.judge(answer, &allowed) else { return };
        let (new, old) = (both.0.expect("it exists"), both.1.expect("it exists"));
        let mut runs = Vec::new();
        while let Some(answer) = answers.message().await.expect("a sound pool") {
            runs.extend(answer.extents);
        }
        let ordered = runs.windows(2).all(|two| two[0].offset + two[0].length <= two[1].offset);
        assert!(ordered, "{runs:?}");
        let sectors = new.sectors.keys().chain(old.sectors.keys());
        for sector in sectors.filter(|sector| **sector * SECTOR < new.size) {
            let at = sector * SECTOR;
            let reported =
                runs.iter().find(|run| (run.offset..run.offset + run.length).contains(&at));
            let (is, was) = (new.sectors.get(sector), old.sectors.get(sector));
            assert!(reported.is_some() || is == was, "sector {sector} differs and is not reported");
            assert!(reported.is_none_or(|run| run.mapped) || is.is_none(), "sector {sector}");
        }
        self.reached.note("differences");
    }

    /// Calls about exports and devices that must fail: none is ever created.
    pub(super) async fn exports(&mut self, raw: Raw) {
        let volume = name(raw.name);
        let exists = self.volumes.contains_key(&volume);
        let mut allowed = AllowedErrors::default();
        allowed.allow_if(!exists, "not_found");
        match raw.flags % 4 {
            0 => {
                allowed.0.push("unsupported");
                let request = v1::StartExportRequest {
                    volume: named(&volume),
                    kind: 99,
                    ..v1::StartExportRequest::default()
                };
                let answer = self.client.start_export(request).await;
                self.judge(answer, &allowed);
            }
            1 => {
                let kind = if raw.more & 1 == 1 { 99 } else { 0 };
                allowed.0.extend(["unsupported", "invalid"]);
                let request = v1::AttachVolumeRequest {
                    volume: named(&volume),
                    kind,
                    sector_bytes: 513,
                    ..v1::AttachVolumeRequest::default()
                };
                let answer = self.client.attach_volume(request).await;
                self.judge(answer, &allowed);
            }
            2 => {
                let request = v1::DetachVolumeRequest { volume: named(&volume) };
                let answer = self.client.detach_volume(request).await;
                self.judge(answer, &allowed);
            }
            _ => {
                let request = v1::StopExportRequest { volume: named(&volume), kind: 0 };
                let answer = self.client.stop_export(request).await;
                // There is no export to stop, which the daemon may report.
                if answer.is_err() {
                    allowed.0.push("not_found");
                }
                self.judge(answer, &allowed);
            }
        }
    }

    /// Parses a configuration: it is refused with a reason, or its values are within bounds.
    pub(super) fn configuration(&mut self, raw: Raw) {
        let lines = [
            "pool = '/srv/pool'".to_owned(),
            format!("shards = {}", i16::from(raw.size[0]) - 100),
            format!(
                "cache = '{}{}'",
                raw.size[1],
                ["MiB", "KiB", "B", "EiB"][usize::from(raw.more % 4)]
            ),
            format!("spin_us = {}", u64::from(raw.more) * 100),
            "sokcet = '/s'".into(),
            format!("allowed_uids = [{}]", i64::from(raw.label) << 26),
            "nbd_dir = '/run/pando'".into(),
            "[metrics]\nlisten = 'unix:/x'".into(),
            format!("[nbd_tls]\nlisten = '{}'", raw.label),
        ];
        let chosen =
            lines.iter().enumerate().filter(|(n, _)| *n == 0 || raw.flags >> (n - 1) & 1 == 1);
        let mut text = chosen.map(|(_, line)| line.clone()).collect::<Vec<_>>().join("\n");
        if raw.name >= 0xE0 {
            text.insert(usize::from(raw.other) % text.len(), char::from(raw.label));
        }
        match Config::parse(&text) {
            Ok(config) => {
                assert!(config.shards <= 64 && config.cache_bytes >= 4 << 20, "{text}");
                assert!(
                    config.spin_us <= 10_000 && (1..=64).contains(&config.shard_count()),
                    "{text}"
                );
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
        self.reached.note("configurations");
    }

    /// Compares the content of a volume with the model.
    pub(super) async fn compare(&mut self, name: &str) {
        let Some(known) = self.volumes.get(name).cloned() else { return };
        let request =
            v1::ReadVolumeRequest { volume: named(name), ..v1::ReadVolumeRequest::default() };
        let mut pieces = self.client.read_volume(request).await.expect("it exists").into_inner();
        let mut content = BTreeMap::new();
        while let Some(piece) = pieces.message().await.expect("a sound pool") {
            let Some(read_volume_response::Content::Data(data)) = piece.content else { continue };
            for (sector, bytes) in (piece.offset / SECTOR..).zip(data.chunks(512)) {
                assert!(bytes.iter().all(|byte| *byte == bytes[0]), "{name}, sector {sector}");
                if bytes[0] != 0 {
                    content.insert(sector, bytes[0]);
                }
            }
        }
        assert_eq!(content, known.sectors, "{name}");
    }

    pub(super) async fn compare_all(&mut self) {
        for name in self.volumes.keys().cloned().collect::<Vec<_>>() {
            self.compare(&name).await;
        }
    }
}
