//! The list of mutants: `tests/mutants/*.toml`, one file for each class.

use std::collections::BTreeSet;
use std::path::Path;

use toml::{Table, Value};

/// A deliberate bug.
pub(crate) struct Mutant {
    pub(crate) name: String,
    pub(crate) class: String,
    /// What it breaks, in one sentence.
    pub(crate) breaks: String,
    /// Those of the known bugs of comparable systems that have the same cause.
    pub(crate) bugs: Vec<i64>,
    pub(crate) killer: Killer,
}

/// The test that is expected to fail: of `sim/tests/<binary>.rs` or `engine/tests/<binary>.rs`, or a
/// unit test of the engine, then `lib`. It is named by the end of its path, so much that no other
/// test is named so.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Killer {
    pub(crate) binary: String,
    pub(crate) test: String,
}

/// A piece of a function of the engine that is replaced by one which asks at run time which mutant
/// it is to be: `{{name}}` in it stands for that question.
pub(crate) struct Edit {
    /// The function: `Type::name`, `name`, or `module::name` where several functions are named so.
    pub(crate) function: String,
    pub(crate) find: String,
    replace: String,
}

/// All mutants with their edits.
pub(crate) struct List {
    pub(crate) mutants: Vec<Mutant>,
    pub(crate) edits: Vec<Edit>,
}

fn text(table: &Table, key: &str) -> String {
    let value = table.get(key).and_then(Value::as_str);
    value.unwrap_or_else(|| panic!("no {key} in {table:?}")).trim_end_matches('\n').to_owned()
}

fn tables<'a>(file: &'a Table, key: &str) -> impl Iterator<Item = &'a Table> {
    let all = file.get(key).and_then(Value::as_array).into_iter().flatten();
    all.map(|value| value.as_table().expect("a table"))
}

impl Mutant {
    fn of(table: &Table, class: &str) -> Self {
        let killer = text(table, "killer");
        let (binary, test) = killer.split_once(' ').expect("a binary and a test");
        Self {
            name: text(table, "name"),
            class: class.to_owned(),
            breaks: text(table, "breaks"),
            bugs: match table.get("bug") {
                Some(Value::Array(bugs)) => bugs.iter().filter_map(Value::as_integer).collect(),
                bug => bug.and_then(Value::as_integer).into_iter().collect(),
            },
            killer: Killer { binary: binary.to_owned(), test: test.to_owned() },
        }
    }
}

impl Edit {
    /// The names of the mutants that it can be.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.replace.split("{{").skip(1).filter_map(|rest| Some(rest.split_once("}}")?.0))
    }

    /// The names of its mutants, for messages.
    pub(crate) fn title(&self) -> String {
        self.names().collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(", ")
    }

    /// What the piece is replaced by.
    pub(crate) fn question(&self) -> String {
        self.replace.replace("{{", "crate::mutant::on(\"").replace("}}", "\")")
    }
}

impl List {
    /// Reads the files in `directory`.
    pub(crate) fn read(directory: &Path) -> Self {
        let entries = std::fs::read_dir(directory).expect("the list of mutants");
        let mut files: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
        files.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
        files.sort();
        let mut list = Self { mutants: Vec::new(), edits: Vec::new() };
        for path in files {
            let class = path.file_stem().expect("a name").to_string_lossy().into_owned();
            let file = std::fs::read_to_string(&path).expect("a file");
            let file: Table = file.parse().unwrap_or_else(|error| panic!("{class}: {error}"));
            list.mutants.extend(tables(&file, "mutant").map(|table| Mutant::of(table, &class)));
            list.edits.extend(tables(&file, "edit").map(|table| Edit {
                function: text(table, "fn"),
                find: text(table, "find"),
                replace: text(table, "replace"),
            }));
        }
        let listed: BTreeSet<&str> = list.mutants.iter().map(|m| m.name.as_str()).collect();
        let named: BTreeSet<&str> = list.edits.iter().flat_map(Edit::names).collect();
        assert_eq!(listed, named, "each mutant is in an edit, and each in an edit is listed");
        assert_eq!(listed.len(), list.mutants.len(), "each name is used once");
        list
    }
}
