//! What a DBA calls: set, drop and explain policies.

use pgrx::{PgLogLevel, direct_function_call, pg_sys};
use rules::error::Error;
use rules::policy::bounds;
use rules::policy::document::Given;
use rules::policy::model::{Document, Policy};
use rules::policy::pattern::{Element, Pattern, parse_element};
use rules::policy::schedule::Schedule;
use rules::words::{Operation, RelationName, literal, shortened};

use super::catalog::{self, Explained, WhyNot};
use super::change::{self, Outcome};
use super::consequences::Before;
use super::interval::Span;
use super::key::never_undone;
use super::relation::{
    column_names, has_column, nearest, nearest_role, never_covered, relation_name, relation_of, role_oid,
};
use super::{conditions, schema_compat};
use crate::event::record::{Event, Kind};
use crate::event::store;
use crate::pg::ereport::{Failure, tell};
use crate::pg::function::{Arguments, Returns, json, sql_function, value};
use crate::pg::{encoding, owner};
use crate::session::actor::Actor;

sql_function!(
    /// `set_policy(name text, …) → text`: creates or replaces a policy; gives created, changed or unchanged.
    writeguard_set_policy, pg_finfo_writeguard_set_policy, set_policy
);
sql_function!(
    /// `drop_policy(name text)`.
    writeguard_drop_policy, pg_finfo_writeguard_drop_policy, drop_policy
);
sql_function!(
    /// `_effective(relation oid, role text, operation text) → json`: the rows of `effective`.
    writeguard_effective, pg_finfo_writeguard_effective, effective
);
sql_function!(
    /// `explain(relation oid, role text, operation text) → json`: the rows of `effective` as they were until 0.2.0.
    writeguard_explain, pg_finfo_writeguard_explain, explain
);
sql_function!(
    /// `in_schedule(schedule text, at timestamptz) → boolean`: whether a window is open at that time.
    writeguard_in_schedule, pg_finfo_writeguard_in_schedule, in_schedule
);
sql_function!(
    /// Trigger on the policy table: with the commit all sessions drop the policies that they keep.
    writeguard_policy_changed, pg_finfo_writeguard_policy_changed, policy_changed
);
sql_function!(
    /// Trigger on the extension's tables: 42501 for a write by anybody who does not own the table.
    writeguard_owner_only, pg_finfo_writeguard_owner_only, owner_only
);

/// The arguments in the order of `sql/policy.sql`, which is that of the table's columns.
fn set_policy(arguments: &Arguments) -> Returns {
    let texts = |index| arguments.get::<Vec<Option<String>>>(index).unwrap_or_default();
    // SAFETY: these arguments are declared as intervals.
    let span =
        |index| unsafe { Span::of(arguments.get(index).unwrap_or(pg_sys::Datum::null()), arguments.is_null(index)) };
    let (rate_interval, undo) = (span(10), span(18));
    // Where the SQL is of an older version, false is its default.
    let is_older = arguments.declared() <= 21;
    let required = |index| arguments.get::<bool>(index).filter(|required| *required || !is_older);
    store_policy(Document {
        name: arguments.get(0),
        tables: texts(1),
        roles: texts(2),
        application: arguments.get(3),
        client: arguments.get::<pg_sys::Datum>(4).and_then(printed_network),
        schedule: arguments.get(5),
        operations: texts(6),
        max_rows: arguments.get(7),
        max_rows_per_transaction: arguments.get(8),
        rate_rows: arguments.get(9),
        rate_microseconds: rate_interval.as_ref().map(|span| span.microseconds),
        rate_interval: rate_interval.map(|span| span.text),
        max_fraction: arguments.get(11),
        require_where: required(12),
        require_transaction: required(13),
        mode: arguments.get(14),
        override_: arguments.get(15),
        approvers: arguments.get(16),
        min_approvals: arguments.get(17),
        undo_microseconds: undo.as_ref().map(|span| span.microseconds),
        undo: undo.map(|span| span.text),
        comment: arguments.get(19),
        samples: arguments.get(20).unwrap_or(true),
        always: arguments.get(21).unwrap_or_default(),
        columns: arguments.get(22),
        same_rows: arguments.get(23).unwrap_or(true),
    })
}

/// A network as PostgreSQL prints it.
fn printed_network(network: pg_sys::Datum) -> Option<String> {
    // SAFETY: the argument is declared as cidr.
    unsafe { direct_function_call::<&core::ffi::CStr>(pg_sys::cidr_out, &[Some(network)]) }
        .map(|text| encoding::from_server(text.to_bytes()))
}

