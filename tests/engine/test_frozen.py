"""The frozen prefix on every kind of model: how deep it is, that it is still, and that what is kept of it is right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zoo
from device import DEVICE
from shaken import shaken
from torch import nn

from graftkit import attach
from graftkit.data.encode import Encoded
from graftkit.data.ragged import Ragged
from graftkit.data.read import Table
from graftkit.engine.cached import CachedForward, make_forward
from graftkit.engine.forward import Forward
from graftkit.engine.frozen import frozen_depth, set_training
from graftkit.engine.starts import AtOwnHead
from graftkit.grafts.graft import Graft
from graftkit.tasks.base import Dataset, Examples
from graftkit.tasks.shared.texts import TextDataset

pytestmark = pytest.mark.sampled

TEXT = ["bert", "roberta", "modernbert", "gpt2", "llama", "qwen3", "glm", "mixtral", "deberta_v2", "t5"]


def dataset(lengths: tuple[int, ...] = (7, 3, 5, 6, 2, 7)) -> Dataset:
    """Rows of random tokens of these lengths."""
    random = np.random.default_rng(0)
    ids = [random.integers(3, zoo.VOCABULARY, n).astype(np.int32) for n in lengths]
    features = {
        "input_ids": Ragged(ids),
        "attention_mask": Ragged([np.ones(n, dtype=np.int32) for n in lengths]),
    }
    rows = list(range(len(lengths)))
    table = Table({"text": ["a"] * len(lengths)}, "rows", rows, "row")
    targets = np.array([row % 2 for row in rows])
    encoded = Encoded(features, np.array(lengths), 0, {})
    return TextDataset(Examples(table, dict(table.columns), targets), encoded, targets)


def agree(graft: Graft, kept: Forward, data: Dataset) -> None:
    """Logits and gradients of kept outputs are those of the whole model, in batches of other rows than they were made."""
    plain = Forward(graft, DEVICE, "fp32")
    graft.model.eval()
    for rows in ([0, 1], [4], [5, 3, 2]):
        batch = data.batch(np.array(rows), DEVICE)
        results = []
        for forward in (plain, kept):
            graft.model.zero_grad()
            logits = forward(batch)
            logits.square().sum().backward()
            results.append([logits.detach(), *(p.grad.clone() for p in graft.parameters.values())])
        for got, wanted in zip(*results):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize(
    "method", ["unfreeze('blocks[-1:]') + head(classes=2, pooling='mean')", "head(classes=2, pooling='mean')"]
)
def test_what_is_kept_gives_the_same_on_every_text_model(name, method):
    graft = shaken(zoo.BY_NAME[name].fresh(), method)
    data, depth = dataset(), frozen_depth(graft)
    head_alone = "unfreeze" not in method
    assert depth == len(graft.backbone.blocks) - (not head_alone)
    kept = make_forward(graft, DEVICE, "fp32", depth, data, passes=3)
    # blocks of DeBERTa give more than their states; the decoder of T5 looks at all of the encoder
    assert isinstance(kept, CachedForward) == (head_alone or name not in ("deberta_v2", "t5"))
    agree(graft, kept, data)


def test_within_the_encoder_of_a_pair_blocks_may_be_passed_by():
    """The chain breaks between encoder and decoder: nothing that is kept may skip over it."""
    graft = shaken(zoo.BY_NAME["t5"].fresh(), "unfreeze('blocks[1]') + head(classes=2, pooling='mean')")
    assert frozen_depth(graft) == 1
    agree(graft, make_forward(graft, DEVICE, "fp32", 1, dataset(), passes=3), dataset())


class Chain(nn.Module):
    """Four blocks on embedded tokens, connected as `kind` says."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(zoo.VOCABULARY, 8)
        self.between = nn.Linear(8, 8)
        block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.blocks = nn.ModuleList(
            [block, *(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True) for _ in range(3))]
        )
        self.late = nn.Embedding(zoo.VOCABULARY, 8)

    def forward(self, input_ids, attention_mask):
        padding = attention_mask == 0
        x = self.embedding(input_ids)
        if self.kind == "late":  # a part that is defined behind the blocks comes before them
            x = x + self.late(input_ids)
        first = None
        for i, block in enumerate(self.blocks):
            x = block(x, src_key_padding_mask=padding)
            first = x if first is None else first
            if self.kind == "between" and i == 1:
                x = self.between(x)
            if self.kind == "repeated" and i == 1:
                x = block(x, src_key_padding_mask=padding)
        return x + first if self.kind == "skip" else x


