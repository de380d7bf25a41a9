//! Tables as the generator of DDL knows them, and random statements that change them and their rows.

use postgres::Client;

use super::random::Random;

/// The tables that a world begins with. Every row has a number, in `id` and `uid`, that no other row of any table has.
pub const SETUP: &str = "
CREATE SCHEMA ddl;
CREATE TYPE ddl.pair AS (a int, b text);
CREATE TYPE ddl.mood AS ENUM ('sad', 'glad');
CREATE DOMAIN ddl.small AS int CHECK (VALUE < 1000000);
CREATE TABLE ddl.a (id int PRIMARY KEY, uid bigint NOT NULL, c1 int, c2 text, c3 ddl.pair);
CREATE TABLE ddl.b (uid bigint NOT NULL, c1 text, gone int, c2 numeric, id int PRIMARY KEY, c3 ddl.mood, c4 ddl.small);
ALTER TABLE ddl.b DROP gone;
CREATE TABLE ddl.kid (LIKE ddl.a INCLUDING ALL);
CREATE TABLE ddl.p (id int, r int, uid bigint NOT NULL, c1 text, c2 int, PRIMARY KEY (id, r)) PARTITION BY LIST (r);
CREATE TABLE ddl.p1 PARTITION OF ddl.p FOR VALUES IN (1);
CREATE TABLE ddl.p2 PARTITION OF ddl.p FOR VALUES IN (2);
CREATE TABLE ddl.p3 (c2 int, gone text, c1 text, uid bigint NOT NULL, r int NOT NULL, id int NOT NULL, PRIMARY KEY (id, r));
ALTER TABLE ddl.p3 DROP gone;
INSERT INTO ddl.a SELECT n, n, n, 'a' || n, (n, 'x')::ddl.pair FROM oracle.numbers(5) AS n;
INSERT INTO ddl.b (uid, c1, c2, id, c3, c4) SELECT n, n, n, n, 'sad', n FROM oracle.numbers(5) AS n;
INSERT INTO ddl.kid SELECT n, n, n, 'k' || n, (n, 'y')::ddl.pair FROM oracle.numbers(3) AS n;
INSERT INTO ddl.p SELECT n, n % 2 + 1, n, 'p' || n, n FROM oracle.numbers(6) AS n;
INSERT INTO ddl.p3 (c2, c1, uid, r, id) SELECT n, 'q' || n, n, 3, n FROM oracle.numbers(3) AS n;
TRUNCATE oracle.tags;
INSERT INTO oracle.tags SELECT attrelid, attnum, attname FROM pg_attribute JOIN pg_class AS c ON c.oid = attrelid
    WHERE relnamespace = 'ddl'::regnamespace AND attnum > 0 AND NOT attisdropped AND relkind IN ('r', 'p');
TRUNCATE oracle.first_names;
INSERT INTO oracle.first_names SELECT oid, relname FROM pg_class WHERE relnamespace = 'ddl'::regnamespace AND relkind IN ('r', 'p');
";

#[derive(Clone)]
pub struct Column {
    name: String,
    /// As `format_type` has it.
    of: String,
    /// What the column has been from the beginning; `id`, `uid` and `r` are not written.
    tag: String,
}

#[derive(Clone)]
pub struct Table {
    name: String,
    columns: Vec<Column>,
    /// The name of the table that it is a partition or a child of.
    parent: Option<String>,
    /// The value of `r` that all its rows have.
    region: Option<i32>,
    key: String,
    partitioned: bool,
}

/// All tables, as they will be after what was generated.
#[derive(Clone)]
pub struct Model {
    tables: Vec<Table>,
    attributes: Vec<String>,
    /// Places of the tables that most of a case is about.
    focus: Vec<usize>,
}

const LOAD: &str = "SELECT c.relname::text, c.relkind = 'p', h.relname::text, k.conname::text,
        array_agg(a.attname::text ORDER BY a.attnum), array_agg(format_type(a.atttypid, a.atttypmod) ORDER BY a.attnum),
        array_agg(coalesce(g.tag, '') ORDER BY a.attnum), f.name
    FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN oracle.tags AS g ON (g.relation, g.number) = (c.oid, a.attnum)
    LEFT JOIN oracle.first_names AS f ON f.relation = c.oid
    LEFT JOIN pg_inherits AS i ON i.inhrelid = c.oid LEFT JOIN pg_class AS h ON h.oid = i.inhparent
    LEFT JOIN pg_constraint AS k ON k.conrelid = c.oid AND k.contype = 'p'
    WHERE c.relnamespace = 'ddl'::regnamespace AND c.relkind IN ('r', 'p') GROUP BY c.oid, h.relname, k.conname, f.name
    ORDER BY c.oid";

