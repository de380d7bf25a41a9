//! Random commands that write, and transactions made of them.

use super::random::Random;

/// What may be written to, and what PostgreSQL lets one do with it.
struct Target {
    name: &'static str,
    label: &'static str,
    /// The columns of a unique index, for ON CONFLICT.
    unique: Option<&'static str>,
    merge: bool,
    /// Neither rules that give several commands, nor views that RETURNING does not go through.
    single: bool,
    /// Further settings of an UPDATE that are of interest here.
    sets: &'static [&'static str],
}

const fn table(name: &'static str, label: &'static str, sets: &'static [&'static str]) -> Target {
    Target { name, label, unique: Some("id"), merge: true, single: true, sets }
}

const TARGETS: &[Target] = &[
    table("fuzz.alpha", "plain table", &[]),
    table("fuzz.alpha", "plain table", &["id = x.id + 100"]),
    table("fuzz.beta", "plain table", &[]),
    table("fuzz.par", "foreign key", &["id = x.id + 200"]),
    table("fuzz.kid", "foreign key", &["id = x.id + 300", "ref = NULL"]),
    table("fuzz.orphan", "foreign key", &["ref = x.id % 8 + 1"]),
    table("fuzz.tree", "self-reference", &["id = x.id + 400", "ref = NULL"]),
    table("fuzz.trig", "before trigger", &[]),
    table("fuzz.trig", "before trigger", &[]),
    table("fuzz.after", "after trigger", &[]),
    table("fuzz.after", "after trigger", &[]),
    table("fuzz.trans", "transition tables", &[]),
    table("fuzz.sink", "plain table", &[]),
    table("fuzz.late", "deferred trigger", &[]),
    Target { name: "fuzz.part", unique: Some("id, region, bucket"), ..table("fuzz.part", "partitions", MOVES) },
    Target { name: "fuzz.part", unique: Some("id, region, bucket"), ..table("fuzz.part", "partitions", MOVES) },
    Target { name: "fuzz.part_x", unique: Some("id, region, bucket"), ..table("fuzz.part_x", "partitions", BUCKETS) },
    Target { name: "fuzz.part_y", unique: Some("id, region, bucket"), ..table("fuzz.part_y", "partitions", BUCKETS) },
    Target { unique: None, ..table("fuzz.inh", "inheritance", &[]) },
    Target { unique: None, ..table("fuzz.inh_one", "inheritance", &["more = 'less'"]) },
    table("fuzz.inh_one_more", "inheritance", &[]),
    Target { merge: false, ..table("fuzz.plain_view", "view", &[]) },
    Target { merge: false, ..table("fuzz.view_on_view", "view on a view", &[]) },
    Target { merge: false, unique: None, ..table("fuzz.part_view", "view", MOVES) },
    Target { merge: false, unique: None, ..table("fuzz.joined", "instead of trigger", &[]) },
    Target { merge: false, unique: None, single: false, ..table("fuzz.rule_view", "instead rule", &[]) },
    Target { merge: false, unique: None, single: false, ..table("fuzz.ruled", "also rule", &[]) },
];

/// Only where nothing is rolled back: their counters could not tell.
const BARE: &[Target] = &[
    table("bare.flat", "no trigger", &["id = x.id + 500"]),
    table("bare.flat", "no trigger", &[]),
    Target { unique: Some("id, bucket"), ..table("bare.split", "no trigger", BUCKETS) },
    Target { unique: None, ..table("bare.split_1", "no trigger", &[]) },
];

const MOVES: &[&str] =
    &["region = 'y'", "bucket = 22 - x.bucket", "region = CASE WHEN x.id % 2 = 0 THEN 'x' ELSE 'n' END"];
const BUCKETS: &[&str] = &["bucket = 15", "bucket = 19 - x.bucket"];

/// A table, its label, and what moves its rows.
type Meeting = (&'static str, &'static str, &'static [&'static str]);

