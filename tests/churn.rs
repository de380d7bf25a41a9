//! Others make and drop schemas, tables and roles all the time: what a session knows of its tables stays, however many
//! policies there are, and what is another one by that is another one at once.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::common::{Database, Server, expect_refusal};
use postgres::Client;

/// How long one measurement of one round takes.
const ROUND: Duration = Duration::from_millis(150);
const ROUNDS: usize = 11;
/// Roles that policies name.
const ROLES: usize = 200;

/// A database with a table, and so many policies of every kind besides the one that limits it: for exact names, for
/// patterns in a schema and for patterns anywhere, for everybody and for single roles.
fn crowded(server: &Server, policies: usize) -> Database {
    let db = server.database();
    let mut admin = db.admin();
    admin
        .batch_execute(&format!(
            "CREATE TABLE t AS SELECT i AS id, 0 AS v FROM generate_series(1, 10) AS i; ALTER TABLE t ADD PRIMARY KEY (id);
             DO $$ BEGIN FOR i IN 1..{ROLES} LOOP
                 IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'churn_' || i) THEN
                     EXECUTE 'CREATE ROLE churn_' || i;
                 END IF;
             END LOOP; END $$;
             SELECT writeguard.set_policy('t', tables => '{{public.t}}', max_rows => 5);
             SELECT count(*) FROM writeguard.import_policies((
                 SELECT jsonb_agg(jsonb_build_object('name', 'p' || i, 'max_rows', 1000000,
                     'tables', CASE i % 3 WHEN 0 THEN jsonb_build_array('gone_' || i || '.t')
                                          WHEN 1 THEN jsonb_build_array('s' || i || '.*')
                                          ELSE jsonb_build_array('*.x' || i || '*') END,
                     'roles', CASE i % 2 WHEN 0 THEN jsonb_build_array('public')
                                         ELSE jsonb_build_array('churn_' || (1 + i % {ROLES})) END))
                 FROM generate_series(1, {policies}) AS i WHERE i % 3 <> 0))"
        ))
        .unwrap();
    db
}

/// A session that writes one row by its key, again and again.
struct Writer {
    client: Client,
    statement: postgres::Statement,
    pid: i32,
}

impl Writer {
    fn new(db: &Database) -> Writer {
        let mut client = db.admin();
        let statement = client.prepare("UPDATE t SET v = v + 1 WHERE id = 1").unwrap();
        let pid = client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
        Writer { client, statement, pid }
    }

    /// How long its backend has been running on a processor.
    fn processor_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/schedstat", self.pid)).expect("the backend's time");
        Duration::from_nanos(stat.split(' ').next().and_then(|time| time.parse().ok()).expect("nanoseconds"))
    }

    /// Statements in a second that the backend has a processor for, so that what else the machine does has no say.
    fn throughput(&mut self) -> f64 {
        // What it missed while it had nothing to do is not what is measured.
        self.client.execute(&self.statement, &[]).unwrap();
        let (started, before) = (Instant::now(), self.processor_time());
        let mut count = 0;
        while started.elapsed() < ROUND {
            self.client.execute(&self.statement, &[]).unwrap();
            count += 1;
        }
        f64::from(count) / (self.processor_time() - before).as_secs_f64()
    }
}

/// Those who measure are by themselves.
static ALONE: Mutex<()> = Mutex::new(());

