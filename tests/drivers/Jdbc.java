import java.sql.BatchUpdateException;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Statement;
import java.util.ArrayList;
import java.util.List;
import org.postgresql.util.PSQLException;
import org.postgresql.util.ServerErrorMessage;

/**
 * What JDBC makes of limits: arguments are host, port, user, database and the token for UPDATE with 5.
 * Each step is one line of JSON; the next step waits for a line, so that the data can be looked at in between.
 */
public class Jdbc {
    static final String UPDATE = "UPDATE t SET a = 9 WHERE id <= ?";

    interface Run {
        /** Row counts, as JSON. */
        Object rows() throws SQLException;
    }

    static String quoted(String text) {
        if (text == null) {
            return "null";
        }
        return '"' + text.replace("\\", "\\\\").replace("\"", "\\\"").replace("\n", "\\n") + '"';
    }

    static void step(String name, Run run) throws Exception {
        String seen;
        try {
            seen = "\"rows\": " + run.rows();
        } catch (SQLException error) {
            SQLException cause = error instanceof BatchUpdateException ? error.getNextException() : error;
            ServerErrorMessage fields = ((PSQLException) cause).getServerErrorMessage();
            seen = "\"sqlstate\": " + quoted(error.getSQLState())
                + ", \"message\": " + quoted(fields.getMessage())
                + ", \"detail\": " + quoted(fields.getDetail())
                + ", \"hint\": " + quoted(fields.getHint())
                + ", \"schema\": " + quoted(fields.getSchema())
                + ", \"table\": " + quoted(fields.getTable());
        }
        System.out.println("{\"step\": " + quoted(name) + ", " + seen + "}");
        System.in.read();
    }

    static int update(PreparedStatement statement, int rows) throws SQLException {
        statement.setInt(1, rows);
        return statement.executeUpdate();
    }

    /** The rows of a statement that returns them, two at a time. */
    static Object fetched(Connection connection, String sql) throws SQLException {
        int rows = 0;
        try (Statement statement = connection.createStatement()) {
            statement.setFetchSize(2);
            try (ResultSet result = statement.executeQuery(sql)) {
                while (result.next()) {
                    rows++;
                }
            }
        }
        connection.commit();
        return rows;
    }

    static Object batch(Connection connection, int from, int to) throws SQLException {
        try (PreparedStatement statement = connection.prepareStatement("UPDATE u SET a = 9 WHERE id = ?")) {
            for (int id = from; id <= to; id++) {
                statement.setInt(1, id);
                statement.addBatch();
            }
            List<Integer> counts = new ArrayList<>();
            for (int count : statement.executeBatch()) {
                counts.add(count);
            }
            connection.commit();
            return counts;
        }
    }

    public static void main(String[] arguments) throws Exception {
        // From the second execution on, statements are prepared on the server.
        String url = "jdbc:postgresql://" + arguments[0] + ":" + arguments[1] + "/" + arguments[3] + "?prepareThreshold=2";
        String token = arguments[4];
        try (Connection connection = DriverManager.getConnection(url, arguments[2], "");
                PreparedStatement update = connection.prepareStatement(UPDATE);
                Statement plain = connection.createStatement()) {
            step("exactly", () -> update(update, 3));
            step("past", () -> update(update, 4));
            step("prepared", () -> Math.min(update(update, 3), update(update, 3)));
            step("prepared past", () -> update(update, 4));

            connection.setAutoCommit(false);
            step("transaction", () -> update(update, 3));
            connection.commit();
            step("transaction committed", () -> fetched(connection, "SELECT id FROM t WHERE a = 9"));
            step("transaction past", () -> update(update, 4));
            step("transaction aborted", () -> update(update, 1));
            connection.rollback();

            step("fetch", () -> fetched(connection, "UPDATE t SET a = 9 WHERE id <= 3 RETURNING id"));
            step("fetch past", () -> fetched(connection, "UPDATE t SET a = 9 WHERE id <= 4 RETURNING id"));
            connection.rollback();
            // Rows are written one by one while they are read two at a time: five statements of one row.
            step("write while fetching", () -> {
                int rows = 0;
                try (Statement read = connection.createStatement();
                        PreparedStatement write = connection.prepareStatement("UPDATE t SET a = 9 WHERE id = ?")) {
                    read.setFetchSize(2);
                    ResultSet result = read.executeQuery("SELECT id FROM t ORDER BY id");
                    while (result.next()) {
                        rows += update(write, result.getInt(1));
                    }
                }
                connection.commit();
                return rows;
            });
            step("batch", () -> batch(connection, 1, 3));
            step("batch past", () -> batch(connection, 1, 4));
            connection.rollback();

            step("token", () -> {
                plain.execute("SET LOCAL writeguard.override = on");
                plain.execute("SET LOCAL writeguard.token = '" + token + "'");
                int rows = update(update, 5);
                connection.commit();
                return rows;
            });
            step("token spent", () -> update(update, 5));
            connection.rollback();
        }
    }
}
