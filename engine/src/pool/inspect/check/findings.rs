//! What the checker found: numbered kinds, and a bounded list. `docs/OPERATIONS.md` has the table
//! of kinds, which a test compares with this one.

/// Findings that are listed; more are only counted.
pub const FINDINGS_MAX: usize = 1000;

/// What becomes of a pool with such damage when it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// It opens. What meets the damage gets an error; the rest is served.
    Detect,
    /// It does not open: what is damaged is needed for everything, or acknowledged changes are lost.
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

/// What sort of damage it is. The numbers are stable: programs match on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FindingKind {
    /// K1: a block that should hold a node does not hold a whole node of this pool.
    Node,
    /// K2: a node was born at another time than a pointer to it says.
    Birth,
    /// K3: a node's level, order, bounds or number of entries do not fit into its tree.
    Shape,
    /// K4: a stored reference count differs from the references found.
    Count,
    /// K5: a block that is in use is counted as free.
    UsedAndFree,
    /// K6: a block is used as one thing and counted, or used, as another.
    Type,
    /// K7: a block that is in use now, or that the last checkpoint needs, may be allocated.
    Allocatable,
    /// K8: a deletion under way does not hold exactly the references it has to give up.
    Drop,
    /// K9: a pointer or extent leads out of the pool, its volume or its group.
    Bounds,
    /// K10: the journal has a gap, or a record that cannot be carried out.
    Journal,
    /// K11: a superblock slot does not hold what it must.
    Superblock,
    /// K12: the pool was closed cleanly, and yet there are records to replay.
    Clean,
    /// K13: the catalogue is damaged or contradicts itself.
    Catalogue,
    /// K14: a sum (free blocks of a group, mapped or own blocks of a map) is wrong.
    Sum,
    /// K16: a table page or group header is damaged or stale.
    Table,
    /// K17: a block is counted and nothing refers to it.
    Leak,
    /// K18: a freed block that still waits for its readers, or is being discarded, may be allocated.
    Waiting,
}

impl FindingKind {
    /// All kinds, in their order.
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

    /// What opening makes of it.
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

    /// The stable number, as "K4".
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

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Stable number of the kind, as "K4".
    pub code: String,
    /// Name of the kind.
    pub kind: String,
    /// The object, its place and what is wrong with it.
    pub what: String,
}

/// A bounded list of findings.
#[derive(Default)]
pub(super) struct Findings {
    pub(super) list: Vec<Finding>,
    /// Findings that the list had no room for.
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