/// What columns may become whatever they hold, and what with a value for all rows.
const WIDER: [&str; 4] = ["bigint", "numeric", "text", "character varying(40)"];
const TYPES: [&str; 8] =
    ["integer", "bigint", "numeric", "text", "character varying(40)", "ddl.pair", "ddl.mood", "jsonb"];

impl Model {
    pub fn load(client: &mut Client) -> Model {
        let rows = client.query(LOAD, &[]).expect("the tables");
        let tables = rows.iter().map(|row| {
            let (names, types, tags): (Vec<String>, Vec<String>, Vec<String>) = (row.get(4), row.get(5), row.get(6));
            let columns = names.into_iter().zip(types).zip(tags).map(|((name, of), tag)| Column { name, of, tag });
            let first: Option<String> = row.get(7);
            Table {
                name: row.get(0),
                columns: columns.collect(),
                parent: row.get(2),
                region: first.and_then(|name| name.strip_prefix('p').and_then(|number| number.parse().ok())),
                key: row.get::<_, Option<String>>(3).unwrap_or_default(),
                partitioned: row.get(1),
            }
        });
        let attributes = "SELECT a.attname::text FROM pg_attribute AS a JOIN pg_type AS t ON t.typrelid = a.attrelid
            WHERE t.oid = 'ddl.pair'::regtype AND NOT a.attisdropped ORDER BY attnum";
        let attributes = client.query(attributes, &[]).expect("the row type").iter().map(|row| row.get(0)).collect();
        Model { tables: tables.collect(), attributes, focus: Vec::new() }
    }

    /// Most of what follows is about one table, or one tree.
    pub fn focus(&mut self, random: &mut Random) {
        let place = random.below(self.tables.len());
        let is_tree = |table: &Table| table.partitioned || table.region.is_some();
        let tree = is_tree(&self.tables[place]);
        self.focus =
            (0..self.tables.len()).filter(|other| *other == place || tree && is_tree(&self.tables[*other])).collect();
    }

    fn place(&self, random: &mut Random) -> usize {
        if self.focus.is_empty() || random.one_in(5) {
            random.below(self.tables.len())
        } else {
            *random.pick(&self.focus)
        }
    }

    /// A value of a type, as SQL.
    fn value(&self, random: &mut Random, of: &str) -> String {
        let n = random.below(90) + 10;
        match of {
            "ddl.pair" => {
                let rest = ", NULL".repeat(self.attributes.len().saturating_sub(1));
                format!("ROW({n}{rest})::ddl.pair")
            }
            "ddl.mood" => format!("'{}'::ddl.mood", random.word(&["sad", "glad"])),
            "jsonb" => format!("'{{\"n\": {n}}}'::jsonb"),
            "text" | "character varying(40)" if random.one_in(2) => format!("'w{n}'"),
            "text" if random.one_in(9) => format!("repeat('long{n}', 800)"),
            "text" | "character varying(40)" => format!("'{n}'"),
            _ if random.one_in(12) => "NULL".into(),
            _ => n.to_string(),
        }
    }

    fn name(&self, random: &mut Random) -> String {
        format!("n{}", random.below(12))
    }

    /// The tables that a change of this one's columns goes on to, itself first.
    fn with_children(&self, place: usize) -> Vec<usize> {
        let name = &self.tables[place].name;
        let children = (0..self.tables.len()).filter(|other| self.tables[*other].parent.as_ref() == Some(name));
        [place].into_iter().chain(children).collect()
    }

    fn each(&mut self, place: usize, change: impl Fn(&mut Table)) {
        for place in self.with_children(place) {
            change(&mut self.tables[place]);
        }
    }

    /// Places of columns that may be written.
    fn free(&self, place: usize) -> Vec<usize> {
        let fixed = |column: &Column| matches!(column.tag.as_str(), "id" | "uid" | "r");
        (0..self.tables[place].columns.len()).filter(|column| !fixed(&self.tables[place].columns[*column])).collect()
    }

    fn named(&self, place: usize, tag: &str) -> String {
        let column = self.tables[place].columns.iter().find(|column| column.tag == tag);
        column.map_or_else(|| tag.to_owned(), |column| column.name.clone())
    }

