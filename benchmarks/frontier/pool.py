"""Several runs side by side, each in a process of its own that is forked from this one.

A forked process shares the testbed and the base, starts at once, and its peak memory is the run's.
"""

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Task = TypeVar("Task")


def side_by_side(
    tasks: Sequence[Task], work: Callable[[Task], dict[str, Any]], processes: int
) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Every task with what ``work`` gave, as they end; what failed gave ``{"error": text}``."""
    fork = get_context("fork")
    waiting = list(reversed(tasks))
    running: dict[Connection[Any, Any], tuple[Task, Any]] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            task = waiting.pop()
            here, there = fork.Pipe(duplex=False)
            process = fork.Process(target=_worker, args=(work, task, there), daemon=True)
            process.start()
            there.close()
            running[here] = (task, process)
        ended = wait(list(running))
        for ready in [pipe for pipe in running if pipe in ended]:
            task, process = running.pop(ready)
            try:
                found = ready.recv()
            except EOFError:
                process.join()
                found = {"error": f"the process ended with code {process.exitcode}"}
            process.join()
            yield task, found


def _worker(work: Callable[[Any], dict[str, Any]], task: Any, there: Any) -> None:
    with open(os.devnull, "w") as nowhere:  # what libraries say would tear up the progress bar
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        there.send(work(task))
    except Exception:  # whatever it was, the other runs go on, and it is reported
        there.send({"error": traceback.format_exc()})
    there.close()