const SOURCES: &[&str] = &[
    "fuzz.alpha",
    "fuzz.beta",
    "fuzz.part",
    "fuzz.tree",
    "fuzz.plain_view",
    "fuzz.joined",
    "fuzz.sink",
    "(SELECT i AS id, i % 7 AS v, i % 5 AS w FROM generate_series(1, 12) AS i)",
    "(VALUES (1, 2, 3), (5, 6, 7), (11, 0, 1), (44, 4, 4)) ",
];

const FUNCTIONS: &[&str] = &["loops", "by_sql", "walks", "dynamic", "definer"];
const FUNCTIONS_WITH_EXCEPTIONS: &[&str] = &["tries", "fails_midway"];

/// Whether several rows of a source may have the same id.
fn may_repeat(source: &str) -> bool {
    source.contains("fuzz.part") || source.starts_with('w') || source.starts_with("(SELECT * FROM w")
}

/// A command of the client.
pub struct Command {
    pub tag: String,
    /// With the tag in a comment, so that its events can be told.
    pub sql: String,
    /// What it is made of.
    pub labels: Vec<&'static str>,
}

pub enum Step {
    Command(Command),
    /// SAVEPOINT and the like, which changes no row itself.
    Control(String),
}

/// One transaction.
pub struct Case {
    pub tag: String,
    /// BEGIN and settings.
    pub begin: String,
    pub steps: Vec<Step>,
    /// Something inside a command may be rolled back while the command goes on.
    pub has_exceptions: bool,
    /// A command may take the guard's own errors for its own.
    pub swallows: bool,
    pub rolls_back: bool,
    pub truncates: bool,
    /// What it does depends on the order in which a plan comes upon rows.
    pub is_ambiguous: bool,
}

impl Case {
    pub fn commands(&self) -> impl Iterator<Item = &Command> {
        self.steps.iter().filter_map(|step| match step {
            Step::Command(command) => Some(command),
            Step::Control(_) => None,
        })
    }

    /// Rules turn some command into several.
    pub fn has_rules(&self) -> bool {
        self.commands().any(|command| command.labels.iter().any(|label| label.ends_with(" rule")))
    }

    /// The whole transaction, as psql takes it.
    pub fn script(&self) -> String {
        let mut script = format!("{};\n", self.begin);
        for step in &self.steps {
            match step {
                Step::Command(command) => {
                    script += &format!("SET LOCAL fuzz.tag = '{}'; {};\n", command.tag, command.sql);
                }
                Step::Control(sql) => script += &format!("{sql};\n"),
            }
        }
        script + &format!("SET LOCAL fuzz.tag = '{0}_c';\n/*{0}_c*/ COMMIT;\n", self.tag)
    }
}

pub struct Generator {
    pub random: Random,
    cases: usize,
    prefix: &'static str,
    labels: Vec<&'static str>,
    bare: bool,
    /// Exception blocks are allowed, and whether there are some.
    may_roll_back: bool,
    has_exceptions: bool,
    swallows: bool,
    is_ambiguous: bool,
}

impl Generator {
    pub fn new(seed: u64, prefix: &'static str) -> Generator {
        Generator {
            random: Random::new(seed),
            cases: 0,
            prefix,
            labels: Vec::new(),
            bare: false,
            may_roll_back: false,
            has_exceptions: false,
            swallows: false,
            is_ambiguous: false,
        }
    }

    pub fn case(&mut self) -> Case {
        self.cases += 1;
        let tag = format!("{}{}", self.prefix, self.cases);
        self.bare = self.random.one_in(4);
        self.may_roll_back = !self.bare;
        self.has_exceptions = false;
        self.swallows = false;
        self.is_ambiguous = false;
        let mut case = Case {
            begin: self.begin(),
            steps: Vec::new(),
            has_exceptions: false,
            swallows: false,
            rolls_back: false,
            truncates: false,
            is_ambiguous: false,
            tag,
        };
        match self.random.below(20) {
            0..=3 => self.transaction(&mut case),
            4 => self.prepared(&mut case),
            5 => self.cursor(&mut case),
            6 if self.random.one_in(3) => self.truncate(&mut case),
            _ => {
                let sql = self.command();
                self.push(&mut case, sql);
            }
        }
        case.has_exceptions = self.has_exceptions;
        case.swallows = self.swallows;
        case.is_ambiguous = self.is_ambiguous;
        case
    }

