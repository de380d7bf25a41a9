//! The frontend/backend protocol without a driver, for what no driver does: portals that are fetched in parts,
//! pipelines, messages out of order or cut short.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::common::limits::Bed;
use crate::common::{Server, wait_until};

/// A connection without a driver. Messages are collected and sent together.
pub struct Raw {
    pub stream: UnixStream,
    /// What a cancel request names.
    pub key: Vec<u8>,
    pub unsent: Vec<u8>,
}

/// What the server answered: one word for each message, several rows in a row as one.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Answer {
    pub words: Vec<String>,
    pub rows: usize,
    pub message: String,
    pub table: String,
    pub key: Vec<u8>,
}

impl Answer {
    pub fn trace(&self) -> String {
        self.words.join(" ")
    }

    fn push(&mut self, word: String) {
        if word != "D" || self.words.last().is_none_or(|last| last != "D") {
            self.words.push(word);
        }
    }

    fn take(&mut self, kind: u8, body: &[u8]) {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match kind {
            b'C' => self.push(text(&body[..body.len() - 1]).replace(' ', ":")),
            b'D' => {
                self.rows += 1;
                self.push("D".into());
            }
            b'E' => {
                for field in body.split(|byte| *byte == 0).filter(|field| !field.is_empty()) {
                    match field[0] {
                        b'C' => self.push(text(&field[1..])),
                        b'M' => self.message = text(&field[1..]),
                        b't' => self.table = text(&field[1..]),
                        _ => {}
                    }
                }
            }
            b'Z' => self.push(format!("Z{}", body[0] as char)),
            b'K' => self.key = body.to_vec(),
            b'N' | b'S' | b'A' | b'R' => {}
            other => self.push((other as char).into()),
        }
    }
}

impl Raw {
    pub fn to(bed: &Bed) -> Raw {
        Raw::connect("postgres", &bed.db().name)
    }

    pub fn connect(user: &str, database: &str) -> Raw {
        Raw::over(socket(), user, database)
    }

    /// Through a socket that leads to a server, if only behind a pool.
    pub fn over(stream: UnixStream, user: &str, database: &str) -> Raw {
        let mut raw = Raw { stream, key: Vec::new(), unsent: Vec::new() };
        let mut body = 196_608_u32.to_be_bytes().to_vec();
        for word in ["user", user, "database", database, ""] {
            body.extend_from_slice(&text(word));
        }
        raw.message(None, &body);
        let answer = raw.ready();
        assert_eq!(answer.trace(), "ZI");
        raw.key = answer.key;
        raw
    }

    pub fn message(&mut self, kind: Option<u8>, body: &[u8]) -> &mut Raw {
        let length = u32::try_from(body.len() + 4).unwrap();
        self.unsent.extend(kind);
        self.unsent.extend_from_slice(&length.to_be_bytes());
        self.unsent.extend_from_slice(body);
        self
    }

    pub fn send(&mut self) {
        let unsent = std::mem::take(&mut self.unsent);
        self.stream.write_all(&unsent).unwrap();
    }

    pub fn parse(&mut self, name: &str, sql: &str) -> &mut Raw {
        let body = [text(name), text(sql), vec![0, 0]].concat();
        self.message(Some(b'P'), &body)
    }

    pub fn bind(&mut self, portal: &str, statement: &str, parameters: &[&str]) -> &mut Raw {
        let values: Vec<&[u8]> = parameters.iter().map(|value| value.as_bytes()).collect();
        self.bind_in(0, portal, statement, &values)
    }

    /// Format 0 is text, 1 is binary.
    pub fn bind_in(&mut self, format: u16, portal: &str, statement: &str, parameters: &[&[u8]]) -> &mut Raw {
        let mut body = [text(portal), text(statement)].concat();
        body.extend_from_slice(&1_u16.to_be_bytes());
        body.extend_from_slice(&format.to_be_bytes());
        body.extend_from_slice(&u16::try_from(parameters.len()).unwrap().to_be_bytes());
        for value in parameters {
            body.extend_from_slice(&u32::try_from(value.len()).unwrap().to_be_bytes());
            body.extend_from_slice(value);
        }
        body.extend_from_slice(&[0, 0]);
        self.message(Some(b'B'), &body)
    }

