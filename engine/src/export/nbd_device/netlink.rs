//! Generic netlink, as much as the family `nbd` needs. Sources: `include/uapi/linux/netlink.h`,
//! `genetlink.h` and `nbd-netlink.h` of Linux.
//!
//! ```text
//! message:   length 4 | type 2 | flags 2 | sequence 4 | port 4 || command 1 | version 1 | 0 2 || ...
//! attribute: length 2 | type 2 | payload, padded to 4 (a nested one holds attributes)
//! ```
//!
//! Integers are in the machine's own byte order. An answer is zero or more messages of the family
//! and then an acknowledgement with an errno, zero for success.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};

use crate::units::{to_u32, to_u64};

/// How long the kernel may take for an answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);
/// Bytes of an answer: a page, as the kernel makes them.
const ANSWER_BYTES_MAX: usize = 8192;

const HEADER_BYTES: usize = 16;
const COMMAND_BYTES: usize = 4;
const NESTED: u16 = 1 << 15;

/// `NLM_F_REQUEST | NLM_F_ACK`.
const FLAGS: u16 = 1 | 4;
/// `NLMSG_ERROR`: an acknowledgement.
const ACKNOWLEDGEMENT: u16 = 2;

/// The family of families, its command and its attributes.
const CONTROLLER: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;

/// Attributes of a message, one behind the other.
#[derive(Clone, Debug, Default)]
pub(super) struct Attributes(Vec<u8>);

impl Attributes {
    fn put(mut self, kind: u16, payload: &[u8]) -> Self {
        let length = u16::try_from(4 + payload.len()).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(payload);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// With a number of 32 bits.
    pub(super) fn u32(self, kind: u16, value: u32) -> Self {
        self.put(kind, &value.to_ne_bytes())
    }

    /// With a number of 64 bits.
    pub(super) fn u64(self, kind: u16, value: u64) -> Self {
        self.put(kind, &value.to_ne_bytes())
    }

    /// With a text, which ends with a zero.
    pub(super) fn text(self, kind: u16, value: &str) -> Self {
        self.put(kind, &[value.as_bytes(), b"\0"].concat())
    }

    /// With attributes inside one.
    pub(super) fn nested(self, kind: u16, inner: &Self) -> Self {
        self.put(kind | NESTED, &inner.0)
    }
}

/// A socket for one family.
pub(super) struct Family {
    socket: OwnedFd,
    id: u16,
}

impl Family {
    /// Finds a family by its name.
    ///
    /// # Errors
    /// `NotFound` when the kernel does not have it.
    pub(super) fn open(name: &str) -> io::Result<Self> {
        let protocol = Some(netlink::GENERIC);
        let kind = SocketType::RAW;
        let socket = socket_with(AddressFamily::NETLINK, kind, SocketFlags::CLOEXEC, protocol)?;
        set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_TIME_MAX))?;
        let mut family = Self { socket, id: CONTROLLER };
        let answer = family.call(GET_FAMILY, &Attributes::default().text(FAMILY_NAME, name))?;
        let id = answer.get(FAMILY_ID).and_then(|id| id.try_into().ok()).map(u16::from_ne_bytes);
        family.id = id.ok_or(io::ErrorKind::NotFound)?;
        Ok(family)
    }

    /// Gives a command and waits for its end.
    ///
    /// # Errors
    /// The kernel's answer, or `InvalidData` for one that makes no sense.
    pub(super) fn call(&self, command: u8, attributes: &Attributes) -> io::Result<Answer> {
        let message = message(self.id, command, attributes);
        send(&self.socket, &message, SendFlags::empty())?;
        let mut answer = Answer::default();
        let mut bytes = vec![0; ANSWER_BYTES_MAX];
        loop {
            let (held, length) = match recv(&self.socket, &mut bytes[..], RecvFlags::empty()) {
                Err(rustix::io::Errno::INTR) => continue,
                received => received?,
            };
            if length > held {
                return Err(io::ErrorKind::InvalidData.into());
            }
            if answer.take(&bytes[..held])? {
                return Ok(answer);
            }
        }
    }
}

fn message(family: u16, command: u8, attributes: &Attributes) -> Vec<u8> {
    let length = HEADER_BYTES + COMMAND_BYTES + attributes.0.len();
    let mut message = Vec::with_capacity(length);
    message.extend_from_slice(&to_u32(to_u64(length)).to_ne_bytes());
    message.extend_from_slice(&family.to_ne_bytes());
    message.extend_from_slice(&FLAGS.to_ne_bytes());
    // One call at a time on a socket of its own: a sequence number and a port tell nothing.
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&[command, 1, 0, 0]);
    message.extend_from_slice(&attributes.0);
    message
}