/// Checks a policy, and puts its names and times into the form in which they are stored.
///
/// # Errors
/// WG007 for a mistake, and for what the version of the extension in this database has no place for.
pub fn settle(document: &mut Document) -> Result<Policy, Error> {
    bounds::check(document)?;
    if document.rate_microseconds.is_none() {
        let rate_interval = document.rate_interval.as_deref().and_then(Span::read);
        document.rate_microseconds = rate_interval.map(|span| span.microseconds);
    }
    if document.undo_microseconds.is_none() {
        document.undo_microseconds = document.undo.as_deref().and_then(Span::read).map(|span| span.microseconds);
    }
    for element in document.tables.iter_mut().flatten() {
        if let Element::Unqualified(name) = parse_element(element)? {
            *element = qualify(element, &name)?;
        }
    }
    let policy = document.check()?;
    schema_compat::check(&policy)?;
    check_names(&policy)?;
    policy.schedule.as_ref().map_or(Ok(()), conditions::check_zones)?;
    document.schedule = policy.schedule.as_ref().map(Schedule::to_string);
    document.tables = policy.tables.iter().map(|pattern| Some(pattern.to_string())).collect();
    document.columns = policy.columns.as_ref().map(|columns| columns.iter().cloned().map(Some).collect());
    schema_compat::fill(document);
    Ok(policy)
}

fn store_policy(mut document: Document) -> Returns {
    let policy = settle(&mut document)?;
    let json = serde_json::to_string(&document).map_err(|error| {
        Error::invalid(format!("malformed policy: {error}"), "SELECT writeguard.set_policy('orders-guard', …);")
    })?;
    change::lock_one(&policy.name)?;
    let before = Before::now()?;
    let outcome = change::store_one(policy.name, json)?;
    tell_what_was_reset(&outcome)?;
    before.tell_change_of(&[&outcome.name])?;
    value(outcome.action)
}

/// Whoever meant to change one column should know what became of the others.
fn tell_what_was_reset(outcome: &Outcome) -> Result<(), Failure> {
    let reset = outcome.reset();
    if reset.is_empty() {
        return Ok(());
    }
    let columns: Vec<String> = reset.iter().map(|(column, was)| format!("{column} (was {was})")).collect();
    let message = format!("policy \"{}\" was replaced: back to the default went {}", outcome.name, columns.join(", "));
    let again: Given = reset.iter().map(|(column, was)| ((*column).to_owned(), (*was).clone())).collect();
    let again = serde_json::Value::from(again).to_string();
    let hint =
        format!("To have that again: SELECT writeguard.alter_policy({}, {});", literal(&outcome.name), literal(&again));
    tell(PgLogLevel::NOTICE, &message, None, Some(&hint))?;
    Ok(())
}

fn record(policy: &str, reason: String) -> Result<(), Error> {
    let mut event = Event::new(Kind::PolicyChanged);
    event.policy = Some(policy.to_owned());
    event.reason = Some(reason);
    store::insert(&event)?;
    Ok(())
}

/// The qualified form of a name that stands without a schema, found through the search_path.
fn qualify(written: &str, name: &str) -> Result<String, Error> {
    let unknown = || {
        Error::invalid(
            format!("table \"{written}\" does not exist in the search_path"),
            format!("tables => '{{public.{written}}}' (the schema it is in)"),
        )
    };
    let c_name = encoding::name_to_c(name).ok_or_else(unknown)?;
    // SAFETY: a look-up through the search_path; InvalidOid when there is none.
    let relation = unsafe { pg_sys::RelnameGetRelid(c_name.as_ptr()) };
    let found = (relation != pg_sys::InvalidOid).then(|| relation_name(relation)).flatten();
    Ok(found.ok_or_else(unknown)?.to_sql())
}

/// Roles and exactly named tables must be there.
fn check_names(policy: &Policy) -> Result<(), Error> {
    for role in policy.roles.iter().filter(|role| *role != "public") {
        check_role(role, "roles", "public means everybody")?;
    }
    if let Some(approvers) = &policy.approvers {
        check_role(approvers, "approvers", "NULL means whoever may call approve")?;
    }
    for name in policy.tables.iter().filter_map(Pattern::exact) {
        let unknown = || {
            Error::invalid(
                format!("table \"{name}\" does not exist"),
                format!(
                    "SELECT schemaname, tablename FROM pg_catalog.pg_tables WHERE tablename = {};",
                    literal(&name.name)
                ),
            )
        };
        let relation = relation_of(&name).ok_or_else(unknown)?;
        if let Some(reason) = never_covered(relation) {
            return Err(Error::invalid(
                format!("\"{name}\" {reason}, and no policy covers that"),
                "tables => '{public.orders}' (a table, a partitioned table or a foreign table; of a view, the tables behind it)",
            ));
        }
        check_columns(policy, &name, relation)?;
        if policy.undo.is_some()
            && let Some(reason) = never_undone(relation)
        {
            return Err(Error::Invalid {
                message: format!("rows of \"{name}\" cannot be put back: it {reason}"),
                detail: Some(format!("Policy \"{}\" asks for undo.", policy.name)),
                hint: format!("ALTER TABLE {} ADD PRIMARY KEY (…); (or leave undo out)", name.to_sql()),
            });
        }
    }
    Ok(())
}