    /// Zero rows are all of them.
    pub fn execute(&mut self, portal: &str, rows: u32) -> &mut Raw {
        let body = [text(portal), rows.to_be_bytes().to_vec()].concat();
        self.message(Some(b'E'), &body)
    }

    /// Parse, bind and execute without names.
    pub fn run(&mut self, sql: &str) -> &mut Raw {
        self.parse("", sql).bind("", "", &[]).execute("", 0)
    }

    pub fn open(&mut self, portal: &str, sql: &str) -> &mut Raw {
        self.parse("", sql).bind(portal, "", &[])
    }

    pub fn describe(&mut self, kind: char, name: &str) -> &mut Raw {
        let body = [vec![kind as u8], text(name)].concat();
        self.message(Some(b'D'), &body)
    }

    pub fn close(&mut self, portal: &str) -> &mut Raw {
        let body = [vec![b'P'], text(portal)].concat();
        self.message(Some(b'C'), &body)
    }

    pub fn simple(&mut self, sql: &str) -> &mut Raw {
        let body = text(sql);
        self.message(Some(b'Q'), &body)
    }

    /// A fast-path call with one integer.
    pub fn call(&mut self, function: u32, argument: i32) -> &mut Raw {
        let mut body = function.to_be_bytes().to_vec();
        body.extend_from_slice(&[0, 1, 0, 1, 0, 1, 0, 0, 0, 4]);
        body.extend_from_slice(&argument.to_be_bytes());
        body.extend_from_slice(&[0, 1]);
        self.message(Some(b'F'), &body)
    }

    /// Sends what was collected and reads until the last word is one that ends it.
    pub fn read(&mut self, ends: impl Fn(&str) -> bool) -> Answer {
        self.send();
        let mut answer = Answer::default();
        while !answer.words.last().is_some_and(|word| ends(word)) {
            let mut head = [0; 5];
            self.stream.read_exact(&mut head).unwrap_or_else(|error| panic!("{error} after {answer:?}"));
            let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
            let mut body = vec![0; usize::try_from(length).unwrap() - 4];
            self.stream.read_exact(&mut body).unwrap();
            answer.take(head[0], &body);
        }
        answer
    }

    /// Ends the pipeline and gives what the server answered to all of it.
    pub fn sync(&mut self) -> Answer {
        self.message(Some(b'S'), &[]);
        self.read(|word| word.starts_with('Z'))
    }

    /// The same for what ends by itself.
    pub fn ready(&mut self) -> Answer {
        self.read(|word| word.starts_with('Z'))
    }

    pub fn query(&mut self, sql: &str) -> String {
        self.simple(sql);
        self.ready().trace()
    }

    /// Flush: answers without an end to the pipeline, as far as a word of this kind.
    pub fn flush(&mut self, last: &str) -> Answer {
        self.message(Some(b'H'), &[]);
        self.read(|word| word.starts_with(last))
    }

    /// Three rows pass and four do not: nothing is left in the count, and nothing of it in the table.
    #[track_caller]
    pub fn assert_fresh(&mut self, bed: &mut Bed) {
        let before = bed.contents();
        assert_eq!(self.run("UPDATE t SET v = v WHERE id <= 3").sync().trace(), "1 2 UPDATE:3 ZI");
        assert_eq!(self.run("UPDATE t SET v = v WHERE id <= 4").sync().trace(), "1 2 WG001 ZI");
        assert_eq!(self.query("UPDATE t SET v = v WHERE id > 3"), "UPDATE:3 ZI");
        assert_eq!(bed.contents(), before);
    }

    /// Sends what was collected and leaves, as a client does that crashed.
    pub fn leave(mut self, bed: &mut Bed) {
        self.send();
        let pid = u32::from_be_bytes(self.key[..4].try_into().unwrap());
        drop(self);
        gone(bed, pid);
    }
}

pub fn gone(bed: &mut Bed, pid: u32) {
    wait_until(20, || bed.number(&format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}")) == 0);
}

pub fn socket() -> UnixStream {
    socket_of(Server::shared())
}

pub fn socket_of(server: &Server) -> UnixStream {
    let stream = UnixStream::connect(server.socket_dir().join(format!(".s.PGSQL.{}", server.port()))).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream
}

pub fn text(word: &str) -> Vec<u8> {
    [word.as_bytes(), &[0]].concat()
}
