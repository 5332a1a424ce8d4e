"""The queue and the judgements, on SQLite and, where a server and its driver are, on PostgreSQL."""

import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from rayrlhf.config import RecipeError
from rayrlhf.serving.database import FILE, METADATA, Database
from rayrlhf.serving.exchange import wanted_people
from rayrlhf.serving.store import Battle, Conflict, Judgement, Store, Unknown, item_id, shown_order
from tests.serving.people import items, section


@pytest.fixture(params=["sqlite", "postgresql"])
def queue(request: pytest.FixtureRequest, tmp_path: Path, postgres: str | None) -> Iterator[Store]:
    """Return a store of eight items, of which every second one wants two people."""
    if request.param == "postgresql" and postgres is None:
        pytest.skip("no PostgreSQL server, or no psycopg")
    database = Database(postgres or "" if request.param == "postgresql" else "", tmp_path)
    with database.writing() as connection:
        for table in reversed(METADATA.sorted_tables):
            connection.execute(table.delete())
    store = Store(database, claim_s=600)
    assert store.set_items(items(8), wanted_people(8, section(overlap=0.5))) == 8
    yield store
    database.close()


def judgement(item: str, key: str = "k" * 16, ranks: list[int] | None = None) -> Judgement:
    return Judgement(key, item, ranks or [1, 2, 2, 3, 4, 5], [[] for _ in range(6)], "", 4.5)


def skip(item: str) -> Judgement:
    return Judgement(f"skip-{item}", item, None, [[] for _ in range(6)])


def test_an_item_stays_until_it_is_judged_and_is_given_to_one_person(queue: Store) -> None:
    first = queue.next_item("Ann")
    assert first is not None and first == queue.next_item("Ann")
    assert first.prompt == "Prompt 0"
    second = queue.next_item("Bob")  # the first one wants two people
    assert second == first
    third = queue.next_item("Cem")
    assert third is not None and third.prompt == "Prompt 1"
    assert queue.judge("Ann", judgement(first.id))
    after = queue.next_item("Ann")
    assert after is not None and after.prompt == "Prompt 2"  # Cem has the second


def test_everything_is_judged_as_often_as_wanted(queue: Store) -> None:
    counts: Counter[str] = Counter()
    waiting = ["Ann", "Bob", "Cem"]
    while waiting:
        for name in list(waiting):
            item = queue.next_item(name)
            if item is None:
                waiting.remove(name)
                continue
            assert queue.judge(name, judgement(item.id, f"{name}-{item.id}"))
            counts[item.prompt] += 1
    assert counts == {f"Prompt {i}": 2 - i % 2 for i in range(8)}
    progress = queue.progress("Ann")
    assert (progress.num_items, progress.wanted, progress.done) == (8, 12, 12)
    assert sum(queue.progress(name).mine for name in ("Ann", "Bob", "Cem")) == 12


def test_the_same_judgement_counts_once_and_another_is_refused(queue: Store) -> None:
    item = queue.next_item("Ann")
    assert item is not None
    assert queue.judge("Ann", judgement(item.id)) is True
    assert queue.judge("Ann", judgement(item.id)) is False
    with pytest.raises(Conflict, match="key stands for another"):
        queue.judge("Ann", judgement(item.id, ranks=[2, 1, 2, 3, 4, 5]))
    with pytest.raises(Conflict, match="judged this item already"):
        queue.judge("Ann", judgement(item.id, "another-key-0000"))
    with pytest.raises(Unknown):
        queue.judge("Ann", judgement("0" * 32, "third-key-000000"))
    assert queue.judge("Bob", judgement(item.id))  # keys are each person's own
    assert len(queue.rankings()) == 2


def test_a_skipped_item_is_for_others(queue: Store) -> None:
    first = queue.next_item("Ann")
    assert first is not None
    assert queue.judge("Ann", skip(first.id)) and not queue.judge("Ann", skip(first.id))
    second = queue.next_item("Ann")
    assert second is not None and second.id != first.id
    assert queue.progress("Ann").done == queue.progress("Ann").mine == 0
    assert queue.next_item("Bob") == first and queue.next_item("Cem") == first
    assert queue.rankings()[0].ranks is None


def test_an_abandoned_item_goes_to_another_person(tmp_path: Path) -> None:
    store = Store(Database("", tmp_path), claim_s=0.0)
    store.set_items(items(2), [1, 1])
    first = store.next_item("Ann")
    assert first is not None and store.next_item("Bob") == first
    # Whoever comes late is heard, too.
    assert store.judge("Bob", judgement(first.id)) and store.judge("Ann", judgement(first.id))
    assert store.progress().done == 1


