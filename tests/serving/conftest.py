"""Databases, items and a signed-in client of the labelling page, without Ray."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from rayrlhf.serving.database import Database
from rayrlhf.serving.exchange import wanted_people
from rayrlhf.serving.store import Store
from tests.serving.people import anonymous, items, section, sign_in


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str | None]:
    """Return the URL of a PostgreSQL server of these tests' own; None without server or driver."""
    initdb = shutil.which("initdb") or next(
        iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None
    )
    if initdb is None or find_spec("psycopg") is None:
        yield None
        return
    folder = tmp_path_factory.mktemp("postgres")
    programs, as_user = Path(initdb).resolve().parent, []
    if os.geteuid() == 0:  # which PostgreSQL refuses to run as
        shutil.chown(folder, "nobody")
        depth = len(folder.parents) - len(Path(tempfile.gettempdir()).parents) - 1
        for parent in folder.parents[:depth]:  # pytest's, of which xdist makes one more
            parent.chmod(0o755)
        as_user = ["setpriv", "--reuid=nobody", "--clear-groups"]
    data = folder / "data"
    subprocess.run(
        [*as_user, programs / "initdb", "-D", data, "-U", "judge", "-A", "trust", "-N"],
        check=True,
        capture_output=True,
    )
    server = subprocess.Popen(
        [*as_user, programs / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses="],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"postgresql://judge@/postgres?host={folder}"
    yield url
    server.terminate()
    server.wait(20)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    found = Database("", tmp_path)
    yield found
    found.close()


@pytest.fixture
def store(database: Database) -> Store:
    """Return a store of three items of six responses, each for all three people."""
    found = Store(database, claim_s=600)
    found.set_items(items(3), wanted_people(3, section(overlap_labellers=3)))
    return found


@pytest.fixture
def client(store: Store) -> Iterator[TestClient]:
    """Return a client that is signed in as Ann."""
    with anonymous(store) as found:
        sign_in(found, "Ann")
        yield found
