//! Which limits apply: a table of cases, and what has to hold for any policies, against a second implementation that
//! does what the contract says word by word.

use proptest::prelude::*;
use rules::policy::limit::Limit;
use rules::policy::model::{Document, Policy};
use rules::policy::resolve::{self, Actor, Index, Target};
use rules::words::{Mode, Operation, RelationName};
use serde_json::{Value, json};

/// A policy as a line has it: name, tables, roles, and what it says.
fn policy(line: &str) -> Policy {
    let mut words = line.split_whitespace();
    let mut next = || words.next().unwrap_or_else(|| panic!("\"{line}\" has no name, tables or roles"));
    let list = |text: &str| Value::from(text.split(',').collect::<Vec<_>>());
    let mut document = json!({"name": next(), "tables": list(next()), "roles": list(next())});
    for word in words {
        let (key, value) = word.split_once('=').unwrap_or((word, "true"));
        document[key] = match key {
            "operations" | "columns" => list(value),
            "mode" | "application" => value.into(),
            _ => serde_json::from_str(value).unwrap_or_else(|error| panic!("{word}: {error}")),
        };
    }
    let document: Document = serde_json::from_value(document).unwrap_or_else(|error| panic!("{line}: {error}"));
    let document = Document { rate_microseconds: Some(3_600_000_000), ..document };
    document.check().unwrap_or_else(|error| panic!("{line}: {error}"))
}

/// The world of the cases: one table has a parent, one role is in a group.
fn target(table: &str) -> Target {
    let name = |text: &str| {
        let (schema, name) = text.split_once('.').unwrap_or_else(|| panic!("{text} has no schema"));
        RelationName::new(schema, name)
    };
    let ancestors = if table == "public.orders_2026" { vec![(name("public.orders"), 1)] } else { Vec::new() };
    Target { name: name(table), ancestors }
}

fn actor(role: &str) -> Actor {
    let one = |name: &str| core::iter::once(name.to_owned()).collect();
    Actor { itself: one(role), member_of: if role == "app" { one("team") } else { Default::default() } }
}

/// One limit of one policy that covers the write.
#[derive(Debug, Clone, PartialEq, PartialOrd)]
struct Answer {
    limit: Limit,
    /// Whether another policy's limit decides.
    set_aside_by: Option<String>,
    /// The smaller the stricter.
    strictness: f64,
    policy: String,
}

fn strictness(policy: &Policy, limit: Limit) -> f64 {
    let number = |rows: Option<u64>| rows.map_or(f64::INFINITY, |rows| rows as f64);
    let wanted = |wanted: Option<bool>| if wanted == Some(true) { 0.0 } else { 1.0 };
    match limit {
        Limit::Rows => number(policy.max_rows),
        Limit::RowsPerTransaction => number(policy.max_rows_per_transaction),
        Limit::Rate => number(policy.rate.map(|rate| rate.rows)),
        Limit::Fraction => policy.max_fraction.unwrap_or(f64::INFINITY),
        Limit::Where => wanted(policy.require_where),
        Limit::Transaction => wanted(policy.require_transaction),
    }
}

/// What the crate says.
fn answers(policies: &[Policy], operation: Operation, table: &str, role: &str) -> Vec<Answer> {
    let target = target(table);
    let fitting = resolve::fitting(policies, &Index::new(policies).naming(&target), &target, &actor(role));
    let candidates = resolve::candidates(policies, &fitting, operation);
    let mut answers = Vec::new();
    for candidate in &candidates {
        let policy = &policies[candidate.policy];
        for limit in policy.states().iter() {
            let set_aside_by = candidate.set_aside_by(limit).map(|by| policies[by].name.clone());
            assert_eq!(set_aside_by.is_none(), candidate.applying.contains(limit));
            answers.push(Answer {
                limit,
                set_aside_by,
                strictness: strictness(policy, limit),
                policy: policy.name.clone(),
            });
        }
    }
    answers.sort_by(|one, other| one.partial_cmp(other).expect("no limit is NaN"));
    answers
}

