//! f11: the client's side of the handshake, in any pieces: raw bytes, or options that are well formed
//! or nearly. A model of the negotiation that knows the protocol's document gives the same replies and
//! the same end, however the bytes are cut; and the server never asks to hold more than its bound.
//!
//! ```text
//! TLS and form (1), cut of the pieces (1), then bytes; or flags (1), and options:
//! what (1), form (1), name (1), more (1)
//! ```

use super::{Input, Reached};
use pando_engine::disk::sim::Rng;
use pando_engine::export::nbd::handshake::{
    Action, Facts, Handshake, INPUT_BYTES_MAX, Negotiated, Opened, Tls, put_list_end, put_listed,
};
use pando_engine::units::to_usize;

/// What the corpus must come to.
pub(super) const REACHES: &[&str] =
    &["closed", "errors", "replies", "sessions", "too long", "transmissions", "waiting"];

const NAME: &str = "db";
const DESCRIPTION: &str = "a volume";
const SIZE: u64 = 1 << 20;
/// Bounds of the server, as docs/PROTOCOLS.md has them.
const LOOKED_AT_MAX: usize = 16 << 10;
const DRAINED_MAX: usize = 256 << 10;
const OPTIONS_MAX: usize = 1024;

/// One thing that the server says. The text of an error is its own affair.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Said {
    Reply(u32, u32, Option<Vec<u8>>),
    /// The answer to `EXPORT_NAME`, which has no head.
    Export(Vec<u8>),
}

/// How it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Waiting,
    Closed,
    /// Behind so many bytes.
    Transmission(Negotiated, usize),
}

pub(super) fn body(bytes: &[u8], reached: &mut Reached) {
    let mut input = Input::new(bytes);
    let form = input.byte();
    let tls = [Tls::Refused, Tls::Required, Tls::Active][usize::from(form) % 3];
    let read_only = form & 0x40 == 0x40;
    let cut = input.byte();
    let stream = if form & 0x80 == 0 { options(&mut input) } else { input.bytes(1 << 16).to_vec() };
    let mut server = Server::new(tls, read_only, cut);
    let end = server.serve(&stream);
    let mut model = Model { said: vec![], tls, read_only, sessions: server.sessions.clone() };
    let expected = model.serve(&stream);
    assert_eq!(end, expected, "the end");
    let said = parse(&server.out, &model.said);
    assert_eq!(said, model.said, "what the server says");
    reached.add(
        "sessions",
        pando_engine::units::to_u64(model.sessions.iter().filter(|on| **on).count()),
    );
    for reply in &model.said {
        match reply {
            Said::Reply(_, code, _) if *code == (1 << 31) + 9 => reached.note("too long"),
            Said::Reply(_, code, _) if *code >= 1 << 31 => reached.note("errors"),
            _ => reached.note("replies"),
        }
    }
    reached.note(match end {
        End::Waiting => "waiting",
        End::Closed => "closed",
        End::Transmission(..) => "transmissions",
    });
}

/// A client's bytes out of options.
fn options(input: &mut Input<'_>) -> Vec<u8> {
    let flags = input.byte();
    let mut out = match flags {
        0..=0xDF => 3_u32,
        0xE0..=0xEF => u32::from(flags & 3),
        _ => u32::from(flags) << 8,
    }
    .to_be_bytes()
    .to_vec();
    while !input.is_empty() {
        let [what, form, name, more] = [(); 4].map(|()| input.byte());
        let names: [&[u8]; 8] = [b"db", b"", b"x", b"db\0", b"\xff", b"DB", b"db", b"db2"];
        let name: Vec<u8> = match name {
            0xFF => vec![b'n'; 4096],
            0xFE => vec![b'n'; 4097],
            _ => names[usize::from(name) % names.len()].to_vec(),
        };
        let option = [7, 6, 8, 10, 9, 3, 1, 5, 2, 0, 4, 11, 7, 10][usize::from(what) % 14];
        let counted = |text: &[u8]| [&len(text.len()), text].concat();
        let mut data = match option {
            1 => name,
            6 | 7 => {
                let kinds = usize::from(more % 5);
                let all = [0_u16, 1, 2, 3, u16::from(form)].map(u16::to_be_bytes);
                [counted(&name), vec![0, more % 5], all[..kinds].concat()].concat()
            }
            9 | 10 => {
                let queries: [&[u8]; 4] = [b"base:allocation", b"base:", b"qemu:x", b""];
                let some = queries.iter().cycle().skip(usize::from(form % 4));
                let some: Vec<u8> =
                    some.take(usize::from(more % 4)).flat_map(|query| counted(query)).collect();
                [counted(&name), len(usize::from(more % 4)).to_vec(), some].concat()
            }
            _ => vec![],
        };
        let mut said = data.len();
        match form {
            0xE0 => data.push(more),
            0xE1 => drop(data.pop()),
            0xE2 => data = vec![more; LOOKED_AT_MAX + usize::from(more % 2)],
            0xE3 => data = vec![more; LOOKED_AT_MAX + 1 + 64 * usize::from(more)],
            0xE4 => said = DRAINED_MAX + usize::from(more % 2),
            0xE5 => said = to_usize(u32::MAX.into()),
            0xE6 => said += usize::from(more),
            0xE7 => data.iter_mut().skip(usize::from(more)).take(1).for_each(|byte| *byte ^= 0x80),
            _ => {}
        }
        if !(0xE4..=0xE6).contains(&form) {
            said = data.len();
        }
        let magic: &[u8; 8] = if form == 0xE8 { b"IHAVEOPX" } else { b"IHAVEOPT" };
        let repeats = if form == 0xE9 { OPTIONS_MAX + 1 } else { 1 };
        let whole = [magic, &u32::to_be_bytes(option)[..], &len(said), &data].concat();
        (0..repeats).for_each(|_| out.extend_from_slice(&whole));
        if out.len() > 2 * DRAINED_MAX {
            break;
        }
    }
    out
}

