"""A run that is killed at any moment and resumed ends with the same graft, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import forked, make_rows, tune_words
from killing import assert_same, killed, lines, put_back, resume
from safetensors import safe_open
from safetensors.torch import load_file

from graftkit.cli.main import main
from graftkit.errors import Interrupted

pytestmark = pytest.mark.slow

# each case: method, settings, and the step of the early stop, if there is one
CASES = {
    "lora": ("lora(rank=4, dropout=0.1) + head()", ["train.steps=9"]),
    "full": ("full(lr=0.001) + head()", ["train.steps=7"]),
    "accumulate": ("lora(rank=2) + head()", ["train.steps=6", "train.accumulate=2", "train.batch_size=8"]),
    "head": ("head(pooling='mean')", ["train.steps=9"]),
    "unfreeze": ("unfreeze('blocks[-1:]', lr=0.001) + head(pooling='mean')", ["train.steps=8"]),
    "adalora": ("adalora(rank=4, target_rank=2, dropout=0.1) + head()", ["train.steps=9"]),
    "vera": ("vera(rank=8, seed=3) + head()", ["train.steps=7"]),
    "prefix": ("prefix(tokens=3, hidden=8) + head(pooling='cls')", ["train.steps=7"]),
    "prompt": ("prompt(tokens=3) + head(pooling='cls')", ["train.steps=7"]),
    "galore": (
        "full(lr=0.001) + head()",
        ["train.steps=7", "train.optimizer=galore(rank=3, interval=3)"],
    ),
    "peft": ("peft('hra', {'r': 4}) + head()", ["train.steps=7"]),
    "best": (
        "full(lr=0.02) + head(lr=0.1)",
        ["train.steps=40", "train.early_stopping=3", "train.evaluate_every=2", "train.schedule=constant"],
    ),
}


@pytest.fixture(scope="module")
def uninterrupted(short_bert, rows_folder, tmp_path_factory):
    """The run of a case that nothing stops, made once."""
    made: dict[str, Path] = {}

    def run(case: str) -> Path:
        if case not in made:
            made[case] = tmp_path_factory.mktemp("whole") / case
            tune(short_bert, rows_folder, made[case], case)
        return made[case]

    return run


def words_of(model: Path, rows: Path, out: Path, case: str) -> list[str]:
    method, settings = CASES[case]
    return tune_words(model, rows, out, "train.checkpoint_every=1", *settings, method=method)


def tune(model: Path, rows: Path, out: Path, case: str) -> None:
    from graftkit.cli.main import main

    with pytest.raises(SystemExit) as stop:
        main(words_of(model, rows, out, case))
    assert stop.value.code == 0


@pytest.mark.parametrize(
    ("case", "moment", "number"),
    [
        ("lora", "mid-write", 1),  # before there is any checkpoint
        ("lora", "mid-log", 4),
        ("lora", "before-plan", 0),
        ("lora", "before-result", 0),
        ("full", "mid-write", 4),
        ("accumulate", "after-rename", 3),
        ("head", "mid-write", 8),
        ("unfreeze", "after-rename", 5),
        ("adalora", "mid-write", 4),
        ("vera", "before-rename", 3),
        ("prefix", "before-rename", 4),
        ("best", "after-best", 1),
        ("best", "mid-write", 9),
    ],
)
def test_killed_and_resumed(uninterrupted, short_bert, rows_folder, tmp_path, case, moment, number):
    run = tmp_path / "run"
    words = words_of(short_bert, rows_folder, run, case)
    killed(moment, number, words)
    assert not (run / "result.json").exists()
    resume(run)
    assert_same(run, uninterrupted(case))


@pytest.mark.slow
def test_killed_again_and_again_at_any_moment(uninterrupted, short_bert, rows_folder, tmp_path):
    """No patch: a real process, killed from outside as soon as it has come one checkpoint further."""
    run = tmp_path / "run"
    seen: set[str] = set()

    def kill_after_a_checkpoint(pid: int) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            new = {path.name for path in (run / "checkpoints").glob("step-*")} - seen
            if new:
                seen.update(new)
                break
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)

    for words in (words_of(short_bert, rows_folder, run, "lora"), ["tune", "--resume", str(run)]):
        ended = forked(lambda words=words: main(words), meanwhile=kill_after_a_checkpoint)
        assert ended.status == -signal.SIGKILL, ended.err
    resume(run)
    assert_same(run, uninterrupted("lora"))


@pytest.mark.parametrize("case", ["lora", "prompt", "peft"])
def test_control_c(uninterrupted, short_bert, rows_folder, tmp_path, case):
    if case == "peft":
        pytest.importorskip("peft")
    run = tmp_path / "run"

    def work():
        from graftkit.cli.main import main
        from graftkit.runs import monitor as watch

        plain = watch.Watch.log

        def log(self, step):
            plain(self, step)
            if step.number == 4:
                os.kill(os.getpid(), signal.SIGINT)

        watch.Watch.log = log
        main(words)

    words = [
        w for w in words_of(short_bert, rows_folder, run, case) if not w.startswith("train.checkpoint_every")
    ]
    stopped = forked(work)
    assert stopped.status == 130 and "Traceback" not in stopped.err
    assert "the checkpoint is written" in stopped.err and f"graftkit tune --resume {run}" in stopped.err
    assert [path.name for path in (run / "checkpoints").glob("step*")] == ["step-00000004.safetensors"]
    resume(run)
    assert_same(run, uninterrupted(case))


@pytest.mark.parametrize("moment", ["training_forward", "describe"])
def test_control_c_before_and_after_the_steps(
    uninterrupted, short_bert, rows_folder, tmp_path, monkeypatch, command, moment
):
    import graftkit.runs.monitor
    import graftkit.runs.tune

    def interrupt(*arguments):
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(
            graftkit.runs.tune if moment == "training_forward" else graftkit.runs.monitor, moment, interrupt
        )
        stopped = command(*words_of(short_bert, rows_folder, run, "lora"))
    assert stopped.status == 130 and f"graftkit tune --resume {run}" in stopped.err
    resume(run)
    assert_same(run, uninterrupted("lora"))


def test_checkpoints_hold_no_base_weights(short_bert, rows_folder, tmp_path):
    run = tmp_path / "run"
    words = words_of(short_bert, rows_folder, run, "lora")
    killed("after-rename", 3, words)
    path = max((run / "checkpoints").glob("step-*"))
    tensors = load_file(path)
    parameters = {name for name in tensors if name.startswith("parameters/")}
    assert all(".lora_default." in name or "classifier" in name for name in parameters)
    moments = {name for name in tensors if name.startswith(("optimizer/exp_avg/", "optimizer/exp_avg_sq/"))}
    assert {name.split("/", 2)[2] for name in moments} == {name.split("/", 1)[1] for name in parameters}
    trained = json.loads((run / "plan.json").read_text())["trained_parameters"]
    assert path.stat().st_size < 3 * 4 * trained + 40_000
    resume(run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["best.safetensors"]
    for path in run.rglob("*.safetensors"):
        assert not [
            name for name in load_file(path) if name.endswith("query.weight") or "word_embeddings" in name
        ]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def blank_a_page(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-6000, os.SEEK_END)
        file.write(bytes(4096))


def rename_a_tensor(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b"layer.0", b"layer.2", 1).replace(b"layer.1", b"layer.0", 1))


@pytest.fixture(scope="module")
def stopped(short_bert, rows_folder, tmp_path_factory) -> tuple[Path, Path]:
    """Where a run was killed after its fourth checkpoint, and a copy of what it left."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    killed("after-rename", 4, words_of(short_bert, rows_folder, run, "lora"))
    return run, Path(shutil.copytree(run, run.with_name("left")))


