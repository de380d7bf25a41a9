//! The only border between PostgreSQL's bytes and Rust's strings.
//!
//! Inside, text is UTF-8; outside, it is in the database's encoding, which may be any other one, or none (SQL_ASCII), and a
//! name from a shared catalog may be in the encoding of another database. All of this module takes every text, in every
//! encoding and in every state of a transaction, and raises nothing but "out of memory".
//!
//! * [`from_server`] and [`to_server`] are exact: what cannot be converted is carried along as strays (see `stray`), so that
//!   names and statements go back to the bytes that they came from. In a UTF8 database, where such bytes are no text at all,
//!   they become `\x81` at once.
//! * [`shown`] and [`shown_json`] are for what people read: every letter in them is one that the database has.

use core::ffi::{CStr, c_char, c_int};
use std::borrow::Cow;
use std::ffi::CString;

use pgrx::datum::DatumWithOid;
use pgrx::{FromDatum, IntoDatum, pg_sys};

use super::conversion::Conversion;
use super::stray::{self, Escape, Sink, out_of_memory, put_bytes, put_strays, put_unavailable};

const UTF8: c_int = pg_sys::pg_enc::PG_UTF8 as c_int;
const SQL_ASCII: c_int = pg_sys::pg_enc::PG_SQL_ASCII as c_int;

/// What the database's encoding is to us.
#[derive(Clone, Copy)]
enum Server {
    Utf8,
    /// SQL_ASCII, and what a process has that is connected to no database.
    Unknown,
    Other(c_int),
}

fn server() -> Server {
    // SAFETY: reads a static.
    match unsafe { pg_sys::GetDatabaseEncoding() } {
        UTF8 => Server::Utf8,
        SQL_ASCII => Server::Unknown,
        other => Server::Other(other),
    }
}

/// Whether the database's encoding has a letter for everything.
pub fn has_all_letters() -> bool {
    matches!(server(), Server::Utf8)
}

fn owned(text: &str) -> String {
    let mut copy = String::new();
    copy.put(text);
    copy
}

/// Text of the server's as UTF-8.
pub fn from_server(bytes: &[u8]) -> String {
    match (server(), core::str::from_utf8(bytes)) {
        (_, Ok(text)) if text.is_ascii() => owned(text),
        (Server::Utf8, Ok(text)) => owned(text),
        (Server::Utf8, Err(_)) => stray::from_damaged_utf8(bytes),
        (Server::Unknown, _) => stray::from_unknown(bytes),
        (Server::Other(encoding), _) => from_encoding(encoding, bytes),
    }
}

/// Text in one of the encodings that PostgreSQL converts. The conversion of a few characters is not the inverse of that
/// back; they stay strays, as those do that have no counterpart.
fn from_encoding(encoding: c_int, bytes: &[u8]) -> String {
    let comes_back = |text: &String| {
        let mut rest = Some(bytes);
        write_to_server(text, Escape::Plain, |more| rest = rest.and_then(|rest| rest.strip_prefix(more)));
        rest.is_some_and(<[u8]>::is_empty)
    };
    if let Some((conversion, back)) = Conversion::between(encoding, UTF8).zip(Conversion::between(UTF8, encoding)) {
        let mut text = String::new();
        let put = |text: &mut String, source: &[u8], converted: Option<&[u8]>| match converted
            .and_then(|converted| core::str::from_utf8(converted).ok())
        {
            Some(converted) => text.put(converted),
            None => put_strays(text, source),
        };
        conversion.each(bytes, |source, converted| put(&mut text, source, converted));
        if comes_back(&text) {
            return text;
        }
        text.clear();
        conversion.each_character(bytes, |source, converted| {
            put(&mut text, source, converted.filter(|converted| back.gives(converted, source)));
        });
        if comes_back(&text) {
            return text;
        }
    }
    let mut text = String::new();
    put_strays(&mut text, bytes);
    text
}

/// The text behind a C string of the server's.
///
/// # Safety
/// `text` is NULL or a valid C string.
pub unsafe fn from_c(text: *const c_char) -> Option<String> {
    // SAFETY: the caller's promise.
    (!text.is_null()).then(|| from_server(unsafe { CStr::from_ptr(text) }.to_bytes()))
}

