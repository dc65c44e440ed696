"""Kill commands at random, go on, and compare with what an undisturbed command gives, bit for bit.

    python bench/kill.py --tries 200            # about two seconds a try on one core
    python bench/kill.py --tries 20 --seed 7

Each try draws a command (a run of a task and method, a run that replaces another, an export, a merge, predictions into a
file) and how it ends: SIGKILL at a random moment, before a random operation on files, or within the writing of a tensor
file; SIGTERM or SIGINT at a random moment. Every second time, what goes on from there is killed too. Then the command that
a person would give next runs undisturbed: `--resume` for a run, else the same command with `--overwrite`. Its files must
have the bytes of an undisturbed one, and nothing else may be left. The models are the tiny ones of the tests.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "support")]

from common import machine  # noqa: E402
from conftest import _make_bert, forked, graft_tensors, make_rows, write_csv  # noqa: E402
from killing import _changes_files, assert_same, contents, die  # noqa: E402
from task_cases import CASES, material  # noqa: E402

FAST = ["train.precision=fp32", "train.batch_size=8", "train.lr=0.01", "train.steps=6", "train.checkpoint_every=1",
        "train.evaluate_every=3"]  # fmt: skip
METHODS = ("lora(rank=2, dropout=0.1) + head()", "full(lr=0.001) + head()", "prefix(tokens=3) + head(pooling='cls')",
           "adalora(rank=4, target_rank=2) + head()", "adapter() + head()", "head(pooling='mean')")  # fmt: skip
TASKS = ("tag", "span", "generate")  # besides classify
ENDS = ("SIGKILL at a moment", "SIGKILL at a file operation", "SIGKILL within a write", "SIGTERM", "SIGINT")
BYTES = ".bytes"  # of the undisturbed outcome


@dataclass(frozen=True)
class Case:
    """A command that writes to `out`, and what lies there before it."""

    name: str
    words: tuple[str, ...]
    out: Path
    before: Path | None = None


def main_of(words: tuple[str, ...] | list[str]) -> None:
    from graftkit.cli.main import main

    main(list(words))


def interrupted(case: Case, words: tuple[str, ...], end: str, seconds: float, draw: random.Random) -> int:
    """Run a command until it is ended in this way, or by itself. Return its status."""
    moment, place, share = draw.uniform(0, seconds), draw.randint(1, 60), draw.random()

    def work() -> None:
        count = 0

        def hook(event: str, given: tuple) -> None:
            nonlocal count
            if _changes_files(event, given, str(case.out.parent)):
                count += 1
                if count == place:
                    die()

        if end == ENDS[1]:
            sys.addaudithook(hook)
        if end == ENDS[2]:
            import safetensors.torch

            safetensors.torch.save_file = partial(cut_short, safetensors.torch.save_file, [place % 8], share)
        if end in (ENDS[0], *ENDS[3:]):
            number = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}.get(end, signal.SIGKILL)
            own = os.getpid()
            if os.fork() == 0:  # sends the signal, unless that process has ended by then
                time.sleep(moment)
                if os.getppid() == own:
                    os.kill(own, number)
                os._exit(0)
        main_of(words)

    done = forked(work)
    if "Traceback" in done.err:
        raise AssertionError(done.err)
    return done.status


def cut_short(
    plain: Callable, left: list[int], share: float, tensors: dict, path: Path, metadata: dict | None = None
) -> None:
    """Write a tensor file; when none are left before it, die with a part of it written."""
    plain(tensors, path, metadata=metadata)
    left[0] -= 1
    if left[0] < 0:
        os.truncate(path, int(share * os.path.getsize(path)))
        die()


def next_words(case: Case) -> tuple[str, ...]:
    """The command that goes on from what is left."""
    if case.words[0] == "tune" and "--overwrite" not in case.words and (case.out / "recipe.yaml").exists():
        return ("tune", "--resume", str(case.out))
    return case.words if "--overwrite" in case.words else (*case.words, "--overwrite")


def check(case: Case, whole: Path) -> None:
    """Compare with the undisturbed outcome; nothing else may be left beside it."""
    if case.words[0] == "tune":
        assert_same(case.out, whole)
        assert graft_tensors(case.out)
        left = [path.name for path in (case.out / "checkpoints").glob("step-*")]
        assert not left, left
    elif case.out.is_file():
        assert case.out.read_bytes() == whole.read_bytes()
    else:
        assert contents(case.out) == contents(whole)
    beside = sorted(path.name for path in case.out.parent.iterdir())
    assert beside == [case.out.name], beside


def cases(folder: Path) -> list[Case]:
    bert = _make_bert(folder / "bert")
    rows, evaluation = (
        write_csv(folder / "train.csv", make_rows(48, 1)),
        write_csv(folder / "eval.csv", make_rows(24, 2)),
    )
    found = []

    def tune(name: str, model: Path, task: str, train: Path, method: str, *more: str) -> list[str]:
        out = folder / name.replace(" ", "-") / "run"
        return ["tune", "--model", str(model), "--task", task, "--train", str(train), "--eval", "0.25", "--method", method,
                "--out", str(out), *FAST, *more]  # fmt: skip

    for number, method in enumerate(METHODS):
        words = tune(f"classify {number}", bert, "classify", rows, method)
        found.append(
            Case(
                f"tune, classify, {method.partition('(')[0]}",
                tuple(words),
                folder / f"classify-{number}" / "run",
            )
        )
    for case in TASKS:
        task, method, _ = CASES[case]
        (folder / f"for-{case}").mkdir()
        model, train = material(case, folder / f"for-{case}", bert)
        words = tune(
            case, model, task, train, method, *(["data.max_length=60"] if case == "generate" else [])
        )
        found.append(Case(f"tune, {case}", tuple(words), folder / case / "run"))
    run = folder / "finished" / "run"
    other = folder / "other" / "run"
    for place, seed in ((run, "0"), (other, "1")):
        words = tune(place.parent.name, bert, "classify", rows, METHODS[0], f"seed={seed}")
        done = forked(partial(main_of, words))
        assert done.status == 0, done.err
    over = folder / "over" / "run"
    words = tune("over", bert, "classify", rows, METHODS[0], "--overwrite")
    done = forked(partial(main_of, tune("over", bert, "classify", rows, METHODS[-1])))
    assert done.status == 0, done.err
    earlier = over.rename(folder / "earlier")
    found.append(Case("tune --overwrite", tuple(words), over, earlier))
    for name, words in {
        "export": ["export", str(run), "--to"],
        "merge": ["merge", str(run), str(other), "--out"],
        "predict --out": ["predict", str(run), "--data", str(evaluation), "--out"],
    }.items():
        out = folder / name.split()[0] / ("answers.csv" if name.startswith("predict") else "out")
        found.append(Case(name, (*words, str(out)), out))
    return found


def undisturbed(case: Case, folder: Path) -> tuple[Path, float]:
    """Run a command in peace. Return its outcome, and the seconds that it took."""
    begin(case)
    start = time.monotonic()
    done = forked(partial(main_of, case.words))
    assert done.status == 0, done.err
    whole = folder / f"{case.out.parent.name}{BYTES}"
    return case.out.rename(whole), time.monotonic() - start


def begin(case: Case) -> None:
    shutil.rmtree(case.out.parent, ignore_errors=True)
    case.out.parent.mkdir(parents=True)
    if case.before is not None:
        shutil.copytree(case.before, case.out)


def attempt(case: Case, end: str, whole: Path, seconds: float, draw: random.Random) -> None:
    begin(case)
    words = case.words
    for _ in range(draw.randint(1, 2)):
        status = interrupted(case, words, end, seconds, draw)
        assert status in (0, 130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT), status
        words = next_words(case)
    done = forked(partial(main_of, words))
    assert done.status == 0, done.err
    check(case, whole)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tries", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    import torch

    import graftkit.runs.export
    import graftkit.runs.tune  # noqa: F401  (imported before the processes fork)

    torch.set_num_threads(1)
    draw, tries, failures = random.Random(given.seed), Counter(), Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        known = cases(folder)
        outcomes = {case.name: undisturbed(case, folder) for case in known}
        for number in range(given.tries):
            case, end = draw.choice(known), draw.choice(ENDS)
            tries[case.name, end] += 1
            try:
                attempt(case, end, *outcomes[case.name], random.Random(f"{given.seed} {number}"))
            except AssertionError as error:
                failures[case.name, end] += 1
                print(f"try {number}, {case.name}, {end}: {str(error)[-2000:]}", file=sys.stderr)
        print("| command | " + " | ".join(ENDS) + " | failures |")
        print("| --- |" + " --- |" * (len(ENDS) + 1))
        for case in known:
            row = [tries[case.name, end] for end in ENDS]
            bad = sum(failures[case.name, end] for end in ENDS)
            print(f"| {case.name} | {' | '.join(map(str, row))} | {bad} |")
    print(f"\n{given.tries} tries with seed {given.seed}, {sum(failures.values())} failures. {machine()}.")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
