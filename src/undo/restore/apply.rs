//! `undo`: puts back what a change took, under the caller's rights and in the caller's transaction.

use pgrx::{IntoDatum, PgLogLevel, pg_sys};
use rules::error::Error;
use rules::policy::model::Keep;
use rules::words::RelationName;
use rustc_hash::FxHashSet;

use super::as_caller::{Fate, check_deferred, in_subtransaction};
use super::current_state::{Purpose, compare};
use super::plan::Standing;
use super::settle::{Refused, settle};
use super::verify::verify;
use crate::event::record::{Event, Kind};
use crate::event::store;
use crate::pg::ereport::{Failure, tell};
use crate::pg::function::{Arguments, Returns, sql_function, text};
use crate::pg::owner;
use crate::policy::relation::{relation_name, with_descendants};
use crate::session::actor::{Actor, shown_role};
use crate::session::{rehearsing, statement};
use crate::undo::change_record::{self, Change};
use crate::undo::in_progress;

sql_function!(
    /// `undo(change bigint, on_conflict text, dry_run boolean, triggers text) → setof …`: a row for each table.
    writeguard_undo, pg_finfo_writeguard_undo, undo
);

/// What becomes of rows that are not as the change left them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OnConflict {
    /// Nothing is undone.
    Error,
    /// They stay as they are.
    Skip,
}

/// What was done, or would be, with one table.
struct Outcome {
    name: RelationName,
    restored: u64,
    conflicts: u64,
}

fn undo(arguments: &Arguments) -> Returns {
    let id = change_record::number(arguments)?;
    let word: Option<String> = arguments.get(1);
    let on_conflict = match word.as_deref() {
        Some("error") => OnConflict::Error,
        Some("skip") => OnConflict::Skip,
        _ => {
            let hint = format!("SELECT * FROM writeguard.undo({id}, on_conflict => 'skip');");
            return Err(Error::invalid("on_conflict must be error or skip", hint).into());
        }
    };
    let dry_run: bool = arguments.get(2).ok_or_else(|| {
        Error::invalid("dry_run must not be NULL", format!("SELECT * FROM writeguard.undo({id}, dry_run => true);"))
    })?;
    let word: Option<String> = arguments.get(3);
    let fire_triggers = match word.as_deref() {
        Some("off") => false,
        Some("fire") => true,
        // Version 0.2.0 declares no such argument.
        None if arguments.declared() <= 3 => false,
        _ => {
            let hint = format!("SELECT * FROM writeguard.undo({id}, triggers => 'fire');");
            return Err(Error::invalid("triggers must be off or fire", hint).into());
        }
    };
    let outcomes = match dry_run {
        true => taken_back(|| take_back(id, OnConflict::Skip, fire_triggers))?,
        false => {
            let outcomes = take_back(id, on_conflict, fire_triggers)?;
            record(id, &outcomes)?;
            outcomes
        }
    };
    let number = |rows: u64| i64::try_from(rows).unwrap_or(i64::MAX).into_datum();
    arguments.give_rows(
        outcomes
            .into_iter()
            .map(|Outcome { name, restored, conflicts }| [text(&name.to_sql()), number(restored), number(conflicts)]),
    )
}

fn take_back(id: i64, on_conflict: OnConflict, fire_triggers: bool) -> Result<Vec<Outcome>, Failure> {
    let change = Change::find(id, true)?;
    check_not_undone(&change)?;
    let mut tables = standing(&change)?;
    let conflicts = tables.iter().map(|table| table.conflicts).sum();
    if on_conflict == OnConflict::Error && conflicts > 0 {
        let first = tables.iter().find_map(|table| Some((table.shape.name(), table.first.clone()?)));
        return Err(Error::ChangedSince { change: id, rows: conflicts, first }.into());
    }
    let refused = put_back(&change, &mut tables, fire_triggers)?;
    let mut outcomes = Vec::with_capacity(tables.len());
    for (place, table) in tables.into_iter().enumerate() {
        let wrong = verify(&table, |_| ())?;
        let name = table.shape.name();
        if wrong.rows > 0 {
            let refused = refused.iter().find(|refused| refused.table == place);
            let (key, why) = match refused {
                Some(refused) => (Some(refused.key.clone()), Some(refused.why.clone())),
                None => (wrong.first, None),
            };
            if on_conflict == OnConflict::Error {
                return Err(Error::NotWritten { change: id, rows: wrong.rows, relation: name, key, why }.into());
            }
            let (key, why) = (key.unwrap_or_default(), why.unwrap_or_else(|| "It was suppressed or changed.".into()));
            let message = format!("a row of table \"{name}\" is not as it was: {key}");
            tell(PgLogLevel::NOTICE, &message, Some(&why), None)?;
        }
        let written = table.planned.iter().sum::<u64>().saturating_sub(wrong.rows);
        outcomes.push(Outcome { name, restored: table.settled + written, conflicts: table.conflicts + wrong.rows });
        table.end();
    }
    Ok(outcomes)
}