fn len(len: usize) -> [u8; 4] {
    u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes()
}

/// The server under test, fed as a connection feeds it.
struct Server {
    out: Vec<u8>,
    handshake: Option<Handshake>,
    read_only: bool,
    rng: Rng,
    longest: u64,
    /// Of each `STARTTLS` that was accepted: whether it came to a session.
    sessions: Vec<bool>,
}

impl Server {
    fn new(tls: Tls, read_only: bool, cut: u8) -> Self {
        let mut out = Vec::new();
        let handshake = Some(Handshake::start(tls, &mut out));
        let longest = if cut == 0 { 1 << 20 } else { u64::from(cut) };
        Self { out, handshake, read_only, rng: Rng::new(cut.into()), longest, sessions: vec![] }
    }

    fn serve(&mut self, stream: &[u8]) -> End {
        let (mut taken, mut come) = (0, 0);
        loop {
            let handshake = self.handshake.as_mut().expect("under way");
            let unread = &stream[taken..come];
            assert!(unread.len() <= INPUT_BYTES_MAX);
            let before = self.out.len();
            let (used, action) = handshake.step(unread, &mut self.out);
            assert!(used <= unread.len(), "more is taken than was given");
            assert!(self.out.len() - before <= 64 * (used + 64), "an answer is bounded");
            taken += used;
            match action {
                Action::Read => {
                    let room = INPUT_BYTES_MAX - (come - taken);
                    assert!(room > 0, "more is wanted than there is room for");
                    let piece = to_usize(1 + self.rng.below(self.longest)).min(room);
                    if come == stream.len() {
                        return End::Waiting;
                    }
                    come = (come + piece).min(stream.len());
                }
                Action::Open(name) => {
                    let facts = Facts {
                        name: NAME,
                        description: DESCRIPTION,
                        size_bytes: SIZE,
                        read_only: self.read_only,
                    };
                    let known = (name.is_empty() || name == NAME).then_some(&facts);
                    match handshake.opened(known, &mut self.out) {
                        Opened::Continue => {}
                        Opened::Transmit(agreed) => return End::Transmission(agreed, taken),
                        Opened::Close => return End::Closed,
                    }
                }
                Action::List => {
                    put_listed(NAME, &mut self.out);
                    put_list_end(&mut self.out);
                }
                Action::StartTls => {
                    assert_eq!(taken, come, "plaintext becomes a part of the session");
                    self.sessions.push(true);
                    self.handshake = self.handshake.take().map(Handshake::after_tls);
                }
                Action::Close => {
                    // It may be a STARTTLS with plaintext behind it: the model knows.
                    self.sessions.push(false);
                    return End::Closed;
                }
            }
        }
    }
}

/// The negotiation, by the protocol's document.
struct Model {
    said: Vec<Said>,
    tls: Tls,
    read_only: bool,
    /// Whether there was something behind each `STARTTLS`, which depends on how the bytes came.
    sessions: Vec<bool>,
}

/// The data of an option, read from its front.
struct Data<'a>(&'a [u8]);

