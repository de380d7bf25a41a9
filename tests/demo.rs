//! `make demo` plays what docs/demo.md shows.

use std::process::Command;

const PAGE: &str = include_str!("../docs/demo.md");

/// Without what differs from run to run: times, the server's version and its directory.
fn normalised(transcript: &str) -> String {
    let is_number = |word: &str| word.starts_with(|c: char| c.is_ascii_digit());
    let mut lines = Vec::new();
    for line in transcript.trim().lines() {
        if line.starts_with("PostgreSQL ") {
            lines.push("PostgreSQL".to_owned());
            continue;
        }
        let mut words: Vec<&str> = line.trim_end().split(' ').collect();
        // psql adds minutes and seconds to a long time.
        if words.last().is_some_and(|word| word.starts_with("(00:")) {
            words.pop();
        }
        for n in 0..words.len().saturating_sub(1) {
            if is_number(words[n]) && words[n + 1].starts_with(['m', 's']) {
                let unit = words[n + 1].trim_end_matches(|c: char| !c.is_ascii_alphabetic());
                if matches!(unit, "ms" | "s") {
                    words[n] = "N";
                }
            }
        }
        lines.push(words.join(" "));
    }
    lines.join("\n")
}

#[test]
fn the_demo_plays_what_the_page_shows() {
    let played = Command::new("scripts/demo")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("PGWG_ON", std::env::var("PGWG_BIN").expect("PGWG_BIN is set"))
        .env_remove("KEEP")
        .output()
        .expect("scripts/demo runs");
    let said = String::from_utf8_lossy(&played.stdout);
    assert!(played.status.success(), "{said}\n{}", String::from_utf8_lossy(&played.stderr));
    let shown = PAGE.split("```\n").nth(1).expect("a transcript");
    for (shown, said) in normalised(shown).lines().zip(normalised(&said).lines()) {
        assert_eq!(shown, said, "docs/demo.md and what scripts/demo prints");
    }
    assert_eq!(normalised(shown).lines().count(), normalised(&said).lines().count(), "{said}");
}

#[test]
fn only_what_differs_from_run_to_run_is_left_out() {
    assert_eq!(normalised("    Time: 2853.251 ms (00:02.853)"), normalised("    Time: 812.4 ms"));
    assert_eq!(normalised("(act 4: 0.3 s)"), normalised("(act 4: 12.0 s)"));
    assert_ne!(normalised("(act 4: 0.3 s)"), normalised("(act 5: 0.3 s)"));
    assert_ne!(normalised("UPDATE 3"), normalised("UPDATE 4"));
    assert_ne!(normalised("       3 | 4"), normalised("       3 | 5"));
    assert_ne!(normalised("this is number 101 (the"), normalised("this is number 102 (the"));
}