/// A table that is named has at least one of the columns that the policy is about.
fn check_columns(policy: &Policy, name: &RelationName, relation: pg_sys::Oid) -> Result<(), Error> {
    let Some(columns) = &policy.columns else { return Ok(()) };
    if columns.iter().any(|column| has_column(relation, column)) {
        return Ok(());
    }
    let all = column_names(relation);
    let nearest = columns.iter().find_map(|column| nearest(column, all.iter().map(String::as_str)));
    Err(Error::Invalid {
        message: format!("table \"{name}\" has none of the columns {}", columns.join(", ")),
        detail: nearest.map(|nearest| format!("Did you mean \"{nearest}\"?")),
        hint: format!(
            "SELECT attname FROM pg_catalog.pg_attribute WHERE attrelid = {}::regclass AND attnum > 0;",
            literal(&name.to_sql())
        ),
    })
}

fn check_role(role: &str, column: &str, everybody: &str) -> Result<(), Error> {
    if role_oid(role).is_some() {
        return Ok(());
    }
    Err(Error::Invalid {
        message: format!("role \"{role}\" does not exist"),
        detail: nearest_role(role).map(|nearest| format!("The nearest known role for {column} is \"{nearest}\".")),
        hint: format!("SELECT rolname FROM pg_catalog.pg_roles; ({everybody})"),
    })
}

fn drop_policy(arguments: &Arguments) -> Returns {
    let name = arguments.text(0, "name")?;
    let before = Before::now()?;
    let dropped = owner::connect(|client| {
        owner::rows(
            client,
            "DELETE FROM writeguard.policy WHERE name OPERATOR(pg_catalog.=) $1 RETURNING name",
            &[name.as_str().into()],
        )
    })?;
    if dropped.is_empty() {
        return Err(Error::invalid(
            format!("policy \"{}\" does not exist", shortened(&name, 255)),
            "SELECT name FROM writeguard.policy ORDER BY name;",
        )
        .into());
    }
    record(&name, "dropped".into())?;
    before.tell_change_of(&[&name])?;
    Ok(None)
}

/// What a caller asks `effective` about: the table, the role and the operations.
fn asked(arguments: &Arguments) -> Result<(pg_sys::Oid, Vec<pg_sys::Oid>, Vec<Operation>), Error> {
    let relation = arguments
        .get::<pg_sys::Oid>(0)
        .ok_or_else(|| Error::invalid("table must not be NULL", "\"table\" => 'public.orders'"))?;
    let operations = match arguments.get::<String>(2) {
        None => Operation::ALL.to_vec(),
        Some(word) => vec![
            Operation::parse(&word)
                .ok_or_else(|| Error::invalid(format!("unknown operation \"{word}\""), "operation => 'update'"))?,
        ],
    };
    let roles = match arguments.get::<String>(1) {
        None => Actor::current().roles(),
        Some(role) => vec![role_oid(&role).ok_or_else(|| {
            Error::invalid(format!("role \"{role}\" does not exist"), "SELECT rolname FROM pg_catalog.pg_roles;")
        })?],
    };
    // SAFETY: what other sessions committed shall be seen.
    unsafe { pg_sys::AcceptInvalidationMessages() };
    Ok((relation, roles, operations))
}

