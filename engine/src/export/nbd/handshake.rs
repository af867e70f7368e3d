//! The handshake as a state machine over bytes: no socket, no export, no clock, so that a test or
//! a fuzzer can feed it anything.
//!
//! ```text
//!            bytes                               Open(name), List
//! client --------------> step() --> Action ----------------------------> caller
//!        <-------------- out    <-- opened(), put_listed() <------------ answers
//!
//! ClientFlags -> Options -> (GO, EXPORT_NAME) -> transmission
//!                  ^  |
//!                  +--+ INFO, LIST, STRUCTURED_REPLY, ..._META_CONTEXT, unknown
//! ```
//!
//! Memory is bounded: an option longer than [`OPTION_BYTES_MAX`] is drained unseen and refused,
//! one longer than [`OPTION_DRAIN_MAX`] ends the connection, and so does option
//! [`OPTIONS_MAX`] + 1. No export is opened before the client has named it.

use zerocopy::{FromBytes, IntoBytes};

use super::proto::{
    CONTEXT_ALLOCATION, CONTEXT_ALLOCATION_ID, EXPORT_NAME_PADDING, ExportNameAnswer,
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, HELLO_MAGIC, Hello, InfoBlockSize, InfoExport,
    OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionHeader, OptionReply, export_flag, info, option, reply,
};
use crate::limits::REQUEST_BYTES_MAX;
use crate::units::{BLOCK_SIZE, SECTOR_BYTES, to_u32, to_u64, to_usize};

/// Bytes of an export's name, by the protocol.
pub const NAME_BYTES_MAX: usize = 4096;
/// Bytes of an option's data that are looked at: a name and several queries of the same length.
pub const OPTION_BYTES_MAX: usize = 16 << 10;
/// Bytes of an option's data that are drained for the sake of a polite answer.
pub const OPTION_DRAIN_MAX: usize = 256 << 10;
/// Options of one connection.
pub const OPTIONS_MAX: u32 = 1024;
/// Bytes of input that `step` needs to see at once at most.
pub const INPUT_BYTES_MAX: usize = size_of::<OptionHeader>() + OPTION_BYTES_MAX;

/// How this end of the connection stands to TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tls {
    /// `STARTTLS` is refused by policy: a local socket.
    Refused,
    /// Nothing but `STARTTLS` and `ABORT` is served.
    Required,
    /// The bytes come out of a TLS session already.
    Active,
}

/// What the caller does next.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Send what is in `out`, then bring more input.
    Read,
    /// Open this export and call [`Handshake::opened`].
    Open(String),
    /// Answer with [`put_listed`] for each export, then [`put_list_end`].
    List,
    /// Send what is in `out`, run the TLS handshake, continue with [`Handshake::after_tls`].
    StartTls,
    /// Send what is in `out` and close.
    Close,
}

/// What came of opening an export.
#[derive(Debug, PartialEq, Eq)]
pub enum Opened {
    /// The handshake goes on: call `step` again.
    Continue,
    /// Send what is in `out`; what follows is transmission.
    Transmit(Negotiated),
    /// Close: there is no polite way to refuse.
    Close,
}

/// What both ends agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Negotiated {
    /// Reads are answered with structured replies.
    pub structured: bool,
    /// `base:allocation` was selected for the export.
    pub allocation: bool,
}

/// What the handshake tells of an export.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// Canonical name.
    pub name: &'a str,
    /// Text for people; empty for none.
    pub description: &'a str,
    /// Bytes.
    pub size_bytes: u64,
    /// Writes are refused.
    pub read_only: bool,
}

enum Phase {
    ClientFlags,
    Options,
    /// Bytes of an oversized option that are still to come.
    Draining {
        left: usize,
        option: u32,
    },
}

/// What to do with the export that is being opened.
enum Pending {
    ExportName,
    Go { transmit: bool, want_name: bool, want_description: bool },
    SetContext { allocation: bool },
    ListContext { allocation: bool },
}

/// One connection's handshake.
pub struct Handshake {
    phase: Phase,
    tls: Tls,
    fixed: bool,
    no_zeroes: bool,
    structured: bool,
    /// The export that `base:allocation` was selected for; it holds for no other.
    context_for: Option<String>,
    options_seen: u32,
    /// The name that the client gave, and what for.
    pending: Option<(String, Pending)>,
}