/// The throughput with many policies as a part of that with few, of a session beside another one that runs `churn` all the
/// time; in one run with the two by turns.
fn beside(churn: &str) -> f64 {
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    // A server of its own: what others do on one concerns all of its sessions.
    let server = Server::start(&[]);
    let databases = [crowded(&server, 10), crowded(&server, 3_000)];
    let mut writers = databases.each_ref().map(Writer::new);
    let (stop, turn, commands) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let mut parts = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut churners = databases.each_ref().map(Database::admin);
            while !stop.load(Ordering::Relaxed) {
                churners[turn.load(Ordering::Relaxed)].batch_execute(churn).unwrap();
                commands.fetch_add(1, Ordering::Relaxed);
                // Who falls behind by 4,096 messages throws away all that it knows, core's caches too.
                std::thread::sleep(Duration::from_micros(500));
            }
        });
        for _ in 0..ROUNDS {
            let [few, many] = [0, 1].map(|which| {
                turn.store(which, Ordering::Relaxed);
                writers[which].throughput()
            });
            println!("beside {churn:?}: {few:.0}/s with 10 policies, {many:.0}/s with 3,000");
            parts.push(many / few);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(commands.load(Ordering::Relaxed) > 50, "nothing changed beside the writes");
    parts.sort_by(f64::total_cmp);
    parts[parts.len() / 2]
}

#[track_caller]
fn assert_as_fast(churn: &str) {
    let part = beside(churn);
    assert!(part >= 0.6, "beside {churn:?} 3,000 policies leave {part:.2} of the throughput under 10");
}

#[test]
fn beside_schemas_that_come_and_go() {
    assert_as_fast("CREATE SCHEMA come; ALTER SCHEMA come RENAME TO go; DROP SCHEMA go");
}

#[test]
fn beside_tables_that_come_and_go() {
    assert_as_fast("CREATE TABLE come (id int); ALTER TABLE come RENAME TO go; DROP TABLE go");
}

#[test]
fn beside_roles_that_come_and_go() {
    assert_as_fast("CREATE ROLE churn_come; ALTER ROLE churn_come RENAME TO churn_go; DROP ROLE churn_go");
}

/// A session that has written to table `t` before, with one prepared statement, and another one that changes what its
/// rows fall under.
struct Known {
    db: Database,
    writer: Client,
    statement: postgres::Statement,
    other: Client,
    login: String,
}

impl Known {
    /// With three rows in `work.t`, which a login of its own writes to through a view, whatever the table's name is.
    fn new(setup: &str) -> Known {
        let db = Server::shared().database();
        let login = db.role("known");
        let mut other = db.admin();
        let setup = setup.replace("LOGIN", &login);
        other
            .batch_execute(&format!(
                "CREATE SCHEMA work; CREATE TABLE work.t AS SELECT i AS id, 0 AS v FROM generate_series(1, 3) AS i;
                 GRANT ALL ON SCHEMA work TO public; GRANT ALL ON work.t TO public;
                 CREATE VIEW v AS TABLE work.t; GRANT ALL ON v TO public; {setup}"
            ))
            .unwrap();
        let mut writer = db.connect(&login);
        let statement = writer.prepare("UPDATE v SET v = v + 1").unwrap();
        Known { db, writer, statement, other, login }
    }

    fn change(&mut self, sql: &str) -> &mut Known {
        self.other.batch_execute(&sql.replace("LOGIN", &self.login)).unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        self
    }

    #[track_caller]
    fn passes(&mut self) -> &mut Known {
        assert_eq!(self.writer.execute(&self.statement, &[]).unwrap(), 3);
        self
    }

    #[track_caller]
    fn is_refused(&mut self) -> &mut Known {
        assert_eq!(expect_refusal(self.writer.execute(&self.statement, &[])).sqlstate, "WG001");
        self
    }
}

#[test]
fn a_schema_that_gets_another_name_is_seen_at_once() {
    Known::new("SELECT writeguard.set_policy('p', tables => '{guarded*.*}', max_rows => 1)")
        .passes()
        .change("CREATE SCHEMA other; ALTER SCHEMA other RENAME TO guarded_other")
        .passes()
        .change("ALTER SCHEMA work RENAME TO guarded")
        .is_refused()
        .change("CREATE SCHEMA work; ALTER TABLE guarded.t SET SCHEMA work")
        .passes()
        .change("ALTER TABLE work.t SET SCHEMA guarded")
        .is_refused()
        .change("DROP SCHEMA work; ALTER SCHEMA guarded RENAME TO work")
        .passes()
        .change("SELECT writeguard.set_policy('p', tables => '{work.*}', max_rows => 1)")
        .is_refused();
}