    fn push(&mut self, case: &mut Case, sql: String) {
        let tag = format!("{}_{}", case.tag, case.commands().count());
        let labels = std::mem::take(&mut self.labels);
        case.steps.push(Step::Command(Command { sql: format!("/*{tag}*/ {sql}"), tag, labels }));
    }

    fn begin(&mut self) -> String {
        let isolation = ["", "", "", " ISOLATION LEVEL REPEATABLE READ", " ISOLATION LEVEL SERIALIZABLE"];
        let plans = [
            "",
            "",
            "; SET LOCAL enable_hashjoin = off",
            "; SET LOCAL enable_seqscan = off",
            "; SET LOCAL enable_nestloop = off",
            "; SET LOCAL plan_cache_mode = force_generic_plan",
            "; SET LOCAL enable_indexscan = off; SET LOCAL enable_bitmapscan = off",
        ];
        format!("BEGIN{}{}", self.random.pick(&isolation), self.random.pick(&plans))
    }

    /// Several commands, with savepoints.
    fn transaction(&mut self, case: &mut Case) {
        let mut savepoints: Vec<usize> = Vec::new();
        let mut next = 1;
        let mut left = 2 + self.random.below(5);
        while left > 0 {
            match self.random.below(if self.may_roll_back { 8 } else { 4 }) {
                0..=3 => {
                    self.labels.push("transaction");
                    let sql = if self.random.one_in(25) {
                        case.truncates = true;
                        self.truncation()
                    } else {
                        self.command()
                    };
                    self.push(case, sql);
                    left -= 1;
                }
                4 | 5 => {
                    case.steps.push(Step::Control(format!("SAVEPOINT s{next}")));
                    savepoints.push(next);
                    next += 1;
                }
                6 if !savepoints.is_empty() => {
                    let at = self.random.below(savepoints.len());
                    case.steps.push(Step::Control(format!("ROLLBACK TO s{}", savepoints[at])));
                    savepoints.truncate(at + 1);
                    case.rolls_back = true;
                }
                7 if !savepoints.is_empty() => {
                    let at = self.random.below(savepoints.len());
                    case.steps.push(Step::Control(format!("RELEASE s{}", savepoints[at])));
                    savepoints.truncate(at);
                }
                _ => {}
            }
        }
    }

    fn prepared(&mut self, case: &mut Case) {
        let target = self.target(true, true);
        let name = format!("p_{}", case.tag);
        let sql = if self.random.one_in(2) {
            format!("UPDATE {} AS x SET v = $1 WHERE x.id % 8 = $1", target.name)
        } else {
            let other = self.dml(target, None, false);
            format!("WITH w AS (DELETE FROM fuzz.sink WHERE id = $1 RETURNING id) {other}")
        };
        self.labels.clear();
        case.steps.push(Step::Control(format!("PREPARE {name} (int) AS {sql}")));
        for _ in 0..1 + self.random.below(3) {
            self.labels.extend(["prepared", target.label]);
            let value = self.random.below(8);
            self.push(case, format!("EXECUTE {name}({value})"));
        }
        case.steps.push(Step::Control(format!("DEALLOCATE {name}")));
    }

    fn cursor(&mut self, case: &mut Case) {
        let name = *self.random.pick(&["fuzz.alpha", "fuzz.part", "fuzz.inh", "fuzz.trig", "fuzz.after", "fuzz.par"]);
        let predicate = self.predicate("x");
        let writes = self.random.one_in(3);
        let query = if writes {
            let function = self.random.pick(FUNCTIONS);
            format!("SELECT fuzz.{function}(x.id) FROM {name} AS x WHERE x.id < 6")
        } else {
            format!("SELECT x.id FROM {name} AS x WHERE {predicate} FOR UPDATE")
        };
        case.steps.push(Step::Control(format!("DECLARE c CURSOR FOR {query}")));
        for _ in 0..1 + self.random.below(3) {
            let fetch = format!("FETCH {} FROM c", 1 + self.random.below(2));
            self.labels.push("cursor");
            self.push(case, fetch);
            let between = if writes {
                self.command()
            } else if self.random.one_in(3) {
                format!("DELETE FROM {name} WHERE CURRENT OF c")
            } else {
                format!("UPDATE {name} SET v = v + 1 WHERE CURRENT OF c")
            };
            self.labels.push("cursor");
            self.push(case, between);
        }
        case.steps.push(Step::Control("CLOSE c".to_owned()));
    }