type Refusal = (u32, &'static str);

impl Handshake {
    /// A fresh connection; puts the server's hello into `out`.
    pub fn start(tls: Tls, out: &mut Vec<u8>) -> Self {
        let hello = Hello {
            magic: HELLO_MAGIC.into(),
            option_magic: OPTION_MAGIC.into(),
            flags: (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).into(),
        };
        out.extend_from_slice(hello.as_bytes());
        Self {
            phase: Phase::ClientFlags,
            tls,
            fixed: false,
            no_zeroes: false,
            structured: false,
            context_for: None,
            options_seen: 0,
            pending: None,
        }
    }

    /// The handshake inside the TLS session: the client's flags hold, nothing else that was said
    /// in the clear does.
    #[must_use]
    pub fn after_tls(self) -> Self {
        Self {
            phase: Phase::Options,
            tls: Tls::Active,
            structured: false,
            context_for: None,
            options_seen: 0,
            pending: None,
            ..self
        }
    }

    /// Takes what it can from the front of `input`, puts answers into `out`, and says how many
    /// bytes it took and what is to be done.
    pub fn step(&mut self, input: &[u8], out: &mut Vec<u8>) -> (usize, Action) {
        let mut taken = 0;
        loop {
            let rest = &input[taken..];
            let Some((used, action)) = self.one(rest, out) else {
                return (taken, Action::Read);
            };
            taken += used;
            match action {
                None => {}
                // Plaintext behind STARTTLS would be taken for the client's words in the session.
                Some(Action::StartTls) if taken != input.len() => return (taken, Action::Close),
                Some(action) => return (taken, action),
            }
        }
    }

    /// One item of the input; `None` when it is not whole yet.
    fn one(&mut self, input: &[u8], out: &mut Vec<u8>) -> Option<(usize, Option<Action>)> {
        match self.phase {
            Phase::ClientFlags => {
                let (flags, _) = zerocopy::big_endian::U32::read_from_prefix(input).ok()?;
                Some((size_of::<u32>(), self.client_flags(flags.get())))
            }
            Phase::Draining { left, option } => {
                let used = left.min(input.len());
                if used < left {
                    self.phase = Phase::Draining { left: left - used, option };
                    return (used > 0).then_some((used, None));
                }
                self.phase = Phase::Options;
                refuse(out, option, (reply::ERR_TOO_BIG, "the option is too long"));
                Some((used, None))
            }
            Phase::Options => self.option(input, out),
        }
    }

    fn client_flags(&mut self, flags: u32) -> Option<Action> {
        let known = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        if flags & !known != 0 {
            return Some(Action::Close);
        }
        self.fixed = flags & u32::from(FLAG_FIXED_NEWSTYLE) != 0;
        self.no_zeroes = flags & u32::from(FLAG_NO_ZEROES) != 0;
        self.phase = Phase::Options;
        None
    }

    fn option(&mut self, input: &[u8], out: &mut Vec<u8>) -> Option<(usize, Option<Action>)> {
        let (header, rest) = OptionHeader::read_from_prefix(input).ok()?;
        let option = header.option.get();
        let length = to_usize(header.length.get().into());
        let head = size_of::<OptionHeader>();
        let acceptable = header.magic.get() == OPTION_MAGIC
            && length <= OPTION_DRAIN_MAX
            && self.options_seen < OPTIONS_MAX
            && (self.fixed || option == option::EXPORT_NAME);
        if !acceptable {
            return Some((head, Some(Action::Close)));
        }
        if length > OPTION_BYTES_MAX {
            self.options_seen += 1;
            if option == option::EXPORT_NAME {
                return Some((head, Some(Action::Close)));
            }
            self.phase = Phase::Draining { left: length, option };
            return Some((head, None));
        }
        let data = rest.get(..length)?;
        self.options_seen += 1;
        let action = match self.dispatch(option, data, out) {
            Ok(action) => action,
            Err(_) if option == option::EXPORT_NAME => Some(Action::Close),
            Err(refusal) => {
                refuse(out, option, refusal);
                None
            }
        };
        Some((head + length, action))
    }

    fn dispatch(
        &mut self,
        option: u32,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Option<Action>, Refusal> {
        let in_clear = matches!(option, option::STARTTLS | option::ABORT);
        if self.tls == Tls::Required && !in_clear {
            return Err((reply::ERR_TLS_REQD, "this server speaks TLS only"));
        }
        match option {
            option::EXPORT_NAME => Ok(self.ask(text(data)?, Pending::ExportName)),
            option::ABORT => {
                answer(out, option, reply::ACK, &[]);
                Ok(Some(Action::Close))
            }
            option::LIST => {
                no_data(data)?;
                Ok(Some(Action::List))
            }
            option::STARTTLS => self.start_tls(data, out),
            option::INFO | option::GO => {
                let (name, pending) = parse_go(data, option == option::GO)?;
                Ok(self.ask(name, pending))
            }
            option::STRUCTURED_REPLY => {
                no_data(data)?;
                if self.structured {
                    return Err((reply::ERR_INVALID, "structured replies are on already"));
                }
                self.structured = true;
                answer(out, option, reply::ACK, &[]);
                Ok(None)
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(option, data),
            _ => Err((reply::ERR_UNSUP, "unknown option")),
        }
    }

    fn start_tls(&self, data: &[u8], out: &mut Vec<u8>) -> Result<Option<Action>, Refusal> {
        no_data(data)?;
        match self.tls {
            Tls::Refused => Err((reply::ERR_POLICY, "this socket has no TLS")),
            Tls::Active => Err((reply::ERR_INVALID, "TLS is on already")),
            Tls::Required => {
                answer(out, option::STARTTLS, reply::ACK, &[]);
                Ok(Some(Action::StartTls))
            }
        }
    }

    fn meta_context(&mut self, option: u32, data: &[u8]) -> Result<Option<Action>, Refusal> {
        let setting = option == option::SET_META_CONTEXT;
        if setting {
            // A new selection replaces the old one even when it fails.
            self.context_for = None;
        }
        if !self.structured {
            return Err((reply::ERR_INVALID, "ask for structured replies first"));
        }
        let (name, rest) = counted_text(data)?;
        let (count, mut rest) = count(rest)?;
        let mut allocation = !setting && count == 0;
        for _ in 0..count {
            let (query, behind) = counted_text(rest)?;
            rest = behind;
            allocation |= query == CONTEXT_ALLOCATION || (!setting && query == "base:");
        }
        no_data(rest)?;
        let pending = if setting {
            Pending::SetContext { allocation }
        } else {
            Pending::ListContext { allocation }
        };
        Ok(self.ask(name, pending))
    }

    fn ask(&mut self, name: String, pending: Pending) -> Option<Action> {
        self.pending = Some((name.clone(), pending));
        Some(Action::Open(name))
    }

    /// The export asked for by [`Action::Open`], or `None` when there is none of that name.
    pub fn opened(&mut self, export: Option<&Facts<'_>>, out: &mut Vec<u8>) -> Opened {
        let Some((name, pending)) = self.pending.take() else { return Opened::Close };
        let option = pending.option();
        let Some(facts) = export else {
            if option == option::EXPORT_NAME {
                return Opened::Close;
            }
            refuse(out, option, (reply::ERR_UNKNOWN, "no such export"));
            return Opened::Continue;
        };
        match pending {
            Pending::ExportName => {
                let negotiated = self.negotiated(&name);
                let flags = transmission_flags(facts, negotiated).into();
                let answer = ExportNameAnswer { size: facts.size_bytes.into(), flags };
                out.extend_from_slice(answer.as_bytes());
                if !self.no_zeroes {
                    out.extend_from_slice(&[0; EXPORT_NAME_PADDING]);
                }
                Opened::Transmit(negotiated)
            }
            Pending::Go { transmit, want_name, want_description } => {
                let negotiated = self.negotiated(&name);
                describe(out, option, facts, negotiated);
                if want_name {
                    answer_info(out, option, info::NAME, facts.name);
                }
                let described = (1..=NAME_BYTES_MAX).contains(&facts.description.len());
                if want_description && described {
                    answer_info(out, option, info::DESCRIPTION, facts.description);
                }
                answer(out, option, reply::ACK, &[]);
                if transmit { Opened::Transmit(negotiated) } else { Opened::Continue }
            }
            Pending::SetContext { allocation } => {
                self.context_for = allocation.then_some(name);
                answer_contexts(out, option, allocation);
                Opened::Continue
            }
            Pending::ListContext { allocation } => {
                answer_contexts(out, option, allocation);
                Opened::Continue
            }
        }
    }

    fn negotiated(&self, name: &str) -> Negotiated {
        Negotiated {
            structured: self.structured,
            allocation: self.context_for.as_deref() == Some(name),
        }
    }
}

impl Pending {
    const fn option(&self) -> u32 {
        match self {
            Self::ExportName => option::EXPORT_NAME,
            Self::Go { transmit: true, .. } => option::GO,
            Self::Go { .. } => option::INFO,
            Self::SetContext { .. } => option::SET_META_CONTEXT,
            Self::ListContext { .. } => option::LIST_META_CONTEXT,
        }
    }
}

/// One export's name, in answer to [`Action::List`].
pub fn put_listed(name: &str, out: &mut Vec<u8>) {
    let length = to_u32(to_u64(name.len())).to_be_bytes();
    answer(out, option::LIST, reply::SERVER, &[&length, name.as_bytes()]);
}

/// The end of the list of exports.
pub fn put_list_end(out: &mut Vec<u8>) {
    answer(out, option::LIST, reply::ACK, &[]);
}

fn transmission_flags(facts: &Facts<'_>, negotiated: Negotiated) -> u16 {
    let mut flags = export_flag::HAS_FLAGS
        | export_flag::SEND_FLUSH
        | export_flag::SEND_FUA
        | export_flag::CAN_MULTI_CONN;
    flags |= if facts.read_only {
        export_flag::READ_ONLY
    } else {
        export_flag::SEND_TRIM | export_flag::SEND_WRITE_ZEROES | export_flag::SEND_FAST_ZERO
    };
    if negotiated.structured {
        flags |= export_flag::SEND_DF;
    }
    flags
}

fn describe(out: &mut Vec<u8>, option: u32, facts: &Facts<'_>, negotiated: Negotiated) {
    let export = InfoExport {
        kind: info::EXPORT.into(),
        size: facts.size_bytes.into(),
        flags: transmission_flags(facts, negotiated).into(),
    };
    answer(out, option, reply::INFO, &[export.as_bytes()]);
    // Sent unasked: the minimum of 512 is not what a client would assume.
    let sizes = InfoBlockSize {
        kind: info::BLOCK_SIZE.into(),
        minimum: to_u32(SECTOR_BYTES).into(),
        preferred: to_u32(to_u64(BLOCK_SIZE)).into(),
        maximum: REQUEST_BYTES_MAX.into(),
    };
    answer(out, option, reply::INFO, &[sizes.as_bytes()]);
}

fn answer_info(out: &mut Vec<u8>, option: u32, kind: u16, text: &str) {
    answer(out, option, reply::INFO, &[&kind.to_be_bytes(), text.as_bytes()]);
}

fn answer_contexts(out: &mut Vec<u8>, option: u32, allocation: bool) {
    if allocation {
        let id = CONTEXT_ALLOCATION_ID.to_be_bytes();
        answer(out, option, reply::META_CONTEXT, &[&id, CONTEXT_ALLOCATION.as_bytes()]);
    }
    answer(out, option, reply::ACK, &[]);
}

fn answer(out: &mut Vec<u8>, option: u32, reply: u32, data: &[&[u8]]) {
    let length = data.iter().map(|part| part.len()).sum();
    let header = OptionReply {
        magic: OPTION_REPLY_MAGIC.into(),
        option: option.into(),
        reply: reply.into(),
        length: to_u32(to_u64(length)).into(),
    };
    out.extend_from_slice(header.as_bytes());
    for part in data {
        out.extend_from_slice(part);
    }
}

fn refuse(out: &mut Vec<u8>, option: u32, (reply, why): Refusal) {
    answer(out, option, reply, &[why.as_bytes()]);
}

const MALFORMED: Refusal = (reply::ERR_INVALID, "malformed option");

const fn no_data(data: &[u8]) -> Result<(), Refusal> {
    if data.is_empty() { Ok(()) } else { Err((reply::ERR_INVALID, "unexpected data")) }
}

/// A name or query: UTF-8 without NUL, of bounded length.
fn text(bytes: &[u8]) -> Result<String, Refusal> {
    if bytes.len() > NAME_BYTES_MAX || bytes.contains(&0) {
        return Err(MALFORMED);
    }
    str::from_utf8(bytes).map(str::to_owned).map_err(|_| MALFORMED)
}

fn count(data: &[u8]) -> Result<(u32, &[u8]), Refusal> {
    let (count, rest) = zerocopy::big_endian::U32::read_from_prefix(data).map_err(|_| MALFORMED)?;
    Ok((count.get(), rest))
}

/// A text behind its 32-bit length, and what follows it.
fn counted_text(data: &[u8]) -> Result<(String, &[u8]), Refusal> {
    let (length, rest) = count(data)?;
    let (bytes, rest) = rest.split_at_checked(to_usize(length.into())).ok_or(MALFORMED)?;
    Ok((text(bytes)?, rest))
}

fn parse_go(data: &[u8], transmit: bool) -> Result<(String, Pending), Refusal> {
    let (name, rest) = counted_text(data)?;
    let (count, rest) = zerocopy::big_endian::U16::read_from_prefix(rest).map_err(|_| MALFORMED)?;
    let (kinds, behind) =
        <[zerocopy::big_endian::U16]>::ref_from_prefix_with_elems(rest, usize::from(count.get()))
            .map_err(|_| MALFORMED)?;
    no_data(behind)?;
    let wants = |kind| kinds.iter().any(|wanted| wanted.get() == kind);
    let (want_name, want_description) = (wants(info::NAME), wants(info::DESCRIPTION));
    Ok((name, Pending::Go { transmit, want_name, want_description }))
}

#[cfg(test)]
mod tests;
