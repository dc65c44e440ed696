"""A process that makes shards: `python -m graftkit.data.corpora.worker`, started by `crew.py`.

It reads lines of JSON from standard input, the tokenizer first and then one job a line, and answers each job with a line.
It ends when its input does, so it does not outlive the process that started it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from graftkit.data.corpora.writing import Encoder, Job, fingerprints, write_shard
from graftkit.errors import UserError


def main() -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # which a terminal sends to all processes; the first one decides
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print is no answer
    lines: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    first = json.loads(lines.get())
    encoder = Encoder.read(first["tokenizer"], first["unknown"])
    while True:
        print(json.dumps(_answer(json.loads(lines.get()), encoder)), file=answers, flush=True)


def _listen(lines: SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def _answer(asked: dict[str, Any], encoder: Encoder) -> dict[str, Any]:
    job = Job.of(asked["job"])
    try:
        if asked["fingerprints"] is not None:
            fingerprints(job, Path(asked["fingerprints"]))
            return {"done": {}}
        return {"done": write_shard(job, encoder)}
    except UserError as error:
        return {"mistake": str(error)}
    except Exception:
        return {"failure": traceback.format_exc()}


if __name__ == "__main__":
    main()
