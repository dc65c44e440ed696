"""Do the jobs of several chains of work: one after the other, or side by side in processes of their own.

A chain is a generator. It yields jobs that do not wait for one another, is sent what became of each, and returns its result.
What is done first makes no difference to a job, so both ways give the same results.
"""

from __future__ import annotations

import os
import select
import signal
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graftkit.engine.memory import host_memory, resident
from graftkit.errors import Note, UserError
from graftkit.runs.progress import stop_signals
from graftkit.studies.forked import Answer, Forked, import_here

SHARE = 0.8  # of the free memory that jobs may take together
TICK = 0.2  # seconds between looks at whether a signal came


@dataclass(frozen=True)
class Job:
    """Work that is done once. `ended` is called in this process when it is done; `memory`: bytes that it takes."""

    work: Callable[[], Any]
    ended: Callable[[], None] = lambda: None
    memory: int = 0


Outcome = Any  # the value of a job, or the `UserError` that it raised
Chain = Generator[Sequence[Job], list[Outcome], Any]


def in_turn(chains: Iterable[Chain]) -> list[Any]:
    """Do the jobs of all chains in this process, and return the results of the chains."""
    return [_one(chain) for chain in chains]


def _one(chain: Chain) -> Any:
    jobs = next(chain, None)
    while jobs is not None:
        try:
            jobs = chain.send([_outcome(job) for job in jobs])
        except StopIteration as end:
            return end.value
    return None


def _outcome(job: Job) -> Outcome:
    try:
        value = job.work()
    except UserError as error:
        return error
    job.ended()
    return value


@dataclass
class _Asked:
    """A job that waits or runs: the `place` of its outcome in the batch of its chain. `alone`: with no other beside it."""

    job: Job
    chain: int
    place: int
    alone: bool = False
    beside: bool = False  # whether another ran at the same time


class SideBySide:
    """Processes that do jobs, at most so many at a time, each with so many threads. If one is killed, as for want of memory,
    it is done again with no other beside it. `told`: notes that were shown before."""

    def __init__(self, at_once: int, threads: int, told: set[str] | None = None) -> None:
        self.at_once, self.threads = at_once, threads
        self.waiting: deque[_Asked] = deque()
        self.running: dict[int, tuple[Forked, _Asked]] = {}
        self.batches: dict[int, list[Outcome]] = {}
        self.missing: dict[int, int] = {}  # outcomes of the batch of a chain
        self.told = set() if told is None else told
        self.room = SHARE * free_memory()

    def run(self, chains: Sequence[Chain]) -> list[Any]:
        """Do the jobs of all chains, and return the results of the chains.

        Raises `KeyboardInterrupt` on Ctrl-C and its like, when all processes have ended, and `RuntimeError` for an error of a
        job that is no mistake of the user's.
        """
        results: dict[int, Any] = {}
        try:
            with stop_signals() as stopped:
                for number, chain in enumerate(chains):
                    self._go_on(number, chain, None, results)
                while self.waiting or self.running:
                    self._start()
                    ready = select.select(list(self.running), [], [], TICK)[0]
                    if stopped:
                        raise KeyboardInterrupt
                    for reader in ready:
                        self._take(reader, chains, results)
        finally:
            self._stop()
        return [results[number] for number in range(len(chains))]

    def _go_on(
        self, number: int, chain: Chain, outcomes: list[Outcome] | None, results: dict[int, Any]
    ) -> None:
        jobs: Sequence[Job] = ()
        try:
            while not jobs:
                jobs = next(chain) if outcomes is None else chain.send(outcomes)
                outcomes = []
        except StopIteration as end:
            results[number] = end.value
            return
        self.batches[number], self.missing[number] = [None] * len(jobs), len(jobs)
        self.waiting += [_Asked(job, number, place) for place, job in enumerate(jobs)]

    def _start(self) -> None:
        """Start waiting jobs as long as there is room."""
        for asked in list(self.waiting):
            if not self._fits(asked):
                continue
            self.waiting.remove(asked)
            forked = Forked(asked.job.work, self.threads)
            self.running[forked.reader] = forked, asked
            if len(self.running) > 1:
                for _, one in self.running.values():
                    one.beside = True

    def _fits(self, asked: _Asked) -> bool:
        if not self.running:
            return True
        others = [one for _, one in self.running.values()]
        if asked.alone or any(one.alone for one in others) or len(others) >= self.at_once:
            return False
        return sum(one.job.memory for one in others) + asked.job.memory <= self.room

    def _take(self, reader: int, chains: Sequence[Chain], results: dict[int, Any]) -> None:
        """Take the answer of a process that has ended."""
        forked, asked = self.running.pop(reader)
        answer = forked.answer()
        import_here(answer.modules)
        for note in answer.notes:
            if note not in self.told:
                self.told.add(note)
                warnings.warn(Note(note), stacklevel=2)
        if answer.interrupted:
            raise KeyboardInterrupt
        if answer.failure is not None:
            raise RuntimeError(f"a run failed:\n{answer.failure}")
        if answer.killed is not None and asked.beside:
            asked.alone, asked.beside = True, False
            self.waiting.appendleft(asked)
            self.at_once = max(1, self.at_once - 1)
            note = f"a run was killed ({_name(answer.killed)}), perhaps for want of memory; it is done again with no other beside it"
            warnings.warn(Note(f"{note}."), stacklevel=2)
            return
        outcome = _outcome_of(answer)
        if not isinstance(outcome, UserError):
            asked.job.ended()
        self.batches[asked.chain][asked.place] = outcome
        self.missing[asked.chain] -= 1
        if not self.missing[asked.chain]:
            self._go_on(asked.chain, chains[asked.chain], self.batches[asked.chain], results)

    def _stop(self) -> None:
        """Let the processes that run end: each finishes its step and writes its checkpoint; a second Ctrl-C kills them."""
        for forked, _ in self.running.values():
            forked.stop()
        try:
            for forked, _ in self.running.values():
                forked.answer()
        except KeyboardInterrupt:
            for forked, _ in self.running.values():
                forked.stop(signal.SIGKILL)
            raise
        finally:
            self.running.clear()


def _outcome_of(answer: Answer) -> Outcome:
    if answer.killed is not None:
        return UserError(
            f"its process was killed ({_name(answer.killed)}), perhaps for want of memory; lower train.batch_size or "
            "data.max_length, or use train.checkpointing=blocks."
        )
    return answer.done if answer.mistake is None else UserError(answer.mistake)


def _name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def free_memory() -> int:
    """Return the bytes of memory that are free, within what this process and its copies may use."""
    free = host_memory() - resident()
    with suppress(OSError, ValueError, IndexError):
        line = Path("/proc/meminfo").read_text(encoding="ascii").split("MemAvailable:")[1]
        free = min(free, int(line.split()[0]) * 1024)
    return max(0, free)


def cores() -> int:
    """Return how many threads this process computes with, which is how many processes of one thread it may use."""
    return min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