/// A name in a row of a catalog.
pub fn from_name(name: &pg_sys::NameData) -> String {
    // SAFETY: PostgreSQL ends every name with a NUL.
    unsafe { from_c(name.data.as_ptr()) }.unwrap_or_default()
}

/// The text of an SQL value.
///
/// # Safety
/// The value is of type text, or one that looks the same, and not NULL.
pub unsafe fn from_text(value: pg_sys::Datum) -> String {
    // SAFETY: the caller's promise; detoasting gives the value itself, or a copy that is freed.
    unsafe {
        let original = value.cast_mut_ptr::<pg_sys::varlena>();
        let text = pg_sys::pg_detoast_datum_packed(original);
        let found = from_server(pgrx::varlena::varlena_to_byte_slice(text));
        if text != original {
            pg_sys::pfree(text.cast());
        }
        found
    }
}

/// Hands out the bytes of a text in the server's encoding: strays as what they stand for, what the encoding has no letter for
/// as escapes.
fn write_to_server(text: &str, escape: Escape, mut put: impl FnMut(&[u8])) {
    match server() {
        Server::Utf8 => put(text.as_bytes()),
        _ if text.is_ascii() => put(text.as_bytes()),
        Server::Unknown => stray::to_unknown(text, put),
        Server::Other(encoding) => {
            let conversion = Conversion::between(UTF8, encoding);
            let unavailable = |letter: char, put: &mut dyn FnMut(&[u8])| match stray::byte(letter) {
                Some(byte) => put(&[byte]),
                None => put_unavailable(escape, letter, |shown| put(shown.as_bytes())),
            };
            each_letter(conversion, text, |part| match part {
                Part::Available { converted, .. } => put(converted),
                Part::Not(letter) => unavailable(letter, &mut put),
            });
        }
    }
}

/// A part of a text, with regard to an encoding.
enum Part<'a> {
    /// It has these letters.
    Available { text: &'a str, converted: &'a [u8] },
    /// It does not have this one.
    Not(char),
}

/// Goes through a text with the conversion from UTF-8 to an encoding; without one only ASCII is to be had.
fn each_letter(conversion: Option<Conversion>, text: &str, mut each: impl FnMut(Part<'_>)) {
    let Some(conversion) = conversion else {
        let mut rest = text;
        while let Some(at) = rest.find(|letter: char| !letter.is_ascii()) {
            let ascii = &rest[..at];
            each(Part::Available { text: ascii, converted: ascii.as_bytes() });
            if let Some(letter) = rest[at..].chars().next() {
                each(Part::Not(letter));
                rest = &rest[at + letter.len_utf8()..];
            }
        }
        each(Part::Available { text: rest, converted: rest.as_bytes() });
        return;
    };
    conversion.each(text.as_bytes(), |source, converted| {
        // Procedures go by whole characters, so this is text again.
        let text = core::str::from_utf8(source).unwrap_or_default();
        match converted {
            Some(converted) => each(Part::Available { text, converted }),
            None => text.chars().for_each(|letter| each(Part::Not(letter))),
        }
    });
}

fn bytes_for_server(text: &str, escape: Escape) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_to_server(text, escape, |more| put_bytes(&mut bytes, more));
    bytes
}

/// Text in the server's encoding, exactly as it came from there.
pub fn to_server(text: &str) -> Vec<u8> {
    bytes_for_server(text, Escape::Plain)
}

/// JSON in the server's encoding, the strings in it exact.
pub fn json_to_server(json: &str) -> Vec<u8> {
    bytes_for_server(json, Escape::Json)
}

/// Text as a C string of the server's, to look a name up or to run a statement. A NUL, which no text of PostgreSQL's has, ends
/// it.
pub fn to_c(text: &str) -> CString {
    let mut bytes = to_server(text);
    bytes.truncate(bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len()));
    bytes.try_reserve_exact(1).unwrap_or_else(|_| out_of_memory());
    CString::new(bytes).unwrap_or_default()
}

/// The same where it says exactly what the text does; a name that is another one in this encoding names nothing.
pub fn name_to_c(name: &str) -> Option<CString> {
    let c_name = to_c(name);
    (!name.contains('\0') && from_server(c_name.to_bytes()) == name).then_some(c_name)
}

