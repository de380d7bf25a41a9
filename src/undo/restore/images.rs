//! The kept images of one table within a change: read as the owner, set aside in the order in which they are to be folded,
//! and given row by row, without ever holding more than one row's of them.

use core::ffi::c_long;
use core::ptr;
use std::ffi::CString;

use pgrx::{IntoDatum, pg_sys};
use rules::error::Error;
use rules::net_change::{Done, Image, Net, Values, roots};
use serde::Deserialize;

use super::rows::{Rows, Typed};
use super::table_definition::Shape;
use super::text;
use crate::pg::ereport::Failure;
use crate::pg::{encoding, owner};
use crate::policy::schema_compat;

/// Images of one row are those with the same root, one after the other.
pub struct Images {
    rows: Rows,
    change: i64,
    /// What reading an image allocates.
    context: pg_sys::MemoryContext,
    /// The image that was read last and belongs to the next row.
    next: Option<(i64, i64, Image)>,
    /// Whether each image is wanted besides what they come to.
    pub each: bool,
}

/// One row's images, folded.
pub struct Folded {
    pub net: Net,
    /// The number of the row's last image.
    pub last: i64,
    /// All of them, where they are asked for.
    pub images: Vec<(i64, Image)>,
}

#[derive(Deserialize)]
struct Link {
    number: i64,
    previous: i64,
}

/// Which images continue a row that an earlier image of the same change left: they begin with the version of the row that
/// the earlier one made. Keys do not tell that: where they are deferrable, two rows have the same one for a while.
/// Sorted, not joined: nobody has told the planner how many images there are.
const LINKS: &str = "WITH touch AS ( \
       SELECT number, was_at AS at, true AS takes FROM writeguard.image \
       WHERE change = $1::int8 AND relation = $2::int8::oid AND was_at IS NOT NULL \
       UNION ALL \
       SELECT number, left_at, false FROM writeguard.image \
       WHERE change = $1::int8 AND relation = $2::int8::oid AND left_at IS NOT NULL), \
     ordered AS (SELECT number, takes, lag(takes) OVER w AS took_before, lag(number) OVER w AS previous \
       FROM touch WINDOW w AS (PARTITION BY at ORDER BY number)) \
     SELECT jsonb_build_object('number', number, 'previous', previous)::text FROM ordered \
     WHERE takes AND NOT took_before ORDER BY number";

/// Whether images say where versions of rows were; those that version 0.2.0 kept do not.
const SAYS_WHERE: &str = "SELECT COALESCE(was_at, left_at)::text FROM writeguard.image \
     WHERE change = $1::int8 AND relation = $2::int8::oid ORDER BY number LIMIT 1";

/// The same by keys, for images that say no more: an image continues a row that has the key that an earlier one gave it.
/// `{was}` and `{left}` are the keys before and after. A row that was deleted and put back (by an undo) is continued as well.
const LINKS_BY_KEY: &str = "WITH image AS MATERIALIZED ( \
       SELECT number, operation, {was} AS was, {left} AS becomes FROM writeguard.image \
       WHERE change = $1::int8 AND relation = $2::int8::oid), \
     touch AS MATERIALIZED ( \
       SELECT number, was AS key, operation, true AS takes, operation = 'update' AND was = becomes AS leaves \
       FROM image WHERE operation <> 'insert' \
       UNION ALL \
       SELECT number, becomes, operation, false, true FROM image \
       WHERE operation = 'insert' OR operation = 'update' AND was <> becomes), \
     several AS (SELECT key FROM touch GROUP BY key HAVING count(*) > 1), \
     ordered AS ( \
       SELECT number, takes, operation, lag(leaves) OVER w AS left_before, lag(operation) OVER w AS done_before, \
         lag(number) OVER w AS previous \
       FROM touch JOIN several USING (key) WINDOW w AS (PARTITION BY key ORDER BY number, leaves)) \
     SELECT jsonb_build_object('number', number, 'previous', previous)::text FROM ordered \
     WHERE takes AND left_before OR operation = 'insert' AND done_before IN ('delete', 'truncate') \
     ORDER BY number";

const IN_ORDER: &str = "SELECT number, number AS root, operation, before, after FROM writeguard.image \
     WHERE change = $1 AND relation = $2 ORDER BY number";

const BY_ROOT: &str = "SELECT i.number, COALESCE(l.root, i.number), i.operation, i.before, i.after \
     FROM writeguard.image AS i \
     LEFT JOIN ROWS FROM (unnest($3), unnest($4)) AS l (number, root) ON l.number = i.number \
     WHERE i.change = $1 AND i.relation = $2 ORDER BY 2, 1";

