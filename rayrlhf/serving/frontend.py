"""The endpoint's mind: which model answers, on which engine, and how new weights go live."""

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayrlhf.config import ServeConfig
from rayrlhf.serving.answers import Answer, Kind
from rayrlhf.serving.metering import Meters
from rayrlhf.serving.refusals import Refusal
from rayrlhf.serving.upstream import Scoring, Upstream
from rayrlhf.serving.votes import Votes
from rayrlhf.serving.weights import Live, LiveWeights, Unfit, check_fit, newest

FOLLOW_EVERY_S = 2.0
LOOK_EVERY_S = 1.0
MODEL, VERSION = "x-rayrlhf-model", "x-rayrlhf-version"
"""Headers of an answer: who gave it, and of which weights."""


@dataclass(frozen=True)
class Reloaded:
    """New weights that are live."""

    model: str
    version: int
    fingerprint: str


@dataclass
class Frontend:
    """All that the application needs; nothing in it is of HTTP."""

    name: str
    """That a request names to leave the choice to the shares."""
    cfg: ServeConfig
    engines: Mapping[str, Sequence[Upstream]]
    """Per model."""
    weights: LiveWeights
    scorer: Scoring | None = None
    votes: Votes | None = None
    followed: Path | None = None
    """Folder of the stage that `cfg.follow` names."""
    meters: Meters = field(default_factory=Meters)
    rng: random.Random = field(default_factory=random.SystemRandom)

    def __post_init__(self) -> None:
        self._turns = {model: asyncio.Lock() for model in self.engines}
        self._refused = ""
        self._task: asyncio.Task[None] | None = None

    @property
    def models(self) -> list[str]:
        """Names that a request may have."""
        return list(dict.fromkeys([self.name, *self.engines]))

    def choose(self, model: Any, user: str | None) -> str:
        """Return the model that answers: the one named, or by the shares, the same for a user.

        Raises Refusal (404) for a name that nobody has.
        """
        if isinstance(model, str) and model in self.engines:
            return model
        if model is not None and model != self.name:
            raise Refusal(
                404,
                f"there is no model {str(model)[:80]!r}: name one of {', '.join(self.models)}",
                "model",
            )
        place = self.rng.random() if user is None else _place(user)
        for name, share in self.cfg.shares.items():
            place -= share
            if place < 0:
                return name
        return name

    def engine(self, model: str) -> Upstream:
        """Return the engine of a model that has least to do; raises Refusal (503)."""
        up = [engine for engine in self.engines[model] if engine.version]
        if not up:
            raise Refusal(503, f"no engine of {model} is up: try again in a moment")
        return min(up, key=lambda engine: engine.ongoing)

    async def answer(self, kind: Kind, body: dict[str, Any]) -> tuple[Answer, dict[str, str]]:
        """Return the answer to a bounded request, and its headers."""
        model = self.choose(body.get("model"), body.get("user"))
        asked = {**body, "model": model}
        answer = await self.engine(model).answer(kind, asked)
        self.meters.answers.labels(model).inc()
        if self.votes is not None and answer.status == 200:
            self.votes.keep(kind, body, answer.body, answer.version)
        return answer, {MODEL: model, VERSION: answer.version}

    async def stream(
        self, kind: Kind, body: dict[str, Any]
    ) -> tuple[Answer, dict[str, str], AsyncIterator[str]]:
        """Return the beginning of a streamed answer, its headers, and its events."""
        model = self.choose(body.get("model"), body.get("user"))
        items = self.engine(model).stream(kind, {**body, "model": model})
        first = await anext(items)
        assert isinstance(first, Answer), "a stream begins with its version"
        self.meters.answers.labels(model).inc()
        return first, {MODEL: model, VERSION: first.version}, self._events(kind, body, first, items)

    async def _events(
        self, kind: Kind, body: dict[str, Any], first: Answer, items: AsyncIterator[Answer | str]
    ) -> AsyncIterator[str]:
        reader = self.votes.reader(kind, body, first.version) if self.votes is not None else None
        try:
            async for events in items:
                assert isinstance(events, str), "only the first item is an Answer"
                if reader is not None:
                    reader.read(events)
                yield events
        except Refusal as refusal:
            yield f"data: {refusal.body.decode()}\n\n"
            return
        if reader is not None:
            reader.end()

    async def load(self, model: str | None, folder: str | Path) -> Reloaded:
        """Let the weights in a folder go live, engine by engine, between two answers of each.

        Raises Refusal: 404 for a model that is not there, 422 for a folder that does not fit, 503
        where an engine is down, 504 where answers do not end in time.
        """
        name = model if model is not None else next(iter(self.engines))
        if name not in self.engines:
            raise Refusal(404, f"there is no model {name[:80]!r} to give weights to", "model")
        async with self._turns[name]:
            try:
                reloaded = await self._load(name, folder)
            except BaseException:
                self.meters.reloads.labels(name, "refused").inc()
                raise
        self.meters.reloads.labels(name, "live").inc()
        self.meters.version.labels(name).set(reloaded.version)
        return reloaded

    async def _load(self, name: str, folder: str | Path) -> Reloaded:
        before = self.weights.of(name)
        try:
            await asyncio.to_thread(check_fit, folder, before.folder)
            live = await asyncio.to_thread(self.weights.take_in, name, folder)
            # A checkpoint may be removed while its files are taken in.
            await asyncio.to_thread(check_fit, live.folder, before.folder)
        except (Unfit, OSError) as error:
            raise Refusal(422, str(error), "folder") from None
        changed = 0
        try:
            for engine in self.engines[name]:
                fingerprint = await engine.load(live, self.cfg.limits.timeout_s + LOOK_EVERY_S)
                changed += 1
        except BaseException as error:
            if not changed:
                await asyncio.to_thread(self.weights.give_up, live)
            if isinstance(error, TimeoutError):
                raise Refusal(504, "answers that are being made did not end in time") from None
            if not isinstance(error, Exception) or isinstance(error, Refusal):
                raise
            raise Refusal(503, f"{folder}: the engine could not load it: {error}"[:500]) from error
        finally:
            if changed:
                await self._settle(name, live, self.engines[name][changed:])
        return Reloaded(name, live.version, fingerprint)

    async def _settle(self, name: str, live: Live, behind: Sequence[Upstream]) -> None:
        """Record what is live; engines that did not get it start again, with it."""
        await asyncio.to_thread(self.weights.go_live, name, live)
        for engine in behind:
            await engine.restart()

    def start(self) -> None:
        """Begin to watch the engines, and the followed stage."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Watch no more."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def check(self) -> None:
        """Raise RuntimeError when nothing watches the engines any more."""
        if self._task is not None and self._task.done():
            raise RuntimeError("the endpoint does not watch its engines any more")

    async def _run(self) -> None:
        for model in self.engines:
            self.meters.version.labels(model).set(self.weights.of(model).version)
        engines: list[Upstream | Scoring] = [
            engine for several in self.engines.values() for engine in several
        ]
        engines += [self.scorer] if self.scorer is not None else []
        follow = [self._follow(self.followed)] if self.followed is not None else []
        async with asyncio.TaskGroup() as group:
            own = (self._meter(), self._mend())
            for work in (*(engine.watch() for engine in engines), *own, *follow):
                group.create_task(work)

    async def _meter(self) -> None:
        while True:
            for model, engines in self.engines.items():
                for number, engine in enumerate(engines):
                    self.meters.is_up.labels(model, str(number)).set(bool(engine.version))
            await asyncio.sleep(LOOK_EVERY_S)

    async def _mend(self) -> None:
        """Give what is live to engines that came up while it changed, and have something else."""
        said = ""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            for model in self.engines:
                try:
                    await self._catch_up(model)
                except Exception as error:  # the next look may see it well again
                    if repr(error) != said:
                        said = repr(error)
                        print(f"serve: {model} cannot catch up: {said}"[:500], flush=True)

    async def _catch_up(self, model: str) -> None:
        async with self._turns[model]:
            live = await asyncio.to_thread(self.weights.of, model)
            for engine in self.engines[model]:
                if engine.version and not live.names(model, engine.version):
                    print(f"serve: {engine.version} is behind version {live.version}", flush=True)
                    await engine.load(live, self.cfg.limits.timeout_s + LOOK_EVERY_S)

    async def _follow(self, stage: Path) -> None:
        """Let each newer checkpoint of a stage go live; what does not fit is said once."""
        assert self.cfg.follow is not None, "a followed folder is that of a stage"
        seen = await asyncio.to_thread(self._live_stamp, stage)
        while True:
            await asyncio.sleep(FOLLOW_EVERY_S)
            stamp = seen
            try:
                folder = await asyncio.to_thread(newest, stage)
                stamp = _stamp(folder)
                if folder is None or stamp == seen or not self.engines[self.cfg.follow][0].version:
                    continue
                reloaded = await self.load(self.cfg.follow, folder)
                print(f"serve: {folder} is live as {reloaded.fingerprint}", flush=True)
                seen = stamp
            except (Refusal, OSError) as error:
                if str(error) != self._refused:
                    print(f"serve: {stage}: {error}", flush=True)
                self._refused = str(error)
                if isinstance(error, Refusal) and (error.status == 422 or error.__cause__):
                    seen = stamp  # what broke an engine would break it again: the next one may do

    def _live_stamp(self, stage: Path) -> tuple[str, int]:
        """Return the stamp of the newest checkpoint if it is what is live."""
        assert self.cfg.follow is not None, "a followed folder is that of a stage"
        with suppress(OSError):
            begun = newest(stage)
            live = Path(self.weights.of(self.cfg.follow).folder)
            if begun is not None and _weights_of(begun) == _weights_of(live):
                return _stamp(begun)
        return _stamp(None)


def _stamp(folder: Path | None) -> tuple[str, int]:
    """Return what tells one checkpoint from the next, also where it has the same name."""
    return ("", 0) if folder is None else (str(folder), folder.stat().st_mtime_ns)


def _weights_of(folder: Path) -> list[tuple[str, int, int]]:
    """Return what tells the weights of a folder from others; a copy of them has the same."""
    files = [(file.name, file.stat()) for file in folder.glob("*.safetensors")]
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)


def _place(user: str) -> float:
    """Return a number in [0, 1), always the same for a user."""
    digest = hashlib.blake2b(user.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