impl<'a> Data<'a> {
    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(front)
    }

    fn number(&mut self, len: usize) -> Option<usize> {
        Some(self.bytes(len)?.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte)))
    }

    fn text(&mut self) -> Option<&'a str> {
        let len = self.number(4)?;
        name(self.bytes(len)?)
    }
}

fn name(bytes: &[u8]) -> Option<&str> {
    let text = str::from_utf8(bytes).ok()?;
    (text.len() <= 4096 && !text.contains('\0')).then_some(text)
}

fn exists(name: &str) -> bool {
    name.is_empty() || name == NAME
}

const ACK: u32 = 1;
const ERROR: u32 = 1 << 31;

/// What was agreed on so far; TLS begins anew.
#[derive(Default)]
struct Agreed {
    structured: bool,
    context: Option<String>,
    options: usize,
}

/// What follows an option.
enum Next {
    Option,
    Refused(u32),
    Tls,
    Transmission(Negotiated),
    Closed,
}

impl Model {
    fn say(&mut self, option: u32, reply: u32, data: Vec<u8>) {
        self.said.push(Said::Reply(option, reply, (reply < ERROR).then_some(data)));
    }

    fn serve(&mut self, stream: &[u8]) -> End {
        let mut all = Data(stream);
        let Some(flags) = all.number(4) else { return End::Waiting };
        if flags & !3 != 0 {
            return End::Closed;
        }
        let mut agreed = Agreed::default();
        let mut sessions = self.sessions.clone().into_iter();
        loop {
            let whole = all.0.len() >= 16;
            let Some(magic) = all.bytes(8).filter(|_| whole) else { return End::Waiting };
            let (option, len) = (all.number(4).expect("whole"), all.number(4).expect("whole"));
            let option = u32::try_from(option).expect("four bytes");
            let plain = flags & 1 == 0 && option != 1;
            if magic != b"IHAVEOPT" || len > DRAINED_MAX || agreed.options == OPTIONS_MAX || plain {
                return End::Closed;
            }
            agreed.options += 1;
            if len > LOOKED_AT_MAX && option == 1 {
                return End::Closed;
            }
            let Some(data) = all.bytes(len) else { return End::Waiting };
            if len > LOOKED_AT_MAX {
                self.say(option, ERROR + 9, vec![]);
                continue;
            }
            match self.answer(option, data, &mut agreed) {
                Next::Option => {}
                Next::Refused(_) if option == 1 => return End::Closed,
                Next::Refused(code) => self.say(option, code, vec![]),
                Next::Closed => return End::Closed,
                Next::Tls if sessions.next() == Some(true) => {
                    self.tls = Tls::Active;
                    agreed = Agreed::default();
                }
                Next::Tls => {
                    assert!(!all.0.is_empty(), "closed instead of a session");
                    return End::Closed;
                }
                Next::Transmission(negotiated) => {
                    if option == 1 && flags & 2 == 0 {
                        let Some(Said::Export(last)) = self.said.last_mut() else {
                            unreachable!("the answer was given")
                        };
                        last.extend([0; 124]);
                    }
                    return End::Transmission(negotiated, stream.len() - all.0.len());
                }
            }
        }
    }

    /// What comes of one option, if all of it is there.
    fn answer(&mut self, option: u32, data: &[u8], agreed: &mut Agreed) -> Next {
        if self.tls == Tls::Required && !matches!(option, 2 | 5) {
            return Next::Refused(ERROR + 5);
        }
        match option {
            1 | 6 | 7 => {
                match self.export(option, data, agreed.structured, agreed.context.as_ref()) {
                    Ok(Some(negotiated)) => return Next::Transmission(negotiated),
                    Ok(None) => {}
                    Err(code) => return Next::Refused(code),
                }
            }
            2 => {
                self.say(2, ACK, vec![]);
                return Next::Closed;
            }
            3 | 5 | 8 if !data.is_empty() => return Next::Refused(ERROR + 3),
            3 => {
                self.say(3, 2, [&[0, 0, 0, 2], NAME.as_bytes()].concat());
                self.say(3, ACK, vec![]);
            }
            5 if self.tls == Tls::Required => {
                self.say(5, ACK, vec![]);
                return Next::Tls;
            }
            5 => return Next::Refused(ERROR + if self.tls == Tls::Refused { 2 } else { 3 }),
            8 if agreed.structured => return Next::Refused(ERROR + 3),
            8 => {
                agreed.structured = true;
                self.say(8, ACK, vec![]);
            }
            9 | 10 => {
                if option == 10 {
                    agreed.context = None;
                }
                match self.contexts(option, data, agreed.structured) {
                    Ok(None) => {}
                    Ok(chosen) => agreed.context = chosen,
                    Err(code) => return Next::Refused(code),
                }
            }
            _ => return Next::Refused(ERROR + 1),
        }
        Next::Option
    }