#[test]
fn the_schema_of_an_ancestor_counts_as_well() {
    let setup = "CREATE SCHEMA up; CREATE TABLE up.root (id int, v int); ALTER TABLE work.t INHERIT up.root;
                 SELECT writeguard.set_policy('p', tables => '{guarded.*}', max_rows => 1)";
    Known::new(setup)
        .passes()
        .change("ALTER SCHEMA up RENAME TO guarded")
        .is_refused()
        .change("ALTER SCHEMA guarded RENAME TO up")
        .passes()
        .change("CREATE SCHEMA guarded; ALTER TABLE up.root SET SCHEMA guarded")
        .is_refused()
        .change("ALTER TABLE work.t NO INHERIT guarded.root")
        .passes();
}

#[test]
fn memberships_are_seen_at_once() {
    let mut known = Known::new("SELECT 1");
    let (team, part) = (known.db.role("team"), known.db.role("part"));
    known
        .change(&format!("SELECT writeguard.set_policy('p', roles => '{{{team}}}', max_rows => 1)"))
        .passes()
        .change(&format!("GRANT {part} TO LOGIN"))
        .passes()
        .change(&format!("GRANT {team} TO {part}"))
        .is_refused()
        .change(&format!("REVOKE {part} FROM LOGIN"))
        .passes()
        .change(&format!("GRANT {team} TO LOGIN"))
        .is_refused()
        .change(&format!("DROP ROLE {team}"))
        .passes();
}

#[test]
fn names_of_roles_are_seen_at_once() {
    let mut known = Known::new("SELECT 1");
    let (login, named) = (known.login.clone(), known.db.role("named"));
    known
        .change(&format!("SELECT writeguard.set_policy('p', roles => '{{{named}}}', max_rows => 1)"))
        .passes()
        // Another role, and then this one, takes the name that the policy names.
        .change(&format!("DROP ROLE {named}; CREATE ROLE {login}_other; ALTER ROLE {login}_other RENAME TO {named}"))
        .passes()
        .change(&format!("GRANT {named} TO {login}"))
        .is_refused()
        .change(&format!("ALTER ROLE {named} RENAME TO {login}_other"))
        .passes()
        .change(&format!("ALTER ROLE {login} RENAME TO {named}"))
        .is_refused()
        .change(&format!("ALTER ROLE {named} RENAME TO {login}"))
        .passes();
}

#[test]
fn the_extension_may_come_and_go() {
    let limit = "SELECT writeguard.set_policy('p', max_rows => 1)";
    Known::new("SELECT 1")
        .passes()
        .change(limit)
        .is_refused()
        .change("DROP EXTENSION pg_writeguard")
        .passes()
        .change("CREATE EXTENSION pg_writeguard")
        .passes()
        .change(limit)
        .is_refused()
        .change("DROP SCHEMA writeguard CASCADE")
        .passes()
        .change("CREATE SCHEMA writeguard")
        .passes()
        .change("CREATE EXTENSION pg_writeguard")
        .change(limit)
        .is_refused();
}

#[test]
fn a_table_that_gets_another_name_is_seen_at_once() {
    Known::new(
        "CREATE TABLE work.guarded (id int, v int); GRANT ALL ON work.guarded TO public;
         SELECT writeguard.set_policy('p', tables => '{work.guarded}', max_rows => 1)",
    )
    .passes()
    .change("ALTER TABLE work.guarded RENAME TO old; ALTER TABLE work.t RENAME TO guarded")
    .is_refused()
    .change("ALTER TABLE work.guarded RENAME TO t; ALTER TABLE work.old RENAME TO guarded")
    .passes();
}
