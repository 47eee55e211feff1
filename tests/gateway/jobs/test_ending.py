"""Tasks that swallow a cancellation end all the same."""

from __future__ import annotations

import asyncio

from deepseek_triton.gateway.jobs.ending import end_tasks


def test_a_task_that_swallows_its_cancellation_is_cancelled_again() -> None:
    async def stubborn(times: int) -> None:
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if (times := times - 1) < 0:
                    raise

    async def failing() -> None:
        raise ValueError("dropped")

    async def main() -> None:
        tasks = [asyncio.create_task(stubborn(times)) for times in (0, 2)] + [asyncio.create_task(failing())]
        await asyncio.sleep(0)
        await asyncio.wait_for(end_tasks(tasks, 0.01), 5)
        assert [task.cancelled() for task in tasks] == [True, True, False]

    asyncio.run(main())