def test_another_file_leaves_the_queue_and_keeps_what_was_said(queue: Store) -> None:
    item = queue.next_item("Ann")
    assert item is not None
    queue.judge("Ann", judgement(item.id))
    queue.next_item("Ann")
    fresh = [{"prompt": "New", "responses": ["x", "y"]}] * 2
    assert queue.set_items(fresh, [1, 2]) == 1  # the same texts twice are one item
    found = queue.next_item("Ann")
    assert found is not None and found.prompt == "New"
    assert queue.progress().wanted == 2
    assert [row.prompt for row in queue.rankings()] == ["Prompt 0"]
    assert queue.set_items(items(8), [1] * 8) == 8  # and back: what is judged is not asked again
    assert queue.progress().done == 1


def test_votes_count_once(queue: Store) -> None:
    battle = Battle("b" * 16, "Hi", ("sft", "ppo"), ("x", "y"), (1, 2))
    assert queue.open_battle("Ann") is None
    assert queue.add_battle("Ann", battle) == battle
    other = Battle("b" * 16, "Hi", ("ppo", "sft"), ("z", "z"), (3, 4))
    assert queue.add_battle("Ann", other) == battle  # the first answers stand
    assert queue.open_battle("Ann") == battle and queue.open_battle("Bob") is None
    with pytest.raises(Unknown):
        queue.vote("Bob", battle.key, "a", "v" * 16)
    decided, fresh = queue.vote("Ann", battle.key, "a", "v" * 16)
    assert fresh and decided.vote == "a" and decided.models == ("sft", "ppo")
    assert queue.vote("Ann", battle.key, "a", "v" * 16)[1] is False
    for vote, key in (("b", "v" * 16), ("a", "w" * 16)):
        with pytest.raises(Conflict):
            queue.vote("Ann", battle.key, vote, key)
    assert queue.open_battle("Ann") is None
    assert [row.vote for row in queue.votes()] == ["a"]


def test_a_database_of_before_gets_its_new_columns(queue: Store, tmp_path: Path) -> None:
    queue.set_items(items(1), [1])
    old = Battle("b" * 16, "Hi", ("sft", "ppo"), ("x", "y"), (1, 2))
    queue.add_battle("Ann", old)
    with queue.database.writing() as connection:
        connection.execute(text("ALTER TABLE battles DROP COLUMN messages"))
        url = connection.engine.url.render_as_string(hide_password=False)
    again = Database("" if url.startswith("sqlite") else url, tmp_path)
    store = Store(again, claim_s=600)
    assert store.battle("Ann", old.key) == old
    chat = Battle("c" * 16, "Hi", ("sft", "ppo"), ("x", "y"), (1, 2), messages=[{"role": "user"}])
    assert store.add_battle("Ann", chat) == store.battle("Ann", chat.key) == chat
    again.close()


def test_twenty_people_at_once(queue: Store) -> None:
    """Every person works until nothing is left: no item is given out too often."""
    queue.set_items(items(40), [1] * 40)
    errors: list[Exception] = []

    def work(name: str) -> None:
        try:
            while (item := queue.next_item(name)) is not None:
                for _ in range(2):  # sent twice
                    queue.judge(name, judgement(item.id, f"{name}-{item.id}"))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"P{i}",)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert Counter(row.prompt for row in queue.rankings()) == {f"Prompt {i}": 1 for i in range(40)}


def test_sqlite_syncs_every_commit(tmp_path: Path) -> None:
    database = Database("", tmp_path)
    with database.writing() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
    with sqlite3.connect(tmp_path / FILE) as other:
        assert other.execute("SELECT count(*) FROM items").fetchone() == (0,)


def test_an_error_leaves_nothing_half_written(queue: Store) -> None:
    class Stop(Exception):
        pass

    with pytest.raises(Stop), queue.database.writing() as connection:
        connection.execute(METADATA.tables["items"].update().values(wanted=7))
        raise Stop
    assert queue.progress().wanted == 12


def test_a_database_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"label\.database="):
        Database(f"postgresql://nobody@/x?host={tmp_path}", tmp_path)
    with pytest.raises(RecipeError, match="cannot be opened"):
        Database("", tmp_path / "missing")


def test_the_shown_order_is_a_permutation_of_each_persons_own() -> None:
    name = item_id("p", ["a", "b"])
    assert name != item_id("p", ["b", "a"]) and len(name) == 32
    orders = {tuple(shown_order(name, f"P{i}", 6)) for i in range(30)}
    assert all(sorted(order) == list(range(6)) for order in orders) and len(orders) > 20
    assert shown_order(name, "Ann", 6) == shown_order(name, "Ann", 6)
    first = Counter(shown_order(item_id(f"{i}", ["a"]), "Ann", 4)[0] for i in range(400))
    assert min(first.values()) > 60  # of 100 each
