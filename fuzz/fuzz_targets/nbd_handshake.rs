//! Any bytes in any pieces as the client's side of the handshake: bounded work and memory, and
//! never more taken than was given.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pando_engine::export::nbd::handshake::{
    Action, Facts, Handshake, INPUT_BYTES_MAX, Opened, Tls, put_list_end, put_listed,
};

fuzz_target!(|bytes: &[u8]| {
    let Some((&first, mut input)) = bytes.split_first() else { return };
    let tls = [Tls::Refused, Tls::Required, Tls::Active][usize::from(first) % 3];
    let mut out = Vec::new();
    let mut handshake = Handshake::start(tls, &mut out);
    for _ in 0..bytes.len() + 8 {
        out.clear();
        let piece = &input[..input.len().min(INPUT_BYTES_MAX)];
        let (used, action) = handshake.step(piece, &mut out);
        assert!(used <= piece.len());
        assert!(out.len() <= 1 << 20, "an answer is bounded");
        input = &input[used..];
        match action {
            Action::Read if used == 0 => return,
            Action::Read => {}
            Action::Open(name) => {
                let facts =
                    Facts { name: "db", description: "", size_bytes: 1 << 20, read_only: false };
                let known = (name.is_empty() || name == "db").then_some(&facts);
                match handshake.opened(known, &mut out) {
                    Opened::Continue => {}
                    Opened::Transmit(_) | Opened::Close => return,
                }
            }
            Action::List => {
                put_listed("db", &mut out);
                put_list_end(&mut out);
            }
            Action::StartTls | Action::Close => return,
        }
    }
});
