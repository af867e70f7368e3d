//! Whether the pointers by which the edits of one record go down agree on who owns a node. An edit
//! moves a node that is its volume's own; another pointer to it, which only a damaged map has,
//! would then lead nowhere, in the middle of a record that is in the journal already.

use crate::error::{Error, Result};
use crate::format::node::NodeRef;
use crate::units::{BlockNo, Lba, Seqno, VolumeId};

/// A pointer to a node that an edit will meet.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    block: BlockNo,
    volume: VolumeId,
    lba: Lba,
    own: bool,
}

/// The pointers to nodes that the edits of one record will meet. A node that is younger than the
/// last seal stays where it is, and is left out: most of what busy volumes meet.
pub struct Claims {
    seal: Seqno,
    claims: Vec<Claim>,
}

impl Claims {
    /// None so far; `seal` is the sequence number up to which the last sealed checkpoint covers
    /// everything.
    #[must_use]
    pub const fn new(seal: Seqno) -> Self {
        Self { seal, claims: Vec::new() }
    }

    /// An edit of `volume`, which last took part in a clone or snapshot at `shared_at`, meets `node`.
    pub fn add(&mut self, volume: VolumeId, shared_at: Seqno, node: &NodeRef) {
        if node.birth <= self.seal {
            let own = node.birth > shared_at;
            self.claims.push(Claim { block: node.block, volume, lba: node.lba, own });
        }
    }

    /// Checks that no node which one pointer makes a volume's own has another pointer.
    ///
    /// # Errors
    /// `Corrupt`, naming the node.
    pub fn check(mut self) -> Result<()> {
        self.claims.sort_unstable();
        for pair in self.claims.windows(2) {
            if pair[0].block == pair[1].block && pair[0] != pair[1] && (pair[0].own || pair[1].own)
            {
                return Err(Error::corrupt(format!(
                    "map node at {}: two pointers name it, one of them as its volume's own; run \
                     `pando pool check`",
                    pair[0].block
                )));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEAL: Seqno = Seqno::new(100);

    fn claimed(claims: &[(u64, u64, u64, u64, u64)]) -> Result<()> {
        let mut all = Claims::new(SEAL);
        for &(volume, shared_at, block, birth, lba) in claims {
            let (block, birth, lba) = (BlockNo::new(block), Seqno::new(birth), Lba::new(lba));
            let node = NodeRef { block, birth, level: 0, lba, end: Lba::new(1000), mapped: 1 };
            all.add(VolumeId::new(volume), Seqno::new(shared_at), &node);
        }
        all.check()
    }

    #[test]
    fn one_pointer_may_be_met_often_and_shared_nodes_by_many() {
        claimed(&[(1, 20, 7, 50, 0), (1, 20, 8, 50, 30), (1, 20, 7, 50, 0)]).expect("one pointer");
        claimed(&[(1, 60, 7, 50, 0), (2, 60, 7, 50, 0), (3, 70, 7, 50, 0)]).expect("shared");
        claimed(&[(1, 20, 7, 101, 0), (2, 20, 7, 101, 0)]).expect("it stays where it is");
    }

    #[test]
    fn what_is_a_volumes_own_has_no_other_pointer() {
        for other in [(2, 20, 7, 50, 0), (2, 60, 7, 50, 0), (1, 20, 7, 50, 30)] {
            let error = claimed(&[(1, 20, 7, 50, 0), (1, 20, 9, 50, 10), other]).unwrap_err();
            assert!(error.to_string().contains("map node at block 7"), "{error}");
        }
    }
}
