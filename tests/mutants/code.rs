//! Pieces of Rust, compared token by token, and the items of a file: functions, constants, types.
//! Line breaks, comments and the comma before a closing bracket do not count, so that an edit
//! still finds its place when code is moved or formatted anew.

use std::ops::Range;

/// A token and where it begins in its text, in bytes.
#[derive(Clone, Copy)]
pub(crate) struct Token<'a> {
    text: &'a str,
    start: usize,
}

impl Token<'_> {
    fn end(&self) -> usize {
        self.start + self.text.len()
    }

    fn opens(&self) -> bool {
        matches!(self.text, "(" | "[" | "{")
    }

    fn closes(&self) -> bool {
        matches!(self.text, ")" | "]" | "}")
    }
}

/// The tokens of `code`; punctuation is one token for each character.
pub(crate) fn tokens(code: &str) -> Vec<Token<'_>> {
    let (mut all, mut start) = (Vec::new(), 0);
    while let Some(first) = code[start..].chars().next() {
        let rest = &code[start..];
        let blank = if first.is_whitespace() { Some(first.len_utf8()) } else { comment(rest) };
        let length = blank.unwrap_or_else(|| {
            let longer = string(rest).or_else(|| character(rest)).or_else(|| word(rest));
            longer.unwrap_or_else(|| first.len_utf8())
        });
        if blank.is_none() {
            all.push(Token { text: &rest[..length], start });
        }
        start += length;
    }
    all
}

fn comment(rest: &str) -> Option<usize> {
    if rest.starts_with("//") {
        return Some(rest.find('\n').unwrap_or(rest.len()));
    }
    if !rest.starts_with("/*") {
        return None;
    }
    let (mut depth, mut end) = (0, 0);
    while end < rest.len() {
        let step = match rest.as_bytes().get(end..end + 2) {
            Some(b"/*") => 1,
            Some(b"*/") => -1,
            _ => 0,
        };
        depth += step;
        end += if step == 0 { 1 } else { 2 };
        if depth == 0 {
            break;
        }
    }
    Some(end)
}

/// The length of the string literal at the beginning of `rest`.
fn string(rest: &str) -> Option<usize> {
    let prefix = rest.find(|c: char| !matches!(c, 'b' | 'c' | 'r'))?;
    if prefix > 2 {
        return None;
    }
    let hashes = rest[prefix..].find(|c: char| c != '#')?;
    let raw = rest[..prefix].ends_with('r');
    let body = prefix + hashes + 1;
    if !rest[prefix + hashes..].starts_with('"') || (hashes > 0 && !raw) {
        return None;
    }
    if raw {
        let close = format!("\"{}", "#".repeat(hashes));
        return Some(body + rest[body..].find(&close)? + close.len());
    }
    let mut escaped = false;
    let close = rest[body..].find(|c: char| {
        let closes = c == '"' && !escaped;
        escaped = c == '\\' && !escaped;
        closes
    })?;
    Some(body + close + 1)
}

/// The length of the character literal, or of the lifetime, at the beginning of `rest`.
fn character(rest: &str) -> Option<usize> {
    let inner = rest.strip_prefix('\'')?;
    if inner.starts_with('\\') {
        return Some(3 + rest.get(3..)?.find('\'')? + 1);
    }
    let first = inner.chars().next()?.len_utf8();
    if inner[first..].starts_with('\'') { Some(first + 2) } else { Some(1 + word(inner)?) }
}

/// The length of the name or number at the beginning of `rest`.
fn word(rest: &str) -> Option<usize> {
    let in_word = |c: char| c.is_alphanumeric() || c == '_';
    let end = rest.find(|c| !in_word(c)).unwrap_or(rest.len());
    let is_number = rest.starts_with(|c: char| c.is_ascii_digit());
    let fraction =
        rest[end..].strip_prefix('.').filter(|f| f.starts_with(|c: char| c.is_ascii_digit()));
    match fraction {
        Some(digits) if is_number => {
            Some(end + 1 + digits.find(|c| !in_word(c)).unwrap_or(digits.len()))
        }
        _ => (end > 0).then_some(end),
    }
}

/// Where in its text `piece` is found among `code`.
pub(crate) fn places(code: &[Token<'_>], piece: &[Token<'_>]) -> Vec<Range<usize>> {
    let at = |from: usize| {
        let length = matched(&code[from..], piece)?;
        Some(code[from].start..code[from + length - 1].end())
    };
    (0..code.len()).filter_map(at).collect()
}

/// How many tokens at the beginning of `code` make up `piece`.
fn matched(code: &[Token<'_>], piece: &[Token<'_>]) -> Option<usize> {
    let (mut at, mut wanted) = (0, 0);
    while wanted < piece.len() {
        if code.get(at)?.text == piece[wanted].text {
            (at, wanted) = (at + 1, wanted + 1);
        } else if at > 0 && begins_with_last_comma(&code[at..]) {
            at += 1;
        } else if at > 0 && begins_with_last_comma(&piece[wanted..]) {
            wanted += 1;
        } else {
            return None;
        }
    }
    (at > 0).then_some(at)
}

fn begins_with_last_comma(tokens: &[Token<'_>]) -> bool {
    matches!(tokens, [comma, close, ..] if comma.text == "," && close.closes())
}

/// A function, constant, static or type, with its attributes.
pub(crate) struct Item<'a> {
    /// The modules and the type that it is in, and its name.
    path: Vec<&'a str>,
    pub(crate) tokens: Range<usize>,
}

impl Item<'_> {
    /// Whether `name` is the end of its path.
    pub(crate) fn is(&self, name: &str) -> bool {
        let wanted: Vec<&str> = name.split("::").collect();
        self.path.ends_with(&wanted)
    }
}