    /// A write.
    pub fn write(&self, random: &mut Random) -> String {
        let place = self.place(random);
        let table = &self.tables[place];
        let (name, id) = (format!("ddl.{}", table.name), self.named(place, "id"));
        let most = random.below(4) + 1;
        let some = format!("WHERE {id} % {most} = {}", random.below(most));
        let free = self.free(place);
        match random.below(14) {
            0 => format!("TRUNCATE {name}"),
            1 | 2 => format!("DELETE FROM {name} {some}"),
            3 => self.insert(random, place),
            4 | 5 if table.partitioned || table.region.is_some() => {
                let r = self.named(place, "r");
                format!(
                    "UPDATE {name} SET {r} = CASE {r} WHEN 1 THEN 2 WHEN 2 THEN {} ELSE 1 END {some}",
                    random.below(3) + 1
                )
            }
            _ if free.is_empty() => format!("DELETE FROM {name} {some}"),
            _ => {
                let mut set: Vec<String> = Vec::new();
                for _ in 0..random.below(2) + 1 {
                    let column = &table.columns[*random.pick(&free)];
                    let own = matches!(column.of.as_str(), "integer" | "bigint" | "numeric") && random.one_in(2);
                    let value = if own { format!("{} + 1", column.name) } else { self.value(random, &column.of) };
                    if !set.iter().any(|known| known.starts_with(&format!("{} =", column.name))) {
                        set.push(format!("{} = {value}", column.name));
                    }
                }
                format!("UPDATE {name} SET {} {some}", set.join(", "))
            }
        }
    }

    fn insert(&self, random: &mut Random, place: usize) -> String {
        let table = &self.tables[place];
        let region = table.region.unwrap_or(random.below(2) as i32 + 1).to_string();
        let values = table.columns.iter().map(|column| match column.tag.as_str() {
            "id" | "uid" => "n".to_owned(),
            "r" => region.clone(),
            _ => self.value(random, &column.of),
        });
        let values: Vec<String> = values.collect();
        let names: Vec<&str> = table.columns.iter().map(|column| column.name.as_str()).collect();
        format!(
            "INSERT INTO ddl.{} ({}) SELECT {} FROM oracle.numbers(1) AS n",
            table.name,
            names.join(", "),
            values.join(", ")
        )
    }

    /// A change of a table or a type. What it says may be refused: then the model is read again.
    pub fn ddl(&mut self, random: &mut Random) -> String {
        let mut place = self.place(random);
        // What a partition or child has from above is changed there.
        if let Some(parent) = &self.tables[place].parent
            && !random.one_in(4)
        {
            place = self.tables.iter().position(|table| table.name == *parent).unwrap_or(place);
        }
        let name = format!("ddl.{}", self.tables[place].name);
        let free = self.free(place);
        let any = random.below(self.tables[place].columns.len());
        let new = self.name(random);
        match random.below(20) {
            0..3 if self.tables[place].columns.len() < 12 => {
                let of = random.word(&TYPES).to_owned();
                let default =
                    if random.one_in(2) { format!(" DEFAULT {}", self.value(random, &of)) } else { String::new() };
                let column = Column { name: new.clone(), of: of.clone(), tag: String::new() };
                self.each(place, |table| table.columns.push(column.clone()));
                format!("ALTER TABLE {name} ADD {new} {of}{default}")
            }
            3 | 4 if free.len() > 1 => {
                let gone = self.tables[place].columns[*random.pick(&free)].name.clone();
                self.each(place, |table| table.columns.retain(|column| column.name != gone));
                format!("ALTER TABLE {name} DROP {gone}")
            }
            5..8 => {
                let old = self.tables[place].columns[any].name.clone();
                self.rename(place, &old, &new);
                format!("ALTER TABLE {name} RENAME {old} TO {new}")
            }
            8..11 => {
                let other = random.below(self.tables[place].columns.len());
                let [one, other] = [any, other].map(|column| self.tables[place].columns[column].name.clone());
                if one == other {
                    return format!("ALTER TABLE {name} SET (autovacuum_enabled = off)");
                }
                for (old, new) in [(&one, "swap"), (&other, &one), (&"swap".to_owned(), &other)] {
                    self.rename(place, old, new);
                }
                format!(
                    "ALTER TABLE {name} RENAME {one} TO swap; ALTER TABLE {name} RENAME {other} TO {one};
                     ALTER TABLE {name} RENAME swap TO {other}"
                )
            }
            11..14 if !free.is_empty() => {
                let Column { name: column, of: was, .. } = self.tables[place].columns[*random.pick(&free)].clone();
                let of = random.word(&TYPES).to_owned();
                // Other values of the same type would look as if they had been written.
                let wider = of == was || WIDER.contains(&of.as_str()) && random.one_in(2);
                let using = if wider { String::new() } else { format!(" USING {}", self.value(random, &of)) };
                self.each(place, |table| {
                    table
                        .columns
                        .iter_mut()
                        .filter(|known| known.name == column)
                        .for_each(|known| known.of.clone_from(&of));
                });
                format!("ALTER TABLE {name} ALTER {column} DROP DEFAULT, ALTER {column} TYPE {of}{using}")
            }
            14 | 15 => self.link(random),
            16 => {
                let old = std::mem::replace(&mut self.tables[place].name, new.clone());
                let children = self.tables.iter_mut().filter(|table| table.parent.as_ref() == Some(&old));
                children.for_each(|table| table.parent = Some(new.clone()));
                format!("ALTER TABLE {name} RENAME TO {new}")
            }
            17 if self.tables[place].region.is_none() && !self.tables[place].partitioned => {
                let key = self.named(place, random.word(&["id", "uid"]));
                let old = std::mem::replace(&mut self.tables[place].key, format!("key_{new}"));
                format!("ALTER TABLE {name} DROP CONSTRAINT {old}, ADD CONSTRAINT key_{new} PRIMARY KEY ({key})")
            }
            18 => self.type_(random),
            19 if self.tables[place].region.is_none() && !self.tables[place].partitioned && random.one_in(3) => {
                let of = |tag: &str, of: &str| Column { name: tag.into(), of: of.into(), tag: tag.into() };
                let table = &mut self.tables[place];
                table.columns = vec![of("uid", "bigint"), of("id", "integer"), of("c1", "text")];
                table.columns[2].tag.clear();
                (table.parent, table.key) = (None, format!("key_{new}"));
                format!(
                    "DROP TABLE {name}; CREATE TABLE {name} (uid bigint NOT NULL, id int, c1 text, CONSTRAINT key_{new} PRIMARY KEY (id));
                     INSERT INTO {name} SELECT n, n, 'again' FROM oracle.numbers(3) AS n"
                )
            }
            _ => random
                .word(&["ANALYZE #", "ALTER TABLE # SET (fillfactor = 90)", "COMMENT ON TABLE # IS 'x'"])
                .replace('#', &name),
        }
    }

