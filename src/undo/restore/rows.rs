//! Typed rows that are set aside: in memory as far as `work_mem` goes, then on disk. SQL can read them under a name, as a
//! trigger reads a transition table: no privilege is asked for, and nobody else sees them.

use core::cell::Cell;
use core::ffi::{CStr, c_int};

use pgrx::pg_sys;

use crate::pg::{encoding, ffi};

/// A column of set-aside rows: its name for SQL, type, modifier and collation.
pub struct Typed<'a> {
    pub name: &'a str,
    pub type_oid: pg_sys::Oid,
    pub typmod: i32,
    pub collation: pg_sys::Oid,
}

impl<'a> Typed<'a> {
    /// A column of a type without modifier and collation.
    pub fn plain(name: &'a str, type_oid: pg_sys::Oid) -> Self {
        Self { name, type_oid, typmod: -1, collation: pg_sys::InvalidOid }
    }
}

/// Set-aside rows. What holds them goes with [`Rows::end`], or with the (sub)transaction when that is rolled back.
pub struct Rows {
    store: *mut pg_sys::Tuplestorestate,
    descriptor: pg_sys::TupleDesc,
    slot: *mut pg_sys::TupleTableSlot,
    count: u64,
    /// What SPI knows them by.
    registered: Cell<Option<*mut pg_sys::EphemeralNamedRelationData>>,
}

impl Rows {
    /// No rows yet, of these columns.
    pub fn new(columns: &[Typed<'_>]) -> Self {
        // SAFETY: the descriptor has as many places as there are columns; everything lives in the current memory
        // context, as the caller does.
        unsafe {
            let descriptor = pg_sys::CreateTemplateTupleDesc(columns.len() as c_int);
            for (number, column) in (1..).zip(columns) {
                let Typed { name, type_oid, typmod, collation } = *column;
                pg_sys::TupleDescInitEntry(descriptor, number, encoding::to_palloc(name), type_oid, typmod, 0);
                pg_sys::TupleDescInitEntryCollation(descriptor, number, collation);
            }
            ffi::finish_descriptor(descriptor);
            let slot = pg_sys::MakeSingleTupleTableSlot(descriptor, &raw const pg_sys::TTSOpsMinimalTuple);
            let store = pg_sys::tuplestore_begin_heap(true, false, pg_sys::work_mem);
            Self { store, descriptor, slot, count: 0, registered: Cell::new(None) }
        }
    }

    /// No rows yet, of the same columns.
    pub fn like(&self) -> Self {
        // SAFETY: as above; both read the same descriptor.
        unsafe {
            let slot = pg_sys::MakeSingleTupleTableSlot(self.descriptor, &raw const pg_sys::TTSOpsMinimalTuple);
            let store = pg_sys::tuplestore_begin_heap(true, false, pg_sys::work_mem);
            Self { store, descriptor: self.descriptor, slot, count: 0, registered: Cell::new(None) }
        }
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Sets a row aside; a value for each column.
    pub fn put(&mut self, values: &[Option<pg_sys::Datum>]) {
        let mut nulls: Vec<bool> = values.iter().map(Option::is_none).collect();
        let mut datums: Vec<pg_sys::Datum> =
            values.iter().map(|value| value.unwrap_or(pg_sys::Datum::from(0))).collect();
        // SAFETY: the caller's values are of the columns' types; they are copied.
        unsafe {
            pg_sys::tuplestore_putvalues(self.store, self.descriptor, datums.as_mut_ptr(), nulls.as_mut_ptr());
        }
        self.count += 1;
    }

    /// Sets a row of a query's result aside.
    ///
    /// # Safety
    /// Its columns are of these rows' types.
    pub unsafe fn put_tuple(&mut self, tuple: pg_sys::HeapTuple) {
        // SAFETY: the caller's promise; the tuple is copied.
        unsafe { pg_sys::tuplestore_puttuple(self.store, tuple) };
        self.count += 1;
    }

    /// Begins again with the first row.
    pub fn rewind(&mut self) {
        // SAFETY: rows that can be read in any order.
        unsafe {
            self.take_turn();
            pg_sys::tuplestore_rescan(self.store);
        }
    }

    /// Forgets all rows; none of them was read by [`Rows::next`]. Each statement that read them has left a place in what held them, so that is made anew.
    pub fn clear(&mut self) {
        // SAFETY: rows of ours that no statement reads now; SPI looks their holder up when it runs the next one.
        unsafe {
            pg_sys::tuplestore_end(self.store);
            self.store = pg_sys::tuplestore_begin_heap(true, false, pg_sys::work_mem);
            if let Some(relation) = self.registered.get() {
                (*relation).reldata = self.store.cast();
            }
        }
        self.count = 0;
    }

    /// Statements that read the rows have places of their own in them.
    unsafe fn take_turn(&self) {
        // SAFETY: the first place is there from the beginning.
        unsafe { pg_sys::tuplestore_select_read_pointer(self.store, 0) };
    }

    /// The next row's values; they are good until the one after it is asked for.
    pub fn next(&mut self) -> Option<Vec<Option<pg_sys::Datum>>> {
        // SAFETY: the slot is for these rows.
        unsafe {
            self.take_turn();
            // What is read from disk is the slot's until the next row, whatever becomes of the current context.
            let here = pg_sys::MemoryContextSwitchTo((*self.slot).tts_mcxt);
            let found = pg_sys::tuplestore_gettupleslot(self.store, true, false, self.slot);
            pg_sys::MemoryContextSwitchTo(here);
            if !found {
                return None;
            }
            let count = (*self.descriptor).natts;
            pg_sys::slot_getsomeattrs_int(self.slot, count);
            let count = usize::try_from(count).unwrap_or(0);
            let value = |index| (!*(*self.slot).tts_isnull.add(index)).then(|| *(*self.slot).tts_values.add(index));
            Some((0..count).map(value).collect())
        }
    }

    /// Makes them a relation of that name for statements of the SPI connection that is open; for as long as that is.
    ///
    /// # Safety
    /// An SPI connection is open, and ends before the rows do and before the current memory context.
    pub unsafe fn register(&self, name: &CStr) {
        // SAFETY: the caller's promise.
        unsafe {
            let relation = pg_sys::palloc0(size_of::<pg_sys::EphemeralNamedRelationData>())
                .cast::<pg_sys::EphemeralNamedRelationData>();
            (*relation).md.name = pg_sys::pstrdup(name.as_ptr());
            (*relation).md.tupdesc = self.descriptor;
            (*relation).md.enrtype = pg_sys::EphemeralNameRelationType::ENR_NAMED_TUPLESTORE;
            (*relation).md.enrtuples = self.count as f64;
            (*relation).reldata = self.store.cast();
            pg_sys::SPI_register_relation(relation);
            self.registered.set(Some(relation));
        }
    }

    /// Frees what holds the rows.
    pub fn end(self) {
        // SAFETY: nobody reads them any more.
        unsafe {
            pg_sys::ExecDropSingleTupleTableSlot(self.slot);
            pg_sys::tuplestore_end(self.store);
        }
    }
}
