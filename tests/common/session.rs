//! What a session does, in one word, and what the server's answer has to be.

use postgres::Client;

use crate::common::{Refusal, expect_refusal};

/// What has to pass, with the server's error in the message where it does not.
#[track_caller]
pub fn pass(client: &mut Client, sql: &str) {
    if let Err(error) = client.batch_execute(sql) {
        panic!("{sql}: {:?}", Refusal::of(&error));
    }
}

/// The statement is refused, with this SQLSTATE; gives the error.
#[track_caller]
pub fn refused(client: &mut Client, sql: &str, sqlstate: &str) -> Refusal {
    let refusal = expect_refusal(client.batch_execute(sql));
    assert_eq!(refusal.sqlstate, sqlstate, "{sql}: {refusal:?}");
    refusal
}

/// A WG001 of a client that goes on afterwards in the same session.
#[track_caller]
pub fn refuse(client: &mut Client, sql: &str) -> Refusal {
    refused(client, sql, "WG001")
}

/// One number, that a query or an expression gives.
#[track_caller]
pub fn number(client: &mut Client, sql: &str) -> i64 {
    match client.query_one(&format!("SELECT ({sql})::bigint"), &[]) {
        Ok(row) => row.get(0),
        Err(error) => panic!("{sql}: {:?}", Refusal::of(&error)),
    }
}

/// The text that a query gives.
#[track_caller]
pub fn text(client: &mut Client, sql: &str) -> String {
    match client.query_one(sql, &[]) {
        Ok(row) => row.get(0),
        Err(error) => panic!("{sql}: {:?}", Refusal::of(&error)),
    }
}

/// Sets flag and token.
#[track_caller]
pub fn arm(client: &mut Client, token: &str) {
    pass(client, &format!("SET writeguard.override = on; SET writeguard.token = '{token}'"));
}
