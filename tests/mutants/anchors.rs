//! Where in the engine the edits of the list are, whichever files its functions are in.

use std::collections::BTreeMap;
use std::ops::Range;

use super::code::{Item, Token, items, places, tokens};
use super::list::{Edit, Killer, List};

/// Files by their paths from the root of the repository.
pub(crate) type Sources = BTreeMap<String, String>;

/// The directory of the code that has mutants.
const ENGINE: &str = "engine/src/";

/// A file that has been taken apart.
struct File<'a> {
    path: &'a str,
    tokens: Vec<Token<'a>>,
    items: Vec<Item<'a>>,
}

impl<'a> File<'a> {
    fn of(path: &'a str, code: &'a str) -> Self {
        let tokens = tokens(code);
        Self { path, items: items(path, &tokens), tokens }
    }

    /// The code of each item whose path ends with `name`.
    fn named(&self, name: &str) -> impl Iterator<Item = &[Token<'a>]> {
        self.items.iter().filter(move |item| item.is(name)).map(|i| &self.tokens[i.tokens.clone()])
    }
}

fn files<'a>(sources: &'a Sources, is_wanted: impl Fn(&str) -> bool) -> Vec<File<'a>> {
    let wanted = sources.iter().filter(|(path, _)| path.ends_with(".rs") && is_wanted(path));
    wanted.map(|(path, code)| File::of(path, code)).collect()
}

/// The sources of the engine that change when every edit of `list` is applied.
///
/// # Errors
/// Every edit that does not fit the code any more.
pub(crate) fn edited(sources: &Sources, list: &List) -> Result<Sources, String> {
    let files = files(sources, |path| path.starts_with(ENGINE));
    let mut misfits = String::new();
    let mut edits: BTreeMap<&str, Vec<(Range<usize>, &Edit)>> = BTreeMap::new();
    for edit in &list.edits {
        match place(&files, edit) {
            Ok((path, range)) => edits.entry(path).or_default().push((range, edit)),
            Err(why) => misfits.push_str(&format!("{}: {why}\n", edit.title())),
        }
    }
    let mut changed = Sources::new();
    for (path, mut edits) in edits {
        edits.sort_by_key(|(range, _)| range.start);
        for pair in edits.windows(2).filter(|pair| pair[0].0.end > pair[1].0.start) {
            let names = [pair[0].1.title(), pair[1].1.title()].join(" and ");
            misfits.push_str(&format!("{names} overlap in {path}\n"));
        }
        let mut code = sources[path].clone();
        for (range, edit) in edits.into_iter().rev() {
            code.replace_range(range, &edit.question());
        }
        changed.insert(path.to_owned(), code);
    }
    if misfits.is_empty() { Ok(changed) } else { Err(misfits) }
}

/// The one place where the piece of `edit` is: a file, and which bytes of it.
fn place<'a>(files: &[File<'a>], edit: &Edit) -> Result<(&'a str, Range<usize>), String> {
    let (name, piece) = (&edit.function, tokens(&edit.find));
    let named = || files.iter().flat_map(|file| file.named(name).map(|code| (file.path, code)));
    let mut found = named()
        .flat_map(|(path, code)| places(code, &piece).into_iter().map(move |range| (path, range)));
    match (found.next(), found.next()) {
        (Some(place), None) => Ok(place),
        (Some(_), Some(_)) => Err(format!("found more than once in `{name}`:\n{}", edit.find)),
        (None, _) if named().next().is_none() => Err(format!("there is no function `{name}`")),
        (None, _) => Err(format!("not found in `{name}`:\n{}", edit.find)),
    }
}

/// The killers of `list` that are not among the tests, or that several tests may be.
pub(crate) fn unknown<'a>(sources: &Sources, list: &'a List) -> Vec<&'a Killer> {
    let files = files(sources, |_| true);
    let is_known = |killer: &Killer| {
        let Killer { binary, test } = killer;
        let (root, parts) = (format!("/tests/{binary}.rs"), format!("/tests/{binary}/"));
        let of_binary = files.iter().filter(|file| match binary.as_str() {
            "lib" => file.path.starts_with(ENGINE),
            _ => file.path.ends_with(&root) || file.path.contains(&parts),
        });
        of_binary.flat_map(|file| file.named(test)).count() == 1
    };
    list.mutants.iter().map(|m| &m.killer).filter(|killer| !is_known(killer)).collect()
}
