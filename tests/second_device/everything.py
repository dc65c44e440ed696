"""Everything on a device that is not the CPU: every tensor is made where the model is. Run by
tests/runs/test_second_device.py, or by `pytest tests/second_device/everything.py`.

The device is `second_device.DEVICE`, which computes on the CPU and refuses to mix its tensors with the CPU's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import contract
import device
import pytest
import torch
import zoo
from expressions import EXPRESSIONS
from objectives import tiny_model, write_texts
from peft_versions import skip_without_tuner
from second_device import DEVICE, There, Values
from task_cases import CASES, material

import graftkit
from graftkit import NotFoldable
from graftkit.engine import parallel
from graftkit.export import base as export_base
from graftkit.runs import export

pytestmark = pytest.mark.skipif(device.DEVICE.type != "cpu", reason="there is another device already")
BERT = zoo.BY_NAME["bert"]


def test_the_device_refuses_tensors_of_the_cpu() -> None:
    """Else nothing below could fail."""
    there = torch.ones(3, 4).to(DEVICE)
    assert isinstance(there, There) and there.device == DEVICE and (there + 1).cpu().sum() == 24
    for wrong in (lambda: there + torch.ones(4), lambda: there.numpy(), lambda: there[:, 0] @ torch.ones(3)):
        with pytest.raises((AssertionError, RuntimeError)):
            wrong()


def sent(batch: zoo.Batch) -> zoo.Batch:
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def outputs(model: Any) -> torch.Tensor:
    return zoo.outputs(model, sent(BERT.batch())).cpu()


@pytest.mark.parametrize("name", sorted(EXPRESSIONS))
def test_each_method(name: str) -> None:
    """It attaches there, trains there, and gives what it gives on the CPU, folded into the weights too."""
    skip_without_tuner(EXPRESSIONS[name][0])
    graft = graftkit.attach(BERT.fresh().to(DEVICE), EXPRESSIONS[name][0])
    assert all(tensor.device == DEVICE for tensor in graft.model.state_dict().values())
    optimizer = graft.optimizer()
    graft.model.train()
    for step in (1, 2):
        loss = zoo.flat(graft.model(**sent(BERT.batch())), sent(BERT.batch())).square().mean()
        extra = graft.extra_loss()
        (loss if extra is None else loss + extra).backward()
        optimizer.step()
        graft.after_step(step, 2)
        optimizer.zero_grad()
    wanted = outputs(graft.model)
    try:
        graft.fold()
    except NotFoldable:
        pass
    else:
        contract.close(outputs(graft.model), wanted, "folded outputs")
        graft.unfold()
    graft.model.to("cpu")
    contract.close(zoo.outputs(graft.model, BERT.batch()), wanted, "outputs on the CPU")


@pytest.mark.parametrize(
    "method", ["lora(rank=2) + head(classes=2)", "adapter(2)", "ia3()", "bitfit()", "loha(rank=2)"]
)
def test_several_grafts(method: str) -> None:
    """By row and as a weighted sum."""
    model = BERT.fresh()
    for seed, name in enumerate(("one", "two")):
        contract.shake(graftkit.attach(model, method, name=name), seed).disable()
    choices: list[dict[str, Any]] = [{"rows": ["one", "two", "one"]}, {"which": {"one": 0.7, "two": 0.3}}]
    wanted = []
    for choice in choices:
        with graftkit.using(model, **choice):
            wanted.append(zoo.outputs(model, BERT.batch()))
    model.to(DEVICE)
    for choice, there in zip(choices, wanted):
        with graftkit.using(model, **choice):
            contract.close(outputs(model), there, str(choice))


@pytest.fixture(autouse=True)
def values() -> Iterator[None]:
    with Values():
        yield


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are on the second device, and their exports are compared on few rows: each operation takes longer there."""
    for module in (export_base, export):
        monkeypatch.setattr(module, "ROWS", 4)
    monkeypatch.setattr(parallel, "device", lambda: DEVICE)


def tuned(out: Path, model: Path, train: Path, task: str, method: str | None) -> graftkit.Run:
    settings = {"train.precision": "fp32", "train.batch_size": 8, "train.steps": 2, "train.lr": 0.01}
    run = graftkit.tune(model=str(model), task=task, train=train, method=method, out=out, settings=settings)
    assert run.result["device"] == str(DEVICE)
    return run


@pytest.mark.parametrize("case", CASES)
def test_each_task(case: str, short_bert: Path, tmp_path: Path, elsewhere: None) -> None:
    """It trains, evaluates, and is exported; one of them with a head that pools by attention."""
    task, method, _ = CASES[case]
    if case == "classify":
        method = method.replace("head()", "head(pooling='attention')")
    model, rows = material(case, tmp_path, short_bert)
    run = tuned(tmp_path / "run", model, rows, task, method)
    assert run.evaluate(rows)["rows"] > 0
    assert run.export(tmp_path / "plain")["largest_difference"] < 1e-4


OBJECTIVES = {  # objective: (model, optimizer)
    "mlm(unit='span')": ("bert", "muon()"),
    "causal()": ("llama-tiny", "galore(rank=4, svd='full', bits=8, space_bits=4)"),
    "glm(mode='mixture')": ("glm-tiny", "adamw4bit()"),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_and_optimizers(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: None
) -> None:
    """A model is pre-trained there, and has the loss that it has on the CPU."""
    model, optimizer = OBJECTIVES[objective]
    monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path / "cache"))
    texts = write_texts(tmp_path / "texts.txt", 30)
    new = "-" in model
    start = {"size": model, "vocabulary": 300} if new else {"model": str(tiny_model(tmp_path / model, model))}
    settings = {
        "train.precision": "fp32", "train.batch_size": 4, "train.steps": 2, "train.lr": 0.01, "data.max_length": 24,
        "train.optimizer": optimizer,
    }  # fmt: skip
    run = graftkit.pretrain(
        objective=objective, train=texts, out=tmp_path / "run", settings=settings, **start
    )
    assert run.result["device"] == str(DEVICE)
    there = run.evaluate(texts)["loss"]
    monkeypatch.setattr(parallel, "device", lambda: torch.device("cpu"))
    assert run.evaluate(texts)["loss"] == pytest.approx(there, rel=1e-4)
