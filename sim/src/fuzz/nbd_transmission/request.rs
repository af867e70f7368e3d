//! Requests: how they are made of an input, what is sent of them, and what must come of them.

use super::{FAILURES, Input, SECTOR, Setting};
use crate::model::fill_sector;
use pando_engine::units::{to_u32, to_usize};

/// A request, as it is sent.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) command: u16,
    pub(super) flags: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) len: u32,
    /// What it writes.
    pub(super) stamp: u64,
    /// Bytes that are sent of it; less than all end the stream.
    pub(super) sent: Vec<u8>,
    /// The stream ends with it, and it gets no reply.
    pub(super) breaks: bool,
}

/// What a reply must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    Done,
    Data,
    Extents,
    Error(u32),
}

impl Request {
    /// The next one of the input; also whether it goes to the second connection and ends the round.
    pub(super) fn of(input: &mut Input<'_>, size: u64, number: u64) -> (Self, usize, bool) {
        let [command, flags, place, len, more, cookie, form, last] = [(); 8].map(|()| input.byte());
        let all = [0, 1, 4, 6, 7, 3, 2, 5, 1, 0, 1, 6, 4, 8, 1, 9];
        let command = all[usize::from(command) % all.len()] + if command == 0xFF { 256 } else { 0 };
        let flags = match flags {
            0..=0x7F => 0,
            0x80..=0xBF => 1,
            0xC0..=0xEF => u16::from(flags & 0x1F),
            _ => u16::from(flags) << 8,
        };
        let (mut offset, mut len) =
            (u64::from(place) * SECTOR % size, 512 * u32::from(1 + len % 24));
        match form {
            0xC0 => offset += u64::from(more),
            0xC1 => len += u32::from(more),
            0xC2 => offset = size - SECTOR + u64::from(more % 4) * SECTOR,
            0xC3 => offset = u64::MAX - u64::from(more) * 256,
            0xC4 => len = u32::MAX - u32::from(more) * 256,
            0xC5 => len = 0,
            0xC6 => len = (32 << 20) + 512 * u32::from(more % 2),
            0xC7 => len = (64 << 20) + 512 * u32::from(more % 2),
            _ => len = len.min(to_u32(size - offset)),
        }
        if command == 3 && more < 0xE0 {
            (offset, len) = (0, 0);
        }
        let cookie = u64::from(cookie) << 56 | number;
        let mut request = Self {
            command,
            flags,
            cookie,
            offset,
            len,
            stamp: number,
            sent: vec![],
            breaks: command == 2,
        };
        request.send(form, more);
        (request, usize::from(last & 1), last >= 0xC0)
    }

    fn send(&mut self, form: u8, more: u8) {
        let magic: u32 = if form == 0xD0 { 0x2560_9512 } else { 0x2560_9513 };
        self.sent.extend(magic.to_be_bytes());
        self.sent.extend(self.flags.to_be_bytes());
        self.sent.extend(self.command.to_be_bytes());
        self.sent.extend(self.cookie.to_be_bytes());
        self.sent.extend(self.offset.to_be_bytes());
        self.sent.extend(self.len.to_be_bytes());
        self.breaks |= form == 0xD0;
        if self.command == 1 {
            let payload = to_usize(self.len.into());
            // What is refused has a payload as well; one that nobody would send is not sent.
            let whole = payload <= 1 << 16;
            let mut bytes = vec![0; payload.min(1 << 16)];
            for (sector, chunk) in (self.offset / SECTOR..).zip(bytes.chunks_mut(512)) {
                if chunk.len() == 512 {
                    fill_sector(chunk, sector, self.stamp);
                }
            }
            self.sent.append(&mut bytes);
            self.breaks |= !whole;
        }
        if form == 0xD1 {
            self.sent.truncate(self.sent.len().saturating_sub(1 + usize::from(more)));
            self.breaks = true;
        }
    }

    /// What must come of it, by the protocol's document and docs/PROTOCOLS.md.
    pub(super) fn expected(&self, setting: &Setting, structured: bool) -> Expected {
        const PERM: u32 = 1;
        const INVALID: u32 = 22;
        const NO_SPACE: u32 = 28;
        const NOT_SUPPORTED: u32 = 95;
        let allowed = match self.command {
            0 if structured => 1 | 4,
            0 | 1 | 3 | 4 => 1,
            6 => 1 | 2 | 16,
            7 if structured => 1 | 8,
            _ => return Expected::Error(INVALID),
        };
        if self.flags & !allowed != 0 {
            return Expected::Error(INVALID);
        }
        let writes = matches!(self.command, 1 | 4 | 6);
        if writes && setting.read_only {
            return Expected::Error(PERM);
        }
        if self.command == 3 {
            let plain = self.offset == 0 && self.len == 0;
            return if plain { Expected::Done } else { Expected::Error(INVALID) };
        }
        if !self.offset.is_multiple_of(SECTOR) || !self.len.is_multiple_of(512) {
            return Expected::Error(INVALID);
        }
        let end = self.offset.checked_add(self.len.into());
        if end.is_none_or(|end| end > setting.size) {
            return Expected::Error(if matches!(self.command, 1 | 6) { NO_SPACE } else { INVALID });
        }
        if self.len == 0 {
            return match self.command {
                7 => Expected::Error(INVALID),
                0 => Expected::Data,
                _ => Expected::Done,
            };
        }
        if self.command == 6 && self.flags & 18 == 18 {
            return Expected::Error(NOT_SUPPORTED);
        }
        if let Some(how) = setting.failure(self.offset, self.len.into()) {
            return Expected::Error(FAILURES[how].1);
        }
        match self.command {
            7 => Expected::Extents,
            0 => Expected::Data,
            _ => Expected::Done,
        }
    }

    /// Sectors that it changes, and what they hold then.
    pub(super) fn change(&self) -> Option<(std::ops::Range<u64>, u64)> {
        let (from, to) = (self.offset / SECTOR, (self.offset + u64::from(self.len)) / SECTOR);
        match self.command {
            1 => Some((from..to, self.stamp)),
            6 => Some((from..to, 0)),
            4 => Some((from.next_multiple_of(8)..to / 8 * 8, 0)),
            _ => None,
        }
    }
}
