//! Ids and names.
//!
//! ```text
//!  id of a volume or snapshot   NODE . POOL . NUMBER      node-1.0f3c...e1.42
//!  id of a group of snapshots   NODE . POOL . gNUMBER     a random number, in its members' labels
//!
//!  CSI name                     name in the pool
//!  volume pvc-1                 csi-vol-pvc-1
//!  snapshot snap-1              csi-snap-snap-1
//!  snapshot "m\u{e4}r z"        csi-snap_bcOkciB6          (base64url, if not valid in a pool)
//!  group g, of volume 7         csi-group-g.7
//! ```
//!
//! The number is the identity in the pool's catalogue, which is never reused. Together with the
//! pool's UUID it names one volume for all time, even after the pool was formatted again. The node
//! is there for people and for software that routes calls to nodes; it separates calls that went to
//! the wrong node from calls about a pool that was replaced. Ids are only compared and looked up.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use pando_proto::v1;

/// Prefix of the name of every volume that CSI created.
pub(crate) const VOLUME_PREFIX: &str = "csi-vol";
/// Prefix of the name of every snapshot that CSI created outside of a group.
const SNAPSHOT_PREFIX: &str = "csi-snap";
/// Prefix of the name of every snapshot that CSI created in a group.
pub(crate) const GROUP_PREFIX: &str = "csi-group";
/// Prefix of the names of all volumes and snapshots that CSI created.
pub(crate) const ANY_PREFIX: &str = "csi-";

/// The identity of a pool: its UUID as 32 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PoolId(String);

impl PoolId {
    /// Takes a UUID in its usual form, with hyphens.
    pub(crate) fn new(uuid: &str) -> Self {
        Self(uuid.chars().filter(|c| *c != '-').map(|c| c.to_ascii_lowercase()).collect())
    }

    /// The id of a volume or snapshot in this pool.
    pub(crate) fn id(&self, node: &str, number: u64) -> String {
        format!("{node}.{}.{number}", self.0)
    }

    /// The id of the group `number`.
    pub(crate) fn group_id(&self, node: &str, number: u64) -> String {
        format!("{node}.{}.g{number}", self.0)
    }
}

/// A parsed id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Id {
    /// The node on which the object was created. Its pool may have moved since.
    pub(crate) node: String,
    pub(crate) pool: PoolId,
    pub(crate) number: u64,
}

/// Parses the id of a volume or snapshot. Returns `None` for ids that Pando did not issue.
pub(crate) fn parse(text: &str) -> Option<Id> {
    parse_with(text, "")
}

/// Parses the id of a group.
pub(crate) fn parse_group(text: &str) -> Option<Id> {
    parse_with(text, "g")
}

fn parse_with(text: &str, prefix: &str) -> Option<Id> {
    let mut parts = text.rsplitn(3, '.');
    let digits = parts.next()?.strip_prefix(prefix)?;
    let pool = parts.next()?;
    let node = parts.next()?;
    let number: u64 = digits.parse().ok()?;
    // Each number has one text: no sign, no leading zeros.
    let canonical = number.to_string() == digits;
    let uuid = pool.len() == 32 && pool.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    (canonical && uuid).then(|| Id { node: node.to_owned(), pool: PoolId(pool.to_owned()), number })
}

/// Encodes a CSI name, which can be any text of 128 bytes, as part of a name in the pool: unchanged
/// or in base64 (171 bytes). The first character distinguishes them.
fn encoded(name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.chars().all(plain) {
        format!("-{name}")
    } else {
        format!("_{}", URL_SAFE_NO_PAD.encode(name))
    }
}

/// Name in the pool of the volume that CSI calls `name`.
pub(crate) fn volume_name(name: &str) -> String {
    format!("{VOLUME_PREFIX}{}", encoded(name))
}

/// Name in the pool of the snapshot that CSI calls `name`.
pub(crate) fn snapshot_name(name: &str) -> String {
    format!("{SNAPSHOT_PREFIX}{}", encoded(name))
}

/// Prefix of the names of all members of the group that CSI calls `group`.
fn group_prefix(group: &str) -> String {
    format!("{GROUP_PREFIX}{}.", encoded(group))
}

/// Name in the pool of the group's snapshot of the volume `source`.
pub(crate) fn member_name(group: &str, source: u64) -> String {
    format!("{}{source}", group_prefix(group))
}

/// Whether CSI created this volume.
pub(crate) fn is_volume(volume: &v1::Volume) -> bool {
    !volume.snapshot && volume.name.starts_with(VOLUME_PREFIX)
}

/// Whether CSI created this snapshot.
pub(crate) fn is_snapshot(volume: &v1::Volume) -> bool {
    volume.snapshot && volume.name.starts_with(ANY_PREFIX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> PoolId {
        PoolId::new("0F3C0000-1111-2222-3333-4444555566e1")
    }

    #[test]
    fn an_id_is_parsed_again() {
        let node = "ip-10-0-0-1.eu.internal";
        let id = pool().id(node, 42);
        assert_eq!(id, "ip-10-0-0-1.eu.internal.0f3c00001111222233334444555566e1.42");
        let expected = |number| Some(Id { node: node.to_owned(), pool: pool(), number });
        assert_eq!(parse(&id), expected(42));
        let group = pool().group_id(node, 7);
        assert_eq!(parse_group(&group), expected(7));
        assert_eq!((parse(&group), parse_group(&id)), (None, None));
        // The longest id: a node name of the maximum length, and the largest number.
        let longest = pool().group_id(&"n".repeat(63), u64::MAX);
        assert!(longest.len() <= crate::validate::TEXT_BYTES_MAX, "{}", longest.len());
    }

    #[test]
    fn foreign_texts_are_not_ids() {
        let pool = "0f3c00001111222233334444555566e1";
        let texts = [
            String::new(),
            "..".to_owned(),
            "../../etc/passwd".to_owned(),
            "fake-vol-id".to_owned(),
            pool.to_owned(),
            format!("{pool}.1"),
            format!("n.{pool}.+1"),
            format!("n.{pool}.01"),
            format!("n.{pool}. 1"),
            format!("n.{pool}.18446744073709551616"),
            format!("n.{}.1", pool.to_uppercase()),
            format!("n.{}.1", &pool[1..]),
            format!("n.{pool}.1\0"),
        ];
        for text in texts {
            assert_eq!(parse(&text), None, "{text:?}");
        }
    }

    #[test]
    fn names_are_distinct_and_valid() {
        let longest = "\u{10ffff}".repeat(32);
        let names = ["a", "A", "-a", ".", "_YQ", "a.7", "a b", "\u{e4}", &longest];
        let mut seen = std::collections::BTreeSet::new();
        for name in names {
            for name in [volume_name(name), snapshot_name(name), member_name(name, u64::MAX)] {
                let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
                assert!(name.chars().all(good) && name.len() <= 253, "{name}");
                assert!(seen.insert(name.clone()), "{name} twice");
            }
        }
        assert_ne!(member_name("a", 7), snapshot_name("a.7"));
    }
}
