//! What a change of policies means for others, told to whoever makes it: which limits set which aside since, which no
//! longer do, and which policies limit nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use pgrx::{PgLogLevel, pg_sys};
use rules::policy::limit::Limit;
use rules::policy::pattern::Pattern;
use rules::policy::resolve::{self, Actor, Target};
use rules::words::{Mode, Operation, RelationName, literal};

use super::relation::{coverable_tables, relation_of, role_oid};
use super::table::{self, Place, Policies};
use super::{catalog, target};
use crate::pg::ereport::{Failure, tell};

/// Lines of one kind that are told one by one.
const MOST_TOLD: usize = 10;

/// What is looked at for one change, counted in policies that may cover a table and in roles: a document of ten thousand
/// policies is stored in seconds, and stays so.
const MOST_LOOKED_AT: usize = 50_000;

/// The policies before a change.
pub struct Before(Option<Rc<Policies>>);

impl Before {
    /// As they are in the table now.
    ///
    /// # Errors
    /// What waiting for the policy table's lock may raise.
    pub fn now() -> Result<Self, Failure> {
        let Place::Table(oid) = table::find() else { return Ok(Self(None)) };
        Ok(Self(Policies::read(oid, None)?.filter(|policies| policies.unreadable.is_none())))
    }

    /// Tells what is another now, by the change of policies of these names, which the table has by now.
    ///
    /// # Errors
    /// Where the table cannot be read, or the client does not listen.
    pub fn tell_change_of(self, changed: &[&str]) -> Result<(), Failure> {
        let (Some(before), Self(Some(after))) = (self.0, Self::now()?) else { return Ok(()) };
        let changed: BTreeSet<&str> = changed.iter().copied().collect();
        tell_what_limits_nothing(&after, &changed)?;
        let concerned = Concerned::by(&before, &after, &changed);
        let (old, new) = (concerned.set_asides(&before, &changed), concerned.set_asides(&after, &changed));
        tell_lines(concerned.more_in(&new, &old).map(|(key, place)| key.sentence(&place, "sets aside")))?;
        // What is not stated any more, or by nobody, cannot be set aside.
        let is_stated = |key: &Key| {
            let mut those = after.loaded.iter().map(|loaded| &loaded.policy);
            those.any(|policy| policy.name == key.aside && policy.states().contains(key.limit))
        };
        let lost = concerned.more_in(&old, &new).filter(|(key, _)| is_stated(key));
        tell_lines(lost.map(|(key, place)| key.sentence(&place, "no longer sets aside")))?;
        if let Some(first) = concerned.left_out.first() {
            let message = format!("{} more tables were not looked at for what this changes", concerned.left_out.len());
            let hint = format!("SELECT * FROM writeguard.effective({});", literal(&first.to_sql()));
            tell(PgLogLevel::NOTICE, &message, None, Some(&hint))?;
        }
        Ok(())
    }
}

/// A limit of a policy that another one sets aside: by their names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    by: String,
    aside: String,
    limit: Limit,
}

/// By limit that is set aside: the places of the tables where it is, and the first role for which.
type SetAsides<'a> = BTreeMap<Key, (BTreeSet<usize>, &'a str)>;

/// Where a limit is set aside.
struct Where<'a> {
    table: &'a RelationName,
    others: usize,
    role: &'a str,
}

impl Key {
    /// As a message and its hint.
    fn sentence(&self, place: &Where<'_>, verb: &str) -> (String, String) {
        let Self { by, aside, limit } = self;
        let Where { table, others, role } = place;
        let others = if *others == 0 { String::new() } else { format!(" and {others} more") };
        let (whom, argument) = match *role {
            "public" => (String::new(), String::new()),
            role => (format!(" for role \"{role}\""), format!(", {}", literal(role))),
        };
        (
            format!(
                "policy \"{by}\" {verb} {} of policy \"{aside}\" on table \"{table}\"{others}{whom}",
                limit.column()
            ),
            format!("SELECT * FROM writeguard.effective({}{argument});", literal(&table.to_sql())),
        )
    }
}

fn tell_lines(lines: impl Iterator<Item = (String, String)>) -> Result<(), Failure> {
    let mut more = 0;
    for (place, (message, hint)) in lines.enumerate() {
        if place < MOST_TOLD {
            tell(PgLogLevel::NOTICE, &message, None, Some(&hint))?;
        } else {
            more += 1;
        }
    }
    if more > 0 {
        tell(PgLogLevel::NOTICE, &format!("{more} more such limits"), None, None)?;
    }
    Ok(())
}

