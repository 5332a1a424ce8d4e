"""The queue and what people said: the next item for a person, rankings, skips, battles, votes.

Every verb that writes is one transaction, on disk when it returns. A judgement carries a key that
the page chose: sent again it is counted once, and another one on the same item is refused.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import Connection, Row, delete, func, insert, select, update

from rayrlhf.data.records import Record
from rayrlhf.serving.database import BATTLES, CLAIMS, ITEMS, JUDGEMENTS, Database

Ranks = list[int]


class Unknown(LookupError):
    """There is no such item or battle for this person."""


class Conflict(ValueError):
    """Something else is already counted in this place."""


@dataclass(frozen=True)
class Item:
    """A prompt and its responses, in the order of the file."""

    id: str
    prompt: str
    responses: list[str]


@dataclass(frozen=True)
class Judgement:
    """What one person said of one item."""

    key: str
    """Chosen by the page, once per judgement."""
    item: str
    ranks: Ranks | None
    """Per response in the order of the file: 1 = best, ties allowed. None: skipped."""
    flags: list[list[str]]
    """Per response in the order of the file."""
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Battle:
    """Two answers to a person's prompt; `models` are theirs, left and right."""

    key: str
    prompt: str
    models: tuple[str, str]
    responses: tuple[str, str]
    seeds: tuple[int, int]
    vote: str | None = None
    """`a` (left is better), `b`, `tie` or `bad` (both are)."""
    messages: list[Record] | None = None
    """The chat that was answered, where it was one; `prompt` is what people read of it."""


@dataclass(frozen=True)
class Progress:
    """How far the queue is."""

    num_items: int
    wanted: int
    """Rankings that all items together ask for."""
    done: int
    """Of them."""
    mine: int
    """Rankings by this person."""


