"""AdapterFusion against the paper's formula, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from shaken import count, shaken
from torch import Tensor, nn

from graftkit import UserError, attach, load

pytestmark = pytest.mark.sampled

L, W = tiny.BLOCKS, tiny.WIDTH


def states() -> Tensor:
    return torch.randn(2, 5, W, generator=torch.Generator().manual_seed(3))


FORMS = {"a": "adapter(3, 'pfeiffer')", "b": "adapter(5, 'pfeiffer', scale=2, nonlinearity='tanh')"}


@pytest.fixture
def folders(tmp_path):
    """Two trained adapters with a head each, saved; the second was attached under another name."""
    for seed, (name, text) in enumerate(FORMS.items()):
        shaken(tiny.with_head("bert"), f"{text} + head(classes=3)", name=name, seed=seed).save(
            tmp_path / name
        )
    return [str(tmp_path / name) for name in FORMS]


def fused(folders: list[str], more: str = "") -> str:
    return f"adapter_fusion(grafts={folders!r}{more})"


def test_fusion_is_that_of_the_paper(folders):
    """s = softmax((Q x) . (K z_n)) over n, h + sum_n s_n V z_n; z_n is what adapter n adds."""
    x, alone = states(), []
    for folder in folders:
        model = tiny.with_head("bert")
        bottleneck = (load(model, folder), model.bert.encoder.layer[1].adapter_default)[1]
        alone.append(bottleneck.change)
    graft = shaken(tiny.with_head("bert"), fused(folders))
    fusion = graft.model.bert.encoder.layer[1].adapter_fusion_default
    Q, K, V = fusion.query, fusion.key, fusion.value
    with torch.no_grad():
        z = torch.stack([change(x) for change in alone])
        scores = torch.einsum("rtd,nrtd->nrt", x @ Q.T, z @ K.T)
        wanted = (scores.softmax(0).unsqueeze(-1) * (z @ V.T)).sum(0)
        assert tiny.relative(fusion.change(x), wanted) < 1e-6
    assert count(graft) == 3 * W * W * L


def test_fusion_starts_near_the_mean_and_its_adapters_are_frozen(folders):
    graft = attach(tiny.with_head("bert"), fused(folders) + " + head(classes=3)")
    fusion = graft.model.bert.encoder.layer[0].adapter_fusion_default
    assert torch.equal(fusion.value, torch.eye(W))
    x = states()
    with torch.no_grad():
        z = torch.stack([member.change(x) for member in fusion.members])
        assert tiny.relative(fusion.change(x), z.mean(0)) < 0.05
    frozen = [n for n, p in graft.model.named_parameters() if ".members." in n]
    assert len(frozen) == 2 * 4 * L and not set(frozen) & set(graft.labels)
    assert set(frozen) < set(graft.tensors)


def test_fusion_needs_the_folders_only_once(folders, tmp_path):
    graft = shaken(tiny.with_head("bert"), fused(folders) + " + head(classes=3)", name="both")
    graft.save(tmp_path / "fused")
    for folder in folders:
        shutil.rmtree(folder)
    again = load(tiny.with_head("bert"), tmp_path / "fused")
    assert torch.equal(tiny.outputs(again.model), tiny.outputs(graft.model))
    assert folders[0] not in (tmp_path / "fused" / "graft.json").read_text()
    again.save(tmp_path / "twice")
    third = load(tiny.with_head("bert"), tmp_path / "twice")
    assert torch.equal(tiny.outputs(third.model), tiny.outputs(graft.model))


def test_value_is_kept_near_the_identity(folders):
    graft = shaken(tiny.with_head("bert"), fused(folders, ", regularization=0.3"))
    loss = graft.method.extra_loss(graft.backbone, graft.name)
    values = [p for name, p in graft.parameters.items() if name.endswith(".value")]
    wanted = 0.3 * sum((value - torch.eye(W)).square().sum() for value in values)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    torch.testing.assert_close(values[0].grad, 0.6 * (values[0] - torch.eye(W)))
    silent = attach(tiny.with_head("bert"), fused(folders, ", regularization=0"))
    assert silent.method.extra_loss(silent.backbone, silent.name) is None


def refused(model: nn.Module, text: str, *words: str) -> None:
    before = tiny.snapshot(model)
    with pytest.raises(UserError) as caught:
        attach(model, text)
    assert all(word in str(caught.value) for word in ("adapter_fusion()", *words)), str(caught.value)
    assert tiny.snapshot(model).keys() == before.keys()


@pytest.mark.parametrize(
    "text,words",
    [
        ("lora(rank=2) + head(classes=3)", ("trained lora", "adapter(norms=False)")),
        ("adapter(3)", ("trained adapter", "norms")),
        ("adapter(3, 'pfeiffer') + bitfit()", ("trained adapter", "bitfit")),
        ("head(classes=3)", ("trained a head",)),
        ("adapter(3, 'pfeiffer', sites='blocks[1:]')", ("different places", "same placement and sites")),
        ("adapter(3, 'parallel')", ("different places",)),
        ("adapter(3, norms=False)", ("different places",)),
    ],
)
def test_grafts_that_cannot_be_composed(text, words, folders, tmp_path):
    shaken(tiny.with_head("bert"), text).save(tmp_path / "other")
    refused(tiny.with_head("bert"), fused([folders[0], str(tmp_path / "other")]), *words)


def test_folders_that_are_no_such_grafts(folders, tmp_path):
    refused(tiny.with_head("bert"), fused(folders[:1]), "at least two", "1")
    refused(tiny.with_head("bert"), "adapter_fusion()", "at least two")
    refused(tiny.with_head("bert"), fused([folders[0], str(tmp_path / "gone")]), "gone", "graft.json")
    refused(tiny.with_head("bert"), "adapter_fusion(adapters=['lora()', 'adapter()'])", "'lora()'")
    refused(tiny.with_head("bert", vocab_size=50), fused(folders), "another backbone", "fingerprint")
    refused(tiny.with_head("llama"), fused(folders), "another backbone")


@pytest.mark.slow
def test_damaged_folders(folders):
    path = Path(folders[1]) / "graft.safetensors"
    tensors = load_file(path)
    name = "bert.encoder.layer.1.adapter_default.down"
    save_file({**tensors, name: tensors[name][:2].clone()}, path)
    refused(tiny.with_head("bert"), fused(folders), name, "(5, 16)")
    save_file({n: t for n, t in tensors.items() if n != name}, path)
    refused(tiny.with_head("bert"), fused(folders), name)
    (Path(folders[1]) / "graft.json").write_text("[]")
    refused(tiny.with_head("bert"), fused(folders), "graft.json", "contains a list, not an object")
