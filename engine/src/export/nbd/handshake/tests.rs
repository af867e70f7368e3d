//! Every option, well-formed and malformed, against the state machine.

use super::*;

const SIZE: u64 = 1 << 30;

const FACTS: Facts<'static> =
    Facts { name: "disk", description: "a disk", size_bytes: SIZE, read_only: false };

/// A parsed reply: option, reply, data.
type Answer = (u32, u32, Vec<u8>);

fn started(tls: Tls, flags: u16) -> Handshake {
    let mut out = Vec::new();
    let mut handshake = Handshake::start(tls, &mut out);
    assert_eq!(out[..16], *b"NBDMAGICIHAVEOPT");
    assert_eq!(out[16..], [0, 3]);
    out.clear();
    let (taken, action) = handshake.step(&u32::from(flags).to_be_bytes(), &mut out);
    assert_eq!((taken, action), (4, Action::Read));
    assert!(out.is_empty());
    handshake
}

fn fixed() -> Handshake {
    started(Tls::Refused, FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)
}

fn opt(option: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap();
    let header =
        OptionHeader { magic: OPTION_MAGIC.into(), option: option.into(), length: length.into() };
    [header.as_bytes(), data].concat()
}

fn counted(name: &str) -> Vec<u8> {
    [&u32::try_from(name.len()).unwrap().to_be_bytes(), name.as_bytes()].concat()
}

fn go_data(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = counted(name);
    data.extend(u16::try_from(infos.len()).unwrap().to_be_bytes());
    for info in infos {
        data.extend(info.to_be_bytes());
    }
    data
}

fn context_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = counted(name);
    data.extend(u32::try_from(queries.len()).unwrap().to_be_bytes());
    for query in queries {
        data.extend(counted(query));
    }
    data
}

fn answers(mut out: &[u8]) -> Vec<Answer> {
    let mut answers = Vec::new();
    while !out.is_empty() {
        let (header, rest) = OptionReply::read_from_prefix(out).unwrap();
        assert_eq!(header.magic.get(), OPTION_REPLY_MAGIC);
        let (data, rest) = rest.split_at(usize::try_from(header.length.get()).unwrap());
        answers.push((header.option.get(), header.reply.get(), data.to_vec()));
        out = rest;
    }
    answers
}

/// One option that is taken whole and needs no export; its one answer.
fn ask(handshake: &mut Handshake, option: u32, data: &[u8]) -> u32 {
    let input = opt(option, data);
    let mut out = Vec::new();
    assert_eq!(handshake.step(&input, &mut out), (input.len(), Action::Read));
    let answers = answers(&out);
    assert_eq!(answers.len(), 1);
    assert_eq!(answers[0].0, option);
    answers[0].1
}

/// One option that opens an export named `name`; what came of it.
fn open(handshake: &mut Handshake, option: u32, data: &[u8], name: &str) -> (Opened, Vec<Answer>) {
    let input = opt(option, data);
    let mut out = Vec::new();
    let expected = (input.len(), Action::Open(name.to_owned()));
    assert_eq!(handshake.step(&input, &mut out), expected);
    assert!(out.is_empty());
    let opened = handshake.opened(Some(&FACTS), &mut out);
    (opened, answers(&out))
}

#[test]
fn go_describes_the_export_and_begins() {
    let mut handshake = fixed();
    let data = go_data("disk", &[info::NAME, info::BLOCK_SIZE, info::DESCRIPTION]);
    let (opened, answers) = open(&mut handshake, option::GO, &data, "disk");
    assert_eq!(opened, Opened::Transmit(Negotiated::default()));
    let kinds: Vec<u32> = answers.iter().map(|answer| answer.1).collect();
    assert_eq!(kinds, [reply::INFO, reply::INFO, reply::INFO, reply::INFO, reply::ACK]);
    let flags = export_flag::HAS_FLAGS
        | export_flag::SEND_FLUSH
        | export_flag::SEND_FUA
        | export_flag::SEND_TRIM
        | export_flag::SEND_WRITE_ZEROES
        | export_flag::SEND_FAST_ZERO
        | export_flag::CAN_MULTI_CONN;
    assert_eq!(answers[0].2, [&[0, 0][..], &SIZE.to_be_bytes(), &flags.to_be_bytes()].concat());
    assert_eq!(answers[1].2, [0, 3, 0, 0, 2, 0, 0, 0, 0x10, 0, 2, 0, 0, 0]);
    assert_eq!(answers[2].2, *b"\0\x01disk");
    assert_eq!(answers[3].2, *b"\0\x02a disk");
}

