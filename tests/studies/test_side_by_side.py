"""Runs of a study side by side, in copies of this process: the same results, and no harm from one that dies."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from conftest import make_rows

import graftkit
from graftkit.errors import Note, UserError
from graftkit.files import read_tensors
from graftkit.studies import sharing
from graftkit.studies import study as studies
from graftkit.studies.measuring import Cost, Pace, pace_of
from graftkit.studies.side_by_side import Job, SideBySide, in_turn

HEADS = ["head(pooling='mean')", "bitfit() + head(pooling='mean')"]


def compared(model, out, pace, monkeypatch):
    """The comparison of two methods at a pace; None: in this process."""
    monkeypatch.setattr(sharing, "cores", lambda: 2)
    monkeypatch.setattr(sharing, "pace_of", lambda *_: pace)
    monkeypatch.setattr(sharing, "can_fork", lambda: pace is not None)
    return graftkit.compare(
        model=str(model), methods=HEADS, seeds=1, search=2, train=make_rows(40, 1), eval=0.5, out=out,
        settings={"train.precision": "fp32", "train.batch_size": 8, "train.steps": 3, "train.evaluate_every": "end"},
    )  # fmt: skip


def test_runs_side_by_side_are_those_that_run_alone(short_bert, tmp_path, monkeypatch):
    assert torch.get_num_threads() == 1
    ways = {"beside": Pace(2, 1), "here": None}
    found = {name: compared(short_bert, tmp_path / name, pace, monkeypatch) for name, pace in ways.items()}
    runs = sorted(path.name for path in (tmp_path / "here" / "runs").iterdir())
    assert len(runs) == 4 == len(list((tmp_path / "beside" / "runs").iterdir()))
    for run in runs:
        graft, other = (
            read_tensors(tmp_path / name / "runs" / run / "graft" / "graft.safetensors")[0] for name in ways
        )
        assert graft.keys() == other.keys() and all(torch.equal(graft[key], other[key]) for key in graft)
    for row, other in zip(found["beside"].rows, found["here"].rows, strict=True):
        assert row["values"] == other["values"] and row["tried"] == other["tried"]
        assert row["learning_rate"] == other["learning_rate"]
    assert (tmp_path / "beside" / "pace.json").is_file()

    # what is there is not made again, and one whose result is damaged is
    damaged = tmp_path / "beside" / "runs" / runs[0] / "result.json"
    damaged.write_text('{"metrics": 3}')
    again = compared(short_bert, tmp_path / "beside", Pace(1, 1), monkeypatch)
    assert [row["values"] for row in again.rows] == [row["values"] for row in found["beside"].rows]
    assert '"accuracy"' in damaged.read_text()


def chain(*jobs):
    return (yield [Job(job) for job in jobs])


def note_and_return(value):
    warnings.warn(Note("something to know"), stacklevel=1)
    return value


def refused():
    raise UserError("it cannot be trained")


def die_beside_others(path):
    """Be killed the first time, as by a system without memory."""
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def test_chains_go_on_when_their_jobs_are_done():
    def longer():
        first = yield [Job(partial(int, 3)), Job(partial(int, 4))]
        second = yield []
        third = yield [Job(partial(int, sum(first)))]
        return first, second, third

    ended = []
    told = Job(partial(note_and_return, 5), ended=partial(ended.append, "one"))

    def short():
        return (yield [told, told, Job(refused)])

    with pytest.warns(Note, match="something to know") as notes:
        beside = SideBySide(3, 1).run([longer(), short(), chain()])
    assert beside[0] == ([3, 4], [], [7]) == in_turn([longer()])[0]
    assert beside[1][:2] == [5, 5] and str(beside[1][2]) == "it cannot be trained"
    assert ended == ["one", "one"] and len(notes) == 1


def test_what_a_copy_imports_is_there_for_the_next():
    def imports():
        import colorsys

        return colorsys.__name__

    sys.modules.pop("colorsys", None)
    assert SideBySide(1, 1).run([chain(imports)]) == [["colorsys"]] and "colorsys" in sys.modules


def test_one_that_is_killed_is_done_again_alone(tmp_path):
    work = SideBySide(2, 1)
    with pytest.warns(Note, match="SIGKILL.*again with no other beside it"):
        found = work.run(
            [chain(partial(time.sleep, 0.3), partial(die_beside_others, tmp_path / "died"), partial(int, 1))]
        )
    assert found == [[None, "done", 1]] and work.at_once == 1
    found = SideBySide(2, 1).run([chain(partial(die_beside_others, tmp_path / "alone"))])
    assert "its process was killed (SIGKILL)" in str(found[0][0])


def test_errors_and_signals_stop_all(tmp_path):
    def ends_well():
        with graftkit.runs.progress.stop_signals() as stopped:
            while not stopped:
                time.sleep(0.01)
        (tmp_path / f"{os.getpid()}").touch()

    def wrong():
        time.sleep(0.1)
        raise ZeroDivisionError

    def signalled():
        time.sleep(0.1)
        os.kill(os.getppid(), signal.SIGTERM)
        ends_well()

    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        SideBySide(2, 1).run([chain(ends_well, wrong)])
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(KeyboardInterrupt):
        SideBySide(2, 1).run([chain(ends_well, signalled)])
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(ChildProcessError):  # none is left
        os.waitpid(-1, os.WNOHANG)


def test_memory_bounds_how_many_run():
    work = SideBySide(4, 1)
    running, most = [], []

    def start(asked):
        found = plain(asked)
        if found:
            running.append(asked)
            most.append(
                sum(one.job.memory for one in running if one in [o for _, o in work.running.values()])
                + asked.job.memory
            )
        return found

    plain, work._fits, work.room = work._fits, start, 100

    def jobs():
        return (yield [Job(partial(time.sleep, 0.05), memory=40) for _ in range(5)])

    work.run([jobs()])
    assert max(most) == 80 and len(most) == 5


def test_the_pace_is_the_faster_one():
    head, full = Cost(2.0, 1.0, 1.1, 100), Cost(2.0, 100.0, 380.0, 100)
    assert pace_of([(head, 6, 4)], 4, 2, 1000) == Pace(2, 2)
    assert pace_of([(full, 6, 4)], 4, 2, 1000) == Pace(1, 4)
    assert pace_of([(head, 6, 4)] * 8, 4, 16, 1000) == Pace(4, 1)
    assert pace_of([(head, 6, 4)] * 8, 4, 16, 250) == Pace(2, 2)
    assert pace_of([(head, 6, 4)] * 8, 4, 16, 150) == Pace(1, 4)
    assert pace_of([], 4, 2, 1000) == Pace(2, 2)  # none could be measured: each is alone all the same
    assert pace_of([(head, 2, 2)], 4, 2, 1000) == Pace(1, 4)  # each waits for the one before


def test_threads_of_the_first_process_do_not_hang_its_copies():
    """OpenMP's threads are not in a copy; they would be waited for if the copy began in the thread that has used them."""
    threads = torch.get_num_threads()

    def product():
        a = torch.from_numpy(np.random.default_rng(0).standard_normal((300, 300)))
        return float((a @ a).exp().sum().log()), torch.get_num_threads()

    try:
        torch.set_num_threads(2)
        here = product()
        assert SideBySide(1, 2).run([chain(product)])[0][0] == list(here)
    finally:
        torch.set_num_threads(threads)


def test_a_study_has_one_thread_count(tmp_path, monkeypatch):
    """A study goes on as it began: the number of threads changes results by rounding."""
    study = studies.Study("compare", tmp_path, {}, graftkit.report.console.Console(quiet=True))
    kind = sharing.Kind("head()", None, None, 1, 6, 4)
    monkeypatch.setattr(
        sharing, "measure", lambda *_: {"fixed": 1.0, "alone": 1.0, "beside": 1.0, "memory": 5}
    )
    monkeypatch.setattr(sharing, "cores", lambda: 2)
    sharing.set_pace(study, [kind], 2)
    assert study.pace == Pace(2, 1) and study.memory == {"head()": 5}
    monkeypatch.setattr(sharing, "cores", lambda: 8)
    again = studies.Study("compare", tmp_path, {}, graftkit.report.console.Console(quiet=True))
    sharing.set_pace(again, [kind], 2)
    assert again.pace == Pace(2, 1)
    (tmp_path / "pace.json").write_text("{")
    sharing.set_pace(again, [kind], 2)
    assert again.pace == Pace(2, 4)
