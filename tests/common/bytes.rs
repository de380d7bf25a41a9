//! A connection that sends and reads bytes, in whatever encoding they are.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::common::Server;

pub type Row = Vec<Option<Vec<u8>>>;

/// The fields of an error, as bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fault {
    pub sqlstate: String,
    pub message: Vec<u8>,
    pub detail: Vec<u8>,
    pub hint: Vec<u8>,
    pub constraint: Vec<u8>,
    pub context: Vec<u8>,
}

impl Fault {
    /// All of its text.
    pub fn text(&self) -> Vec<u8> {
        [self.message.as_slice(), &self.detail, &self.hint, &self.context].join(&b'\n')
    }

    /// The number of the event that it names.
    pub fn event(&self) -> Option<i64> {
        let text = String::from_utf8_lossy(&self.hint).into_owned();
        let digits = text.split("event => ").nth(1)?;
        digits.split(|letter: char| !letter.is_ascii_digit()).next()?.parse().ok()
    }
}

/// What a simple query gave.
#[derive(Debug, Default)]
pub struct Reply {
    pub rows: Vec<Row>,
    pub fault: Option<Fault>,
    pub tag: String,
}

pub struct Bytes {
    stream: UnixStream,
}

impl Bytes {
    /// A superuser's connection, with the database's encoding as the client's.
    pub fn admin(server: &Server, database: &str) -> Bytes {
        Bytes::connect(server, database, b"postgres")
    }

    pub fn connect(server: &Server, database: &str, user: &[u8]) -> Bytes {
        let path = server.socket_dir().join(format!(".s.PGSQL.{}", server.port()));
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut bytes = Bytes { stream };
        let mut body = 196_608_u32.to_be_bytes().to_vec();
        for word in [b"user", user, b"database", database.as_bytes(), b""] {
            body.extend_from_slice(word);
            body.push(0);
        }
        bytes.send(None, &body);
        let reply = bytes.read();
        assert!(reply.fault.is_none(), "{reply:?}");
        bytes
    }

    fn send(&mut self, kind: Option<u8>, body: &[u8]) {
        let mut message = Vec::with_capacity(body.len() + 5);
        message.extend(kind);
        message.extend_from_slice(&u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        message.extend_from_slice(body);
        self.stream.write_all(&message).unwrap();
    }

    fn read(&mut self) -> Reply {
        let mut reply = Reply::default();
        loop {
            let mut head = [0; 5];
            self.stream.read_exact(&mut head).unwrap_or_else(|error| panic!("{error} after {reply:?}"));
            let length = u32::from_be_bytes(head[1..].try_into().unwrap());
            let mut body = vec![0; usize::try_from(length).unwrap() - 4];
            self.stream.read_exact(&mut body).unwrap();
            match head[0] {
                b'D' => reply.rows.push(row(&body)),
                b'C' => reply.tag = String::from_utf8_lossy(&body[..body.len() - 1]).into_owned(),
                b'E' => reply.fault = Some(fault(&body)),
                b'Z' => return reply,
                _ => {}
            }
        }
    }

    /// Runs a string of commands.
    pub fn run(&mut self, sql: impl AsRef<[u8]>) -> Reply {
        let mut body = sql.as_ref().to_vec();
        body.push(0);
        self.send(Some(b'Q'), &body);
        self.read()
    }

    /// One that must pass; gives its rows.
    #[track_caller]
    pub fn rows(&mut self, sql: impl AsRef<[u8]>) -> Vec<Row> {
        let reply = self.run(sql.as_ref());
        if let Some(fault) = &reply.fault {
            panic!(
                "{} {}: {} in {}",
                fault.sqlstate,
                fault.message.escape_ascii(),
                fault.detail.escape_ascii(),
                sql.as_ref()[..sql.as_ref().len().min(300)].escape_ascii()
            );
        }
        reply.rows
    }

    /// The one value that a query gives.
    #[track_caller]
    pub fn value(&mut self, sql: impl AsRef<[u8]>) -> Vec<u8> {
        let rows = self.rows(sql.as_ref());
        let value = rows.first().and_then(|row| row.first().cloned().flatten());
        value.unwrap_or_else(|| panic!("no value of {}", sql.as_ref().escape_ascii()))
    }

    #[track_caller]
    pub fn number(&mut self, sql: impl AsRef<[u8]>) -> i64 {
        String::from_utf8(self.value(sql)).unwrap().parse().unwrap()
    }

    /// One that must fail.
    #[track_caller]
    pub fn fault(&mut self, sql: impl AsRef<[u8]>) -> Fault {
        let reply = self.run(sql.as_ref());
        reply.fault.unwrap_or_else(|| panic!("passed: {}", sql.as_ref()[..sql.as_ref().len().min(300)].escape_ascii()))
    }
}

fn row(body: &[u8]) -> Row {
    let count = u16::from_be_bytes(body[..2].try_into().unwrap());
    let mut rest = &body[2..];
    (0..count)
        .map(|_| {
            let length = i32::from_be_bytes(rest[..4].try_into().unwrap());
            rest = &rest[4..];
            let value = rest.get(..usize::try_from(length).ok()?)?.to_vec();
            rest = &rest[value.len()..];
            Some(value)
        })
        .collect()
}

fn fault(body: &[u8]) -> Fault {
    let mut fault = Fault::default();
    for field in body.split(|byte| *byte == 0).filter(|field| !field.is_empty()) {
        let text = field[1..].to_vec();
        match field[0] {
            b'C' => fault.sqlstate = String::from_utf8_lossy(&text).into_owned(),
            b'M' => fault.message = text,
            b'D' => fault.detail = text,
            b'H' => fault.hint = text,
            b'n' => fault.constraint = text,
            b'W' => fault.context = text,
            _ => {}
        }
    }
    fault
}