#[test]
fn info_does_not_begin() {
    let mut handshake = fixed();
    let (opened, answers) = open(&mut handshake, option::INFO, &go_data("", &[]), "");
    assert_eq!(opened, Opened::Continue);
    assert_eq!(answers.len(), 3, "size, block size, done");
    assert_eq!(ask(&mut handshake, option::STRUCTURED_REPLY, &[]), reply::ACK);
}

#[test]
fn export_name_with_and_without_padding() {
    for (flags, padding) in [(FLAG_FIXED_NEWSTYLE, 124), (3, 0), (0, 124)] {
        let mut handshake = started(Tls::Refused, flags);
        let input = opt(option::EXPORT_NAME, b"disk");
        let mut out = Vec::new();
        let (_, action) = handshake.step(&input, &mut out);
        assert_eq!(action, Action::Open("disk".to_owned()));
        let opened = handshake.opened(Some(&FACTS), &mut out);
        assert_eq!(opened, Opened::Transmit(Negotiated::default()));
        assert_eq!(out.len(), 10 + padding);
        assert_eq!(out[..8], SIZE.to_be_bytes());
    }
}

#[test]
fn read_only_exports_say_so() {
    let facts = Facts { read_only: true, ..FACTS };
    let flags = transmission_flags(&facts, Negotiated::default());
    assert_eq!(flags & export_flag::READ_ONLY, export_flag::READ_ONLY);
    assert_eq!(flags & (export_flag::SEND_TRIM | export_flag::SEND_WRITE_ZEROES), 0);
}

#[test]
fn unknown_exports_are_refused() {
    let mut handshake = fixed();
    let mut out = Vec::new();
    handshake.step(&opt(option::GO, &go_data("gone", &[])), &mut out);
    assert_eq!(handshake.opened(None, &mut out), Opened::Continue);
    assert_eq!(answers(&out)[0].1, reply::ERR_UNKNOWN);
    handshake.step(&opt(option::EXPORT_NAME, b"gone"), &mut out);
    assert_eq!(handshake.opened(None, &mut out), Opened::Close);
    assert_eq!(handshake.opened(Some(&FACTS), &mut out), Opened::Close, "nothing is pending");
}

#[test]
fn list_names_every_export() {
    let mut handshake = fixed();
    let mut out = Vec::new();
    let input = opt(option::LIST, &[]);
    assert_eq!(handshake.step(&input, &mut out), (input.len(), Action::List));
    put_listed("a", &mut out);
    put_listed("bc", &mut out);
    put_list_end(&mut out);
    let expected = [
        (option::LIST, reply::SERVER, b"\0\0\0\x01a".to_vec()),
        (option::LIST, reply::SERVER, b"\0\0\0\x02bc".to_vec()),
        (option::LIST, reply::ACK, vec![]),
    ];
    assert_eq!(answers(&out), expected);
    assert_eq!(ask(&mut handshake, option::LIST, b"x"), reply::ERR_INVALID);
}

#[test]
fn contexts_need_structured_replies_and_hold_for_one_export() {
    let mut handshake = fixed();
    let data = context_data("disk", &["base:allocation", "qemu:dirty-bitmap:x"]);
    assert_eq!(ask(&mut handshake, option::SET_META_CONTEXT, &data), reply::ERR_INVALID);
    assert_eq!(ask(&mut handshake, option::STRUCTURED_REPLY, &[]), reply::ACK);
    assert_eq!(ask(&mut handshake, option::STRUCTURED_REPLY, &[]), reply::ERR_INVALID);

    let (_, set) = open(&mut handshake, option::SET_META_CONTEXT, &data, "disk");
    assert_eq!(set[0].1, reply::META_CONTEXT);
    assert_eq!(set[0].2, *b"\0\0\0\x01base:allocation");
    assert_eq!(set[1].1, reply::ACK);

    let (opened, _) = open(&mut handshake, option::GO, &go_data("other", &[]), "other");
    assert_eq!(opened, Opened::Transmit(Negotiated { structured: true, allocation: false }));
    let (opened, info) = open(&mut handshake, option::GO, &go_data("disk", &[]), "disk");
    assert_eq!(opened, Opened::Transmit(Negotiated { structured: true, allocation: true }));
    let flags = u16::from_be_bytes([info[0].2[10], info[0].2[11]]);
    assert_eq!(flags & export_flag::SEND_DF, export_flag::SEND_DF);

    // A selection that fails or selects nothing takes the former one back.
    open(&mut handshake, option::SET_META_CONTEXT, &context_data("disk", &[]), "disk");
    let (opened, _) = open(&mut handshake, option::GO, &go_data("disk", &[]), "disk");
    assert_eq!(opened, Opened::Transmit(Negotiated { structured: true, allocation: false }));
}