fn effective(arguments: &Arguments) -> Returns {
    let (relation, roles, operations) = asked(arguments)?;
    let explained = catalog::explain(relation, &roles, &operations)?;
    let strictest = |one: &Explained| {
        let limit = one.limit.filter(|_| one.why_not.is_none())?;
        let same = explained
            .iter()
            .filter(|other| (other.operation, other.limit) == (one.operation, one.limit) && other.why_not.is_none());
        Some(
            same.map(|other| other.loaded.policy.strictness(limit)).fold(f64::INFINITY, f64::min)
                == one.loaded.policy.strictness(limit),
        )
    };
    let rows: Vec<serde_json::Value> = explained
        .iter()
        .map(|one| {
            let policy = &one.loaded.policy;
            let why_not = one.why_not.as_ref().map(|why| match why {
                WhyNot::SetAsideBy(name) => format!("set aside by \"{name}\""),
                WhyNot::Condition(condition) => condition.column().to_owned(),
                WhyNot::Exempts => "mode".to_owned(),
                WhyNot::NoLimit => "no limit".to_owned(),
            });
            serde_json::json!({
                "operation": one.operation.word(),
                "policy": policy.name,
                "limit": one.limit.map(|limit| limit.to_string()),
                "value": one.limit.map(|limit| policy.shown(limit)),
                "applies": one.why_not.is_none(),
                "why_not": why_not,
                "strictest": strictest(one).unwrap_or(false),
                "mode": policy.mode.word(),
                "override": policy.override_.word(),
                "approvers": policy.approvers,
                "min_approvals": policy.min_approvals,
            })
        })
        .collect();
    Ok(json(&serde_json::Value::Array(rows)))
}

/// A row a policy, as 0.1.0 and 0.2.0 have it: a policy applies there if any limit of it does.
fn explain(arguments: &Arguments) -> Returns {
    arguments.text(1, "role")?;
    arguments.text(2, "operation")?;
    let (relation, roles, operations) = asked(arguments)?;
    let mut rows: Vec<serde_json::Value> = Vec::new();
    let explained = catalog::explain(relation, &roles, &operations)?;
    for one in explained.chunk_by(|one, next| std::rc::Rc::ptr_eq(&one.loaded, &next.loaded)) {
        let Some(loaded) = one.first().map(|first| &first.loaded) else { continue };
        let whole = &loaded.policy;
        let applying = one.iter().filter(|limit| limit.why_not.is_none()).filter_map(|limit| limit.limit).collect();
        let applies = one.iter().any(|limit| matches!(limit.why_not, None | Some(WhyNot::NoLimit)));
        let aside = one.iter().find_map(|limit| match &limit.why_not {
            Some(WhyNot::SetAsideBy(name)) if !applies => Some(name.clone()),
            _ => None,
        });
        let policy = if applies { whole.only(applying) } else { whole.clone() };
        rows.push(serde_json::json!({
            "policy": policy.name,
            "applies": applies,
            "set_aside_by": aside,
            "max_rows": policy.max_rows,
            "max_rows_per_transaction": policy.max_rows_per_transaction,
            "rate_rows": policy.rate.map(|rate| rate.rows),
            "rate_interval": policy.rate.map(|rate| format!("{} microseconds", rate.interval)),
            "max_fraction": policy.max_fraction,
            "require_where": policy.wants_where(),
            "require_transaction": policy.wants_transaction(),
            "mode": policy.mode.word(),
            "override": policy.override_.word(),
        }));
    }
    Ok(json(&serde_json::Value::Array(rows)))
}

fn in_schedule(arguments: &Arguments) -> Returns {
    let schedule = arguments.text(0, "schedule")?;
    bounds::schedule(&schedule)?;
    let schedule = Schedule::parse(&schedule)?;
    conditions::check_zones(&schedule)?;
    let at = arguments.get::<i64>(1).ok_or_else(|| Error::invalid("at must not be NULL", "at => now()"))?;
    value(conditions::is_open(&schedule, at))
}

fn policy_changed(arguments: &Arguments) -> Returns {
    if let Some(trigger) = arguments.trigger() {
        // SAFETY: the trigger's own table is open; the message goes out with the commit.
        unsafe { pg_sys::CacheInvalidateRelcacheByRelid((*(*trigger).tg_relation).rd_id) };
    }
    // A trigger's result is a pointer, not an SQL NULL.
    Ok(Some(pg_sys::Datum::from(0)))
}

fn owner_only(arguments: &Arguments) -> Returns {
    if let Some(trigger) = arguments.trigger() {
        // SAFETY: the trigger's own table is open.
        unsafe {
            let table = (*trigger).tg_relation;
            if !pg_sys::has_privs_of_role(pg_sys::GetUserId(), (*(*table).rd_rel).relowner) {
                let name = &raw const (*(*table).rd_rel).relname.data;
                pg_sys::aclcheck_error(
                    pg_sys::AclResult::ACLCHECK_NOT_OWNER,
                    pg_sys::ObjectType::OBJECT_TABLE,
                    name.cast(),
                );
            }
        }
    }
    Ok(Some(pg_sys::Datum::from(0)))
}
