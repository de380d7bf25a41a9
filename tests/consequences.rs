//! Whoever changes policies is told what that means for others.

use std::sync::{Arc, Mutex};

use postgres::error::DbError;
use postgres::{Client, NoTls};

use crate::common::limits::{Bed, pass};

/// A client, and what it was told.
struct Told {
    client: Client,
    notices: Arc<Mutex<Vec<DbError>>>,
}

impl Told {
    fn new(bed: &Bed) -> Told {
        let notices = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&notices);
        let mut config = bed.db().config("postgres");
        config.notice_callback(move |notice| into.lock().unwrap().push(notice));
        Told { client: config.connect(NoTls).expect("a connection"), notices }
    }

    /// The messages of a command. Each hint runs.
    #[track_caller]
    fn by(&mut self, sql: &str) -> Vec<String> {
        pass(&mut self.client, sql);
        let notices: Vec<DbError> = self.notices.lock().unwrap().drain(..).collect();
        let replaced = |notice: &&DbError| !notice.message().contains("was replaced");
        for hint in notices.iter().filter(replaced).filter_map(DbError::hint) {
            pass(&mut self.client, &format!("BEGIN; {hint} ROLLBACK"));
        }
        self.notices.lock().unwrap().clear();
        notices.iter().filter(replaced).map(|notice| notice.message().to_owned()).collect()
    }
}

const TABLES: &str =
    "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE u (id int PRIMARY KEY); CREATE TABLE w (id int)";

#[test]
fn what_a_policy_sets_aside_is_told_when_it_comes_and_when_it_goes() {
    let bed = Bed::new(TABLES);
    let mut dba = Told::new(&bed);
    let nothing: [&str; 0] = [];
    assert_eq!(dba.by("SELECT writeguard.set_policy('cap', max_rows => 100, require_where => true)"), nothing);
    // Another limit takes nothing away.
    assert_eq!(
        dba.by("SELECT writeguard.set_policy('strict', tables => '{t}', max_rows_per_transaction => 5)"),
        nothing
    );
    let aside = "policy \"strict\" sets aside max_rows of policy \"cap\" on table \"public.t\"";
    assert_eq!(dba.by("SELECT writeguard.alter_policy('strict', '{\"max_rows\": 500}')"), [aside]);
    // What was so before is not told again.
    assert_eq!(dba.by("SELECT writeguard.alter_policy('strict', '{\"max_rows\": 600}')"), nothing);
    assert_eq!(
        dba.by("SELECT writeguard.alter_policy('strict', '{\"tables\": [\"public.t\", \"public.u\"]}')"),
        [aside.replace("public.t", "public.u")]
    );
    let no_longer =
        "policy \"strict\" no longer sets aside max_rows of policy \"cap\" on table \"public.t\" and 1 more";
    assert_eq!(dba.by("BEGIN; SELECT writeguard.drop_policy('strict'); ROLLBACK"), [no_longer]);
    assert_eq!(dba.by("SELECT writeguard.alter_policy('cap', '{\"always\": true}')"), [no_longer]);
    assert_eq!(dba.by("SELECT writeguard.alter_policy('cap', '{\"always\": false}')"), [format!("{aside} and 1 more")]);
    // One of its own, that others set aside.
    assert_eq!(
        dba.by("SELECT writeguard.set_policy('wide', tables => '{public.*}', max_rows_per_transaction => 1000)"),
        ["policy \"strict\" sets aside max_rows_per_transaction of policy \"wide\" on table \"public.t\" and 1 more"]
    );
    // For one role only.
    let role = bed.db().role("batch");
    assert_eq!(
        dba.by(&format!(
            "SELECT writeguard.set_policy('batch', tables => '{{w}}', roles => '{{{role}}}', mode => 'exempt')"
        )),
        [
            format!("policy \"batch\" sets aside max_rows of policy \"cap\" on table \"public.w\" for role \"{role}\""),
            format!(
                "policy \"batch\" sets aside require_where of policy \"cap\" on table \"public.w\" for role \"{role}\""
            ),
            format!(
                "policy \"batch\" sets aside max_rows_per_transaction of policy \"wide\" on table \"public.w\" for role \"{role}\""
            ),
        ]
    );
    // Documents, and not those that are only tried.
    let document = "'[{\"name\": \"u\", \"tables\": [\"public.u\"], \"require_where\": false}]'";
    assert_eq!(dba.by(&format!("SELECT * FROM writeguard.import_policies({document}, dry_run => true)")), nothing);
    assert_eq!(
        dba.by(&format!("SELECT * FROM writeguard.import_policies({document})")),
        ["policy \"u\" sets aside require_where of policy \"cap\" on table \"public.u\""]
    );
}

#[test]
fn what_limits_nothing_is_told() {
    let bed = Bed::new(TABLES);
    let mut dba = Told::new(&bed);
    assert_eq!(
        dba.by("SELECT writeguard.set_policy('empty', tables => '{public.t}')"),
        ["policy \"empty\" limits nothing: it states no limit"]
    );
    assert_eq!(
        dba.by("SELECT writeguard.set_policy('p', tables => '{public.*,nowhere.*,public.x*}', max_rows => 5)"),
        ["no table matches nowhere.* of policy \"p\" now", "no table matches public.x* of policy \"p\" now"]
    );
    let nothing: [&str; 0] = [];
    assert_eq!(
        dba.by("SELECT writeguard.set_policy('x', tables => '{t}', mode => 'exempt')"),
        ["policy \"x\" sets aside max_rows of policy \"p\" on table \"public.t\""]
    );
    assert_eq!(dba.by("SELECT writeguard.drop_policy('empty')"), nothing);
}

/// However many policies there are, to be told takes no time to speak of.
#[test]
fn a_document_of_thousands_is_stored_in_seconds() {
    let bed =
        Bed::new("DO $$ BEGIN FOR i IN 1..300 LOOP EXECUTE format('CREATE TABLE t%s (id int)', i); END LOOP; END $$");
    let mut dba = Told::new(&bed);
    let document = "(SELECT jsonb_agg(jsonb_build_object('name', 'p' || i, 'max_rows', i, 'tables',
        jsonb_build_array(CASE WHEN i % 2 = 0 THEN '*.*' ELSE 'public.t' || (1 + i % 300) END)))
        FROM generate_series(1, 5000) AS i)";
    let began = std::time::Instant::now();
    let told = dba.by(&format!("SELECT count(*) FROM writeguard.import_policies({document})"));
    assert!(told.len() <= 13 && !told.is_empty(), "{told:?}");
    assert!(began.elapsed().as_secs() < 30, "{:?}", began.elapsed());
}
