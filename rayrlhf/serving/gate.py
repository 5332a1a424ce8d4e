"""A gate between answers and new weights: answers pass together, a change goes alone.

A change closes the gate, waits until nobody is inside, and opens it again: who came meanwhile then
passes. So an answer, however many requests of the engine it is made of, is of one version.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """For one event loop."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._open, self._empty = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._inside = 0

    @property
    def inside(self) -> int:
        """Answers that are being made."""
        return self._inside

    @asynccontextmanager
    async def answer(self) -> AsyncIterator[None]:
        """Stay inside during the block, after waiting for a change to end."""
        while not self._open.is_set():
            await self._open.wait()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @asynccontextmanager
    async def change(self, wait_s: float) -> AsyncIterator[None]:
        """Be alone during the block; raises TimeoutError when it does not empty in `wait_s`."""
        async with self._turn:
            self._open.clear()
            try:
                async with asyncio.timeout(wait_s):
                    while self._inside:
                        self._empty.clear()
                        await self._empty.wait()
                yield
            finally:
                self._open.set()