@pytest.mark.parametrize("damage", [cut, flip_a_bit, blank_a_page, rename_a_tensor])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(uninterrupted, stopped, command, damage):
    run, left = stopped
    put_back(left, run)
    _, path = sorted((run / "checkpoints").glob("step-*"))
    damage(path)
    done = command("tune", "--resume", run)
    assert done.status == 0 and f"note: {path} is" in done.out and "resumed at step 3 of 9" in done.out
    assert_same(run, uninterrupted("lora"))


def test_damaged_checkpoints_are_refused(short_bert, rows_folder, tmp_path, command):
    run = tmp_path / "run"
    killed("after-rename", 3, words_of(short_bert, rows_folder, run, "lora"))
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    for path in checkpoints:
        flip_a_bit(path)
    done = command("tune", "--resume", run)
    assert (
        done.status == 1 and checkpoints[-1].name in done.err and f"remove {run / 'checkpoints'}" in done.err
    )
    shutil.rmtree(run / "checkpoints")
    done = command("tune", "--resume", run)
    assert done.status == 0 and "resumed at step 0 of 9" in done.out


def test_damaged_best_weights(uninterrupted, short_bert, rows_folder, tmp_path, command):
    run = tmp_path / "run"
    killed("after-rename", 4, words_of(short_bert, rows_folder, run, "best"))
    best = run / "checkpoints" / "best.safetensors"
    with safe_open(best, framework="pt") as file:
        assert "checksum" in file.metadata()
    last = max((run / "checkpoints").glob("step-*"))
    flip_a_bit(best)
    done = command("tune", "--resume", run)
    with safe_open(last, framework="pt") as file:
        position = json.loads(file.metadata()["position"])
    if position["best"]["step"] == position["step"]:  # the checkpoint holds the same weights
        assert done.status == 0
        assert_same(run, uninterrupted("best"))
    else:
        assert done.status == 1 and "best.safetensors is damaged" in done.err


