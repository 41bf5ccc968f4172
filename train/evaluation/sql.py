"""Compare SQL queries by their text and by their results in SQLite."""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from ...runtime.base.errors import DataError

MAX_STEPS = 20_000_000
"""Instructions of SQLite's virtual machine that a query may take, about a second."""

STEPS_BETWEEN_CHECKS = 10_000

MAX_ROWS = 100_000
"""Rows of a result that are compared."""

READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
"""Actions that a query may take. Others, such as ATTACH and PRAGMA, are refused."""

LIMITS = {sqlite3.SQLITE_LIMIT_LENGTH: 1_000_000, sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 100}
"""Bytes of a value and of a pattern. One instruction takes a bounded time with them."""


def normalised(query: str) -> str:
    """Return a query in lower case with single spaces, except within quotes, and without the last semicolon."""
    parts = re.split(r"""("[^"]*"|'[^']*')""", query)
    spaced = [part if index % 2 else re.sub(r"\s+", " ", part.casefold()) for index, part in enumerate(parts)]
    return "".join(spaced).strip().rstrip("; ")


def has_database(record: Mapping[str, Any]) -> bool:
    """Return True if a record names a `database` or has a `schema` to execute its query in."""
    return bool(record.get("database") or record.get("schema"))


def gives_same_rows(answer: str, expected: str, record: Mapping[str, Any]) -> bool:
    """Return True if both queries give the same rows in the record's database.

    The order of rows counts only if the expected query has ORDER BY. A query that fails, changes something or takes
    too long is wrong. Raises DataError if that is the expected one.
    """
    with closing(_opened(record)) as connection:
        try:
            wanted = _rows(connection, expected)
        except (sqlite3.Error, sqlite3.Warning) as error:
            raise DataError(f"the expected query fails ({error}); correct it: {expected}") from error
        try:
            found = _rows(connection, answer)
        except (sqlite3.Error, sqlite3.Warning, UnicodeError, ValueError):  # ValueError: a zero character
            return False
    if re.search(r"\border\s+by\b", normalised(expected)):
        return found == wanted
    return Counter(found) == Counter(wanted)


def _opened(record: Mapping[str, Any]) -> sqlite3.Connection:
    """Open a record's database read-only, or create one in memory from its `schema`, a script. Raises DataError."""
    path = Path(record.get("database") or "")
    try:
        if record.get("database"):
            connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
            connection.execute("SELECT count(*) FROM sqlite_master")  # SQLite opens a file with the first query
        else:
            connection = sqlite3.connect(":memory:")
            connection.executescript(record["schema"])
    except (sqlite3.Error, sqlite3.Warning) as error:
        name = f'the database "{path}"' if record.get("database") else 'the "schema" of an example'
        raise DataError(f"{name} cannot be opened: {error}") from error
    for limit, value in LIMITS.items():
        connection.setlimit(limit, value)
    connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in READING else sqlite3.SQLITE_DENY)
    return connection


def _rows(connection: sqlite3.Connection, query: str) -> list[tuple[Any, ...]]:
    """Return the rows of one statement with floats rounded to 9 digits.

    Raises sqlite3.Error or sqlite3.Warning for several statements, too many steps or too many rows.
    """
    left = MAX_STEPS // STEPS_BETWEEN_CHECKS

    def is_over() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    # a model may write a query that never ends
    connection.set_progress_handler(is_over, STEPS_BETWEEN_CHECKS)
    found = connection.execute(query).fetchmany(MAX_ROWS + 1)
    if len(found) > MAX_ROWS:
        raise sqlite3.DataError(f"it gives over {MAX_ROWS} rows")
    # sums of floats depend on the order in which a query plan adds them
    return [tuple(float(f"{value:.9g}") if isinstance(value, float) else value for value in row) for row in found]