/// As the table of cases has it.
fn shown(answers: &[Answer]) -> Vec<String> {
    let mut lines = Vec::new();
    for limit in Limit::ALL {
        let of = |applies: bool| {
            let those = answers.iter().filter(move |one| one.limit == limit && one.set_aside_by.is_none() == applies);
            let mut those: Vec<&Answer> = those.collect();
            those.sort_by(|one, other| one.strictness.total_cmp(&other.strictness));
            let said = those.into_iter().map(|one| {
                let value = match limit {
                    Limit::Where | Limit::Transaction => (one.strictness == 0.0).to_string(),
                    _ => one.strictness.to_string(),
                };
                let by = one.set_aside_by.as_ref().map(|by| format!(" ({by})")).unwrap_or_default();
                format!("{value} of {}{by}", one.policy)
            });
            said.collect::<Vec<_>>().join(", ")
        };
        let (applying, not) = (of(true), of(false));
        match (applying.is_empty(), not.is_empty()) {
            (true, true) => {}
            (false, true) => lines.push(format!("{limit}: {applying}")),
            (true, false) => lines.push(format!("{limit}: not {not}")),
            (false, false) => lines.push(format!("{limit}: {applying}; not {not}")),
        }
    }
    if lines.is_empty() {
        lines.push("nothing".into());
    }
    lines
}

#[test]
fn the_table_of_cases() {
    let text = include_str!("which_policies_apply.cases");
    let mut cases = text.split("\n== ");
    cases.next();
    let (mut asked, mut wrong) = (0, Vec::new());
    for case in cases {
        let (title, case) = case.split_once('\n').expect("a title");
        let mut parts = case.split("\n? ");
        let policies: Vec<Policy> =
            parts.next().into_iter().flat_map(str::lines).filter(|line| !line.is_empty()).map(policy).collect();
        for question in parts {
            let mut lines = question.lines().map(str::trim).filter(|line| !line.is_empty());
            let words: Vec<&str> = lines.next().expect("a question").split_whitespace().collect();
            let [operation, table, role] = words[..] else { panic!("{title}: {words:?}") };
            let operation = Operation::parse(operation).expect("an operation");
            let expected: Vec<&str> = lines.collect();
            let found = shown(&answers(&policies, operation, table, role));
            if found != expected {
                wrong.push(format!("{title}, {operation} {table} {role}: expected {expected:#?}, found {found:#?}"));
            }
            asked += 1;
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(asked > 35, "only {asked} questions were read");
}

/// The contract once more, each sentence by itself and with no thought of speed.
mod by_the_letter {
    use super::*;

    /// Own name 1,000; ancestor's name less by its distance; then patterns.
    fn table_rank(policy: &Policy, target: &Target) -> Option<i32> {
        let matches = |pattern: &str, name: &RelationName| {
            let (schema, table) = pattern.split_once('.').expect("a schema");
            let is = |pattern: &str, text: &str| match pattern.strip_suffix('*') {
                Some(beginning) => text.starts_with(beginning),
                None => pattern == text,
            };
            is(schema, &name.schema) && is(table, &name.name)
        };
        let patterns = policy.tables.iter().map(ToString::to_string);
        let ranks = patterns.filter_map(|pattern| {
            let own = matches(&pattern, &target.name);
            let ancestors = target.ancestors.iter().filter(|(name, _)| matches(&pattern, name));
            let nearest = ancestors.map(|(_, distance)| i32::try_from(*distance).expect("a distance")).min();
            match (pattern.contains('*'), own, nearest) {
                (false, true, _) => Some(1_000),
                (false, false, Some(distance)) => Some(1_000 - distance),
                (true, false, None) | (false, false, None) => None,
                (true, ..) => Some(if pattern.starts_with('*') { 1 } else { 2 }),
            }
        });
        ranks.max()
    }

    fn role_rank(policy: &Policy, actor: &Actor) -> Option<i32> {
        let rank = |role: &String| match role {
            role if actor.itself.contains(role) => Some(3),
            role if actor.member_of.contains(role) => Some(2),
            role => (role == "public").then_some(1),
        };
        policy.roles.iter().filter_map(rank).max()
    }

    /// How closely a policy names table and role; none where it does not cover the write.
    fn ranks(policy: &Policy, operation: Operation, target: &Target, actor: &Actor) -> Option<(i32, i32)> {
        if policy.operations & operation.bit() == 0 {
            return None;
        }
        Some((table_rank(policy, target)?, role_rank(policy, actor)?))
    }

    /// Whether `by` sets aside the limit that `policy` states.
    pub fn sets_aside(by: &Policy, policy: &Policy, limit: Limit, write: &Write) -> bool {
        let (target, actor) = (target(write.table), actor(write.role));
        let (Some(mine), Some(its)) =
            (ranks(by, write.operation, &target, &actor), ranks(policy, write.operation, &target, &actor))
        else {
            return false;
        };
        let states_the_same = by.mode == Mode::Exempt || by.states().contains(limit);
        let more_specific = (mine.0 > its.0 && mine.1 >= its.1) || (mine.1 > its.1 && mine.0 >= its.0);
        let same_columns = match (&by.columns, &policy.columns) {
            (None, _) => true,
            (Some(mine), Some(its)) => its.iter().all(|column| mine.contains(column)),
            (Some(_), None) => false,
        };
        let only_looks = |policy: &Policy| matches!(policy.mode, Mode::Observe | Mode::Warn);
        let may = !only_looks(by) || only_looks(policy);
        states_the_same && more_specific && same_columns && may && by.application.is_none() && !policy.always
    }

    /// The limits that apply to a write, each with its policy.
    pub fn applying<'a>(policies: &'a [Policy], write: &Write) -> Vec<(Limit, &'a Policy)> {
        let (target, actor) = (target(write.table), actor(write.role));
        let covering = policies.iter().filter(|policy| ranks(policy, write.operation, &target, &actor).is_some());
        let stated = covering.flat_map(|policy| policy.states().iter().map(move |limit| (limit, policy)));
        stated.filter(|(limit, policy)| !policies.iter().any(|by| sets_aside(by, policy, *limit, write))).collect()
    }

    /// The limits at which a write is refused.
    pub fn refusing<'a>(policies: &'a [Policy], write: &Write) -> Vec<(Limit, &'a Policy)> {
        let passes = |limit: Limit, policy: &Policy| match limit {
            Limit::Rows => write.rows > policy.max_rows.expect("stated"),
            Limit::RowsPerTransaction => write.rows > policy.max_rows_per_transaction.expect("stated"),
            Limit::Rate => write.rows > policy.rate.expect("stated").rows,
            Limit::Fraction => write.rows as f64 > (100.0 * policy.max_fraction.expect("stated")).max(10.0),
            Limit::Where => policy.require_where == Some(true) && !write.has_where,
            Limit::Transaction => policy.require_transaction == Some(true) && !write.in_block && write.rows > 1,
        };
        let counts = |policy: &Policy| {
            let assigned = |column: &String| write.columns.contains(&column.as_str());
            policy.columns.as_ref().is_none_or(|columns| columns.iter().any(assigned))
        };
        let applying = applying(policies, write).into_iter();
        applying
            .filter(|(limit, policy)| policy.mode == Mode::Enforce && counts(policy) && passes(*limit, policy))
            .collect()
    }
}