#[test]
fn contexts_are_listed() {
    for (queries, found) in [
        (&[][..], true),
        (&["base:"][..], true),
        (&["base:allocation"][..], true),
        (&["x:", "base"][..], false),
    ] {
        let mut handshake = fixed();
        ask(&mut handshake, option::STRUCTURED_REPLY, &[]);
        let data = context_data("disk", queries);
        let (_, listed) = open(&mut handshake, option::LIST_META_CONTEXT, &data, "disk");
        assert_eq!(listed.len(), usize::from(found) + 1, "{queries:?}");
    }
}

#[test]
fn malformed_options_are_refused_and_survived() {
    let mut handshake = fixed();
    ask(&mut handshake, option::STRUCTURED_REPLY, &[]);
    let long = "n".repeat(NAME_BYTES_MAX + 1);
    let mut go_trailing = go_data("disk", &[]);
    go_trailing.push(0);
    let cases: Vec<(u32, Vec<u8>)> = vec![
        (option::GO, vec![]),
        (option::GO, vec![0, 0, 0]),
        (option::GO, vec![0xff; 64]),
        (option::GO, vec![0xff, 0xff, 0xff, 0xff, 0, 0]),
        (option::GO, counted("disk")),
        (option::GO, [counted("disk"), vec![0, 2, 0, 1]].concat()),
        (option::GO, go_trailing),
        (option::GO, go_data("nul\0", &[])),
        (option::INFO, go_data(&long, &[])),
        (option::INFO, [0, 0, 0, 1, 0xff, 0, 0].to_vec()),
        (option::STRUCTURED_REPLY, vec![1]),
        (option::SET_META_CONTEXT, counted("disk")),
        (option::SET_META_CONTEXT, [counted("disk"), vec![0xff; 4]].concat()),
        (option::SET_META_CONTEXT, [context_data("disk", &["a"]), vec![0]].concat()),
        (option::SET_META_CONTEXT, context_data("disk", &[&long])),
        (option::LIST_META_CONTEXT, vec![]),
        (option::STARTTLS, vec![0]),
    ];
    for (option, data) in cases {
        assert_eq!(ask(&mut handshake, option, &data), reply::ERR_INVALID, "{option} {data:?}");
    }
    for unknown in [0, 4, 11, 12, u32::MAX] {
        assert_eq!(ask(&mut handshake, unknown, b"whatever"), reply::ERR_UNSUP);
    }
    let (opened, _) = open(&mut handshake, option::GO, &go_data("disk", &[]), "disk");
    assert!(matches!(opened, Opened::Transmit(_)));
}

#[test]
fn long_options_are_drained_in_bounded_memory() {
    let mut handshake = fixed();
    let mut out = Vec::new();
    let input = opt(option::GO, &vec![0; OPTION_DRAIN_MAX]);
    // What comes in is taken at once, so the caller's buffer never holds it.
    for part in input.chunks(1000) {
        assert_eq!(handshake.step(part, &mut out), (part.len(), Action::Read));
    }
    assert_eq!(answers(&out)[0].1, reply::ERR_TOO_BIG);
    assert_eq!(ask(&mut handshake, option::STRUCTURED_REPLY, &[]), reply::ACK);

    let header = OptionHeader {
        magic: OPTION_MAGIC.into(),
        option: option::GO.into(),
        length: u32::MAX.into(),
    };
    let (_, action) = handshake.step(header.as_bytes(), &mut out);
    assert_eq!(action, Action::Close);
}

