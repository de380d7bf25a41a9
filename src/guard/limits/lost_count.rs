//! That the numbers may be less than what really happened: after a fault of ours in a place where nothing may be raised. A
//! transaction whose numbers are lost does not commit.

use rules::error::Error;

use super::uncharged;
use crate::pg::backend_local::BackendCell;
use crate::session::{settings, xact};

/// Whether the numbers are those of what really happened.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Counts {
    Sound,
    /// Those of the running transaction are lost.
    Lost,
    /// They could not even be forgotten with the transaction: nothing covered is written in this session any more.
    Gone,
}

static COUNTS: BackendCell<Counts> = BackendCell::new(Counts::Sound);

/// What is counted in this transaction may be too little from now on.
#[cold]
pub fn lose(for_good: bool) {
    if for_good || COUNTS.get() == Counts::Sound {
        COUNTS.set(if for_good { Counts::Gone } else { Counts::Lost });
    }
    uncharged::close();
    xact::touch();
}

/// Whether the numbers are lost: none is taken back any more then.
#[inline(always)]
pub fn is_lost() -> bool {
    COUNTS.get() != Counts::Sound
}

/// Before a commit, where the numbers are lost.
///
/// # Errors
/// WG008, unless nothing covered was written or the guard is switched off.
#[cold]
pub fn refuse() -> Result<(), Error> {
    if !xact::is_touched() || !settings::enabled() {
        return Ok(());
    }
    let hint = match COUNTS.get() {
        Counts::Gone => "SELECT pg_catalog.pg_terminate_backend(pg_catalog.pg_backend_pid());",
        _ => "ROLLBACK;",
    };
    let reason = "a fault of pg_writeguard has lost count of its rows; the server log says which";
    Err(Error::Undecided { reason: reason.into(), hint: hint.into(), relation: None })
}

/// The transaction is over.
pub fn end_transaction() {
    if COUNTS.get() == Counts::Lost {
        COUNTS.set(Counts::Sound);
    }
}