/// A write to a table of 100 rows.
#[derive(Debug, Clone)]
struct Write {
    operation: Operation,
    table: &'static str,
    role: &'static str,
    columns: Vec<&'static str>,
    rows: u64,
    has_where: bool,
    in_block: bool,
}

const TABLES: [&str; 4] = ["public.orders_2026", "public.orders", "public.customers", "sales.orders"];
const ROLES: [&str; 3] = ["app", "team", "dba"];
const COLUMNS: [&str; 2] = ["a", "b"];

prop_compose! {
    fn writes()(
        operation in 0usize..4, table in 0usize..4, role in 0usize..3, columns in 0usize..4, rows in 0u64..8,
        has_where in any::<bool>(), in_block in any::<bool>(),
    ) -> Write {
        let operation = Operation::ALL[operation];
        let is_update = operation == Operation::Update;
        let columns = (0..2).filter(|bit| is_update && columns & (1 << bit) != 0).map(|bit| COLUMNS[bit]).collect();
        Write { operation, table: TABLES[table], role: ROLES[role], columns, rows, has_where, in_block }
    }
}

fn any_mode() -> impl Strategy<Value = &'static str> {
    prop_oneof![6 => Just("enforce"), 1 => Just("observe"), 1 => Just("warn"), 1 => Just("exempt")]
}