impl Images {
    /// Reads what is kept of a table. `key` are the columns of its primary key by the names that the images have.
    ///
    /// # Errors
    /// WG008 where our own tables cannot be read.
    pub fn read(change: i64, shape: &Shape, key: &[&[u8]]) -> Result<Self, Error> {
        let of = |sql: &str| {
            let arguments = &[change.into(), i64::from(shape.relation).into()];
            owner::connect(|client| owner::rows(client, sql, arguments))
        };
        let says_where =
            schema_compat::has_column_of(c"image", c"was_at") && of(SAYS_WHERE)?.iter().any(|at| !at.is_empty());
        let links = match says_where {
            true => of(LINKS)?,
            false => {
                of(&LINKS_BY_KEY.replace("{was}", &key_of("before", key)).replace("{left}", &key_of("after", key)))?
            }
        };
        let found: Vec<Link> = links.iter().filter_map(|json| serde_json::from_str(json).ok()).collect();
        let linked = roots(&found.iter().map(|link| (link.number, link.previous)).collect::<Vec<_>>());
        // SAFETY: our own statement, inside SPI and a guard; the context goes with the current one at the latest.
        unsafe {
            let here = pg_sys::CurrentMemoryContext;
            let context = text::per_row_memory();
            let rows = owner::connect(|_| Ok(fetch(change, shape.oid(), &linked, here)))?;
            Ok(Self { rows, change, context, next: None, each: false })
        }
    }

    /// How many images there are.
    pub fn count(&self) -> u64 {
        self.rows.count()
    }

    /// Begins again with the first row.
    pub fn rewind(&mut self) {
        self.rows.rewind();
        self.next = None;
    }

    /// The next row; none: there are no more.
    ///
    /// # Errors
    /// WG008 for an image that cannot be read.
    pub fn next(&mut self) -> Result<Option<Folded>, Failure> {
        let Some((number, root, first)) = self.take()? else { return Ok(None) };
        let mut images = vec![(number, first)];
        while let Some((number, of, image)) = self.take()? {
            if of != root {
                self.next = Some((number, of, image));
                break;
            }
            images.push((number, image));
        }
        let last = images.last().map_or(number, |(number, _)| *number);
        Ok(Some(match self.each {
            true => Folded { net: Net::of(images.iter().map(|(_, image)| image.clone())), last, images },
            false => Folded { net: Net::of(images.into_iter().map(|(_, image)| image)), last, images: Vec::new() },
        }))
    }

    fn take(&mut self) -> Result<Option<(i64, i64, Image)>, Failure> {
        if let Some(next) = self.next.take() {
            return Ok(Some(next));
        }
        let Some(row) = self.rows.next() else { return Ok(None) };
        let number = |index: usize| row.get(index).copied().flatten().map_or(0, |datum| datum.value() as i64);
        // SAFETY: the columns have the types that the statements above give them.
        let image = unsafe {
            pg_sys::MemoryContextReset(self.context);
            let before = pg_sys::MemoryContextSwitchTo(self.context);
            let image = image(&row);
            pg_sys::MemoryContextSwitchTo(before);
            image
        };
        let image = image.ok_or_else(|| Error::Undecided {
            reason: format!("image {} of change {} cannot be read", number(0), self.change),
            hint: format!("SELECT * FROM writeguard.image WHERE change = {};", self.change),
            relation: None,
        })?;
        Ok(Some((number(0), number(1), image)))
    }

    /// Frees what holds them.
    pub fn end(self) {
        self.rows.end();
        // SAFETY: ours, and empty but for the image read last.
        unsafe { pg_sys::MemoryContextDelete(self.context) };
    }
}

/// An image as its row has it.
unsafe fn image(row: &[Option<pg_sys::Datum>]) -> Option<Image> {
    // SAFETY: the caller's promise: a row of one of the statements above.
    unsafe {
        let word = pg_sys::text_to_cstring((*row.get(2)?)?.cast_mut_ptr());
        let done = Done::parse(core::ffi::CStr::from_ptr(word).to_bytes())?;
        let read = |jsonb: Option<pg_sys::Datum>| jsonb.map_or(Some(Values::new()), |jsonb| values(jsonb));
        Some(Image { done, before: read(*row.get(3)?)?, after: read(*row.get(4)?)? })
    }
}

