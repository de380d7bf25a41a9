//! What a policy asks of the approvals behind a token, when the token is used: the policy and the memberships as they are
//! now decide, not those of the time when the request was approved.

use rules::error::Error;
use rules::policy::model::Policy;
use rules::words::{RelationName, counted, literal};

use crate::pg::owner;

/// A broken glass asks nobody; anything else has so many approvals.
const GIVEN: &str = "SELECT CASE WHEN r.break_glass THEN '2147483647' ELSE ( \
       SELECT pg_catalog.count(*)::pg_catalog.text FROM writeguard.approval AS a \
       WHERE a.request OPERATOR(pg_catalog.=) r.id AND writeguard.is_approver(a.approver_oid, $2)) END \
     FROM writeguard.request AS r WHERE r.id OPERATOR(pg_catalog.=) $1::pg_catalog.int8";

/// Checks that a request has the approvals that a policy asks for. `statement` is for the hint.
///
/// # Errors
/// WG006 with both numbers.
pub fn check(request: i64, policy: &Policy, relation: &RelationName, statement: &str) -> Result<(), Error> {
    // What is approved has one approval by somebody who could give it.
    if policy.approvers.is_none() && policy.min_approvals <= 1 {
        return Ok(());
    }
    let approvers = policy.approvers.as_deref();
    let given = owner::connect(|client| owner::rows(client, GIVEN, &[request.into(), approvers.into()]))?;
    let given: u32 = given.first().and_then(|count| count.parse().ok()).unwrap_or(0);
    let asked = policy.min_approvals;
    if given >= asked {
        return Ok(());
    }
    let by = approvers.map_or_else(String::new, |role| format!(" by members of \"{role}\""));
    Err(Error::TokenRefused {
        request: Some(request),
        reason: format!("policy \"{}\" asks for more approvals", policy.name),
        detail: Some(format!(
            "It asks for {}{by}, and request {request} has {given}; nothing was changed.",
            counted(asked.into(), "approval")
        )),
        hint: format!("SELECT writeguard.request({}, reason => 'why this is right');", literal(statement)),
        relation: Some(relation.clone()),
    })
}
