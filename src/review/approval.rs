//! What the policies of a request ask for, as they are now, and what they have been given.

use pgrx::pg_sys;
use pgrx::spi::SpiClient;
use rules::error::Error;
use rules::words::{Override, counted, quote_identifier};
use serde::Deserialize;

use crate::pg::function::{Arguments, Returns, sql_function, value};
use crate::pg::owner;
use crate::policy::relation::{is_member, role_oid};

sql_function!(
    /// `is_approver(login oid, approvers text) → boolean`.
    writeguard_is_approver, pg_finfo_writeguard_is_approver, is_approver, not_preloaded_too
);

fn is_approver(arguments: &Arguments) -> Returns {
    let login = arguments.get::<pg_sys::Oid>(0);
    let approvers = arguments.get::<String>(1);
    value(match (login, approvers) {
        (None, _) => false,
        (Some(_), None) => true,
        (Some(login), Some(approvers)) => role_oid(&approvers).is_some_and(|role| is_member(login, role)),
    })
}

/// What one policy asks for.
#[derive(Debug, Clone, Deserialize)]
pub struct Ask {
    pub policy: String,
    #[serde(rename = "override")]
    pub override_: Override,
    pub approvers: Option<String>,
    pub min_approvals: u32,
    /// Approvals of people who are its approvers now.
    pub given: u32,
    /// Whether the login that was asked about is one of them.
    pub mine: bool,
}

const ASKS: &str = "SELECT pg_catalog.to_jsonb(k)::pg_catalog.text FROM ( \
     SELECT policy, \"override\", approvers, min_approvals, given, writeguard.is_approver($2, approvers) AS mine \
     FROM writeguard.approval_ask WHERE request OPERATOR(pg_catalog.=) $1::pg_catalog.int8 \
     ORDER BY policy) AS k";

/// What the policies of a request ask for, as `login` sees it.
///
/// # Errors
/// WG008 when the extension's tables are not as they should be.
pub fn asks(client: &mut SpiClient<'_>, request: i64, login: pg_sys::Oid) -> Result<Vec<Ask>, Error> {
    let rows = owner::rows(client, ASKS, &[request.into(), login.into()])?;
    rows.iter()
        .map(|row| {
            serde_json::from_str(row).map_err(|error| Error::Undecided {
                reason: format!("what request {request} needs cannot be read: {error}"),
                hint: "ALTER EXTENSION pg_writeguard UPDATE;".into(),
                relation: None,
            })
        })
        .collect()
}

impl Ask {
    /// Approvals that it still lacks.
    pub fn missing(&self) -> u32 {
        self.min_approvals.saturating_sub(self.given)
    }

    fn sentence(&self) -> String {
        let Ask { policy, min_approvals, given, .. } = self;
        format!("Policy \"{policy}\" asks for {}, and has {given}.", people(*min_approvals, self.approvers.as_deref()))
    }
}

/// `2 approvals by members of "dba"`.
fn people(approvals: u32, approvers: Option<&str>) -> String {
    let approvals = counted(approvals.into(), "approval");
    match approvers {
        Some(role) => format!("{approvals} by members of {}", quoted(role)),
        None => approvals,
    }
}

fn quoted(role: &str) -> String {
    format!("\"{role}\"")
}

/// How many more people must approve, as `1 more approval`, and what each policy that waits for them says; none where all
/// have what they ask for.
pub fn still_missing(asks: &[Ask]) -> Option<(String, String)> {
    let lacking: Vec<&Ask> = asks.iter().filter(|ask| ask.missing() > 0).collect();
    let missing = lacking.iter().map(|ask| ask.missing()).max()?;
    // One person may be an approver for several policies.
    let at_least = if lacking.iter().any(|ask| ask.approvers != lacking[0].approvers) { "at least " } else { "" };
    let sentences: Vec<String> = lacking.iter().map(|ask| ask.sentence()).collect();
    Some((format!("{at_least}{}", counted(missing.into(), "more approval")), sentences.join(" ")))
}

/// Why a login that is no approver for any of the policies cannot approve.
pub fn not_an_approver(request: i64, login: &str, asks: &[Ask]) -> Error {
    let known = |role: &str| role_oid(role).is_some();
    let mut roles: Vec<&str> = asks.iter().filter_map(|ask| ask.approvers.as_deref()).collect();
    roles.dedup();
    let of_policy = |ask: &Ask| {
        let role = ask.approvers.as_deref().unwrap_or_default();
        let gone = if known(role) { "" } else { ", a role that does not exist any more" };
        format!("Policy \"{}\" asks for members of {}{gone}.", ask.policy, quoted(role))
    };
    let sentences: Vec<String> = asks.iter().map(of_policy).collect();
    let hint = match roles.iter().find(|role| known(role)) {
        Some(role) => {
            format!("Let a member of {} type: SELECT writeguard.approve({request});", quote_identifier(role))
        }
        None => format!("SELECT name, approvers FROM writeguard.policy WHERE approvers = '{}';", roles.join("")),
    };
    Error::ApprovalRefused {
        message: format!("login \"{login}\" is not an approver of request {request}"),
        detail: Some(sentences.join(" ")),
        hint,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(policy: &str, approvers: Option<&str>, min_approvals: u32, given: u32) -> Ask {
        let (policy, approvers) = (policy.to_owned(), approvers.map(str::to_owned));
        Ask { policy, override_: Override::Token, approvers, min_approvals, given, mine: true }
    }

    #[test]
    fn the_policy_that_lacks_most_says_how_many_are_missing() {
        let asks = [ask("p", None, 1, 1), ask("q", Some("dba"), 3, 1), ask("r", Some("owners"), 1, 0)];
        let (missing, sentences) = still_missing(&asks).unwrap();
        assert_eq!(missing, "at least 2 more approvals");
        assert_eq!(
            sentences,
            "Policy \"q\" asks for 3 approvals by members of \"dba\", and has 1. \
             Policy \"r\" asks for 1 approval by members of \"owners\", and has 0."
        );
        assert_eq!(still_missing(&asks[..2]).unwrap().0, "2 more approvals");
        assert!(still_missing(&asks[..1]).is_none());
        assert!(still_missing(&[]).is_none());
        assert!(still_missing(&[ask("p", None, 1, 5)]).is_none());
    }
}