/// What of the change is to be written, table by table.
fn standing(change: &Change) -> Result<Vec<Standing>, Failure> {
    let mut opened = Vec::with_capacity(change.relations.len());
    for kept in &change.relations {
        opened.push(change.open(kept, pg_sys::RowExclusiveLock)?);
    }
    opened.into_iter().map(|table| compare(change.id, table, Purpose::Write)).collect()
}

/// Writes it, as far as constraints allow. Gives the first row of each table that they do not.
fn put_back(change: &Change, tables: &mut [Standing], fire_triggers: bool) -> Result<Vec<Refused>, Failure> {
    let keep = Keep { microseconds: change.keep_microseconds, text: change.keep.clone() };
    in_progress::begin(change.id, keep, tables.iter().flat_map(names).collect(), fire_triggers);
    let refused = settle(tables)?;
    in_progress::end();
    for table in tables {
        // What was written went by the columns' names; triggers and checks may have given them others meanwhile.
        if !table.shape.holds()? {
            return Err(table.shape.changes(change.id).into());
        }
    }
    Ok(refused)
}

/// The numbers of the rows that cannot be written, table by table, though they are as the change left them. Nothing is
/// written in the end. None where whoever asks may not write.
///
/// # Errors
/// As for `undo`.
pub fn unwritable(id: i64) -> Result<Vec<FxHashSet<i64>>, Failure> {
    let found = taken_back(|| {
        let change = Change::find(id, false)?;
        if change.undone_at.is_some() {
            return Ok(Vec::new());
        }
        let mut tables = standing(&change)?;
        put_back(&change, &mut tables, false)?;
        let mut found = Vec::with_capacity(tables.len());
        for table in tables {
            let mut numbers = FxHashSet::default();
            verify(&table, |number| _ = numbers.insert(number))?;
            table.end();
            found.push(numbers);
        }
        Ok(found)
    });
    match found {
        // SAFETY: just caught, and nobody else's.
        Err(Failure::Ready(raised)) if unsafe { (*raised).forbids_to_write() } => Ok(Vec::new()),
        found => found,
    }
}

fn check_not_undone(change: &Change) -> Result<(), Error> {
    let Some(at) = &change.undone_at else { return Ok(()) };
    let by = change.undone_by.as_deref().unwrap_or_default();
    Err(Error::Invalid {
        message: format!("change {} is undone already", change.id),
        detail: Some(format!("Login \"{by}\" undid it at {at}.")),
        hint: match change.undone_with {
            Some(with) => format!("To take that back: SELECT * FROM writeguard.undo({with});"),
            None => "SELECT id, undone_at, undone_by, undoes FROM writeguard.change;".into(),
        },
    })
}

/// The qualified names of a table and its partitions.
fn names(table: &Standing) -> impl Iterator<Item = String> + use<> {
    with_descendants(table.shape.oid()).into_iter().filter_map(relation_name).map(|name| name.to_sql())
}

/// Marks the change as undone; where it was an undo itself, what it took back is in force again, and so on.
const MARK: &str = "WITH RECURSIVE chain (id, undoes, depth) AS ( \
       SELECT id, undoes, 0 FROM writeguard.change_statement WHERE id = $1 \
       UNION ALL \
       SELECT s.id, s.undoes, c.depth + 1 FROM chain AS c \
       JOIN writeguard.change_statement AS s ON s.id = c.undoes) \
     UPDATE writeguard.change_statement AS s \
     SET undone_at = CASE WHEN c.depth % 2 = 0 THEN clock_timestamp() END, \
         undone_by = CASE WHEN c.depth % 2 = 0 THEN $2 END \
     FROM chain AS c WHERE s.id = c.id RETURNING s.id::text";

/// Notes that the change was undone, if any of it was.
fn record(id: i64, outcomes: &[Outcome]) -> Result<(), Error> {
    let restored: u64 = outcomes.iter().map(|outcome| outcome.restored).sum();
    if restored == 0 {
        return Ok(());
    }
    let login = shown_role(Actor::current().login);
    owner::connect(|client| owner::rows(client, MARK, &[id.into(), login.as_str().into()]))?;
    if rehearsing::is_on() {
        return Ok(());
    }
    statement::current();
    let mut event = Event::new(Kind::Undone);
    event.rows = Some(restored);
    let excerpt = statement::excerpt();
    if !excerpt.is_empty() {
        event.tell_statement(&excerpt);
    }
    event.reason = Some(format!("change {id}"));
    if let [only] = outcomes {
        event.relation = Some(only.name.to_sql());
    }
    store::insert(&event)?;
    Ok(())
}

/// Runs `body` and rolls back all that it did in the database. Deferred constraints are checked before.
fn taken_back<T>(body: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    in_subtransaction(Fate::TakenBack, || {
        check_deferred()?;
        body()
    })
}