    fn truncate(&mut self, case: &mut Case) {
        case.truncates = true;
        let sql = self.truncation();
        self.push(case, sql);
    }

    fn truncation(&mut self) -> String {
        self.labels.push("truncate");
        let tables = [
            "fuzz.beta, fuzz.sink",
            "fuzz.part",
            "fuzz.part_x",
            "fuzz.part_z, fuzz.part",
            "fuzz.inh",
            "ONLY fuzz.inh",
            "fuzz.grandkid",
            "fuzz.par CASCADE",
            "fuzz.kid CASCADE",
            "fuzz.inh_one, fuzz.inh",
            "fuzz.tree",
        ];
        format!("TRUNCATE {}", self.random.pick(&tables))
    }

    /// A command that can stand alone.
    fn command(&mut self) -> String {
        match self.random.below(20) {
            0..=8 => {
                let target = self.target(false, false);
                self.dml(target, None, self.random_returning(target))
            }
            9..=12 => self.with(),
            13 | 14 => self.select(),
            15..=18 => self.block(),
            _ => {
                let target = self.target(false, false);
                let sql = self.dml(target, None, false);
                self.labels.push("explain analyze");
                format!("EXPLAIN ANALYZE {sql}")
            }
        }
    }

    fn random_returning(&self, target: &Target) -> bool {
        target.single && self.cases.is_multiple_of(3)
    }