    /// `EXPORT_NAME`, `INFO` and `GO`: what was agreed on, if transmission begins.
    fn export(
        &mut self,
        option: u32,
        data: &[u8],
        structured: bool,
        context: Option<&String>,
    ) -> Result<Option<Negotiated>, u32> {
        let mut data = Data(data);
        let mut parse = || {
            if option == 1 {
                return name(data.0).map(|name| (name, vec![]));
            }
            let name = data.text()?;
            let count = data.number(2)?;
            let kinds: Option<Vec<usize>> = (0..count).map(|_| data.number(2)).collect();
            kinds.filter(|_| data.0.is_empty()).map(|kinds| (name, kinds))
        };
        let (name, kinds) = parse().ok_or(ERROR + 3)?;
        if !exists(name) {
            return Err(ERROR + 6);
        }
        let agreed = Negotiated { structured, allocation: context.is_some_and(|c| c == name) };
        let mut flags: u16 = 0b1_0000_1101 | if structured { 1 << 7 } else { 0 };
        flags |= if self.read_only { 1 << 1 } else { 1 << 5 | 1 << 6 | 1 << 11 };
        let size = SIZE.to_be_bytes();
        if option == 1 {
            self.said.push(Said::Export([&size[..], &flags.to_be_bytes()].concat()));
            return Ok(Some(agreed));
        }
        self.say(option, 3, [&[0, 0], &size[..], &flags.to_be_bytes()].concat());
        let sizes = [512_u32, 4096, 32 << 20].map(u32::to_be_bytes).concat();
        self.say(option, 3, [&[0, 3], &sizes[..]].concat());
        for (kind, text) in [(1, NAME), (2, DESCRIPTION)] {
            if kinds.contains(&kind) {
                let kind = u8::try_from(kind).expect("1 or 2");
                self.say(option, 3, [&[0, kind], text.as_bytes()].concat());
            }
        }
        self.say(option, ACK, vec![]);
        Ok((option == 7).then_some(agreed))
    }

    /// `LIST_META_CONTEXT` and `SET_META_CONTEXT`: for which export one was chosen.
    fn contexts(
        &mut self,
        option: u32,
        data: &[u8],
        structured: bool,
    ) -> Result<Option<String>, u32> {
        if !structured {
            return Err(ERROR + 3);
        }
        let mut data = Data(data);
        let mut parse = || {
            let name = data.text()?;
            let count = data.number(4)?;
            let mut queries = Vec::new();
            for _ in 0..count {
                queries.push(data.text()?);
            }
            data.0.is_empty().then_some((name, queries))
        };
        let (name, queries) = parse().ok_or(ERROR + 3)?;
        if !exists(name) {
            return Err(ERROR + 6);
        }
        let all = option == 9 && (queries.is_empty() || queries.contains(&"base:"));
        let found = all || queries.contains(&"base:allocation");
        if found {
            self.say(option, 4, [&[0, 0, 0, 1], &b"base:allocation"[..]].concat());
        }
        self.say(option, ACK, vec![]);
        Ok((found && option == 10).then(|| name.to_owned()))
    }
}

/// The server's bytes as replies; where `EXPORT_NAME` is answered is told by what is expected.
fn parse(out: &[u8], expected: &[Said]) -> Vec<Said> {
    let mut data = Data(out);
    assert_eq!(data.bytes(16), Some(&b"NBDMAGICIHAVEOPT"[..]));
    assert_eq!(data.number(2), Some(3), "fixed newstyle, no zeroes");
    let mut said = Vec::new();
    while !data.0.is_empty() {
        if let Some(Said::Export(answer)) = expected.get(said.len()) {
            let whole = data.bytes(answer.len()).expect("the answer is whole");
            said.push(Said::Export(whole.to_vec()));
            continue;
        }
        assert_eq!(data.bytes(8), Some(&0x0003_e889_0455_65a9_u64.to_be_bytes()[..]));
        let mut word = || u32::try_from(data.number(4).expect("a head")).expect("four bytes");
        let (option, reply, len) = (word(), word(), word());
        let content = data.bytes(to_usize(len.into())).expect("the reply is whole");
        if reply >= ERROR {
            let text = str::from_utf8(content).expect("an error's text");
            assert!(text.len() <= 4096);
            said.push(Said::Reply(option, reply, None));
        } else {
            said.push(Said::Reply(option, reply, Some(content.to_vec())));
        }
    }
    said
}
