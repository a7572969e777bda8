"""A SQLite file of ours: opened, checked, and written in transactions."""

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class DatabaseError(ValueError):
    """The file cannot be used; the message names it and says why."""


class Database:
    """One file, for any thread and for several processes.

    What a transaction has written when it ends is there after a crash or a power failure.

    Args:
        path: the file; it and its folder are made if missing.
        application_id: tells whose file it is.
        version: of the schema.
        schema: statements that make the tables of a new file.
        busy_timeout_s: how long to wait for another process that is writing.

    Attributes:
        lock: held by whoever uses the connection.

    Raises:
        DatabaseError: the file cannot be used; so does every method.
    """

    def __init__(
        self,
        path: Path,
        *,
        application_id: int,
        version: int,
        schema: Sequence[str],
        busy_timeout_s: float,
    ) -> None:
        self.lock = threading.Lock()
        self._path, self._application_id, self._version = path, application_id, version
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_usable = not path.exists() or path.is_file()
        except FileExistsError:
            raise DatabaseError(f"cannot use {path}: {path.parent} is not a folder") from None
        except OSError as error:
            raise DatabaseError(f"cannot use {path}: {error.strerror}") from None
        if not is_usable:
            raise DatabaseError(f"{path} is not a file")
        with self.named_errors():
            self._db = sqlite3.connect(
                path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False
            )
        try:
            with self.named_errors():
                self._prepare(schema, busy_timeout_s=busy_timeout_s)
        except DatabaseError:
            self._db.close()
            raise

    def _prepare(self, schema: Sequence[str], *, busy_timeout_s: float) -> None:
        """Check whose file it is before anything is written to it; make the tables in a new one."""
        self._db.execute("BEGIN")
        is_new = self._check_owner()
        self._db.execute("COMMIT")
        # SQLite does not wait for others to leave when it changes the mode, so this does.
        end_s = time.monotonic() + busy_timeout_s
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:
                is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not is_busy or time.monotonic() > end_s:
                    raise
                time.sleep(0.01)
        # In this mode a weaker setting would lose acknowledged rows with the power.
        self._db.execute("PRAGMA synchronous = FULL")
        with self.transaction() as db:
            # Another process may have been faster.
            if is_new and self._check_owner():
                for statement in schema:
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {self._application_id}")
            # Written each time, so that a file that cannot be written is found now.
            db.execute(f"PRAGMA user_version = {self._version}")

    def _check_owner(self) -> bool:
        """Return whether the file is empty, so that it becomes ours; call it in a transaction."""
        (application_id,) = self._db.execute("PRAGMA application_id").fetchone()
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        (num_tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application_id == version == num_tables == 0:
            return True
        if application_id != self._application_id:
            raise DatabaseError(
                f"{self._path} is a database of another program, or of other things"
            )
        if version != self._version:
            raise DatabaseError(
                f"{self._path} has schema version {version}; this version of Proa reads "
                f"{self._version} only"
            )
        (verdict,) = self._db.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise DatabaseError(f"{self._path} is damaged: {' '.join(verdict.split())}")
        return False

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Give the connection; what is written is there as a whole, or not at all on an error."""
        with self.named_errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Give the connection, to read."""
        with self.lock, self.named_errors():
            yield self._db

    def close(self) -> None:
        """Close the file; nothing can be called afterwards."""
        with self.lock, self.named_errors():
            self._db.close()

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        """Name the file in what SQLite raises."""
        try:
            yield
        except sqlite3.Error as error:
            raise DatabaseError(f"cannot use {self._path}: {error}") from None