    fn rename(&mut self, place: usize, old: &str, new: &str) {
        self.each(place, |table| {
            table
                .columns
                .iter_mut()
                .filter(|column| column.name == old)
                .for_each(|column| column.name = new.to_owned());
        });
    }

    /// Attaches, detaches, or makes a table a child of another one.
    fn link(&mut self, random: &mut Random) -> String {
        let top = |model: &Model, partitioned: bool| {
            let is_top = |table: &&Table| {
                table.partitioned == partitioned
                    && (partitioned || table.columns.iter().all(|column| column.tag != "r") && table.parent.is_none())
            };
            model.tables.iter().find(is_top).map(|table| table.name.clone())
        };
        let place = self.place(random);
        let table = self.tables[place].clone();
        let name = format!("ddl.{}", table.name);
        if let Some(parent) = table.parent {
            self.tables[place].parent = None;
            return match table.region {
                Some(_) => format!("ALTER TABLE ddl.{parent} DETACH PARTITION {name}"),
                None => format!("ALTER TABLE {name} NO INHERIT ddl.{parent}"),
            };
        }
        let Some(parent) = top(self, table.region.is_some()).filter(|parent| *parent != table.name) else {
            return format!("ANALYZE {name}");
        };
        self.tables[place].parent = Some(parent.clone());
        match table.region {
            Some(region) => format!("ALTER TABLE ddl.{parent} ATTACH PARTITION {name} FOR VALUES IN ({region})"),
            None => format!("ALTER TABLE {name} INHERIT ddl.{parent}"),
        }
    }

    /// Changes a type that columns have.
    fn type_(&mut self, random: &mut Random) -> String {
        let new = self.name(random);
        match random.below(4) {
            0 => {
                self.attributes.push(new.clone());
                format!("ALTER TYPE ddl.pair ADD ATTRIBUTE {new} int")
            }
            1 if self.attributes.len() > 1 => {
                let gone = self.attributes.pop().unwrap_or_default();
                format!("ALTER TYPE ddl.pair DROP ATTRIBUTE {gone}")
            }
            2 => {
                let first = &mut self.attributes[0];
                let old = std::mem::replace(first, new.clone());
                format!("ALTER TYPE ddl.pair RENAME ATTRIBUTE {old} TO {new}")
            }
            _ => format!("ALTER TYPE ddl.mood ADD VALUE IF NOT EXISTS 'm{new}'"),
        }
    }
}