/// The keys and texts of a flat JSON object; none where it is something else.
unsafe fn values(jsonb: pg_sys::Datum) -> Option<Values> {
    // SAFETY: a jsonb value; what is read of it is copied.
    unsafe {
        let jsonb = pg_sys::pg_detoast_datum(jsonb.cast_mut_ptr()).cast::<pg_sys::Jsonb>();
        let mut iterator = pg_sys::JsonbIteratorInit(&raw mut (*jsonb).root);
        let mut found = pg_sys::JsonbValue::default();
        let text = |value: &pg_sys::JsonbValue| {
            let text = value.val.string;
            let length = usize::try_from(text.len).unwrap_or(0);
            core::slice::from_raw_parts(text.val.cast::<u8>().cast_const(), length).to_vec()
        };
        let mut values = Values::new();
        let mut name = None;
        loop {
            match pg_sys::JsonbIteratorNext(&mut iterator, &mut found, true) {
                pg_sys::JsonbIteratorToken::WJB_DONE => return Some(values),
                pg_sys::JsonbIteratorToken::WJB_BEGIN_OBJECT | pg_sys::JsonbIteratorToken::WJB_END_OBJECT => {}
                pg_sys::JsonbIteratorToken::WJB_KEY => name = Some(text(&found)),
                pg_sys::JsonbIteratorToken::WJB_VALUE => {
                    let value = match found.type_ {
                        pg_sys::jbvType::jbvNull => None,
                        pg_sys::jbvType::jbvString => Some(text(&found)),
                        _ => return None,
                    };
                    values.insert(name.take()?, value);
                }
                _ => return None,
            }
        }
    }
}

/// SQL for the key in one of the two columns of images, as one value.
fn key_of(column: &str, key: &[&[u8]]) -> String {
    let part = |name: &&[u8]| {
        let name = CString::new(*name).unwrap_or_default();
        // SAFETY: gives a quoted copy.
        let quoted = unsafe { encoding::from_c(pg_sys::quote_literal_cstr(name.as_ptr())) }.unwrap_or_default();
        format!("{column} -> {quoted}")
    };
    match key {
        [name] => part(name),
        names => format!("jsonb_build_array({})", names.iter().map(part).collect::<Vec<_>>().join(", ")),
    }
}

/// Rows that are fetched at a time.
const BATCH: c_long = 1_000;

/// Sets the images aside, in the order in which they are to be folded.
unsafe fn fetch(change: i64, relation: pg_sys::Oid, roots: &[(i64, i64)], memory: pg_sys::MemoryContext) -> Rows {
    let int8 = |name| Typed::plain(name, pg_sys::INT8OID);
    let columns = [
        int8("number"),
        int8("root"),
        Typed { collation: pg_sys::DEFAULT_COLLATION_OID, ..Typed::plain("operation", pg_sys::TEXTOID) },
        Typed::plain("before", pg_sys::JSONBOID),
        Typed::plain("after", pg_sys::JSONBOID),
    ];
    let arrays: (Vec<i64>, Vec<i64>) = roots.iter().copied().unzip();
    let (mut types, mut arguments) = (vec![pg_sys::INT8OID, pg_sys::OIDOID], vec![change.into(), relation.into()]);
    let mut sql = IN_ORDER;
    if !roots.is_empty() {
        sql = BY_ROOT;
        types.extend([pg_sys::INT8ARRAYOID; 2]);
        arguments.extend(
            [arrays.0.into_datum(), arrays.1.into_datum()].map(|array| array.unwrap_or(pg_sys::Datum::from(0))),
        );
    }
    // SAFETY: inside SPI; the statement gives the columns above. The rows live longer than SPI's memory.
    unsafe {
        let inside = pg_sys::MemoryContextSwitchTo(memory);
        let mut rows = Rows::new(&columns);
        pg_sys::MemoryContextSwitchTo(inside);
        let plan = pg_sys::SPI_prepare(encoding::to_palloc(sql), types.len() as i32, types.as_mut_ptr());
        let portal = pg_sys::SPI_cursor_open(ptr::null(), plan, arguments.as_mut_ptr(), ptr::null(), false);
        loop {
            pg_sys::SPI_cursor_fetch(portal, true, BATCH);
            let table = pg_sys::SPI_tuptable;
            let fetched = usize::try_from((*table).numvals).unwrap_or(0);
            (0..fetched).for_each(|index| rows.put_tuple(*(*table).vals.add(index)));
            pg_sys::SPI_freetuptable(table);
            if fetched == 0 {
                break;
            }
        }
        pg_sys::SPI_cursor_close(portal);
        rows
    }
}