@pytest.mark.parametrize("kind", ["plain", "between", "repeated", "skip", "late"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_only_a_chain_of_blocks_is_passed_by(kind, depth):
    torch.manual_seed(0)
    part = ",late" if kind == "late" else ""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        graft = shaken(Chain(kind), f"unfreeze('blocks[{depth}:]{part}') + head(classes=2, pooling='mean')")
        assert frozen_depth(graft) == depth
        kept = make_forward(graft, DEVICE, "fp32", depth, dataset(), passes=3)
        chain = {"plain": True, "between": depth < 2, "repeated": depth < 1, "skip": False, "late": False}[
            kind
        ]
        assert isinstance(kept, CachedForward) == chain
        agree(graft, kept, dataset())
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize(
    ("name", "sites", "depth"),
    [
        (
            "swin",
            "re:encoder.layers.0.downsample",
            2,
        ),  # between the stages, behind the two blocks of the first
        ("swin", "blocks[3]", 3),
        ("swin", "embeddings", 0),
        ("convnext", "re:convnext.encoder.stages.1.downsampling_layer", 1),
        ("convnext", "re:convnext.layernorm", 3),
        ("resnet", "blocks[-1:]", 2),
        ("resnet20", "re:bn1", 0),
        ("squeezenet", "re:features.10", 6),
        ("t5", "blocks[-1:]", 3),
        ("t5", "re:encoder.final_layer_norm", 2),
        ("t5", "re:decoder.final_layer_norm", 4),
        ("wav2vec2", "re:wav2vec2.feature_projection", 0),
    ],
)
def test_depth(name, sites, depth):
    graft = attach(zoo.BY_NAME[name].fresh(), f"unfreeze({sites!r}) + head(classes=2)")
    assert frozen_depth(graft) == depth
    assert frozen_depth(attach(zoo.BY_NAME[name].fresh(), "head(classes=2)")) == len(graft.backbone.blocks)


class Drawn(Dataset):
    """Six images or sounds, drawn at random."""

    uniform = True

    def __init__(self, batch):
        parts = [batch(seed) for seed in (1, 2)]
        self.values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        super().__init__(Examples(Table({}, "drawn", list(range(6)), "row"), {}), np.ones(6, np.int64))

    def inputs(self, rows, at):
        return {name: value[torch.from_numpy(rows)] for name, value in self.values.items()}


@pytest.mark.parametrize(
    ("name", "width"),
    [("vit", 16), ("convnext", 16), ("resnet", 32), ("ast", 16), ("squeezenet", None), ("resnet20", 64)],
)
def test_the_model_s_own_head_alone_begins_at_what_is_kept(name, width):
    """No block is computed again, and no dropout of the head itself is lost."""
    graft = shaken(zoo.BY_NAME[name].fresh(), "head(classes=2, pooling='own')")
    data = Drawn(zoo.BY_NAME[name].batch)
    kept = make_forward(graft, DEVICE, "fp32", frozen_depth(graft), data, passes=3)
    assert isinstance(kept.start, AtOwnHead) and (width is None or kept.kept.values[0].numel() == width)
    agree(graft, kept, data)
    drops = [m for m in kept.start.module.modules() if isinstance(m, nn.Dropout)]
    assert bool(drops) == (name == "squeezenet")
    set_training(graft, frozen_depth(graft))
    assert all(module.training for module in drops)


@pytest.mark.parametrize("name", ["roberta", "modernbert", "glm", "wav2vec2"])
def test_other_heads_of_models_begin_at_a_block(name):
    """Of tokens, of a text's last token, or with a projection before them."""
    model = zoo.BY_NAME[name]
    graft = shaken(model.fresh(), "head(classes=2, pooling='own')")
    for module in graft.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    data = dataset() if name != "wav2vec2" else Drawn(model.batch)
    kept = make_forward(graft, DEVICE, "fp32", frozen_depth(graft), data, passes=3)
    assert not isinstance(getattr(kept, "start", None), AtOwnHead)
    agree(graft, kept, data)


class Features(nn.Module):
    """Convolutions, and a last layer whose input `kind` says something about."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3))
        self.norm = nn.BatchNorm2d(6) if kind == "norm" else nn.Identity()
        self.dropout = nn.Dropout(0.2 if kind == "dropout" else 0.0)
        self.fc = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6))

    def forward(self, x):
        x = self.dropout(self.norm(self.layers(x)).mean(dim=(2, 3)))
        if self.kind == "function":
            x = nn.functional.dropout(x, 0.2, self.training)
        logits = self.fc(x)
        if self.kind == "twice":
            logits = self.fc(logits)
        return logits + x if self.kind == "skip" else logits.unsqueeze(-1).flatten(1)


@pytest.mark.parametrize("kind", ["plain", "norm", "dropout", "function", "twice", "skip"])
def test_what_changes_before_the_own_head_is_not_kept(kind):
    torch.manual_seed(0)
    graft = shaken(Features(kind), "head(classes=6, pooling='own')")
    data = Drawn(lambda seed: {"x": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed))})
    before = {name: value.clone() for name, value in graft.model.state_dict().items()}
    state = torch.get_rng_state()
    kept = make_forward(graft, DEVICE, "fp32", frozen_depth(graft), data, passes=3)
    assert isinstance(getattr(kept, "start", None), AtOwnHead) == (kind in ("plain", "norm")), kind
    agree(graft, kept, data)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in graft.model.state_dict().items())


def test_an_addition_lies_where_it_is_placed():
    for sites, depth in (("blocks[1].q", 1), ("re:embeddings.word_embeddings", 0), ("re:pooler.dense", 2)):
        assert frozen_depth(attach(zoo.BY_NAME["bert"].fresh(), f"lora(rank=2, sites={sites!r})")) == depth
    assert frozen_depth(attach(zoo.BY_NAME["bert"].fresh(), "prompt(tokens=2)")) == 0


@pytest.mark.parametrize("name", zoo.BY_NAME)
@pytest.mark.parametrize("pooling", ["mean", "own"])
def test_below_a_head_alone_nothing_is_random(name, pooling):
    """Dropout, layer drop, masked frames and running statistics of what is frozen: two passes give the same."""
    model = zoo.BY_NAME[name]
    if pooling == "own" and name in (
        "bert",
        "deberta_v2",
        "gpt2",
        "llama",
        "t5",
        "mixtral",
        "swin",
        "whisper",
        "qwen3",
    ):
        pytest.skip("has no head of its own")
    graft = attach(model.fresh(), f"head(classes=2, pooling={pooling!r})")
    for module in graft.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    set_training(graft, frozen_depth(graft))
    for _, head in graft.additions():
        head.eval()
    if pooling == "own":  # what lies behind the blocks keeps its dropout
        last = graft.backbone.module(graft.backbone.blocks[-1])
        seen = []
        last.register_forward_hook(lambda module, args, output: seen.append(output))
        graft.model(**model.batch()), graft.model(**model.batch())
        first, second = (x if isinstance(x, torch.Tensor) else x[0] for x in seen)
    else:
        first, second = (graft.model(**model.batch()).logits for _ in range(2))
    assert torch.equal(first, second)


def test_a_block_that_is_trained_keeps_its_dropout():
    graft = attach(zoo.BY_NAME["bert"].fresh(), "unfreeze('blocks[1]') + head(classes=2, pooling='mean')")
    set_training(graft, 1)
    modes = {name: module.training for name, module in graft.model.named_modules()}
    assert (
        not modes["embeddings.dropout"]
        and not modes["encoder.layer.0.output.dropout"]
        and not modes["encoder"]
    )
    assert modes["encoder.layer.1.output.dropout"] and modes["head_default.dropout"]
