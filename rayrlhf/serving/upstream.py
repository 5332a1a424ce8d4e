"""An engine as the endpoint sees it: behind a handle of Ray Serve, up or down.

A call that is always under way tells at once when the engine's process dies. What waits for it then
ends with 503, and so does what comes before Serve has started it again: nobody waits in a queue for
an engine that is not there.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Protocol, TypeVar

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from rayrlhf.data.records import Record
from rayrlhf.serving.answers import Answer, Kind
from rayrlhf.serving.refusals import Refusal
from rayrlhf.serving.weights import Live

AGAIN_S = 0.2
Result = TypeVar("Result")


class Upstream(Protocol):
    """An engine that answers."""

    version: str
    """Of its weights; empty while it is down."""
    ongoing: int
    """Requests that it is answering."""

    async def answer(self, kind: Kind, body: dict[str, Any]) -> Answer:
        """Answer a request; raises Refusal (503) when the engine is down or goes down."""
        ...

    def stream(self, kind: Kind, body: dict[str, Any]) -> AsyncIterator[Answer | str]:
        """Yield an Answer and then events; raises Refusal (503) as above."""
        ...

    async def load(self, live: Live, wait_s: float) -> str:
        """Change the weights between two answers; raises Refusal (503), TimeoutError."""
        ...

    async def restart(self) -> None:
        """Let Serve start the engine again, with the weights that are live."""
        ...

    async def watch(self) -> None:
        """Keep `version` right, for ever."""
        ...


class Scoring(Protocol):
    """A reward model that scores."""

    async def score(self, opening: Record, responses: list[str]) -> list[float] | str:
        """Return a score per response to a `prompt` or `messages`, or what is wrong with them.

        Raises Refusal (503).
        """
        ...

    async def watch(self) -> None:
        """Know whether it is up, for ever."""
        ...


class _Watched:
    """A deployment of one replica, of which is known whether it is up."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle, self._streams = handle, handle.options(stream=True)
        self._down = asyncio.Event()
        self.version = ""

    async def watch(self) -> None:
        """Keep `version` right, for ever."""
        while True:
            names = self._streams.watch.remote()  # waits for a replica, and ends with it
            try:
                async for name in names:
                    self.version = name
                    self._down.clear()
            except (RayError, RayServeException) as error:
                if self.version:
                    print(f"serve: a model went down: {error!r}"[:500], flush=True)
            finally:
                self.version = ""
                self._down.set()
                names.cancel()
            await asyncio.sleep(AGAIN_S)

    def _require_up(self) -> None:
        if not self.version:
            raise _away("is not up yet, or is being started again")

    async def _unless_down(self, call: Awaitable[Result]) -> Result:
        """Wait for a call; raises Refusal (503) when the replica goes down meanwhile."""
        done, down = asyncio.ensure_future(call), asyncio.ensure_future(self._down.wait())
        try:
            await asyncio.wait({done, down}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise _away("went down while it was answering")
            return await done
        except RayTaskError:
            raise  # the replica's own error, not what became of it
        except (RayError, RayServeException) as error:
            raise _away(f"does not answer ({type(error).__name__})") from error
        finally:
            done.cancel()
            down.cancel()

    async def _call(self, response: DeploymentResponse) -> Any:
        """Wait for a call, which ends with what waits for it."""
        try:
            return await self._unless_down(_result(response))
        except BaseException:
            response.cancel()
            raise


class ServeUpstream(_Watched):
    """An engine that is a deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        super().__init__(handle)
        self.ongoing = 0

    async def answer(self, kind: Kind, body: dict[str, Any]) -> Answer:
        """Answer a request."""
        self._require_up()
        self.ongoing += 1
        try:
            answer: Answer = await self._call(self._handle.answer.remote(kind, body))
            return answer
        finally:
            self.ongoing -= 1

    async def stream(self, kind: Kind, body: dict[str, Any]) -> AsyncIterator[Answer | str]:
        """Yield an Answer and then events."""
        self._require_up()
        self.ongoing += 1
        response = self._streams.stream.remote(kind, body)
        try:
            while True:
                try:
                    yield await self._unless_down(_next(response))
                except StopAsyncIteration:
                    return
        except BaseException:
            response.cancel()
            raise
        finally:
            self.ongoing -= 1

    async def load(self, live: Live, wait_s: float) -> str:
        """Change the weights."""
        self._require_up()
        self.version = await self._call(self._handle.load.remote(live, wait_s))
        return self.version

    async def restart(self) -> None:
        """Let Serve start the engine again."""
        try:
            await self._handle.give_up.remote()
        except (RayError, RayServeException) as error:
            print(f"serve: an engine is gone already: {error!r}"[:500], flush=True)


class ServeScorer(_Watched):
    """A reward model that is a deployment."""

    async def score(self, opening: Record, responses: list[str]) -> list[float] | str:
        """Return a score per response, or what is wrong with them."""
        self._require_up()
        called = self._handle.score.remote(opening, responses)
        scores: list[float] | str = await self._call(called)
        return scores


async def _result(response: DeploymentResponse) -> Any:
    return await response


async def _next(stream: AsyncIterator[Any]) -> Any:
    return await anext(stream)


def _away(how: str) -> Refusal:
    return Refusal(503, f"the model {how}: try again in a moment")
