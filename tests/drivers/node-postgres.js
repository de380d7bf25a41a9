// What node-postgres makes of limits: arguments are host, port, user, database and the token for UPDATE with 5.
// Each step is one line of JSON; the next step waits for a line, so that the data can be looked at in between.
'use strict';

const fs = require('fs');
const { Client, Pool } = require('pg');
const Cursor = require('pg-cursor');

const [host, port, user, database, token] = process.argv.slice(2);
const where = { host, port: Number(port), user, database };
const UPDATE = 'UPDATE t SET a = 9 WHERE id <= $1';

function fields(error) {
  if (!error.code) throw error;
  const { code: sqlstate, message, detail, hint, schema, table } = error;
  return { sqlstate, message, detail, hint, schema, table };
}

async function step(name, run) {
  const seen = { step: name };
  try {
    seen.rows = await run();
  } catch (error) {
    Object.assign(seen, fields(error));
  }
  fs.writeSync(1, JSON.stringify(seen) + '\n');
  fs.readSync(0, Buffer.alloc(1));
}

async function main() {
  const client = new Client(where);
  await client.connect();
  const update = async (rows) => (await client.query(UPDATE, [rows])).rowCount;
  await step('exactly', () => update(3));
  await step('past', () => update(4));

  const prepared = async (rows) => (await client.query({ name: 'update', text: UPDATE, values: [rows] })).rowCount;
  await step('prepared', async () => (await prepared(3), prepared(3)));
  await step('prepared past', () => prepared(4));

  // Queued without waiting: each is a transaction of its own.
  await step('queue', async () => {
    const ended = await Promise.allSettled([update(3), update(4), update(1)]);
    return ended.map((end) => (end.status === 'fulfilled' ? end.value : fields(end.reason).sqlstate));
  });

  await client.query('BEGIN');
  await step('transaction', () => update(3));
  await step('transaction past', () => update(4));
  await step('transaction aborted', () => update(1));
  await client.query('ROLLBACK');

  await step('cursor', async () => {
    const cursor = client.query(new Cursor(UPDATE + ' RETURNING id', [3]));
    const counts = [];
    for (let rows; (rows = await cursor.read(2)).length > 0; ) counts.push(rows.length);
    return counts;
  });
  await step('cursor past', async () => (await client.query(new Cursor(UPDATE + ' RETURNING id', [4])).read(2)).length);
  await client.end();

  // Clients of a pool take turns on one connection.
  const pool = new Pool({ ...where, max: 1 });
  await step('token', async () => {
    const one = await pool.connect();
    await one.query('BEGIN');
    await one.query('SET LOCAL writeguard.override = on');
    await one.query(`SET LOCAL writeguard.token = '${token}'`);
    const { rowCount } = await one.query(UPDATE, [5]);
    await one.query('COMMIT');
    one.release();
    return rowCount;
  });
  await step('token spent', async () => (await pool.query(UPDATE, [5])).rowCount);
  await pool.end();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
