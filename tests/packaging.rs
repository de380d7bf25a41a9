//! What a release says about itself: META.json as the PGXN Meta Spec 1.0.0 wants it, and one version everywhere.
//! What building may install on a machine, and that all SQL is built in. The files that are handed out are the business of
//! scripts/test-packages.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value};

const VERSION: &str = env!("CARGO_PKG_VERSION");

const KEYS: [&str; 14] = [
    "abstract",
    "description",
    "generated_by",
    "license",
    "maintainer",
    "meta-spec",
    "name",
    "no_index",
    "prereqs",
    "provides",
    "release_status",
    "resources",
    "tags",
    "version",
];
const LICENSES: [&str; 28] = [
    "agpl_3",
    "apache_1_1",
    "apache_2_0",
    "artistic_1",
    "artistic_2",
    "bsd",
    "freebsd",
    "gfdl_1_2",
    "gfdl_1_3",
    "gpl_1",
    "gpl_2",
    "gpl_3",
    "lgpl_2_1",
    "lgpl_3_0",
    "mit",
    "mozilla_1_0",
    "mozilla_1_1",
    "openssl",
    "perl_5",
    "postgresql",
    "qpl_1_0",
    "ssleay",
    "sun",
    "zlib",
    "open_source",
    "restricted",
    "unrestricted",
    "unknown",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn file(name: &str) -> String {
    std::fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn meta() -> Value {
    serde_json::from_str(&file("META.json")).expect("META.json is JSON")
}

/// A string of at least one character.
fn string(value: &Value) -> Result<&str, String> {
    value.as_str().filter(|text| !text.is_empty()).ok_or_else(|| format!("{value} is no string with something in it"))
}

fn map(value: &Value) -> Result<&Map<String, Value>, String> {
    value.as_object().ok_or_else(|| format!("{value} is no map"))
}

/// A list of at least one string; a string alone counts as one.
fn strings(value: &Value) -> Result<Vec<&str>, String> {
    let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    if values.is_empty() {
        return Err("the list is empty".to_owned());
    }
    values.iter().map(string).collect()
}

fn term(text: &str) -> Result<(), String> {
    let bad = |c: char| c == '/' || c == '\\' || c.is_control() || c.is_whitespace();
    if text.chars().count() < 2 || text.contains(bad) { Err(format!("{text:?} is no term")) } else { Ok(()) }
}

fn tag(text: &str) -> Result<(), String> {
    let bad = |c: char| c == '/' || c == '\\' || c.is_control();
    if text.chars().count() > 255 || text.contains(bad) { Err(format!("{text:?} is no tag")) } else { Ok(()) }
}

/// A semantic version of three numbers, as the spec's 1.0.0 has it, without what may follow them.
fn version(value: &Value) -> Result<&str, String> {
    let text = string(value)?;
    let number = |part: &str| part == "0" || (!part.starts_with('0') && part.parse::<u32>().is_ok());
    if text.split('.').count() == 3 && text.split('.').all(number) {
        Ok(text)
    } else {
        Err(format!("{text:?} is no version"))
    }
}

/// A path inside the distribution, of a file that is there.
fn path(value: &Value) -> Result<(), String> {
    let text = string(value)?;
    let inside = !text.starts_with('/') && !text.contains("..") && !text.contains('\\');
    if inside && root().join(text).is_file() { Ok(()) } else { Err(format!("{text:?} is no file of the distribution")) }
}

fn keys(found: &Map<String, Value>, allowed: &[&str]) -> Result<(), String> {
    match found.keys().find(|key| !allowed.contains(&key.as_str()) && !key.to_lowercase().starts_with("x_")) {
        Some(key) => Err(format!("the spec has no key {key:?} here")),
        None => Ok(()),
    }
}

/// Everything that the spec requires, and the form of those optional keys that META.json has.
fn conforms(meta: &Value) -> Result<(), String> {
    let meta = map(meta)?;
    keys(meta, &KEYS)?;
    let required = |key: &str| meta.get(key).ok_or_else(|| format!("{key} is missing"));

    term(string(required("name")?)?)?;
    string(required("abstract")?)?;
    version(required("version")?)?;
    strings(required("maintainer")?)?;

    let license = required("license")?;
    if let Some(named) = license.as_object() {
        for uri in named.values() {
            string(uri)?.starts_with("https://").then_some(()).ok_or_else(|| format!("{uri} is no link"))?;
        }
        (!named.is_empty()).then_some(()).ok_or("no license")?;
    } else if let Some(unknown) = strings(license)?.into_iter().find(|name| !LICENSES.contains(name)) {
        return Err(format!("{unknown:?} is none of the spec's licenses"));
    }

    let spec = map(required("meta-spec")?)?;
    keys(spec, &["version", "url"])?;
    let spec_version = version(spec.get("version").ok_or("meta-spec has no version")?)?;
    if spec_version != "1.0.0" {
        return Err(format!("this checks the spec's 1.0.0, not {spec_version}"));
    }

    let provides = map(required("provides")?)?;
    for (name, extension) in provides {
        term(name)?;
        let extension = map(extension)?;
        keys(extension, &["file", "version", "abstract", "docfile"])?;
        version(extension.get("version").ok_or("an extension without version")?)?;
        path(extension.get("file").ok_or("an extension without file")?)?;
        extension.get("docfile").map_or(Ok(()), path)?;
        extension.get("abstract").map_or(Ok(""), string)?;
    }

    for text in ["description", "generated_by"] {
        meta.get(text).map_or(Ok(""), string)?;
    }
    for text in meta.get("tags").map_or(Ok(Vec::new()), strings)? {
        tag(text)?;
    }
    if let Some(phases) = meta.get("prereqs") {
        let phases = map(phases)?;
        keys(phases, &["configure", "build", "test", "runtime", "develop"])?;
        for relations in phases.values() {
            let relations = map(relations)?;
            keys(relations, &["requires", "recommends", "suggests", "conflicts"])?;
            for (name, wanted) in relations.values().map(map).collect::<Result<Vec<_>, _>>()?.into_iter().flatten() {
                term(name)?;
                // 0 is any version.
                if wanted != &Value::from(0) {
                    version(wanted)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn the_metadata_conform_to_the_pgxn_meta_spec() {
    conforms(&meta()).expect("META.json");
}

#[test]
fn the_check_of_the_metadata_refuses_what_the_spec_does() {
    for missing in ["name", "abstract", "version", "maintainer", "license", "provides", "meta-spec"] {
        let mut without = meta();
        without.as_object_mut().expect("a map").remove(missing);
        assert_eq!(conforms(&without), Err(format!("{missing} is missing")));
    }
    for (pointer, wrong) in [
        ("/name", Value::from("pg writeguard")),
        ("/abstract", Value::from("")),
        ("/version", Value::from("0.1")),
        ("/version", Value::from("0.01.0")),
        ("/maintainer", serde_json::json!([])),
        ("/license", Value::from("PostgreSQL")),
        ("/meta-spec/version", Value::from("2.0.0")),
        ("/provides/pg_writeguard/file", Value::from("sql/missing.sql")),
        ("/provides/pg_writeguard/version", Value::Null),
        ("/prereqs/runtime/requires/PostgreSQL", Value::from(15)),
        ("/tags/0", Value::from("a/b")),
    ] {
        let mut other = meta();
        *other.pointer_mut(pointer).unwrap_or_else(|| panic!("META.json has no {pointer}")) = wrong;
        assert!(conforms(&other).is_err(), "{pointer}: {other:#}");
    }
    let mut more = meta();
    more["licence"] = Value::from("postgresql");
    assert!(conforms(&more).is_err());
}

#[test]
fn one_version_everywhere() {
    let meta = meta();
    assert_eq!(meta["version"], VERSION, "META.json");
    assert_eq!(meta["provides"]["pg_writeguard"]["version"], VERSION, "META.json, provides");

    let changelog = file("CHANGELOG.md");
    let newest = changelog.lines().find_map(|line| line.strip_prefix("## ")).expect("a release in CHANGELOG.md");
    assert_eq!(newest.split_whitespace().next(), Some(VERSION), "the newest of CHANGELOG.md");

    let image = format!("reference: registry.example.com/pg_writeguard:{VERSION}-18");
    assert!(file("packaging/cloudnative-pg/cluster.yaml").contains(&image), "cluster.yaml");
    for page in ["README.md", "docs/install.md"] {
        let package = format!("postgresql-15-writeguard_{VERSION}-1_");
        assert!(file(page).contains(&package), "{page}");
    }
    assert!(file("docs/install.md").contains(&format!("pg_writeguard_15-{VERSION}-1PGDG.")));
    assert!(file("packaging/pg_writeguard.spec").contains("Version:        %{pgwgversion}"));

    // The build puts Cargo.toml's into it.
    assert!(file("pg_writeguard.control").lines().any(|line| line == "default_version = '@CARGO_VERSION@'"));
    assert!(file("Cargo.lock").contains(&format!("name = \"pg_writeguard\"\nversion = \"{VERSION}\"\n")));

    // What names the package and the archives.
    let script = "source scripts/environment; release_version";
    let said = std::process::Command::new("bash")
        .args(["-euc", script])
        .current_dir(root())
        .output()
        .expect("scripts/environment can be sourced");
    assert_eq!(String::from_utf8_lossy(&said.stdout).trim_end(), VERSION, "scripts/environment: {said:?}");
}

#[test]
fn the_same_words_and_licence_in_every_description() {
    let meta = meta();
    let description = env!("CARGO_PKG_DESCRIPTION");
    assert_eq!(meta["abstract"], description);
    let control = file("pg_writeguard.control");
    let comment = control.lines().find_map(|line| line.strip_prefix("comment = ")).expect("a comment");
    assert_eq!(comment.trim_matches('\'').to_lowercase(), description.to_lowercase());
    let licenses: BTreeSet<&str> = meta["license"].as_object().expect("a map").keys().map(String::as_str).collect();
    assert_eq!(licenses, BTreeSet::from([env!("CARGO_PKG_LICENSE")]));
    assert!(file("LICENSE").starts_with("PostgreSQL License"));
}

/// The Debian packages that `scripts/prepare PURPOSE` may install for PostgreSQL 15.
fn packages_for(purpose: &str) -> BTreeSet<String> {
    let listed = std::process::Command::new("scripts/prepare")
        .args([purpose, "list"])
        .env("PG_CONFIG", "/usr/lib/postgresql/15/bin/pg_config")
        .current_dir(root())
        .output()
        .expect("scripts/prepare runs");
    assert!(listed.status.success(), "{listed:?}");
    String::from_utf8_lossy(&listed.stdout).lines().map(str::to_owned).collect()
}

/// `make install` runs on production servers.
#[test]
fn what_is_installed_for_a_purpose_is_its_own() {
    let build = packages_for("build");
    let building = ["gcc", "libicu-dev", "make", "postgresql-15", "postgresql-server-dev-15"];
    assert_eq!(build, building.map(str::to_owned).into());

    let deb = packages_for("deb");
    let more: BTreeSet<&str> = deb.difference(&build).map(String::as_str).collect();
    assert_eq!(more, ["dpkg-dev", "python3"].into());

    let rpm = packages_for("rpm");
    let more: BTreeSet<&str> = rpm.difference(&build).map(String::as_str).collect();
    assert_eq!(more, ["python3", "rpm"].into());

    let test = packages_for("test");
    assert!(test.is_superset(&deb) && test.is_superset(&rpm) && test.contains("pgbouncer"), "{test:?}");
    let matrix = packages_for("matrix");
    assert!(matrix.is_superset(&test) && matrix.contains("debootstrap"), "{matrix:?}");

    let makefile = file("Makefile");
    for rule in ["install: prepare-build", "deb: prepare-deb", "rpm: prepare-rpm", "tarball: prepare-rpm", "demo:"] {
        assert!(makefile.lines().any(|line| line == rule), "{rule}");
    }
    let demo = file("scripts/demo");
    let prepared: Vec<&str> = demo.lines().map(str::trim).filter(|line| line.starts_with("scripts/prepare")).collect();
    assert_eq!(prepared, ["scripts/prepare build"]);
}

#[test]
fn an_installation_runs_each_file_of_sql_once() {
    let order = file("sql/order");
    let ordered: BTreeSet<String> = order.lines().map(str::to_owned).collect();
    assert_eq!(order.lines().count(), ordered.len(), "{order}");
    let mut there = BTreeSet::new();
    for folder in ["", "install/"] {
        for entry in std::fs::read_dir(root().join("sql").join(folder)).expect("a folder") {
            let name = entry.expect("an entry").file_name().into_string().expect("a name");
            if name.ends_with(".sql") {
                there.insert(format!("{folder}{name}"));
            }
        }
    }
    assert_eq!(ordered, there);
}

/// What CloudNativePG reads.
#[test]
fn the_manifest_names_what_the_image_and_the_server_have() {
    let read = "import json, sys, yaml; json.dump(list(yaml.safe_load_all(open(sys.argv[1]))), sys.stdout)";
    let json = std::process::Command::new("/usr/bin/python3")
        .args(["-c", read, "packaging/cloudnative-pg/cluster.yaml"])
        .current_dir(root())
        .output()
        .expect("scripts/prepare installs python3-yaml");
    assert!(json.status.success(), "{json:?}");
    let documents: Value = serde_json::from_slice(&json.stdout).expect("JSON");
    let kinds: Vec<&Value> = documents.as_array().expect("documents").iter().map(|one| &one["kind"]).collect();
    assert_eq!(kinds, ["Cluster", "Database"]);
    let postgresql = &documents[0]["spec"]["postgresql"];
    assert_eq!(postgresql["shared_preload_libraries"], serde_json::json!(["pg_writeguard"]));
    let name = postgresql["extensions"][0]["name"].as_str().expect("a name");
    assert!(name.chars().all(|letter| letter.is_ascii_lowercase() || letter == '-'), "{name} is no name of a volume");
    assert_eq!(documents[1]["spec"]["extensions"][0]["name"], "pg_writeguard");
    assert_eq!(documents[1]["spec"]["cluster"]["name"], documents[0]["metadata"]["name"]);
}
