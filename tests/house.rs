//! The floors of src/: a file imports from its own room and from lower floors, and no file imports one that imports it, over
//! any number of steps.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The rooms from the top floor down; those of one floor know nothing of each other.
const FLOORS: [&[&str]; 7] = [
    &["lib"],
    &["monitor", "review", "setup"],
    &["guard", "worker"],
    &["stat", "token", "undo"],
    &["policy"],
    &["event"],
    &["session"],
];
/// The lowest floor, on which everybody stands.
const GROUND: &str = "pg";

fn floor(file: &str) -> usize {
    let room = file.split("::").next().unwrap_or_default();
    if room == GROUND {
        return 0;
    }
    let from_top = FLOORS.iter().position(|rooms| rooms.contains(&room));
    FLOORS.len() - from_top.unwrap_or_else(|| panic!("{room} stands on no floor: say which one in tests/house.rs"))
}

/// Every file of src/ by its module path, with what it says.
fn files(folder: &Path, path: &str, all: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(folder).expect("a folder of src").map(|entry| entry.expect("an entry").path()) {
        let name = entry.file_stem().and_then(|name| name.to_str()).expect("a name").to_owned();
        let path = if path.is_empty() { name.clone() } else { format!("{path}::{name}") };
        if entry.is_dir() {
            files(&entry, &path, all);
        } else if name != "mod" {
            all.insert(path, fs::read_to_string(&entry).expect("a file of src"));
        }
    }
}

/// The code without comments and unit tests.
fn code(text: &str) -> String {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    code.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// Every path that begins with `crate` or `super`, with what stands in braces behind it one by one.
fn paths(code: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for start in ["crate::", "super::"] {
        for (at, _) in code.match_indices(start) {
            let inside = code[..at].ends_with("::") || code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
            if !inside {
                expand(&code[at..], Vec::new(), &mut found);
            }
        }
    }
    found
}

/// Reads one path, and gives what follows it.
fn expand<'a>(mut rest: &'a str, mut path: Vec<String>, found: &mut Vec<Vec<String>>) -> &'a str {
    loop {
        rest = rest.trim_start();
        if let Some(mut inside) = rest.strip_prefix('{') {
            loop {
                inside = expand(inside, path.clone(), found).trim_start();
                inside = inside.strip_prefix(',').unwrap_or(inside).trim_start();
                match inside.strip_prefix('}') {
                    Some(rest) => return rest,
                    None if inside.is_empty() => return inside,
                    None => {}
                }
            }
        }
        let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
        if end > 0 && &rest[..end] != "self" {
            path.push(rest[..end].to_owned());
        }
        rest = &rest[end..];
        match rest.strip_prefix("::") {
            Some(further) => rest = further,
            None => {
                found.push(path);
                // `as name`, or a character that is part of no path.
                let skip = rest.find([',', '}', ';', '\n']).unwrap_or(rest.len());
                return if end == 0 && skip == 0 && !rest.starts_with([',', '}']) { "" } else { &rest[skip..] };
            }
        }
    }
}

/// What each file imports.
fn imports() -> BTreeMap<String, BTreeSet<String>> {
    let mut all = BTreeMap::new();
    files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), "", &mut all);
    let rooms: BTreeSet<&str> = all.keys().filter_map(|file| Some(file.split_once("::")?.0)).collect();
    // A whole room, as in `use crate::stat;`, counts as the room: the files that are meant stand in the code.
    let file_of = |path: &[String]| {
        let file = (1..=path.len()).rev().map(|n| path[..n].join("::")).find(|p| all.contains_key(p));
        file.or_else(|| path.first().filter(|room| rooms.contains(room.as_str())).cloned())
    };
    all.iter()
        .map(|(file, text)| {
            let here: Vec<String> = file.split("::").map(str::to_owned).collect();
            let imported = paths(&code(text)).into_iter().filter_map(|path| {
                let ups = path.iter().take_while(|part| *part == "super").count();
                let base = if ups > 0 { &here[..here.len().saturating_sub(ups)] } else { &[] };
                let full: Vec<String> = base.iter().chain(&path[ups.max(1)..]).cloned().collect();
                file_of(&full).filter(|other| other != file)
            });
            (file.clone(), imported.collect())
        })
        .collect()
}

#[test]
fn no_file_imports_from_a_higher_floor_or_from_its_neighbours() {
    let room = |file: &str| file.split("::").next().unwrap_or_default().to_owned();
    let mut wrong = Vec::new();
    for (file, imported) in imports() {
        for other in imported {
            if floor(&other) >= floor(&file) && room(&other) != room(&file) {
                wrong.push(format!("{file} imports {other}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn no_file_imports_one_that_imports_it() {
    let mut imports = imports();
    assert!(imports.values().map(BTreeSet::len).sum::<usize>() > 300, "the imports are not read");
    // Whatever imports nothing that is left is in no circle.
    loop {
        let left: BTreeSet<String> = imports.keys().cloned().collect();
        imports.retain(|_, imported| imported.iter().any(|other| left.contains(other)));
        if imports.len() == left.len() {
            break;
        }
    }
    assert!(imports.is_empty(), "circles among {:#?}", imports.keys());
}
