"""Cached activations in files: equal results with and without, and nothing is believed that was not written whole."""

import json
import os
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import equal_bits, forked, graft_tensors
from device import DEVICE

import graftkit
from graftkit.engine import blocks, cached, filling
from graftkit.engine.blocks import prune, stored
from graftkit.engine.cached import CachedForward, Caching, make_forward
from graftkit.engine.kept import Mapped
from graftkit.errors import Note

pytestmark = pytest.mark.slow

LAST = "unfreeze('blocks[-1:]') + head(dropout=0)"
HEAD = "head(pooling='mean', dropout=0)"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache folder, and every computed row is worth a file."""
    monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GRAFTKIT_CACHE_GB", "1")
    monkeypatch.setattr(filling, "WORTHWHILE", 0.0)
    return tmp_path / "cache" / blocks.PREFIX


def forward_of(run, dataset=None, mode="auto", passes=3) -> CachedForward:
    depth = run.prepared.depth
    made = make_forward(run.graft, DEVICE, "fp32", depth, dataset or run.dataset, passes, None, Caching(mode))
    assert isinstance(made, CachedForward)
    return made


def counts(forward) -> tuple[int, int]:
    return forward.filled.read, forward.filled.computed


def outputs(forward, dataset) -> torch.Tensor:
    forward.graft.model.eval()
    with torch.no_grad():
        return forward(dataset.batch(np.arange(len(dataset)), DEVICE))


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


@pytest.fixture
def noted():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Note)
        yield lambda: [str(one.message) for one in caught if issubclass(one.category, Note)]


@pytest.mark.parametrize("method", [HEAD, LAST])
@pytest.mark.parametrize("mode", ["auto", "disk"])
def test_a_second_run_computes_nothing_and_has_equal_values(ready, folder, method, mode):
    first = ready(method)
    memory = forward_of(first, mode="memory")
    assert not files(folder)
    one = forward_of(first, mode=mode)
    assert counts(one) == (0, 96) and len(files(folder)) == 1
    assert isinstance(one.kept, Mapped) == (mode == "disk")
    second = ready(method)
    second.graft.model.load_state_dict(first.graft.model.state_dict())
    two = forward_of(second, mode=mode)
    assert counts(two) == (96, 0)
    wanted = outputs(memory, first.dataset)
    assert torch.equal(outputs(one, first.dataset), wanted)
    assert torch.equal(outputs(two, second.dataset), wanted)
    torch.testing.assert_close(outputs(first.forward, first.dataset), wanted, rtol=1e-4, atol=1e-4)


def test_methods_that_freeze_the_same_blocks_share_and_others_do_not(ready):
    forward_of(ready(LAST))
    assert counts(forward_of(ready("lora(rank=2, sites='blocks[-1:]') + head()"))) == (96, 0)
    assert counts(forward_of(ready("unfreeze('blocks[-2:]') + head()"))) == (0, 96)
    assert counts(forward_of(ready(HEAD))) == (0, 96)
    other = ready(LAST)
    with torch.no_grad():  # one number in the prefix
        other.graft.model.bert.embeddings.word_embeddings.weight[5, 7] += 1e-3
    assert counts(forward_of(other)) == (0, 96)


def test_only_new_rows_are_computed(ready, rows_folder):
    from conftest import make_rows

    run = ready(LAST)
    rows = make_rows(96, 1)
    forward_of(run)
    new = [{"text": "round apple sweet sweet", "label": "fruit"}, {"text": "sharp saw", "label": "tool"}]
    more = rows[::-1] + new
    run = ready(LAST, rows=more)
    kept = forward_of(run)
    assert counts(kept) == (96, 2)
    torch.testing.assert_close(
        outputs(kept, run.dataset), outputs(run.forward, run.dataset), rtol=1e-4, atol=1e-4
    )
    assert counts(forward_of(ready(LAST, rows=more[-3:]))) == (3, 0)


def test_codes_that_change_without_weights_are_noticed(ready, noted):
    """An attribute of a module that no name, weight or configuration shows."""
    forward_of(ready(LAST))
    run = ready(LAST)
    run.graft.model.bert.embeddings.LayerNorm.register_forward_hook(lambda module, args, output: output * 1.5)
    assert counts(forward_of(run)) == (0, 96)
    assert "does not hold what the model computes" in noted()[-1]


def flip(path, place) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def replaced(path, **tensors) -> None:
    """A file with another tensor, whose checksum is right."""
    from graftkit.files import read_tensors, write_tensors

    found, _ = read_tensors(path)
    write_tensors(path, found | tensors, {"key": path.parent.name})


DAMAGE = {
    "a flipped bit at the end": lambda path: flip(path, -1),
    "a flipped bit among the rows": lambda path: flip(path, path.stat().st_size // 2),
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 40),
    "empty": lambda path: os.truncate(path, 0),
    "a header of absurd size": lambda path: path.write_bytes((2**60).to_bytes(8, "little") + b"{" * 64),
    "sizes that are not there": lambda path: path.write_bytes(
        (n := json.dumps({"values": {"dtype": "F32", "shape": [2**50], "data_offsets": [0, 2**52]}}).encode())
        and len(n).to_bytes(8, "little") + n
    ),
    "no file of ours": lambda path: path.write_bytes(b"\x80\x04\x95 a pickle"),
    "starts that lead outside": lambda path: replaced(path, starts=torch.arange(97) * 10**6),
    "no rows": lambda path: replaced(path, rows=torch.zeros(3)),
    "another type": lambda path: replaced(path, values=torch.zeros(96, 32, dtype=torch.float64)),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_made_again_with_a_note(ready, folder, damage, noted):
    run = ready(HEAD)
    wanted = outputs(forward_of(run), run.dataset)
    (path,) = files(folder)
    DAMAGE[damage](path)
    again = forward_of(run)
    assert counts(again) == (0, 96) and torch.equal(outputs(again, run.dataset), wanted)
    assert "computed again" in noted()[-1]
    assert counts(forward_of(run)) == (96, 0)


def test_files_of_another_key_are_refused(ready, folder, noted):
    forward_of(ready(HEAD))
    (path,) = files(folder)
    other = ready(HEAD)
    with torch.no_grad():
        other.graft.model.embeddings.word_embeddings.weight.add_(0.5)
    forward_of(other)
    moved = next(one for one in files(folder) if one.parent != path.parent)
    moved.write_bytes(path.read_bytes())
    assert counts(forward_of(other)) == (0, 96)
    assert "no activations of this model" in noted()[-1]


@pytest.mark.parametrize("method", [HEAD, LAST])
def test_a_run_killed_while_it_fills_goes_on_bit_for_bit(ready, folder, method, monkeypatch):
    monkeypatch.setattr(filling, "FILL_BATCH", 20)
    monkeypatch.setattr(filling, "BLOCK", 0)  # a file for each batch
    run = ready(method)
    wanted = forward_of(run, mode="memory").kept.values

    def killed() -> None:
        plain = filling.Filling._compute
        done = []

        def compute(self, rows):
            if len(done) == 3:
                os.kill(os.getpid(), 9)
            done.append(plain(self, rows))

        filling.Filling._compute = compute
        forward_of(run)

    assert forked(killed).status == -9
    assert len(files(folder)) == 3
    again = forward_of(run)
    assert counts(again) == (60, 36) and torch.equal(again.kept.values, wanted)


def test_two_runs_at_once(ready, folder):
    run = ready(LAST)
    done = forked(lambda: forward_of(run), lambda: forward_of(run, mode="disk"))
    assert [one.status for one in done] == [0, 0], done
    assert counts(forward_of(run)) == (96, 0)
    assert not list(folder.rglob("*.part"))


def test_a_folder_that_cannot_be_written_to_stops_nothing(ready, tmp_path, monkeypatch, noted):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path / "file" / "cache"))
    run = ready(HEAD)
    assert counts(forward_of(run)) == (0, 96)
    assert [note for note in noted() if "not kept on disk" in note]
    plain = make_forward(run.graft, DEVICE, "fp32", 3, run.dataset, 3, None, Caching("disk"))
    assert not isinstance(plain, CachedForward)


def test_what_fits_into_memory_no_more_is_mapped(ready, monkeypatch):
    monkeypatch.setattr(cached, "MEMORY_SHARE", 0)
    run = ready(LAST)
    kept = forward_of(run)
    assert isinstance(kept.kept, Mapped) and kept.filled.place == "disk"
    torch.testing.assert_close(
        outputs(kept, run.dataset), outputs(run.forward, run.dataset), rtol=1e-4, atol=1e-4
    )


def test_the_files_used_least_recently_are_removed(ready, folder, monkeypatch):
    forward_of(ready(LAST))
    (old,) = files(folder)
    os.utime(old, (1, 1))
    forward_of(ready("unfreeze('blocks[-2:]') + head()"))
    assert len(stored()) == 2 and stored()[-1][0] == old.parent.name
    size = old.stat().st_size
    assert prune(1.5 * size) == (1, size) and not old.parent.exists()
    monkeypatch.setenv("GRAFTKIT_CACHE_GB", "0.00001")
    assert not isinstance(
        make_forward(ready(LAST).graft, DEVICE, "fp32", 2, ready(LAST).dataset, 3, None, Caching("disk")),
        CachedForward,
    )
    assert prune(0)[0] == 1 and not stored()


def tuned(tiny_bert, rows_folder, out, method=HEAD, **train):
    settings = {"train.precision": "fp32", "train.batch_size": 16, "train.lr": 0.01, "train.epochs": 3.0}
    return graftkit.tune(
        model=str(tiny_bert), task="classify", train=rows_folder / "train.csv", eval=rows_folder / "eval.csv",
        test=rows_folder / "eval.csv", method=method, out=out, settings=settings | train,
    )  # fmt: skip


def test_runs_say_what_they_read_and_computed(tiny_bert, rows_folder, tmp_path):
    one, two, none = (
        tuned(tiny_bert, rows_folder, tmp_path / name, **more)
        for name, more in (("one", {}), ("two", {}), ("none", {"train.cache": "none"}))
    )
    found = {name: (part["rows_read"], part["rows_computed"]) for name, part in one.result["cache"].items()}
    assert found == {"train": (0, 96), "eval": (0, 40), "test": (40, 0)}
    assert {part["rows_computed"] for part in two.result["cache"].values()} == {0}
    assert none.result["cache"] == {}
    assert equal_bits(graft_tensors(one.path), graft_tensors(two.path))
    for name, tensor in graft_tensors(none.path).items():
        torch.testing.assert_close(graft_tensors(one.path)[name], tensor, rtol=1e-3, atol=1e-4)
    assert one.metrics == two.metrics


def test_a_copy_that_takes_longer_than_computing_is_not_made(ready, monkeypatch):
    """On an accelerator; its times are made up here."""
    run = ready(LAST)
    start = forward_of(run).start
    times = iter([0.2, 0.1, 0.1, 0.2])
    monkeypatch.setattr(cached, "_seconds", lambda work, device: (work(), next(times))[1])
    plain = SimpleNamespace(device=DEVICE, graft=run.graft)
    monkeypatch.setattr(start, "capture", lambda plain, batch: torch.zeros(len(batch.rows), 3))
    assert cached._pays(plain, start, run.dataset) and not cached._pays(plain, start, run.dataset)


def test_augmented_versions_of_images_are_kept_and_used_in_turn(tiny_vit, colours, monkeypatch):
    from graftkit.data.source import Pass
    from graftkit.recipe import schema as recipes
    from graftkit.runs.prepare import prepare, prepare_rows

    recipe = recipes.make(
        {"model": str(tiny_vit), "method": "head(pooling='mean', dropout=0)", "train": {"precision": "fp32"},
         "task": "image_classify(random_crop='resized', flip=0.5, views=3)",
         "data": {"train": str(colours / "train"), "eval": None}}
    )  # fmt: skip
    prepared = prepare(recipe, prepare_rows(recipe))
    data, rows = prepared.train, np.array([3, 0, 17])
    assert data.keeps and data.views == 3
    make = lambda seed: make_forward(  # noqa: E731
        prepared.graft, DEVICE, "fp32", prepared.depth, data, 5, None, Caching("auto", seed)
    )
    kept = make(7)
    assert isinstance(kept, CachedForward) and counts(kept) == (0, 3 * len(data))
    prepared.graft.model.eval()
    plain = kept.plain
    with torch.no_grad():
        for epoch in range(5):
            batch = data.batch(rows, DEVICE, Pass(7, epoch))
            torch.testing.assert_close(kept(batch), plain(batch), rtol=1e-4, atol=1e-5)
        first, second, fourth = (data.inputs(rows, Pass(7, epoch))["pixel_values"] for epoch in (0, 1, 3))
    assert torch.equal(first, fourth) and not torch.equal(first, second)
    assert counts(make(7)) == (3 * len(data), 0) and counts(make(8)) == (0, 3 * len(data))


@pytest.mark.slow
def test_processes_fill_their_shares_and_read_those_of_others(tiny_bert, rows_folder, tmp_path, folder):
    from processes import both

    def work(rank: int) -> None:
        filling.WORTHWHILE, filling.FILL_BATCH, filling.BLOCK = 0.0, 20, 0
        done = []
        for number, mode in enumerate(("auto", "disk", "auto")):
            run = graftkit.tune(
                model=tiny_bert, task="classify", train=rows_folder / "train.csv", eval=rows_folder / "eval.csv",
                method="unfreeze('blocks[-1:]') + head(dropout=0)", out=tmp_path / str(number),
                settings={"train.precision": "fp32", "train.epochs": 2.0, "train.cache": mode},
            )  # fmt: skip
            done.append(run.result["cache"])
        (tmp_path / f"found-{rank}.json").write_text(json.dumps(done))

    ended = both(work)
    assert [one.status for one in ended] == [0, 0], ended[0].err + ended[1].err
    for index in (0, 1):
        found = json.loads((tmp_path / f"found-{index}.json").read_text())
        read = [
            {name: (part["rows_read"], part["rows_computed"]) for name, part in run.items()} for run in found
        ]
        assert read == [{"train": (0, 96), "eval": (0, 40)}, *[{"train": (96, 0), "eval": (40, 0)}] * 2]
    assert len(files(folder)) == 7  # batches of 20 of 96 and 40 rows, each written once
    grafts = [graft_tensors(tmp_path / number) for number in "012"]
    assert equal_bits(grafts[0], grafts[1]) and equal_bits(grafts[1], grafts[2])


@pytest.mark.parametrize("precision, agrees", [("bf16", True), ("fp32", False)])
def test_stored_values_may_differ_by_the_rounding_of_what_computed_them(precision, agrees):
    """Pooled outputs are stored in fp32, but computed from products in bf16, which depend on the batch."""
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    block = filling.Block(np.arange(6), np.arange(6), values)
    refused = []
    blocks = SimpleNamespace(begun=False, find=lambda: [block], refuse=lambda: refused.append(True))
    filled = filling.Filling(
        lambda rows: values[rows] * 1.01, np.full(6, 3), False, blocks, torch.device("cpu"), True, precision
    )  # fmt: skip
    assert bool(filled._found()) == agrees and bool(refused) != agrees
