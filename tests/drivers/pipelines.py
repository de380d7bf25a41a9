"""What psycopg 3 makes of limits: arguments are host, port, user, database and the token for TOKEN's write.

Each step is one line of JSON; the next step waits for a line, so that the data can be looked at in between.
"""

import json
import sys

import psycopg

host, port, user, database, token = sys.argv[1:]
UPDATE = "UPDATE t SET a = 9 WHERE id <= %s"


def connect(autocommit):
    return psycopg.connect(host=host, port=port, user=user, dbname=database, autocommit=autocommit)


def step(name, run):
    seen = {"step": name}
    try:
        seen["rows"] = run()
    except psycopg.Error as error:
        fields = error.diag
        seen |= {
            "sqlstate": error.sqlstate,
            "message": fields.message_primary,
            "detail": fields.message_detail,
            "hint": fields.message_hint,
            "schema": fields.schema_name,
            "table": fields.table_name,
        }
    print(json.dumps(seen), flush=True)
    sys.stdin.readline()


def pipeline(connection, *statements, sync=False):
    with connection.pipeline() as pipe:
        cursors = []
        for sql, *values in statements:
            cursors.append(connection.execute(sql, values, prepare=True))
            if sync:
                pipe.sync()
        pipe.sync()
        return [cursor.rowcount for cursor in cursors]


auto = connect(True)
step("exactly", lambda: auto.execute(UPDATE, [3]).rowcount)
step("past", lambda: auto.execute(UPDATE, [4]).rowcount)
step("prepared", lambda: [auto.execute(UPDATE, [3], prepare=True).rowcount for _ in range(3)][-1])
step("prepared past", lambda: auto.execute(UPDATE, [4], prepare=True).rowcount)

# What is sent between two syncs is one transaction.
step("pipeline", lambda: pipeline(auto, (UPDATE, 3), (UPDATE, 2)))
step("pipeline past", lambda: pipeline(auto, (UPDATE, 3), (UPDATE, 4), (UPDATE, 1)))
BUDGET = "UPDATE u SET a = 9 WHERE id BETWEEN %s AND %s"
step("pipeline budget", lambda: pipeline(auto, (BUDGET, 1, 2), (BUDGET, 3, 3)))
step("pipeline budget past", lambda: pipeline(auto, (BUDGET, 1, 2), (BUDGET, 3, 4)))
step("pipeline budget synced", lambda: pipeline(auto, (BUDGET, 1, 2), (BUDGET, 3, 4), sync=True))


def many():
    with auto.cursor() as cursor:
        cursor.executemany("UPDATE u SET a = 9 WHERE id = %s", [(id,) for id in range(1, 5)])
        return cursor.rowcount


step("many past", many)

manual = connect(False)
step("transaction", lambda: manual.execute(UPDATE, [3]).rowcount)
step("transaction past", lambda: manual.execute(UPDATE, [4]).rowcount)
step("transaction aborted", lambda: manual.execute(UPDATE, [1]).rowcount)
manual.rollback()
ARM = ("SET LOCAL writeguard.override = on",), (f"SET LOCAL writeguard.token = '{token}'",)


def armed():
    rows = pipeline(manual, *ARM, (UPDATE, 5))[-1]
    manual.commit()
    return rows


step("token", armed)
step("token spent", lambda: pipeline(manual, (UPDATE, 5)))