/// Copies bytes into the current memory context and ends them with a NUL.
fn palloc(bytes: &[u8]) -> *const c_char {
    let flags = (pg_sys::MCXT_ALLOC_NO_OOM | pg_sys::MCXT_ALLOC_HUGE) as c_int;
    let length = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    // SAFETY: as many writable bytes as asked for, or NULL.
    unsafe {
        let copy = pg_sys::palloc_extended(length + 1, flags).cast::<u8>();
        if copy.is_null() {
            out_of_memory();
        }
        copy.copy_from_nonoverlapping(bytes.as_ptr(), length);
        copy.add(length).write(0);
        copy.cast()
    }
}

/// Copies text into the current memory context, in the server's encoding; a NUL inside ends it, as it would for PostgreSQL.
pub fn to_palloc(text: &str) -> *const c_char {
    match server() {
        Server::Utf8 => palloc(text.as_bytes()),
        _ => palloc(&to_server(text)),
    }
}

/// The same with JSON.
pub fn json_to_palloc(json: &str) -> *const c_char {
    palloc(&json_to_server(json))
}

/// Text as a value of type text, in the current memory context.
pub fn to_text(text: &str) -> pg_sys::Datum {
    text_of(&to_server(text))
}

/// JSON as a value of type text or json.
pub fn json_to_text(json: &str) -> pg_sys::Datum {
    text_of(&json_to_server(json))
}

fn text_of(bytes: &[u8]) -> pg_sys::Datum {
    // What PostgreSQL can tell a value's length by.
    const LONGEST: usize = 0x3fff_ffff;
    let size = bytes.len() + pg_sys::VARHDRSZ;
    if size > LONGEST {
        out_of_memory();
    }
    // SAFETY: as much memory as asked for, or NULL: a header and the bytes.
    unsafe {
        let text = pg_sys::palloc_extended(size, pg_sys::MCXT_ALLOC_NO_OOM as c_int).cast::<u8>();
        if text.is_null() {
            out_of_memory();
        }
        pgrx::set_varsize_4b(text.cast(), size as i32);
        text.add(pg_sys::VARHDRSZ).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        pg_sys::Datum::from(text)
    }
}

/// A value of type text, for rows that are read by way of pgrx.
pub struct Text(pub String);

impl FromDatum for Text {
    unsafe fn from_polymorphic_datum(value: pg_sys::Datum, is_null: bool, _type_oid: pg_sys::Oid) -> Option<Self> {
        // SAFETY: the caller's promise.
        (!is_null).then(|| Self(unsafe { from_text(value) }))
    }
}

impl IntoDatum for Text {
    fn into_datum(self) -> Option<pg_sys::Datum> {
        Some(to_text(&self.0))
    }

    fn type_oid() -> pg_sys::Oid {
        pg_sys::TEXTOID
    }
}

/// JSON as a parameter of type text, for statements that are run by way of pgrx.
pub fn json_argument(json: &str) -> DatumWithOid<'static> {
    // SAFETY: a value of that type, in memory that outlives the statement.
    unsafe { DatumWithOid::new(json_to_text(json), pg_sys::TEXTOID) }
}

/// Texts as a value of type text[].
pub fn to_text_array(texts: &[String]) -> pg_sys::Datum {
    let mut values: Vec<pg_sys::Datum> = texts.iter().map(|text| to_text(text)).collect();
    let count = c_int::try_from(values.len()).unwrap_or(c_int::MAX);
    // SAFETY: so many values of that type, which are copied.
    pg_sys::Datum::from(unsafe {
        pg_sys::construct_array(values.as_mut_ptr(), count, pg_sys::TEXTOID, -1, false, pg_sys::TYPALIGN_INT as c_char)
    })
}

/// The texts of a value of type text[].
///
/// # Safety
/// The value is of that type, and not NULL.
pub unsafe fn from_text_array(value: pg_sys::Datum) -> Vec<Option<String>> {
    // SAFETY: the caller's promise; there are as many values and flags as the count says.
    unsafe {
        let array = pg_sys::pg_detoast_datum(value.cast_mut_ptr()).cast::<pg_sys::ArrayType>();
        let (mut values, mut nulls, mut count) = (core::ptr::null_mut(), core::ptr::null_mut(), 0);
        let align = pg_sys::TYPALIGN_INT as c_char;
        pg_sys::deconstruct_array(array, pg_sys::TEXTOID, -1, false, align, &mut values, &mut nulls, &mut count);
        let text = |index: usize| (!*nulls.add(index)).then(|| from_text(*values.add(index)));
        (0..usize::try_from(count).unwrap_or(0)).map(text).collect()
    }
}