/// The items of the file at `path` below the root of its crate.
pub(crate) fn items<'a>(path: &'a str, tokens: &[Token<'a>]) -> Vec<Item<'a>> {
    let modules = path.trim_end_matches(".rs").split('/').filter(|name| *name != "mod");
    let mut all = Vec::new();
    collect(tokens, 0..tokens.len(), &modules.collect::<Vec<_>>(), &mut all);
    all
}

fn collect<'a>(
    tokens: &[Token<'a>],
    within: Range<usize>,
    path: &[&'a str],
    all: &mut Vec<Item<'a>>,
) {
    let text = |at: usize| tokens.get(at).map_or("", |token| token.text);
    let mut start = within.start;
    while start < within.end {
        let keyword = keyword(tokens, start);
        let kind = text(keyword);
        let ends_with_brace = !matches!(kind, "const" | "static" | "type" | "use");
        let (mut end, mut brace) = (keyword, None);
        while end < within.end && text(end) != ";" {
            let open = end;
            end = behind(tokens, end);
            if text(open) == "{" && ends_with_brace {
                brace = Some(open);
                end -= 1;
                break;
            }
        }
        let body = brace.map_or(end..end, |open| open + 1..end);
        let name = match kind {
            "impl" => subject(&tokens[keyword + 1..brace.unwrap_or(end)]),
            "static" if text(keyword + 1) == "mut" => text(keyword + 2),
            _ => text(keyword + 1),
        };
        let inner = [path, &[name]].concat();
        end = within.end.min(end + 1);
        match kind {
            "impl" | "trait" | "mod" => collect(tokens, body, &inner, all),
            _ => all.push(Item { path: inner, tokens: start..end }),
        }
        start = end;
    }
}

/// The index behind the token at `at`, or behind the whole group that it opens.
fn behind(tokens: &[Token<'_>], mut at: usize) -> usize {
    let mut depth = 0;
    while let Some(token) = tokens.get(at) {
        depth += usize::from(token.opens());
        depth -= usize::from(token.closes() && depth > 0);
        at += 1;
        if depth == 0 {
            break;
        }
    }
    at
}

/// Where the word is that says what kind of item begins at `at`.
fn keyword(tokens: &[Token<'_>], mut at: usize) -> usize {
    let text = |at: usize| tokens.get(at).map_or("", |token| token.text);
    loop {
        let next = text(at + 1);
        at = match text(at) {
            "#" if next == "!" => behind(tokens, at + 2),
            "#" => behind(tokens, at + 1),
            "pub" if next == "(" => behind(tokens, at + 1),
            "pub" => at + 1,
            _ => break,
        }
    }
    // Behind words like `async` and `extern "C"`, of which there can be several.
    let is_word = |t: &&Token<'_>| t.text.starts_with(|c: char| c.is_alphabetic() || c == '"');
    let mut words = tokens[at..].iter().take_while(is_word);
    let kind = words.position(|token| matches!(token.text, "fn" | "impl" | "trait" | "mod"));
    at + kind.unwrap_or(0)
}

/// The name of the type that a block `impl` is of; `header` is what stands between the two.
fn subject<'a>(header: &[Token<'a>]) -> &'a str {
    let (mut depth, mut name) = (0_usize, "");
    for (index, token) in header.iter().enumerate() {
        let arrow = index > 0 && header[index - 1].text == "-";
        match token.text {
            "<" => depth += 1,
            ">" if !arrow => depth = depth.saturating_sub(1),
            "where" if depth == 0 => break,
            word if depth == 0 && word.starts_with(|c: char| c.is_alphabetic()) => name = word,
            _ => {}
        }
    }
    name
}

#[test]
fn a_piece_is_found_however_it_is_written() {
    let found = |code: &str, piece: &str| places(&tokens(code), &tokens(piece)).len();
    assert_eq!(found("a(\n    b, // why\n    c,\n)", "a(b, c)"), 1);
    assert_eq!(found("a(b, c)", "a(b /* why /* not */ */, c,)"), 1);
    assert_eq!(found("a(b); a(b);", "a(b)"), 2);
    assert_eq!(found("ab; \"a\"; 'a'; 'a; 1.a", "a"), 1);
    assert_eq!(found(r##"x(r#"a " b"#, "\" // a", '"', b'\'')"##, "'\"', b'\\''"), 1);
    assert_eq!(found("0..1", "0.1"), 0);
}

#[test]
fn items_are_found_wherever_they_are() {
    let code = "#![allow(dead_code)]
        pub(crate) const N: [u8; 2] = { const M: u8 = 1; [M, 2] };
        impl<T: Fn() -> u8> From<T> for a::Pool<T> where T: Send { pub async fn f(&self) { 1 } }
        mod inner { struct Unit; const fn f<'a>(x: &'a str) -> [u8; 2] { 2 } }
        extern \"C\" fn g() {}";
    let all = tokens(code);
    let items = items("pool/mod.rs", &all);
    let named = |name: &str| -> Vec<&str> {
        let items = items.iter().filter(|item| item.is(name)).map(|item| item.tokens.clone());
        items.map(|tokens| &code[all[tokens.start].start..all[tokens.end - 1].end()]).collect()
    };
    assert!(matches!(named("N")[..], [n] if n.ends_with("[M, 2] };")));
    assert!(matches!(named("Pool::f")[..], [f] if f.ends_with("{ 1 }")));
    assert!(matches!(named("pool::inner::f")[..], [f] if f.ends_with("{ 2 }")));
    assert_eq!(named("f").len(), 2);
    assert_eq!(named("Unit"), ["struct Unit;"]);
    assert_eq!(named("g"), ["extern \"C\" fn g() {}"]);
}
