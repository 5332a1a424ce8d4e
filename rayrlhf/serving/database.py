"""The database of the labelling page: its tables, and transactions that are on disk when they end.

SQLite with a write-ahead log and `synchronous=FULL`, so that a commit is fsynced, or PostgreSQL,
whose commits are. A writing transaction runs alone: what it reads stays true until it commits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    inspect,
    text,
)
from sqlalchemy.exc import ArgumentError, DBAPIError

from rayrlhf.config import RecipeError

FILE = "judgements.sqlite"
BUSY_S = 30.0
"""How long a transaction waits for the one before it."""

METADATA = MetaData()
ITEMS = Table(
    "items",
    METADATA,
    Column("id", String(32), primary_key=True),  # hash of prompt and responses
    Column("position", Integer, nullable=False),  # in the file
    Column("wanted", Integer, nullable=False),  # people who should judge it; 0: no longer in a file
    Column("prompt", Text, nullable=False),
    Column("responses", JSON, nullable=False),
    Column("extra", JSON, nullable=False),  # the record's other columns
)
CLAIMS = Table(
    "claims",
    METADATA,
    Column("item", ForeignKey("items.id"), primary_key=True),
    Column("labeller", String(40), primary_key=True),
    Column("time", Float, nullable=False),  # Unix seconds
)
JUDGEMENTS = Table(
    "judgements",
    METADATA,
    Column("labeller", String(40), primary_key=True),
    Column("key", String(64), primary_key=True),  # chosen by the page, once per judgement
    Column("item", ForeignKey("items.id"), nullable=False),
    Column("ranks", JSON(none_as_null=True)),  # per response of the item, 1 = best; null: skipped
    Column("flags", JSON, nullable=False),  # per response: list of codes
    Column("note", Text, nullable=False),
    Column("shown", JSON, nullable=False),  # the responses in the order in which they were shown
    Column("seconds", Float, nullable=False),  # that the person took
    Column("time", Float, nullable=False),  # Unix seconds
    UniqueConstraint("item", "labeller"),
)
BATTLES = Table(
    "battles",
    METADATA,
    Column("labeller", String(40), primary_key=True),
    Column("key", String(64), primary_key=True),  # chosen by the page, once per prompt
    Column("prompt", Text, nullable=False),
    Column("models", JSON, nullable=False),  # names, left and right
    Column("responses", JSON, nullable=False),
    Column("seeds", JSON, nullable=False),  # of the sampling
    Column("time", Float, nullable=False),  # Unix seconds
    Column("vote", String(8)),  # a, b, tie, bad; null: none yet
    Column("vote_key", String(64)),
    Column("vote_time", Float),
    Column("messages", JSON(none_as_null=True)),  # of a chat
)
ADDED = (BATTLES.c.messages,)
"""Columns, all of them nullable, that a database which was made before them gets when it opens."""


class Database:
    """An open database; safe for any number of threads and processes."""

    def __init__(self, url: str, folder: Path) -> None:
        """Open `url`, or SQLite in `folder` where it is empty, and create what is missing.

        Raises RecipeError when there is no such database, or no driver for it.
        """
        self._sqlite = not url
        place = f"sqlite:///{(folder / FILE).absolute()}" if self._sqlite else url
        try:
            self._engine = create_engine(
                place, pool_size=8, max_overflow=32, connect_args=self._arguments()
            )
            if self._sqlite:
                event.listen(self._engine, "connect", _set_up_sqlite)
                event.listen(self._engine, "begin", _begin_sqlite)
            with self._engine.execution_options(writes=True).begin() as connection:
                METADATA.create_all(connection)
                _add_columns(connection)
        except ModuleNotFoundError as error:
            raise RecipeError(
                f"label.database={url} needs {error.name}, which is not installed: "
                "pip install 'rayrlhf[postgres]', or leave label.database empty"
            ) from None
        except (ArgumentError, DBAPIError) as error:
            reason = " ".join(str(error).split())[:300]
            raise RecipeError(
                f"label.database={url or folder / FILE}: cannot be opened ({reason}): correct the "
                "address, or leave it empty for SQLite in the run directory"
            ) from None

    def _arguments(self) -> dict[str, Any]:
        return {"timeout": BUSY_S} if self._sqlite else {"connect_timeout": 10}

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Give a transaction that sees one state of the database."""
        with self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Give a transaction that no other writing one runs beside; on disk when the block ends."""
        engine = self._engine.execution_options(writes=True)
        with engine.connect() as connection, connection.begin():
            if not self._sqlite:
                connection.execute(text("LOCK TABLE claims IN EXCLUSIVE MODE"))
            yield connection

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def _add_columns(connection: Connection) -> None:
    for column in ADDED:
        there = {each["name"] for each in inspect(connection).get_columns(column.table.name)}
        if column.name not in there:
            kind = column.type.compile(connection.dialect)
            connection.execute(
                text(f"ALTER TABLE {column.table.name} ADD COLUMN {column.name} {kind}")
            )


def _set_up_sqlite(connection: Any, _: Any) -> None:
    # Python's own transactions would begin at the first write only, after what it depends on.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