/// A text without strays, all of whose letters an encoding has.
fn with_letters_of(encoding: c_int, text: &str, escape: Escape) -> String {
    let mut shown = String::new();
    each_letter(Conversion::between(UTF8, encoding), text, |part| match part {
        Part::Available { text, .. } => shown.put(text),
        Part::Not(letter) => put_unavailable(escape, letter, |text| shown.put(text)),
    });
    shown
}

/// A text that people read, in letters that the database has.
pub fn shown(text: &str) -> Cow<'_, str> {
    shown_as(text, Escape::Plain)
}

/// JSON that people read, in letters that the database has.
pub fn shown_json(json: &str) -> Cow<'_, str> {
    shown_as(json, Escape::Json)
}

/// Whether a text that was [`shown`] is surely what it was made from: nothing in it can be an escape.
pub fn is_exact(shown: &str) -> bool {
    has_all_letters() || !stray::has_escape(shown)
}

fn shown_as(text: &str, escape: Escape) -> Cow<'_, str> {
    match server() {
        Server::Utf8 => Cow::Borrowed(text),
        _ if text.is_ascii() => Cow::Borrowed(text),
        Server::Unknown if !stray::is_in(text) => Cow::Borrowed(text),
        Server::Unknown => {
            let mut shown = String::new();
            for letter in text.chars() {
                match stray::byte(letter) {
                    Some(_) => put_unavailable(escape, letter, |text| shown.put(text)),
                    None => shown.put(letter.encode_utf8(&mut [0; 4])),
                }
            }
            Cow::Owned(shown)
        }
        Server::Other(encoding) => Cow::Owned(with_letters_of(encoding, text, escape)),
    }
}

/// A message in letters that the database has and the client's encoding as well: a message that cannot be sent is another
/// error.
pub fn shown_to_client(text: &str) -> Cow<'_, str> {
    let text = shown(text);
    // SAFETY: reads a static.
    let client = unsafe { pg_sys::pg_get_client_encoding() };
    if text.is_ascii() || client == UTF8 || client == SQL_ASCII {
        return text;
    }
    match server() {
        Server::Other(encoding) if encoding == client => text,
        // PostgreSQL converts nothing there, but checks that it is text of the client's. All is, for one byte a letter.
        // SAFETY: a table of core's.
        Server::Unknown if unsafe { pg_sys::pg_encoding_max_length(client) } == 1 => text,
        Server::Unknown => {
            let mut shown = String::new();
            each_letter(None, &text, |part| match part {
                Part::Available { text, .. } => shown.put(text),
                Part::Not(letter) => put_unavailable(Escape::Plain, letter, |text| shown.put(text)),
            });
            Cow::Owned(shown)
        }
        _ => Cow::Owned(with_letters_of(client, &text, Escape::Plain)),
    }
}

/// Hands a text of the server's on in UTF-8, part by part: what hashes are made of. What cannot be converted is handed on as it
/// is.
pub fn in_utf8(text: &[u8], mut take: impl FnMut(&[u8])) {
    match server() {
        Server::Other(encoding) if !text.is_ascii() => match Conversion::between(encoding, UTF8) {
            Some(conversion) => conversion.each(text, |source, converted| take(converted.unwrap_or(source))),
            None => take(text),
        },
        _ => take(text),
    }
}

/// The longest beginning of a text of the server's that is whole letters and has at most so many bytes.
#[inline]
pub fn beginning(text: &[u8], bytes: usize) -> &[u8] {
    if text.len() <= bytes { text } else { cut(text, bytes) }
}

#[inline(never)]
fn cut(text: &[u8], bytes: usize) -> &[u8] {
    // A letter has four bytes at most.
    let length = c_int::try_from(text.len().min(bytes + 4)).unwrap_or(c_int::MAX);
    let limit = c_int::try_from(bytes).unwrap_or(c_int::MAX);
    // SAFETY: it looks at the bytes of the letters up to the limit, and at the first of the one after; a text of the server's
    // encoding has whole letters.
    let end = unsafe { pg_sys::pg_mbcliplen(text.as_ptr().cast(), length, limit) };
    &text[..usize::try_from(end).unwrap_or(0).min(bytes)]
}
