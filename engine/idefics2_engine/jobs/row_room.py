"""Rows that are in flight together, or one row alone, on one event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class RowRoom:
    """A lock that many rows share or that one row has for itself."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._inside = 0
        # Rows that are alone or wait for that, so that others do not keep them waiting
        self._alone = 0

    @asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        """Wait until no row is alone or waits for it."""
        await self._enter(lambda: not self._alone)
        try:
            yield
        finally:
            self._inside -= 1
            await self._tell()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Wait until no other row is in flight."""
        self._alone += 1
        try:
            await self._enter(lambda: not self._inside)
            try:
                yield
            finally:
                self._inside -= 1
        finally:
            self._alone -= 1
            await self._tell()

    async def _enter(self, may_enter: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(may_enter)
            self._inside += 1

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