def item_id(prompt: str, responses: Sequence[str]) -> str:
    """Return the name of an item: the same for the same texts in the same order."""
    text = json.dumps([prompt, list(responses)], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def shown_order(item: str, labeller: str, num_responses: int) -> list[int]:
    """Return the positions of the responses in the order in which this person sees them.

    It is shuffled, so that no place is a hint, and the same each time, so that nothing is kept.
    """
    seed = hashlib.sha256(f"{item}/{labeller}".encode()).digest()[:8]
    rng = np.random.default_rng(int.from_bytes(seed, "big"))
    return [int(k) for k in rng.permutation(num_responses)]


class Store:
    """All that the page keeps."""

    def __init__(self, database: Database, *, claim_s: float) -> None:
        """`claim_s`: how long an item that a person was given is kept from others, seconds."""
        self.database = database
        self._claim_s = claim_s

    def set_items(self, records: Sequence[Record], wanted: Sequence[int]) -> int:
        """Make these the items of the queue, `wanted[i]` people for each; return their number.

        Items of an earlier file leave the queue, and what was said of them stays. The same texts
        twice are one item.
        """
        rows: dict[str, dict[str, Any]] = {}
        for position, (record, people) in enumerate(zip(records, wanted, strict=True)):
            name = item_id(record["prompt"], record["responses"])
            extra = {k: v for k, v in record.items() if k not in ("prompt", "responses")}
            row = rows.setdefault(name, {"id": name, "position": position, "wanted": people})
            row |= {"prompt": record["prompt"], "responses": record["responses"], "extra": extra}
            row["wanted"] = max(row["wanted"], people)
        with self.database.writing() as connection:
            known = set(connection.execute(select(ITEMS.c.id)).scalars())
            connection.execute(update(ITEMS).values(wanted=0))
            for name, row in rows.items():
                if name in known:
                    connection.execute(update(ITEMS).where(ITEMS.c.id == name).values(row))
            fresh = [row for name, row in rows.items() if name not in known]
            if fresh:
                connection.execute(insert(ITEMS), fresh)
        return len(rows)

    def next_item(self, labeller: str) -> Item | None:
        """Return the item that this person should judge now, kept for `claim_s`; None: all done.

        It stays the same until it is judged. Items that others have judged and that need more
        people come first, so that agreement shows early; then the order of the file.
        """
        now = time.time()
        judged = _count(JUDGEMENTS, JUDGEMENTS.c.ranks.is_not(None))
        others = _count(CLAIMS, CLAIMS.c.labeller != labeller)
        mine = select(JUDGEMENTS.c.item).where(JUDGEMENTS.c.labeller == labeller)
        with self.database.writing() as connection:
            connection.execute(delete(CLAIMS).where(CLAIMS.c.time < now - self._claim_s))
            held = select(ITEMS).join(CLAIMS).where(CLAIMS.c.labeller == labeller)
            found = connection.execute(held.where(ITEMS.c.wanted > 0)).first()
            if found is None:
                found = connection.execute(
                    select(ITEMS)
                    .where(ITEMS.c.id.not_in(mine), judged + others < ITEMS.c.wanted)
                    .order_by(judged.desc(), ITEMS.c.position)
                    .limit(1)
                ).first()
            if found is None:
                return None
            _claim(connection, found.id, labeller, now)
        return _item(found)

    def item(self, name: str) -> Item:
        """Return an item; raises Unknown."""
        with self.database.reading() as connection:
            found = connection.execute(select(ITEMS).where(ITEMS.c.id == name)).first()
        if found is None:
            raise Unknown(f"there is no item {name}")
        return _item(found)

    def judge(self, labeller: str, judgement: Judgement) -> bool:
        """Count a ranking or a skip; return False when the very same one was counted before.

        Raises Unknown for an item that is not there, and Conflict when the key stands for another
        judgement or the person has judged the item already.
        """
        row: dict[str, Any] = {
            "labeller": labeller,
            "key": judgement.key,
            "item": judgement.item,
            "ranks": judgement.ranks,
            "flags": judgement.flags,
            "note": judgement.note,
        }
        table = JUDGEMENTS.c
        with self.database.writing() as connection:
            item = connection.execute(select(ITEMS).where(ITEMS.c.id == judgement.item)).first()
            if item is None:
                raise Unknown(f"there is no item {judgement.item}")
            same_key = select(JUDGEMENTS).where(
                table.labeller == labeller, table.key == judgement.key
            )
            before = connection.execute(same_key).first()
            if before is not None:
                if any(row[name] != getattr(before, name) for name in row):
                    raise Conflict("this key stands for another judgement, which is counted")
                return False
            mine = select(table.key).where(table.labeller == labeller, table.item == item.id)
            if connection.execute(mine).first() is not None:
                raise Conflict("you have judged this item already, and that judgement is counted")
            row |= {
                "shown": shown_order(item.id, labeller, len(item.responses)),
                "seconds": judgement.seconds,
                "time": time.time(),
            }
            connection.execute(insert(JUDGEMENTS), row)
            connection.execute(
                delete(CLAIMS).where(CLAIMS.c.labeller == labeller, CLAIMS.c.item == item.id)
            )
        return True

    def progress(self, labeller: str = "") -> Progress:
        """Return how far the queue is; more rankings of an item than asked for do not count."""
        judged = _count(JUDGEMENTS, JUDGEMENTS.c.ranks.is_not(None))
        with self.database.reading() as connection:
            rows = connection.execute(select(ITEMS.c.wanted, judged).where(ITEMS.c.wanted > 0))
            pairs = [(int(wanted), int(done)) for wanted, done in rows]
            mine = connection.execute(
                select(func.count())
                .select_from(JUDGEMENTS)
                .where(JUDGEMENTS.c.labeller == labeller, JUDGEMENTS.c.ranks.is_not(None))
            ).scalar_one()
        return Progress(
            len(pairs), sum(w for w, _ in pairs), sum(min(pair) for pair in pairs), int(mine)
        )

    def add_battle(self, labeller: str, battle: Battle) -> Battle:
        """Keep two answers; return those that are kept for this key, the first ones."""
        with self.database.writing() as connection:
            before = connection.execute(_battle_rows(labeller, battle.key)).first()
            if before is not None:
                return _battle(before)
            connection.execute(
                insert(BATTLES),
                {
                    "labeller": labeller,
                    "key": battle.key,
                    "prompt": battle.prompt,
                    "models": list(battle.models),
                    "responses": list(battle.responses),
                    "seeds": list(battle.seeds),
                    "time": time.time(),
                    "messages": battle.messages,
                },
            )
        return battle

    def battle(self, labeller: str, key: str) -> Battle | None:
        """Return the person's battle of this key."""
        with self.database.reading() as connection:
            found = connection.execute(_battle_rows(labeller, key)).first()
        return None if found is None else _battle(found)

    def open_battle(self, labeller: str) -> Battle | None:
        """Return the person's last battle when there is no vote on it yet."""
        newest = select(BATTLES).where(BATTLES.c.labeller == labeller)
        with self.database.reading() as connection:
            found = connection.execute(newest.order_by(BATTLES.c.time.desc()).limit(1)).first()
        return None if found is None or found.vote is not None else _battle(found)

    def vote(self, labeller: str, key: str, vote: str, vote_key: str) -> tuple[Battle, bool]:
        """Count a vote; return the battle, and False when the very same vote was counted before.

        Raises Unknown without such a battle, Conflict when there is another vote on it.
        """
        with self.database.writing() as connection:
            found = connection.execute(_battle_rows(labeller, key)).first()
            if found is None:
                raise Unknown("there is no such pair of answers to a prompt of yours")
            fresh = found.vote is None
            if not fresh and (found.vote, found.vote_key) != (vote, vote_key):
                raise Conflict("you have voted on these two answers already, and that vote counts")
            if fresh:
                connection.execute(
                    update(BATTLES)
                    .where(BATTLES.c.labeller == labeller, BATTLES.c.key == key)
                    .values(vote=vote, vote_key=vote_key, vote_time=time.time())
                )
        return _battle(found, vote), fresh

    def rankings(self) -> list[Row[Any]]:
        """Return all judgements with `prompt`, `responses` and `extra` of the item, by item."""
        joined = select(JUDGEMENTS, ITEMS.c.prompt, ITEMS.c.responses, ITEMS.c.extra).join(ITEMS)
        with self.database.reading() as connection:
            order = (ITEMS.c.position, ITEMS.c.id, JUDGEMENTS.c.time, JUDGEMENTS.c.labeller)
            return list(connection.execute(joined.order_by(*order)))

    def votes(self) -> list[Row[Any]]:
        """Return all battles with a vote, in the order of the votes."""
        voted = select(BATTLES).where(BATTLES.c.vote.is_not(None))
        with self.database.reading() as connection:
            return list(connection.execute(voted.order_by(BATTLES.c.vote_time, BATTLES.c.key)))


def _count(table: Any, condition: Any) -> Any:
    """Return the number of rows of `table` for an item, as a part of a query on items."""
    return (
        select(func.count())
        .select_from(table)
        .where(table.c.item == ITEMS.c.id, condition)
        .correlate(ITEMS)
        .scalar_subquery()
    )


def _claim(connection: Connection, item: str, labeller: str, now: float) -> None:
    connection.execute(delete(CLAIMS).where(CLAIMS.c.labeller == labeller))
    connection.execute(insert(CLAIMS), {"item": item, "labeller": labeller, "time": now})


def _battle_rows(labeller: str, key: str) -> Any:
    return select(BATTLES).where(BATTLES.c.labeller == labeller, BATTLES.c.key == key)


def _item(row: Row[Any]) -> Item:
    return Item(row.id, row.prompt, list(row.responses))


def _battle(row: Row[Any], vote: str | None = None) -> Battle:
    (left, right), (one, other), (seed, next_seed) = row.models, row.responses, row.seeds
    vote = vote or row.vote
    return Battle(
        row.key, row.prompt, (left, right), (one, other), (seed, next_seed), vote, row.messages
    )