/// What the kernel said.
#[derive(Clone, Debug, Default)]
pub(super) struct Answer {
    attributes: Vec<(u16, Vec<u8>)>,
}

impl Answer {
    /// An attribute of the first level.
    pub(super) fn get(&self, kind: u16) -> Option<&[u8]> {
        self.attributes.iter().find(|(own, _)| *own == kind).map(|(_, payload)| payload.as_slice())
    }

    /// Takes the messages of one datagram in; whether the acknowledgement was among them.
    fn take(&mut self, mut bytes: &[u8]) -> io::Result<bool> {
        let senseless = || io::Error::from(io::ErrorKind::InvalidData);
        while !bytes.is_empty() {
            let length = u32_at(bytes, 0).and_then(|length| usize::try_from(length).ok());
            let length = length.filter(|length| *length >= HEADER_BYTES).ok_or_else(senseless)?;
            let message = bytes.get(..length).ok_or_else(senseless)?;
            bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
            if u16_at(message, 4) == Some(ACKNOWLEDGEMENT) {
                let code = u32_at(message, HEADER_BYTES).ok_or_else(senseless)?;
                return match code.cast_signed() {
                    0 => Ok(true),
                    errno => Err(io::Error::from_raw_os_error(errno.saturating_neg())),
                };
            }
            let mut left = message.get(HEADER_BYTES + COMMAND_BYTES..).unwrap_or_default();
            while let (Some(length), Some(kind)) = (u16_at(left, 0), u16_at(left, 2)) {
                let length = usize::from(length);
                let payload = left.get(4..length).ok_or_else(senseless)?;
                self.attributes.push((kind & !NESTED, payload.to_vec()));
                left = left.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
        Ok(false)
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acknowledgement(errno: i32) -> Vec<u8> {
        let mut bytes = message(ACKNOWLEDGEMENT, 0, &Attributes::default());
        bytes.truncate(HEADER_BYTES);
        bytes.extend_from_slice(&(-errno).to_ne_bytes());
        bytes[..4].copy_from_slice(&20_u32.to_ne_bytes());
        bytes
    }

    #[test]
    fn attributes_are_padded_and_nested() {
        let inner = Attributes::default().u32(1, 7);
        let outer = Attributes::default().text(10, "ab").nested(7, &inner);
        let numbers: [u16; 4] = [7, 10, 12, 7 | NESTED];
        let [text_length, text, nested_length, nested] = numbers.map(u16::to_ne_bytes);
        let expected: [&[u8]; 8] = [
            &text_length,
            &text,
            b"ab\0\0",
            &nested_length,
            &nested,
            &8_u16.to_ne_bytes(),
            &1_u16.to_ne_bytes(),
            &7_u32.to_ne_bytes(),
        ];
        assert_eq!(outer.0, expected.concat());
    }

    #[test]
    fn answers_are_taken_apart() {
        let told = message(30, 1, &Attributes::default().u32(1, 5).u64(2, 6));
        let mut answer = Answer::default();
        assert!(!answer.take(&told).unwrap());
        assert!(answer.take(&[told, acknowledgement(0)].concat()).unwrap());
        assert_eq!(answer.get(1), Some(&5_u32.to_ne_bytes()[..]));
        assert_eq!(answer.get(2), Some(&6_u64.to_ne_bytes()[..]));
        assert_eq!(answer.get(3), None);
        let refused = Answer::default().take(&acknowledgement(libc::EBUSY)).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EBUSY));
    }

    #[test]
    fn what_makes_no_sense_is_an_error_or_nothing() {
        let whole = message(30, 1, &Attributes::default().u32(1, 5).text(2, "text"));
        for cut in 0..whole.len() {
            let mut answer = Answer::default();
            let taken = answer.take(&whole[..cut]);
            assert!(cut == 0 || taken.is_err(), "cut at {cut}: {taken:?}");
        }
        for at in 0..whole.len() {
            for value in [0, 1, 0xff] {
                let mut damaged = whole.clone();
                damaged[at] = value;
                // No panic is all that is asked for.
                let _ignored = Answer::default().take(&damaged);
            }
        }
    }

    #[test]
    fn the_kernel_answers() {
        let unknown = Family::open("pando-no-such").err().unwrap();
        assert_eq!(unknown.kind(), io::ErrorKind::NotFound);
        let controller = Family::open("nlctrl").unwrap();
        assert_eq!(controller.id, CONTROLLER);
    }
}
