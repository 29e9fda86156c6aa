"""Changes that the front has asked the worker for and that are not answered yet."""

from __future__ import annotations

import asyncio
import itertools

from salver.server.engine.changes import Changed
from salver.server.engine.errors import ChangeRefused, EngineError

# Of changes: unique for the life of the process.
next_ticket = itertools.count(1).__next__


class PendingChanges:
    """By ticket, who waits for the answer."""

    def __init__(self) -> None:
        self._waiting: dict[int, asyncio.Future[Changed]] = {}

    async def answer(self, ticket: int) -> Changed:
        """Waits for it. Raises ChangeRefused, and what `fail_all` was given."""
        future: asyncio.Future[Changed] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = future
        try:
            changed = await future
        finally:
            del self._waiting[ticket]
        if changed.refusal is not None:
            raise ChangeRefused(changed.message, changed.refusal)
        return changed

    def settle(self, changed: Changed) -> None:
        """One that nobody waits for is ignored."""
        future = self._waiting.get(changed.ticket)
        if future is not None and not future.done():
            future.set_result(changed)

    def fail_all(self, error: EngineError) -> None:
        """The worker is gone, and with it what it had not answered."""
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)
