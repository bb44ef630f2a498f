"""Many coroutines, their results as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from engines.types import Outcome


async def as_finished(work: Sequence[Coroutine[Any, Any, Outcome]]) -> AsyncIterator[list[Outcome]]:
    """Outcomes in the order of completion, those of one engine step together. Cancelling cancels what is in flight."""
    done: asyncio.Queue[asyncio.Task[Outcome]] = asyncio.Queue()
    tasks = [asyncio.create_task(one) for one in work]
    for task in tasks:
        task.add_done_callback(done.put_nowait)
    try:
        left = len(tasks)
        while left:
            finished = [await done.get()]
            await asyncio.sleep(0)
            while not done.empty():
                finished.append(done.get_nowait())
            left -= len(finished)
            yield [task.result() for task in finished]
    finally:
        for task in tasks:
            task.cancel()
