//! The background process that tidies up one database and leaves; the launcher sends one now and then, to one database
//! at a time.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use pgrx::pg_sys;
use pgrx::prelude::*;

use super::prune;
use super::prune_schedule::{Rounds, pause_for};
use crate::event::memory::Visit;
use crate::event::serve;
use crate::pg::process::{connect, exists, start};
use crate::session::settings;

/// How long after its start the launcher begins with the first round, where the retention does not ask for more.
const FIRST: Duration = Duration::from_secs(10);

fn pause() -> Duration {
    let seconds = |seconds: i32| Duration::from_secs(u64::from(seconds.unsigned_abs()));
    pause_for(settings::event_retention().map(seconds))
}

/// The launcher's bookkeeping of the databases that pruners visit.
pub struct Sender {
    rounds: Rounds,
}

impl Sender {
    /// Begins with all databases there are.
    pub fn new() -> Self {
        let mut rounds = Rounds::default();
        let first = Instant::now() + pause().min(FIRST);
        databases().into_iter().for_each(|database| rounds.know(database, first));
        Self { rounds }
    }

    /// A database stores events, so it has the extension.
    pub fn know(&mut self, database: pg_sys::Oid) {
        self.rounds.know(u32::from(database), Instant::now() + pause());
    }

    /// Sends a pruner where one is due, and gives how long the launcher may sleep.
    pub fn send(&mut self) -> Duration {
        const LOOK: Duration = Duration::from_secs(5);
        if let Some(database) = self.rounds.underway() {
            let visit = serve::visit_of(pg_sys::Oid::from_u32(database));
            self.rounds.over(database, visit, Instant::now(), pause());
        }
        while let Some(database) = self.rounds.next(Instant::now(), pause()) {
            let database = pg_sys::Oid::from_u32(database);
            if exists(database) {
                serve::visit_begins(database);
                start(database, c"pg_writeguard pruner", c"writeguard_pruner_main");
            } else {
                self.rounds.over(u32::from(database), Visit::NotInstalled, Instant::now(), pause());
            }
        }
        self.rounds.wait(Instant::now()).unwrap_or(LOOK).clamp(Duration::from_millis(10), LOOK)
    }
}

/// The databases that one can connect to, without templates: a connection would be in the way of CREATE DATABASE.
fn databases() -> HashSet<u32> {
    pgrx::bgworkers::BackgroundWorker::transaction(|| {
        let mut found = HashSet::new();
        // SAFETY: a scan of a shared catalog, as core's own launcher does it.
        unsafe {
            let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
            let catalog = pg_sys::table_open(pg_sys::DatabaseRelationId, lock);
            let none = core::ptr::null_mut();
            let scan = pg_sys::systable_beginscan(catalog, pg_sys::InvalidOid, false, none, 0, core::ptr::null_mut());
            loop {
                let tuple = pg_sys::systable_getnext(scan);
                if tuple.is_null() {
                    break;
                }
                let database = &*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_database>();
                // A limit below -1 marks a database whose drop was interrupted.
                if database.datallowconn && !database.datistemplate && database.datconnlimit >= -1 {
                    found.insert(u32::from(database.oid));
                }
            }
            pg_sys::systable_endscan(scan);
            pg_sys::table_close(catalog, lock);
        }
        found
    })
}

/// A pruner's main function; its argument is the database.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn writeguard_pruner_main(database: pg_sys::Datum) {
    let database = connect(database);
    serve::visited(database, prune::visit());
}
