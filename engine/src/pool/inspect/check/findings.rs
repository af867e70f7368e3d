//! Findings of the checker: numbered kinds and a bounded list. `docs/OPERATIONS.md` has the table
//! of kinds; a test compares it with this code.

/// Findings that are listed; further ones are only counted.
pub const FINDINGS_MAX: usize = 1000;

/// What opening does with a pool that has such damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// It opens. Operations that meet the damage fail; all others work.
    Detect,
    /// It does not open: everything depends on the damaged structure, or acknowledged changes are
    /// lost.
    Refuse,
}

impl Policy {
    /// The name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Detect => "detect",
            Self::Refuse => "refuse",
        }
    }
}

/// Kind of damage. The numbers are stable, because programs match on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FindingKind {
    /// K1: a block that should hold a node does not hold a whole node of this pool.
    Node,
    /// K2: the birth of a node differs from that in a pointer to it.
    Birth,
    /// K3: level, order, bounds or number of entries of a node do not fit into its tree.
    Shape,
    /// K4: a stored reference count differs from the references found.
    Count,
    /// K5: a block in use is counted as free.
    UsedAndFree,
    /// K6: a block is used as one type and counted or used as another.
    Type,
    /// K7: a block that is in use now, or that the last checkpoint needs, is allocatable.
    Allocatable,
    /// K8: a drop in progress does not hold exactly the references that it must release.
    Drop,
    /// K9: a pointer or extent is outside the pool, its volume or its group.
    Bounds,
    /// K10: the journal has a gap, or a record that cannot be applied.
    Journal,
    /// K11: a superblock slot does not hold the expected superblock.
    Superblock,
    /// K12: the pool was closed cleanly, but there are records to replay.
    Clean,
    /// K13: the catalogue is damaged or contradicts itself.
    Catalogue,
    /// K14: a sum (free blocks of a group, mapped or own blocks of a map) is wrong.
    Sum,
    /// K16: a table page or group header is damaged or stale.
    Table,
    /// K17: a block is counted, but nothing refers to it.
    Leak,
    /// K18: a freed block that waits for its readers, or is being discarded, is allocatable.
    Waiting,
}

impl FindingKind {
    /// All kinds in order.
    pub const ALL: [Self; 17] = [
        Self::Node,
        Self::Birth,
        Self::Shape,
        Self::Count,
        Self::UsedAndFree,
        Self::Type,
        Self::Allocatable,
        Self::Drop,
        Self::Bounds,
        Self::Journal,
        Self::Superblock,
        Self::Clean,
        Self::Catalogue,
        Self::Sum,
        Self::Table,
        Self::Leak,
        Self::Waiting,
    ];

    /// What opening does with damage of this kind.
    #[must_use]
    pub const fn policy(self) -> Policy {
        match self {
            Self::Journal | Self::Clean | Self::Catalogue => Policy::Refuse,
            Self::Node
            | Self::Birth
            | Self::Shape
            | Self::Count
            | Self::UsedAndFree
            | Self::Type
            | Self::Allocatable
            | Self::Drop
            | Self::Bounds
            | Self::Superblock
            | Self::Sum
            | Self::Table
            | Self::Leak
            | Self::Waiting => Policy::Detect,
        }
    }

    /// The stable number, such as "K4".
    #[must_use]
    pub const fn code(self) -> &'static str {
        self.about().0
    }

    /// The name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.about().1
    }

    const fn about(self) -> (&'static str, &'static str) {
        match self {
            Self::Node => ("K1", "map node damaged"),
            Self::Birth => ("K2", "map node of another birth"),
            Self::Shape => ("K3", "map node out of shape"),
            Self::Count => ("K4", "wrong reference count"),
            Self::UsedAndFree => ("K5", "block in use counted as free"),
            Self::Type => ("K6", "block of two types"),
            Self::Allocatable => ("K7", "block in use may be allocated"),
            Self::Drop => ("K8", "wrong deletion under way"),
            Self::Bounds => ("K9", "reference out of bounds"),
            Self::Journal => ("K10", "journal damaged"),
            Self::Superblock => ("K11", "superblock slot damaged"),
            Self::Clean => ("K12", "closed cleanly but with records to replay"),
            Self::Catalogue => ("K13", "catalogue damaged"),
            Self::Sum => ("K14", "wrong sum"),
            Self::Table => ("K16", "table damaged"),
            Self::Leak => ("K17", "leaked block"),
            Self::Waiting => ("K18", "freed block may be allocated too early"),
        }
    }
}

const _: () = assert!(FindingKind::ALL.len() == FindingKind::Waiting as usize + 1);

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Stable number of the kind, such as "K4".
    pub code: String,
    /// Name of the kind.
    pub kind: String,
    /// The object, its place and the damage.
    pub what: String,
}

/// A bounded list of findings.
#[derive(Default)]
pub(super) struct Findings {
    pub(super) list: Vec<Finding>,
    /// Number of findings that did not fit into the list.
    pub(super) more: u64,
}

impl Findings {
    pub(super) fn add(&mut self, kind: FindingKind, what: impl std::fmt::Display) {
        if self.list.len() >= FINDINGS_MAX {
            self.more += 1;
            return;
        }
        let (code, kind) = (kind.code().to_owned(), kind.name().to_owned());
        self.list.push(Finding { code, kind, what: what.to_string() });
    }
}
