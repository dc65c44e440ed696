"""Do jobs in several processes.

They are started as programs of their own and not forked: a fork of a process in which torch or a tokenizer has threads may
hang, and those that Python's multiprocessing starts run the caller's script again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from graftkit.data.corpora.writing import Encoder, Job, fingerprints, write_shard
from graftkit.errors import UserError

ROOT = Path(__file__).parents[3]


def done(
    jobs: Sequence[Job], encoder: Encoder, processes: int, to: Sequence[Path] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Do jobs, and yield the place and the description of each when it is done, in any order.

    `to`: write the fingerprints of documents to these paths, and make no shards. Raises the first error of a job; what other
    jobs have finished stays.
    """
    places = [None] * len(jobs) if to is None else list(to)
    if processes < 2 or encoder.portable is None or len(jobs) < 2:
        for number, (job, place) in enumerate(zip(jobs, places)):
            if place is not None:
                fingerprints(job, place)
            yield number, {} if place is not None else write_shard(job, encoder)
        return
    workers = [_Worker(encoder) for _ in range(min(processes, len(jobs)))]
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def do(job: Job, place: Path | None) -> dict[str, Any]:
        worker = idle.get()
        try:
            return worker.do(job, place)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(len(workers))
    try:
        asked = {pool.submit(do, job, place): number for number, (job, place) in enumerate(zip(jobs, places))}
        for future in as_completed(asked):
            yield asked[future], future.result()
    finally:
        for worker in workers:
            worker.stop()
        pool.shutdown(cancel_futures=True)


class _Worker:
    """A process that does one job at a time."""

    def __init__(self, encoder: Encoder) -> None:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        single = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "graftkit.data.corpora.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, **single, "PYTHONPATH": os.pathsep.join(paths)}, encoding="utf-8",
        )  # fmt: skip
        self._say({"tokenizer": encoder.portable, "unknown": encoder.unknown})

    def do(self, job: Job, place: Path | None) -> dict[str, Any]:
        self._say({"job": job.as_dict(), "fingerprints": None if place is None else str(place)})
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise UserError(
                f"a process that tokenizes {job.parts[0].path} was killed (status {self.process.wait()}), perhaps for want of "
                "memory. Run the command again with fewer processes; what is finished is kept."
            )
        answer = json.loads(line)
        if "mistake" in answer:
            raise UserError(answer["mistake"])
        if "failure" in answer:
            raise RuntimeError(answer["failure"])
        return answer["done"]

    def _say(self, value: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(value) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it is gone, which its silence tells
            pass

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass
