"""Users' own modules: `package.module:function`, a safetensors file of weights, and what inspect and tune make of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAST, SHARED
from safetensors.torch import load_file, save_file

import graftkit
from graftkit import Backbone, UserError, attach
from graftkit.backbone.load import load_backbone
from graftkit.backbone.source import find_source

ROOT = Path(__file__).parents[2]
MODELS = {"squeezenet": "squeezenet1_0.safetensors", "resnet20": "resnet20_cifar10.safetensors"}

MODULE = '''
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.again = nn.Linear(4, 4, bias=False)
        self.again.weight = self.tied.weight
        self.output = nn.Linear(4, 2)

    def forward(self, x):
        return self.output(self.again(self.tied(self.norm(self.first(x)))))


def make():
    return Net()


def folder():
    return FOLDER


def number():
    return 3


def fails():
    raise ValueError("no such file")


class Reader(nn.Module):
    """Texts to logits, without any convention of transformers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.blocks = nn.ModuleList(
            [nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.1) for _ in range(2)]
        )
        self.output = nn.Linear(16, 2)

    def forward(self, input_ids, attention_mask):
        states = self.embedding(input_ids)
        for block in self.blocks:
            states = block(states, src_key_padding_mask=attention_mask == 0)
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        return self.output((states * weights).sum(1) / weights.sum(1))


def reader():
    from graftkit import Backbone
    from transformers import AutoTokenizer

    return Backbone(Reader(), AutoTokenizer.from_pretrained(FOLDER), max_length=32)
'''


@pytest.fixture
def own(tmp_path, monkeypatch, tiny_bert) -> Path:
    """A folder with the module `mine.py`, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    (tmp_path / "mine.py").write_text(f"FOLDER = {str(tiny_bert)!r}\n{MODULE}")
    sys.modules.pop("mine", None)
    yield tmp_path
    sys.modules.pop("mine", None)


def weights_of(name: str) -> Path:
    path = SHARED / "models" / MODELS[name]
    if not path.is_file():
        pytest.skip(f"no {path.name} under {SHARED / 'models'}; set GRAFTKIT_SHARED")
    return path


def saved(model: torch.nn.Module, path: Path, **changes: torch.Tensor | None) -> Path:
    """The tensors of a model in a file, one of each tied pair; `changes` adds, replaces or (None) leaves out."""
    tensors: dict[str, torch.Tensor | None] = {n: t.clone() for n, t in model.state_dict().items()}
    tensors |= {"again.weight": None} | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({n: t for n, t in tensors.items() if t is not None}, path)
    return path


def load(weights: Path | str | None = None, function: str = "make", meta: bool = False) -> Backbone:
    return load_backbone(
        find_source(f"mine:{function}", None if weights is None else str(weights)), meta=meta
    )


# --- finding the function


def test_a_module_in_the_current_folder_is_found_and_hides_nothing(own):
    (own / "torch.py").write_text("raise RuntimeError('not this one')")
    path = list(sys.path)
    assert type(load().model).__name__ == "Net" and sys.path == path
    assert not load().model.training


@pytest.mark.slow
def test_from_the_command_line(own, command):
    found = json.loads(command("inspect", "mine:make", "--json").out)
    assert found["class"] == "Net" and {site["name"] for site in found["sites"]} >= {"first", "output"}
    done = subprocess.run(
        [Path(sys.executable).with_name("graftkit"), "inspect", "mine:make", "--json"], cwd=own,
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0 and json.loads(done.stdout) == found, done.stderr


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere:make", "cannot be imported.*PYTHONPATH, or run from the folder"),
        ("mine:mak", "has no 'mak'. Did you mean 'make'"),
        ("mine:FOLDER", "is a str, not a function"),
        ("mine:fails", r"calling fails\(\) without arguments failed \(ValueError: no such file\)"),
        ("mine:number", "returned a int; it must return an nn.Module, a graftkit.Backbone"),
    ],
)
def test_no_such_function(own, name, told):
    with pytest.raises(UserError, match=told):
        find_source(name)


def test_a_function_may_give_a_folder(own, tiny_bert):
    assert load(function="folder").model.config.model_type == "bert"
    with pytest.raises(UserError, match="is a folder with its own weights; leave weights out"):
        load(own / "w.safetensors", function="folder")


def test_what_a_function_draws_is_the_same_each_time(own):
    first, second = (load().model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    before = torch.random.get_rng_state()
    load()
    assert torch.equal(torch.random.get_rng_state(), before)


# --- weights


def test_weights_are_copied_in(own):
    other = load().model
    torch.manual_seed(9)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) * 3)
    path = saved(other, own / "w.safetensors")
    model = load(path).model
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in model.state_dict().items())
    assert model.again.weight is model.tied.weight
    untouched = load(path, meta=True).model.state_dict()
    assert all(torch.equal(t, untouched[n]) for n, t in load().model.state_dict().items()), (
        "meta copies nothing"
    )


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"first__weight": None, "tied__weight": None, "norm__running_var": None, "extra": torch.ones(2)},
         [r"4 missing \(first.weight, norm.running_var, tied.weight, again.weight\)", r"1 unexpected \(extra\)"]),
        ({"output__weight": torch.ones(5, 4)}, [r"1 of another shape \(output.weight is \[5, 4\] F32, not \[2, 4\] float32"]),
        ({"first__bias": torch.ones(4, dtype=torch.int8)}, [r"first.bias is \[4\] I8, not \[4\] float32"]),
        ({"output__weight": torch.ones(4, 2), "more": torch.ones(1)}, ["1 unexpected", "1 of another shape"]),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(own, changes, told, meta):
    saved(load().model, own / "w.safetensors", **changes)
    with pytest.raises(UserError) as caught:
        load(own / "w.safetensors", meta=meta)
    assert str(caught.value).startswith(
        f"weights '{own}/w.safetensors' do not fit the module of 'mine:make': "
    )
    for part in told:
        assert re.search(part, str(caught.value)), str(caught.value)


def test_a_count_of_batches_may_be_missing(own):
    path = saved(load().model, own / "w.safetensors", norm__num_batches_tracked=None)
    assert "norm.num_batches_tracked" not in load_file(path) and load(path)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: path.write_bytes(b"\x10\0\0\0\0\0\0\0{}"), "are broken or cut short"),
        (lambda path: path.write_bytes(b""), "are broken or cut short"),
        (
            lambda path: torch.save({"a": torch.ones(1)}, path),
            "are a pickle, which can run any code.*save_file",
        ),
        (lambda path: path.write_bytes(__import__("pickle").dumps({"a": 1})), "are a pickle"),
        (lambda path: path.mkdir(), "is a folder; name the .safetensors file"),
        (
            lambda path: path.with_name("weight.safetensors").touch(),
            "do not exist. Did you mean 'weight.safetensors'",
        ),
    ],
)
def test_a_file_that_is_no_safetensors(own, make, told):
    path = own / "weights.safetensors"
    make(path)
    with pytest.raises(UserError, match=told):
        load(path)


def test_a_file_that_was_cut_short(own):
    path = saved(load().model, own / "w.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="are broken or cut short"):
        load(path)


# --- the two of examples/


@pytest.mark.parametrize("name", MODELS)
def test_shared_weights_fit_the_examples(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = weights_of(name)
    backbone = load_backbone(find_source(f"examples.{name}:{name}", str(path)))
    for key, tensor in load_file(path).items():
        assert torch.equal(backbone.model.state_dict()[key], tensor)
    plain = load_backbone(find_source(f"examples.{name}:{name}"))
    assert backbone.fingerprint == plain.fingerprint
    other = "resnet20" if name == "squeezenet" else "squeezenet"
    with pytest.raises(UserError, match=r"missing .*unexpected"):
        load_backbone(find_source(f"examples.{other}:{other}", str(path)))


@pytest.mark.slow
def test_resnet20_recognizes_cifar10(monkeypatch):
    """0.804 on the shared test images, as measured elsewhere for these weights."""
    np, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    monkeypatch.chdir(ROOT)
    path = weights_of("resnet20")
    folder = SHARED / "data" / "cifar10" / "test"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    model = load_backbone(find_source("examples.resnet20:resnet20", str(path))).model
    right = total = 0
    for label, kind in enumerate(sorted(folder.iterdir())):
        pixels = np.stack([np.asarray(image.open(p).convert("RGB")) for p in sorted(kind.iterdir())])
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        with torch.no_grad():
            answers = model((x - mean[:, None, None]) / deviation[:, None, None]).argmax(1)
        right, total = right + int((answers == label).sum()), total + len(answers)
    assert right / total == pytest.approx(0.804, abs=0.001)


@pytest.mark.parametrize(
    ("name", "blocks", "head"), [("squeezenet", 8, "classifier.1"), ("resnet20", 9, "linear")]
)
def test_inspect_shows_the_sites_of_the_examples(command, monkeypatch, name, blocks, head):
    monkeypatch.chdir(ROOT)
    found = json.loads(
        command_in(ROOT, command, "inspect", f"examples.{name}:{name}", "--method", "head()", "--json")
    )
    assert len(found["blocks"]) == blocks
    assert [site["name"] for site in found["sites"] if site["role"] == "head"] == [head]
    assert set(found["trained"]) == {f"{head}.weight", f"{head}.bias"}
    first = found["sites"][0]
    assert first["role"] == "conv" and first["shape"][0] == 3 and len(first["kernel"]) == 2


def command_in(folder: Path, command, *words: str) -> str:
    os.chdir(folder)  # `command` starts in an empty folder
    done = command(*words)
    assert done.status == 0, done.err
    return done.out


def test_the_fingerprint_is_of_names_and_shapes_without_the_head(own):
    plain = load()
    with_other_head = load()
    attach(with_other_head, "head(classes=7)")
    assert Backbone(with_other_head.model).fingerprint == plain.fingerprint
    wider = load().model
    wider.first = torch.nn.Linear(5, 4)
    assert Backbone(wider).fingerprint != plain.fingerprint


def test_a_graft_of_an_own_module_is_saved_and_loaded(own):
    backbone = load()
    graft = attach(backbone, "lora(rank=2) + head(classes=3)")
    with torch.no_grad():
        for parameter in graft.parameters.values():
            parameter.add_(torch.randn(parameter.shape))
    x = torch.randn(5, 3)
    wanted = graft.model.eval()(x)
    graft.save(own / "graft")
    again = graftkit.load(load().model, own / "graft")
    assert torch.equal(again.model.eval()(x), wanted)
    with pytest.raises(UserError, match="trained on another backbone"):
        graftkit.load(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)), own / "graft")


# --- runs


@pytest.fixture
def reader(own) -> Path:
    """The weights of the text model of `mine.py`, made from other random numbers."""
    model = load(function="reader").model
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return saved(model, own / "reader.safetensors")


def settings(**more) -> dict:
    return {"train.precision": "fp32", "train.batch_size": 16, "train.lr": 0.01, "train.steps": 8, **more}


@pytest.mark.parametrize(
    "method",
    ["lora(rank=2) + head()", "head(pooling='mean')", "gradual_unfreeze(unit='steps', every=2) + head()"],
)
@pytest.mark.slow
def test_tune_with_weights(reader, rows_folder, method):
    run = graftkit.tune(
        model="mine:reader", weights="reader.safetensors", train=rows_folder / "train.csv", method=method,
        eval=rows_folder / "eval.csv", settings=settings(), out="run",
    )  # fmt: skip
    assert f"weights: {reader}" in (run.path / "recipe.yaml").read_text(), "with its whole path"
    assert run.evaluate(rows_folder / "eval.csv")["accuracy"] == run.metrics["accuracy"]
    assert len(run.predict(["the old hammer"])) == 1
    base = load_file(reader)
    graft = graftkit.load(load(reader, function="reader"), run.path / "graft")
    for name, parameter in graft.model.named_parameters():
        if name not in graft.labels:
            assert torch.equal(parameter, base[name]), name
    with pytest.raises(UserError, match=r"your own module.*graftkit\.load"):
        run.export("exported")


def test_tune_from_the_command_line(reader, rows_folder, command):
    os.chdir(reader.parent)
    words = [
        "--model",
        "mine:reader",
        "--weights",
        "reader.safetensors",
        "--train",
        rows_folder / "train.csv",
    ]
    done = command("plan", *words, *FAST, "--json")
    assert done.status == 0 and json.loads(done.out)["blocks"] == 2
    done = command("tune", *words, "--out", "run", *FAST, "train.steps=3", "--json")
    assert done.status == 0, done.err
    bad = command("plan", *words[:2], "--weights", "none.safetensors", *words[4:])
    assert bad.status == 1 and "'none.safetensors' do not exist" in bad.err
    empty = command("plan", *words[:2], "--weights", "", *words[4:])
    assert empty.status == 1 and "--weights is empty" in empty.err


def test_weights_beside_a_model_folder(tiny_bert, rows_folder, command):
    words = ["--model", tiny_bert, "--weights", "w.safetensors", "--train", rows_folder / "train.csv"]
    done = command("plan", *words)
    assert done.status == 1 and "leave weights out" in done.err