#[test]
fn what_cannot_be_answered_closes() {
    let mut out = Vec::new();
    let long_name = opt(option::EXPORT_NAME, &[b'n'; NAME_BYTES_MAX + 1]);
    assert_eq!(fixed().step(&long_name, &mut out).1, Action::Close);
    let longer_name = opt(option::EXPORT_NAME, &vec![b'n'; OPTION_BYTES_MAX + 1]);
    assert_eq!(fixed().step(&longer_name, &mut out).1, Action::Close);
    assert_eq!(fixed().step(&[0; 16], &mut out).1, Action::Close, "wrong magic");
    let mut handshake = started(Tls::Refused, 0);
    assert_eq!(handshake.step(&opt(option::LIST, &[]), &mut out).1, Action::Close);
    assert!(out.is_empty());
    let mut handshake = Handshake::start(Tls::Refused, &mut Vec::new());
    assert_eq!(handshake.step(&[0, 0, 0, 4], &mut out).1, Action::Close, "unknown client flag");

    assert_eq!(fixed().step(&opt(option::ABORT, &[]), &mut out).1, Action::Close);
    assert_eq!(answers(&out), [(option::ABORT, reply::ACK, vec![])]);
}

#[test]
fn options_are_counted() {
    let mut handshake = fixed();
    for _ in 0..OPTIONS_MAX {
        assert_eq!(ask(&mut handshake, 99, &[]), reply::ERR_UNSUP);
    }
    let mut out = Vec::new();
    assert_eq!(handshake.step(&opt(99, &[]), &mut out).1, Action::Close);
}

#[test]
fn tls_by_policy() {
    assert_eq!(ask(&mut fixed(), option::STARTTLS, &[]), reply::ERR_POLICY);

    let mut handshake = started(Tls::Required, 3);
    assert_eq!(ask(&mut handshake, option::LIST, &[]), reply::ERR_TLS_REQD);
    assert_eq!(ask(&mut handshake, option::STRUCTURED_REPLY, &[]), reply::ERR_TLS_REQD);
    let mut out = Vec::new();
    let name = opt(option::EXPORT_NAME, b"disk");
    assert_eq!(handshake.step(&name, &mut out).1, Action::Close);

    // Words in the clear behind STARTTLS are an injection.
    let mut injected = opt(option::STARTTLS, &[]);
    injected.extend(opt(option::GO, &go_data("disk", &[])));
    let mut handshake = started(Tls::Required, 3);
    assert_eq!(handshake.step(&injected, &mut out).1, Action::Close);

    let mut handshake = started(Tls::Required, 3);
    out.clear();
    assert_eq!(handshake.step(&opt(option::STARTTLS, &[]), &mut out), (16, Action::StartTls));
    assert_eq!(answers(&out)[0].1, reply::ACK);
    let mut inside = handshake.after_tls();
    assert_eq!(ask(&mut inside, option::STARTTLS, &[]), reply::ERR_INVALID);
    let (opened, _) = open(&mut inside, option::GO, &go_data("disk", &[]), "disk");
    assert!(matches!(opened, Opened::Transmit(_)));
}

#[test]
fn any_cut_of_the_input_gives_the_same_answers() {
    let input = [
        opt(option::STRUCTURED_REPLY, &[]),
        opt(77, b"junk"),
        opt(option::LIST, b"bad"),
        opt(option::GO, &go_data("disk", &[info::NAME])),
    ]
    .concat();
    let run = |chunk: usize| {
        let mut handshake = fixed();
        let (mut held, mut out) = (Vec::new(), Vec::new());
        for part in input.chunks(chunk) {
            held.extend_from_slice(part);
            let (taken, action) = handshake.step(&held, &mut out);
            held.drain(..taken);
            if let Action::Open(name) = action {
                assert_eq!(name, "disk");
                handshake.opened(Some(&FACTS), &mut out);
            }
        }
        assert!(held.is_empty());
        out
    };
    let whole = run(input.len());
    for chunk in 1..40 {
        assert_eq!(run(chunk), whole, "cut every {chunk} bytes");
    }
}

#[test]
fn random_bytes_never_panic() {
    // A xorshift keeps this reproducible; the fuzzer goes deeper.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..20_000 {
        let mut handshake = fixed();
        ask(&mut handshake, option::STRUCTURED_REPLY, &[]);
        let option = u32::try_from(next() % 12).unwrap();
        let length = usize::try_from(next() % 48).unwrap();
        let data: Vec<u8> = (0..length)
            .map(|_| if next() % 3 == 0 { next().to_le_bytes()[0] } else { 0 })
            .collect();
        let mut out = Vec::new();
        let (taken, action) = handshake.step(&opt(option, &data), &mut out);
        assert!(taken <= 16 + length);
        if let Action::Open(_) = action {
            handshake.opened(Some(&FACTS), &mut out);
        }
        assert!(out.len() < 1024);
    }
}