    fn target(&mut self, single: bool, any: bool) -> &'static Target {
        loop {
            let all = if self.bare && (any || self.random.one_in(2)) { BARE } else { TARGETS };
            let target = self.random.pick(all);
            if target.single || !single {
                return target;
            }
        }
    }

    fn dml(&mut self, target: &'static Target, from: Option<&str>, returning: bool) -> String {
        self.labels.push(target.label);
        let mut sql = match self.random.below(16) {
            0..=6 => self.update(target, from),
            7..=10 => self.delete(target, from),
            11 | 12 if target.merge && from.is_none() && !returning && target.single => return self.merge(target),
            13..=15 if target.unique.is_some() => self.upsert(target, from),
            _ => self.update(target, from),
        };
        if returning {
            sql += " RETURNING x.id, x.v, x.w";
        }
        sql
    }

    fn update(&mut self, target: &'static Target, from: Option<&str>) -> String {
        self.labels.push("update");
        let only = if target.label == "inheritance" && self.random.one_in(3) { "ONLY " } else { "" };
        let source = self.source(from, 2);
        let mut set = if !target.sets.is_empty() && self.random.one_in(2) {
            let set = *self.random.pick(target.sets);
            if matches!(target.label, "partitions") {
                self.labels.push("row movement");
            }
            set.to_owned()
        } else {
            let value = self.value("x", source.is_some());
            self.is_ambiguous |= value.contains("y.") && source.as_deref().is_some_and(may_repeat);
            format!("v = {value}")
        };
        if self.random.one_in(3) {
            set += ", w = x.w + 1";
        }
        let predicate = self.narrowing(target);
        match source {
            Some(source) => {
                let join = self.random.pick(&["x.id = y.id", "x.id % 7 = y.id", "x.id = y.id + 1"]);
                format!("UPDATE {only}{} AS x SET {set} FROM {source} AS y WHERE {join} AND {predicate}", target.name)
            }
            None => format!("UPDATE {only}{} AS x SET {set} WHERE {predicate}", target.name),
        }
    }

    fn delete(&mut self, target: &'static Target, from: Option<&str>) -> String {
        self.labels.push("delete");
        let only = if target.label == "inheritance" && self.random.one_in(3) { "ONLY " } else { "" };
        let predicate = self.narrowing(target);
        match self.source(from, 3) {
            Some(source) => {
                format!("DELETE FROM {only}{} AS x USING {source} AS y WHERE x.id = y.id AND {predicate}", target.name)
            }
            None => format!("DELETE FROM {only}{} AS x WHERE {predicate}", target.name),
        }
    }

    fn upsert(&mut self, target: &'static Target, from: Option<&str>) -> String {
        self.labels.push("on conflict");
        let unique = target.unique.unwrap_or("id");
        let more = match unique {
            "id, region, bucket" if target.name.ends_with("_y") => (", region, bucket", ", 'y', y.id % 20"),
            "id, region, bucket" if target.name.ends_with("_x") => (", region, bucket", ", 'x', y.id % 20"),
            "id, region, bucket" => (", region, bucket", ", (ARRAY['x', 'y', 'x', 'q'])[y.id % 4 + 1], y.id % 20"),
            "id, bucket" => (", bucket", ", y.id % 20"),
            _ => ("", ""),
        };
        let source = match from {
            Some(name) => name.to_owned(),
            None => (*self.random.pick(SOURCES)).to_owned(),
        };
        self.is_ambiguous |= may_repeat(&source);
        let predicate = self.predicate("y");
        let action = *self.random.pick(&[
            "NOTHING",
            "UPDATE SET v = EXCLUDED.v + 1",
            "UPDATE SET v = EXCLUDED.v + 1",
            "UPDATE SET w = x.w + 1 WHERE x.v % 2 = 0",
            "UPDATE SET (v, w) = (SELECT EXCLUDED.w, count(*) FROM fuzz.beta WHERE v = 1)",
        ]);
        format!(
            "INSERT INTO {} AS x (id, v, w{}) SELECT y.id + {}, y.v, y.w{} FROM {source} AS y (id, v, w) WHERE {predicate} \
             ON CONFLICT ({unique}) DO {action}",
            target.name,
            more.0,
            self.random.pick(&["0", "0", "0", "1", "20"]),
            more.1,
        )
    }

    fn merge(&mut self, target: &'static Target) -> String {
        self.labels.push("merge");
        let source = *self.random.pick(&["fuzz.alpha", "fuzz.beta", "fuzz.sink", SOURCES[7], SOURCES[8]]);
        let on = if target.label == "partitions" { "x.id = y.id AND x.v >= 0" } else { "x.id = y.id" };
        let mut sql = format!("MERGE INTO {} AS x USING {source} AS y (id, v, w) ON {on}", target.name);
        for _ in 0..1 + self.random.below(3) {
            let condition = self.random.pick(&["", " AND x.v % 2 = 0", " AND y.v > 3", " AND x.id > y.w"]);
            let move_ = target.sets.first().filter(|_| self.random.one_in(3));
            let action = match self.random.below(4) {
                0 => "DELETE".to_owned(),
                1 => "DO NOTHING".to_owned(),
                _ => format!("UPDATE SET {}", move_.copied().unwrap_or("v = y.v + x.w")),
            };
            sql += &format!(" WHEN MATCHED{condition} THEN {action}");
            if condition.is_empty() {
                break;
            }
        }
        if self.random.one_in(2) {
            sql += match target.name {
                "fuzz.part_y" => " WHEN NOT MATCHED THEN INSERT (id, v, w, region) VALUES (y.id + 600, y.v, y.w, 'y')",
                "bare.split_1" => " WHEN NOT MATCHED THEN DO NOTHING",
                _ => " WHEN NOT MATCHED AND y.id % 3 = 0 THEN INSERT (id, v, w) VALUES (y.id + 600, y.v, y.w)",
            };
        }
        sql
    }

    /// Several writing branches, whose results are used or not.
    fn with(&mut self) -> String {
        if self.random.one_in(3) {
            return self.meeting();
        }
        let mut branches = Vec::new();
        let mut names: Vec<String> = Vec::new();
        for n in 0..1 + self.random.below(3) {
            let target = self.target(true, false);
            let returning = self.random.one_in(4);
            let from = (!names.is_empty() && self.random.one_in(2)).then(|| self.random.pick(&names).clone());
            let mut sql = self.dml_in_with(target, from.as_deref());
            if !returning || n == 0 {
                sql += " RETURNING x.id, x.v, x.w";
                names.push(format!("w{n}"));
            }
            branches.push(format!("w{n} AS ({sql})"));
        }
        let from = self.random.pick(&names).clone();
        self.labels.push("writing with");
        let last = match self.random.below(4) {
            0 => format!("SELECT count(*) FROM {from}"),
            1 => "SELECT 1".to_owned(),
            2 => format!("SELECT * FROM {from} AS y LIMIT 1"),
            _ => {
                let target = self.target(true, false);
                let from = self.random.one_in(2).then_some(from.as_str());
                self.dml_in_with(target, from)
            }
        };
        format!("WITH {} {last}", branches.join(", "))
    }

    /// Writing branches that are given each other's rows of one partitioned table, of which PostgreSQL lets one branch
    /// change each row, whichever comes first.
    fn meeting(&mut self) -> String {
        self.labels.push("meeting branches");
        let targets: &[Meeting] = if self.bare {
            &[
                ("bare.split", "no trigger", BUCKETS),
                ("bare.split", "no trigger", BUCKETS),
                ("bare.split_1", "no trigger", &[]),
            ]
        } else {
            &[
                ("fuzz.part", "partitions", MOVES),
                ("fuzz.part", "partitions", MOVES),
                ("fuzz.part_x", "partitions", BUCKETS),
                ("fuzz.part_y", "partitions", BUCKETS),
                ("fuzz.part_view", "view", MOVES),
            ]
        };
        let mut branches: Vec<String> = Vec::new();
        for n in 0..2 + self.random.below(2) {
            let target = *self.random.pick(targets);
            let given = (n > 0).then(|| format!("w{}", self.random.below(n)));
            let sql = self.meets(target, given.as_deref());
            branches.push(format!("w{n} AS ({sql} RETURNING x.id, x.v, x.w)"));
        }
        let given = format!("w{}", self.random.below(branches.len()));
        let target = *self.random.pick(targets);
        let last = match self.random.below(7) {
            0 => "SELECT 1".to_owned(),
            1 => format!("SELECT count(*) FROM {given}"),
            2 => "SELECT * FROM w0 JOIN w1 USING (id) LIMIT 2".to_owned(),
            3 | 4 if target.1 != "view" => self.merges(target, &given),
            _ => self.meets(target, Some(&given)),
        };
        format!("WITH {} {last}", branches.join(", "))
    }

    /// A branch: all that it changes, or what has to do with the rows of another branch.
    fn meets(&mut self, (name, label, moves): Meeting, given: Option<&str>) -> String {
        self.labels.push(label);
        let join = *self.random.pick(&[
            "x.id = y.id",
            "x.id = y.id",
            "x.id = y.id + 1",
            "x.id <= y.id",
            "x.id % 7 = y.id % 7",
        ]);
        let predicate = self.predicate("x");
        let set = self.moving(moves);
        match (given, self.random.below(6)) {
            (None, 0) => format!("DELETE FROM {name} AS x WHERE {predicate}"),
            (None, _) => format!("UPDATE {name} AS x SET {set} WHERE {predicate}"),
            (Some(given), 0 | 1) => format!("DELETE FROM {name} AS x USING {given} AS y WHERE {join} AND {predicate}"),
            (Some(given), 2) => {
                format!(
                    "UPDATE {name} AS x SET {set} WHERE NOT EXISTS (SELECT FROM {given} AS y WHERE {join}) AND {predicate}"
                )
            }
            (Some(given), _) => format!("UPDATE {name} AS x SET {set} FROM {given} AS y WHERE {join} AND {predicate}"),
        }
    }

    fn merges(&mut self, (name, label, moves): Meeting, given: &str) -> String {
        self.labels.extend([label, "merge"]);
        let on = *self.random.pick(&["x.id = y.id", "x.id = y.id + 1", "x.id = y.id AND x.v >= 0"]);
        let condition = *self.random.pick(&["", " AND x.v % 2 = 0", " AND x.id > (SELECT min(id) FROM w0)"]);
        let action =
            if self.random.one_in(3) { "DELETE".to_owned() } else { format!("UPDATE SET {}", self.moving(moves)) };
        let mut sql =
            format!("MERGE INTO {name} AS x USING {given} AS y ON {on} WHEN MATCHED{condition} THEN {action}");
        if !condition.is_empty() && self.random.one_in(2) {
            sql += &format!(" WHEN MATCHED THEN UPDATE SET {}", self.moving(moves));
        }
        sql
    }

    /// What a branch sets: mostly what moves a row to another partition.
    fn moving(&mut self, moves: &[&'static str]) -> &'static str {
        if moves.is_empty() || self.random.one_in(3) {
            return "v = x.v + 1";
        }
        self.labels.push("row movement");
        self.random.word(moves)
    }

    /// An UPDATE, DELETE or INSERT; a MERGE takes neither RETURNING nor a place in a WITH.
    fn dml_in_with(&mut self, target: &'static Target, from: Option<&str>) -> String {
        self.labels.push(target.label);
        match self.random.below(8) {
            0..=3 => self.update(target, from),
            4 if target.unique.is_some() => self.upsert(target, from),
            _ => self.delete(target, from),
        }
    }

    /// A SELECT that calls what writes.
    fn select(&mut self) -> String {
        self.labels.push("function");
        let function = self.function();
        let predicate = self.predicate("x");
        match self.random.below(6) {
            0 => format!("SELECT fuzz.{function}({})", self.random.below(40)),
            1 => format!("SELECT fuzz.{function}(x.id) FROM fuzz.beta AS x WHERE {predicate} AND x.id % 9 = 0"),
            2 => format!("SELECT count(fuzz.{function}(i)) FROM generate_series(1, {}) AS i", 1 + self.random.below(3)),
            3 => {
                "SELECT x.id, r FROM fuzz.tree AS x, LATERAL fuzz.rows_by_sql(x.id) AS r WHERE x.id % 13 = 2".to_owned()
            }
            4 => {
                let other = self.function();
                format!("SELECT fuzz.{function}(1), fuzz.{other}(2) WHERE fuzz.loops(3) > 0")
            }
            _ => format!("SELECT x.id FROM fuzz.par AS x WHERE x.id < 4 ORDER BY fuzz.{function}(x.id)"),
        }
    }

    fn function(&mut self) -> &'static str {
        if self.may_roll_back && self.random.one_in(3) {
            self.has_exceptions = true;
            self.labels.push("exception block");
            self.random.word(FUNCTIONS_WITH_EXCEPTIONS)
        } else {
            self.random.word(FUNCTIONS)
        }
    }

    fn block(&mut self) -> String {
        self.labels.push("do block");
        let body = self.items(3);
        format!("DO $do$ DECLARE r record; BEGIN {body} END $do$")
    }

    fn items(&mut self, depth: usize) -> String {
        (0..1 + self.random.below(2)).map(|_| self.item(depth)).collect()
    }

    fn item(&mut self, depth: usize) -> String {
        match self.random.below(if depth > 0 { 10 } else { 5 }) {
            0..=2 => {
                let target = self.target(false, false);
                self.dml(target, None, false) + "; "
            }
            3 => {
                let function = self.function();
                format!("PERFORM fuzz.{function}({}); ", self.random.below(30))
            }
            4 => {
                let target = self.target(true, false);
                let sql = self.dml(target, None, false);
                format!("EXECUTE $ex${sql}$ex$; ")
            }
            5 => {
                let body = self.items(depth - 1);
                format!("FOR turn IN 1..{} LOOP {body} END LOOP; ", 1 + self.random.below(3))
            }
            6 => {
                let predicate = self.predicate("x");
                let target = self.target(false, true);
                self.labels.push(target.label);
                format!(
                    "FOR r IN SELECT x.id FROM fuzz.alpha AS x WHERE {predicate} ORDER BY x.id LIMIT 5 LOOP \
                     UPDATE {} SET w = w + 1 WHERE id = r.id; END LOOP; ",
                    target.name
                )
            }
            _ if !self.may_roll_back => String::from("NULL; "),
            _ => {
                self.has_exceptions = true;
                self.labels.push("exception block");
                let body = self.items(depth - 1);
                let end = *self.random.pick(&[
                    "RAISE EXCEPTION 'back'; ",
                    "PERFORM 1 / 0; ",
                    "UPDATE fuzz.alpha SET w = 7 / (id - 8); ",
                    "",
                ]);
                let caught = if self.random.one_in(4) {
                    self.swallows = true;
                    "OTHERS"
                } else {
                    "raise_exception OR division_by_zero"
                };
                let handler = if self.random.one_in(2) { self.items(depth - 1) } else { "NULL; ".to_owned() };
                format!("BEGIN {body}{end}EXCEPTION WHEN {caught} THEN {handler}END; ")
            }
        }
    }

    /// What to join with, once in so many times, or always what is given.
    fn source(&mut self, from: Option<&str>, times: usize) -> Option<String> {
        match from {
            Some(name) => Some(format!("(SELECT * FROM {name})")),
            None if self.random.one_in(times) => {
                let source = self.random.pick(SOURCES);
                Some(format!("(SELECT * FROM {source} AS s (id, v, w))"))
            }
            None => None,
        }
    }

    fn value(&mut self, x: &str, joined: bool) -> String {
        match self.random.below(8) {
            0 if joined => "y.v".to_owned(),
            1 if joined => format!("y.id + {x}.w"),
            2 => self.random.below(60).to_string(),
            3 => format!("(SELECT max(s.v) FROM fuzz.beta AS s WHERE s.id = {x}.id)"),
            4 => format!("CASE WHEN {x}.id % 3 = 0 THEN {x}.v ELSE {x}.w END"),
            5 => format!("coalesce({x}.v, 0) - 3"),
            _ => format!("{x}.v + 1"),
        }
    }

    /// A condition on the target, or the rows that a LIMIT chooses.
    fn narrowing(&mut self, target: &Target) -> String {
        let predicate = self.predicate("x");
        if target.unique != Some("id") || !target.merge || !self.random.one_in(8) {
            return predicate;
        }
        self.labels.push("limit by ctid");
        let limit = 1 + self.random.below(9);
        format!(
            "x.ctid = ANY (ARRAY(SELECT x.ctid FROM {} AS x WHERE {predicate} ORDER BY x.id LIMIT {limit}))",
            target.name
        )
    }

    fn predicate(&mut self, x: &str) -> String {
        let n = self.random.below(40);
        match self.random.below(14) {
            0 | 1 => format!("{x}.id BETWEEN {n} AND {}", n + 6),
            2 => format!("{x}.id % {} = {}", 2 + n % 5, n % 2),
            3 => format!("{x}.v < {n}"),
            4 => format!("{x}.id IN (SELECT s.id FROM fuzz.beta AS s WHERE s.v % 3 = {})", n % 3),
            5 => format!("EXISTS (SELECT FROM fuzz.tree AS s WHERE s.ref = {x}.id)"),
            6 => format!("{x}.id = ANY ('{{{n}, {}, 3, 7}}')", n / 2),
            7 => "true".to_owned(),
            8 => format!("NOT EXISTS (SELECT FROM fuzz.sink AS s WHERE s.id = {x}.id AND s.v > {n})"),
            9 => format!("({x}.v, {x}.w) > (SELECT {}, {})", n / 2, n % 4),
            10 => format!("{x}.id = {n}"),
            11 => format!("{x}.id IN (SELECT s.id FROM fuzz.alpha AS s ORDER BY s.v, s.id LIMIT {})", 1 + n % 9),
            12 => format!("{x}.v IS NOT DISTINCT FROM {x}.w OR {x}.id < {}", n / 3),
            _ => format!("{x}.id >= {n}"),
        }
    }
}
