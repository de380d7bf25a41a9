//! A covered relation, and the budgets that its rows are charged to.

use core::cell::RefCell;
use std::rc::Rc;

use pgrx::pg_sys;
use rules::limits::ledger::{Beside, MeterId};
use rules::policy::model::Keep;
use rules::words::{Operation, RelationName};

use super::extra_limits::More;
use crate::policy::table::Loaded;
use crate::stat::counters::StatId;

/// A policy's budget that a relation's rows are charged to.
#[derive(Clone)]
pub struct Charge {
    pub meter: MeterId,
    /// The policy with those limits that apply to the relation, and no others.
    pub policy: Rc<Loaded>,
    /// The limits of the meter that do not.
    pub beside: Beside,
    /// Limits beyond those that the meter knows.
    pub more: Option<Rc<More>>,
}

/// A covered relation.
pub struct Binding {
    pub relation: Rc<RelationName>,
    /// The relation's qualified name, as tokens have it.
    pub name: Rc<str>,
    /// Counts the relation's own rows.
    pub rows: MeterId,
    /// Where its statements are counted for the acting role.
    pub stat: StatId,
    /// Bits of [`Operation::bit`]: the operations for which a policy wants a condition.
    wants_where: u8,
    /// The same for those whose changed rows a policy wants kept.
    keeps: u8,
    /// Whether a policy counts only updates of some columns.
    is_by_columns: bool,
    /// The same relation for updates that assign these columns, by their numbers in that relation: itself, or one that its
    /// rows are routed from. As many as were met.
    narrowed: RefCell<Vec<Narrowed>>,
    /// By operation, in the order of [`Operation::ALL`].
    charges: [Vec<Charge>; Operation::ALL.len()],
}

type Narrowed = (pg_sys::Oid, Vec<i32>, Rc<Binding>);

/// Sets of assigned columns that a binding knows its answer for; past that it starts again.
const MOST_NARROWED: usize = 200;

impl Binding {
    /// A relation whose rows `rows` counts and whose statements `stat`, with the budgets of each operation in the order of [`Operation::ALL`].
    pub fn new(
        relation: Rc<RelationName>,
        name: Rc<str>,
        rows: MeterId,
        stat: StatId,
        mut charges: [Vec<Charge>; Operation::ALL.len()],
    ) -> Self {
        for charges in &mut charges {
            // Those of mode observe and warn come first, to have counted a row that another one refuses; then the smallest limit,
            // which is the one to name in the error.
            charges.sort_by_key(|charge| {
                let policy = &charge.policy.policy;
                (policy.mode.refuses(), policy.max_rows.unwrap_or(u64::MAX))
            });
        }
        let wants_where = Operation::ALL
            .into_iter()
            .filter(|operation| charges[*operation as usize].iter().any(|charge| charge.policy.policy.wants_where()))
            .fold(0, |bits, operation| bits | operation.bit());
        let keeps = Operation::ALL
            .into_iter()
            .filter(|operation| *operation != Operation::Drop)
            .filter(|operation| charges[*operation as usize].iter().any(|charge| charge.policy.policy.undo.is_some()))
            .fold(0, |bits, operation| bits | operation.bit());
        let is_by_columns =
            charges[Operation::Update as usize].iter().any(|charge| charge.policy.policy.columns.is_some());
        let narrowed = RefCell::new(Vec::new());
        Self { name, relation, rows, stat, wants_where, keeps, is_by_columns, narrowed, charges }
    }

    /// Whether it matters which columns an update assigns.
    #[inline]
    pub fn is_by_columns(&self) -> bool {
        self.is_by_columns
    }

    /// The same relation for an update that assigns the columns that have these numbers in `numbered`, whose names `names`
    /// tells: without the policies that count only updates of others. Allocates nothing where the same columns were asked
    /// for before.
    pub fn narrowed(
        &self,
        numbered: pg_sys::Oid,
        assigned: impl Iterator<Item = i32> + Clone,
        names: impl FnOnce(&[i32]) -> Vec<String>,
    ) -> Rc<Self> {
        let is_same = |(of, columns, _): &&Narrowed| *of == numbered && assigned.clone().eq(columns.iter().copied());
        let known = self.narrowed.borrow().iter().find(is_same).map(|(.., binding)| Rc::clone(binding));
        if let Some(binding) = known {
            return binding;
        }
        let assigned: Vec<i32> = assigned.collect();
        let names = names(&assigned);
        let counts = |charge: &Charge| {
            let columns = charge.policy.policy.columns.as_ref();
            columns.is_none_or(|columns| columns.iter().any(|column| names.contains(column)))
        };
        let mut charges = self.charges.clone();
        charges[Operation::Update as usize].retain(counts);
        let (relation, name) = (Rc::clone(&self.relation), Rc::clone(&self.name));
        let binding = Rc::new(Self::new(relation, name, self.rows, self.stat, charges));
        let mut narrowed = self.narrowed.borrow_mut();
        if narrowed.len() >= MOST_NARROWED {
            narrowed.clear();
        }
        narrowed.push((numbered, assigned, Rc::clone(&binding)));
        binding
    }

    /// The budgets of an operation.
    #[inline]
    pub fn charges(&self, operation: Operation) -> &[Charge] {
        &self.charges[operation as usize]
    }

    /// Whether a policy that applies to the operation wants a condition.
    #[inline]
    pub fn wants_where(&self, operation: Operation) -> bool {
        self.wants_where & operation.bit() != 0
    }

    /// Whether one that applies to any operation does.
    #[inline]
    pub fn wants_any_where(&self) -> bool {
        self.wants_where != 0
    }

    /// Whether a policy that applies to the operation refuses anything: one of mode enforce.
    pub fn refuses(&self, operation: Operation) -> bool {
        self.charges(operation).iter().any(|charge| charge.policy.policy.mode.refuses())
    }

    /// Whether a policy wants rows kept that one of these operations changes.
    #[inline]
    pub fn keeps_any(&self, operations: &[Operation]) -> bool {
        self.keeps != 0 && operations.iter().any(|operation| self.keeps & operation.bit() != 0)
    }

    /// How long rows are kept that an overridden operation changes; none: not at all.
    pub fn kept(&self, operation: Operation) -> Option<&Keep> {
        self.charges(operation).iter().filter_map(|charge| charge.policy.policy.undo.as_ref()).max()
    }

    /// The policies that apply to any operation; one that applies to several comes several times.
    pub fn policies(&self) -> impl Iterator<Item = &Loaded> {
        self.charges.iter().flatten().map(|charge| &*charge.policy)
    }

    /// The same relation with only those budgets of an operation that are chosen, and no other operation's.
    pub fn only(&self, operation: Operation, chosen: impl Fn(&Loaded) -> bool) -> Binding {
        let mut charges = [const { Vec::new() }; Operation::ALL.len()];
        charges[operation as usize] =
            self.charges(operation).iter().filter(|charge| chosen(&charge.policy)).cloned().collect();
        let (relation, name) = (Rc::clone(&self.relation), Rc::clone(&self.name));
        Binding {
            relation,
            name,
            rows: self.rows,
            stat: self.stat,
            wants_where: self.wants_where,
            keeps: self.keeps,
            is_by_columns: self.is_by_columns,
            narrowed: RefCell::new(Vec::new()),
            charges,
        }
    }
}