prop_compose! {
    fn policies(modes: impl Strategy<Value = &'static str>)(
        tables in proptest::collection::vec(0usize..9, 1..3),
        roles in proptest::collection::vec(0usize..4, 1..3),
        limits in 1u32..64,
        values in proptest::collection::vec(0u64..6, 6),
        mode in modes,
        always in proptest::bool::weighted(0.1),
        application in proptest::bool::weighted(0.1),
        operations in 1usize..16,
        columns in prop_oneof![4 => Just(0usize), 1 => 1usize..4],
    ) -> Policy {
        let tables: Vec<&str> = tables
            .into_iter()
            .map(|table| {
                ["*.*", "*.orders", "public.*", "public.orders*", "sales.*", TABLES[0], TABLES[1], TABLES[2], TABLES[3]][table]
            })
            .collect();
        let roles: Vec<&str> = roles.into_iter().map(|role| ["public", "team", "app", "dba"][role]).collect();
        let mut line = format!("p {} {} mode={mode}", tables.join(","), roles.join(","));
        let keys = ["max_rows", "max_rows_per_transaction", "rate_rows", "max_fraction", "require_where", "require_transaction"];
        for (place, key) in keys.into_iter().enumerate() {
            if mode != "exempt" && limits & (1 << place) != 0 {
                let value = values[place];
                line += &match key {
                    "max_fraction" => format!(" {key}=0.0{value}"),
                    "require_where" | "require_transaction" => format!(" {key}={}", value > 1),
                    _ => format!(" {key}={value}"),
                };
            }
        }
        if columns > 0 {
            let columns = (0..2).filter(|bit| columns & (1 << bit) != 0).map(|bit| COLUMNS[bit]);
            line += &format!(" operations=update columns={}", columns.collect::<Vec<_>>().join(","));
        } else {
            let words = Operation::ALL.into_iter().enumerate().filter(|(place, _)| operations & (1 << place) != 0);
            line += &format!(" operations={}", words.map(|(_, one)| one.word()).collect::<Vec<_>>().join(","));
        }
        if mode != "exempt" {
            line += if always { " always" } else { "" };
            line += if application { " application=psql" } else { "" };
        }
        policy(&line)
    }
}

fn named(policies: Vec<Policy>) -> Vec<Policy> {
    policies.into_iter().enumerate().map(|(place, policy)| Policy { name: format!("p{place}"), ..policy }).collect()
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 4 } else { 2_000 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Both implementations say the same of every limit, and who sets it aside is one that does.
    #[test]
    fn both_implementations_agree(policies in proptest::collection::vec(policies(any_mode()), 0..7), write in writes()) {
        let policies = named(policies);
        let found = answers(&policies, write.operation, write.table, write.role);
        let mut applying: Vec<(Limit, &str)> =
            found.iter().filter(|one| one.set_aside_by.is_none()).map(|one| (one.limit, one.policy.as_str())).collect();
        let mut expected: Vec<(Limit, &str)> = by_the_letter::applying(&policies, &write)
            .into_iter()
            .map(|(limit, policy)| (limit, policy.name.as_str()))
            .collect();
        applying.sort_unstable();
        expected.sort_unstable();
        prop_assert_eq!(applying, expected);
        for one in &found {
            let of = |name: &str| policies.iter().find(|policy| policy.name == name).expect("its policy");
            if let Some(by) = &one.set_aside_by {
                prop_assert!(by_the_letter::sets_aside(of(by), of(&one.policy), one.limit, &write));
            }
        }
    }

    /// A policy of mode enforce that is added lets no write pass that was refused, unless it states that very limit for
    /// something more specific.
    #[test]
    fn what_is_added_weakens_nothing_by_accident(
        policies in proptest::collection::vec(policies(any_mode()), 1..6),
        added in policies(Just("enforce")),
        write in writes(),
    ) {
        let before = named(policies);
        let added = Policy { name: "added".into(), ..added };
        let after: Vec<Policy> = before.iter().cloned().chain([added.clone()]).collect();
        // What the crate lets stand of what refused before.
        let found = answers(&after, write.operation, write.table, write.role);
        for (limit, policy) in by_the_letter::refusing(&before, &write) {
            let stands = found
                .iter()
                .any(|one| one.limit == limit && one.policy == policy.name && one.set_aside_by.is_none());
            let is_said = added.states().contains(limit)
                && by_the_letter::sets_aside(&added, policy, limit, &write);
            prop_assert!(stands || is_said, "{limit} of {} is gone by {added:?}", policy.name);
        }
    }

    /// What holds always holds whatever is added.
    #[test]
    fn what_holds_always_is_never_set_aside(policies in proptest::collection::vec(policies(any_mode()), 0..7), write in writes()) {
        let policies = named(policies);
        for one in answers(&policies, write.operation, write.table, write.role) {
            let policy = policies.iter().find(|policy| policy.name == one.policy).expect("its policy");
            prop_assert!(!policy.always || one.set_aside_by.is_none());
        }
    }

    /// Where nothing exempts, every limit that a policy states for a write has one that applies.
    #[test]
    fn where_nothing_exempts_some_policy_decides(policies in proptest::collection::vec(policies(any_mode()), 1..7), write in writes()) {
        let policies: Vec<Policy> =
            named(policies).into_iter().filter(|policy| policy.mode != Mode::Exempt).collect();
        let found = answers(&policies, write.operation, write.table, write.role);
        for one in &found {
            prop_assert!(found.iter().any(|other| other.limit == one.limit && other.set_aside_by.is_none()));
        }
    }
}