/// Policies that state no limit, and patterns that no table matches.
fn tell_what_limits_nothing(policies: &Policies, changed: &BTreeSet<&str>) -> Result<(), Failure> {
    let those = || {
        let all = policies.loaded.iter().map(|loaded| &loaded.policy);
        all.filter(|policy| changed.contains(policy.name.as_str()))
    };
    let empty = those().filter(|policy| policy.states().is_empty() && policy.mode != Mode::Exempt);
    tell_lines(empty.map(|policy| {
        let example = literal(r#"{"max_rows": 100}"#);
        let name = &policy.name;
        (
            format!("policy \"{name}\" limits nothing: it states no limit"),
            format!("SELECT writeguard.alter_policy({}, {example});", literal(name)),
        )
    }))?;
    if those().flat_map(|policy| &policy.tables).all(|pattern| pattern.exact().is_some()) {
        return Ok(());
    }
    let tables = coverable_tables();
    let mut known: HashMap<&Pattern, bool> = HashMap::new();
    let mut unmatched = Vec::new();
    for policy in those() {
        for pattern in policy.tables.iter().filter(|pattern| pattern.exact().is_none()) {
            pgrx::check_for_interrupts!();
            let is_matched =
                *known.entry(pattern).or_insert_with(|| tables.iter().any(|table| pattern.fit(table, &[]).is_some()));
            if !is_matched {
                unmatched.push((
                    format!("no table matches {pattern} of policy \"{}\" now", policy.name),
                    "SELECT schemaname, tablename FROM pg_catalog.pg_tables ORDER BY 1, 2;".to_owned(),
                ));
            }
        }
    }
    tell_lines(unmatched.into_iter())
}

/// The tables that policies cover which were changed, and the roles that matter there.
struct Concerned {
    tables: Vec<(Target, Vec<String>)>,
    actors: HashMap<String, Rc<Actor>>,
    /// Tables for which there was no time.
    left_out: Vec<RelationName>,
}

impl Concerned {
    fn by(before: &Policies, after: &Policies, changed: &BTreeSet<&str>) -> Self {
        let mut found = Self { tables: Vec::new(), actors: HashMap::new(), left_out: Vec::new() };
        let all = || before.loaded.iter().chain(&after.loaded).map(|loaded| &loaded.policy);
        // One policy alone sets nothing aside.
        if before.loaded.len().max(after.loaded.len()) < 2 {
            return found;
        }
        let patterns: Vec<&Pattern> =
            all().filter(|policy| changed.contains(policy.name.as_str())).flat_map(|policy| &policy.tables).collect();
        let mut names: BTreeSet<RelationName> = patterns.iter().filter_map(|pattern| pattern.exact()).collect();
        let wide: Vec<&&Pattern> = patterns.iter().filter(|pattern| pattern.exact().is_none()).collect();
        let mut left = MOST_LOOKED_AT;
        if !wide.is_empty() {
            for table in coverable_tables() {
                left = left.saturating_sub(1);
                if left > 0 && wide.iter().any(|pattern| pattern.fit(&table, &[]).is_some()) {
                    names.insert(table);
                }
            }
        }
        for name in names {
            pgrx::check_for_interrupts!();
            if left == 0 {
                found.left_out.push(name);
                continue;
            }
            let Some(target) = relation_of(&name).and_then(target::find) else { continue };
            let places = [(before, before.naming(&target)), (after, after.naming(&target))];
            let roles = places.iter().flat_map(|(policies, places)| {
                places.iter().flat_map(|place| policies.loaded[*place].policy.roles.iter())
            });
            let roles: BTreeSet<&String> = roles.collect();
            let looked_at = places.iter().map(|(_, places)| places.len()).sum::<usize>();
            left = left.saturating_sub(looked_at.saturating_mul(roles.len()));
            if left == 0 {
                found.left_out.push(name);
                continue;
            }
            for role in &roles {
                if !found.actors.contains_key(*role) {
                    left = left.saturating_sub(before.roles.len() + after.roles.len());
                    let oids: Vec<pg_sys::Oid> = role_oid(role).into_iter().collect();
                    let mut actor = catalog::memberships(&oids, before);
                    actor.member_of.extend(catalog::memberships(&oids, after).member_of);
                    found.actors.insert((*role).clone(), Rc::new(actor));
                }
            }
            found.tables.push((target, roles.into_iter().cloned().collect()));
        }
        found
    }

    /// Which limits are set aside, and by whom, where one of these policies has to do with it. For everybody where that is
    /// so, else for the first role.
    fn set_asides(&self, policies: &Policies, changed: &BTreeSet<&str>) -> SetAsides<'_> {
        let mut found = SetAsides::new();
        let name = |place: usize| &policies.loaded[place].policy.name;
        for (place, (target, roles)) in self.tables.iter().enumerate() {
            let places = policies.naming(target);
            // Everybody first.
            let (public, others): (Vec<&String>, Vec<&String>) = roles.iter().partition(|role| *role == "public");
            for role in public.into_iter().chain(others) {
                pgrx::check_for_interrupts!();
                let Some(actor) = self.actors.get(role) else { continue };
                let fitting = resolve::fitting(&policies.loaded, &places, target, actor);
                for operation in Operation::ALL {
                    for candidate in resolve::candidates(&policies.loaded, &fitting, operation) {
                        for (limit, by) in candidate.set_aside() {
                            let (by, aside) = (name(by), name(candidate.policy));
                            if changed.contains(by.as_str()) || changed.contains(aside.as_str()) {
                                let key = Key { by: by.clone(), aside: aside.clone(), limit };
                                found.entry(key).or_insert_with(|| (BTreeSet::new(), role)).0.insert(place);
                            }
                        }
                    }
                }
            }
        }
        found
    }

    /// What is set aside in one of them and not in the other.
    fn more_in<'a>(
        &'a self,
        one: &'a SetAsides<'a>,
        other: &'a SetAsides<'a>,
    ) -> impl Iterator<Item = (&'a Key, Where<'a>)> {
        one.iter().filter_map(|(key, (tables, role))| {
            let known = other.get(key).map(|(tables, _)| tables);
            let mut more = tables.iter().filter(|table| known.is_none_or(|known| !known.contains(table)));
            let (table, _) = self.tables.get(*more.next()?)?;
            Some((key, Where { table: &table.name, others: more.count(), role }))
        })
    }
}