def test_other_rows_are_refused(short_bert, rows_folder, tmp_path, command):
    rows = Path(shutil.copytree(rows_folder, tmp_path / "rows"))
    words = words_of(short_bert, rows, tmp_path / "run", "lora")
    killed("after-rename", 2, words)
    for name in ("train", "eval"):
        text = (rows / f"{name}.csv").read_text()
        first, *others = text.splitlines(keepends=True)
        (rows / f"{name}.csv").write_text("".join([first, *reversed(others)]))
        done = command("tune", "--resume", tmp_path / "run")
        assert done.status == 1 and f"{name}.csv: the {name} rows are not those" in done.err
        (rows / f"{name}.csv").write_text(text)
    assert command("tune", "--resume", tmp_path / "run").status == 0


def test_a_run_on_rows_in_memory_goes_on_from_python(short_bert, tmp_path, monkeypatch):
    import graftkit
    import graftkit.runs.monitor

    rows = make_rows(24)
    plain = graftkit.runs.monitor.Watch.log

    def log(self, step):
        plain(self, step)
        if step.number == 2:
            os.kill(os.getpid(), signal.SIGINT)

    given = {"model": str(short_bert), "train": rows, "eval": None, "method": "head()"}
    settings = {"train.steps": 4, "train.precision": "fp32"}
    with monkeypatch.context() as patch:
        patch.setattr(graftkit.runs.monitor.Watch, "log", log)
        with pytest.raises(Interrupted, match=r"graftkit\.resume\('.*run', train=\.\.\.\)"):
            graftkit.tune(**given, out=tmp_path / "run", settings=settings)
    with pytest.raises(graftkit.UserError, match=r"graftkit\.resume\("):
        graftkit.resume(tmp_path / "run")
    with pytest.raises(graftkit.UserError, match="are not those"):
        graftkit.resume(tmp_path / "run", train=rows[::-1])
    assert graftkit.resume(tmp_path / "run", train=rows).result["steps"] == 4
    whole = graftkit.tune(**given, out=tmp_path / "whole", settings=settings)
    assert_same(tmp_path / "run", whole.path)


def test_early_stopping_keeps_the_best_weights(uninterrupted):
    """The case 'best' does stop early, and its graft is that of its best evaluation."""
    run = uninterrupted("best")
    evaluations = [line for line in lines(run) if line["kind"] == "evaluation"]
    best = max(evaluations, key=lambda line: (line["accuracy"], -line["loss"]))
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] < 40 and result["steps"] == evaluations[-1]["step"]
    assert result["evaluation"]["step"] == best["step"] < result["steps"]
    assert evaluations[-4]["step"] == best["step"], "three evaluations without a better one"
    import graftkit

    found = graftkit.Run(run, result).evaluate(json_path(run))
    assert found["accuracy"] == best["accuracy"] and found["loss"] == pytest.approx(best["loss"], rel=1e-5)


def json_path(run: Path) -> str:
    import yaml

    return yaml.safe_load((run / "recipe.yaml").read_text())["data"]["eval"]
