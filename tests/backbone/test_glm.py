"""The GLM backbone: its attention and positions, its files, and methods on it."""

from __future__ import annotations

from pathlib import Path

import contract
import pytest
import torch
import transformers
import zoo
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.glm import GraftKitGlmConfig, GraftKitGlmForMaskedLM, GraftKitGlmModel
from graftkit.backbone.pooling import default_pooling

pytestmark = pytest.mark.slow

VOCABULARY, WIDTH, A, SPANS = 40, 32, 7, (3, 2)


def config(**changes) -> GraftKitGlmConfig:
    return GraftKitGlmConfig(
        **{
            "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 48, "max_position_embeddings": 24, "pad_token_id": 0,
        } | changes
    )  # fmt: skip


def make(model_class=GraftKitGlmForMaskedLM, seed: int = 0, **changes):
    model = model_class(config(**changes)).eval()
    zoo.randomize(model, seed)
    return model


def blanks(rows: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """Part A of seven tokens, whose masks are the third and the sixth, and two blanks."""
    generator = torch.Generator().manual_seed(seed)
    length = A + sum(SPANS)
    places = [*range(A), *[2] * SPANS[0], *[5] * SPANS[1]]
    numbers = [0] * A + [n + 1 for span in SPANS for n in range(span)]
    return {
        "input_ids": torch.randint(3, VOCABULARY, (rows, length), generator=generator),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
        "position_ids": torch.tensor(places).repeat(rows, 1),
        "block_position_ids": torch.tensor(numbers).repeat(rows, 1),
    }


@torch.no_grad()
def plain(model: GraftKitGlmForMaskedLM, row: dict[str, Tensor]) -> Tensor:
    """The logits of one row (tokens, vocabulary), computed token by token with loops over what each may see."""
    glm = model.glm
    ids, places, numbers = (row[name] for name in ("input_ids", "position_ids", "block_position_ids"))
    states = (
        glm.word_embeddings(ids) + glm.position_embeddings(places) + glm.block_position_embeddings(numbers)
    )
    part_a = int((numbers == 0).sum())
    for block in glm.layers:
        normed = block.input_layernorm(states)
        attention, heads = block.attention, glm.config.num_attention_heads
        q, k, v = (
            f(normed).view(len(ids), heads, -1)
            for f in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mixed = torch.zeros_like(q)
        for i in range(len(ids)):
            seen = range(part_a) if i < part_a else range(i + 1)
            for head in range(heads):
                scores = torch.stack([q[i, head] @ k[j, head] for j in seen]) / (WIDTH // heads) ** 0.5
                mixed[i, head] = sum(p * v[j, head] for p, j in zip(scores.softmax(0), seen))
        states = states + attention.o_proj(mixed.reshape(len(ids), -1))
        inner = nn.functional.gelu(block.mlp.up_proj(block.post_attention_layernorm(states)))
        states = states + block.mlp.down_proj(inner)
    return glm.final_layernorm(states) @ glm.word_embeddings.weight.T


def test_logits_are_those_of_a_plain_loop() -> None:
    model, batch = make(), blanks()
    with torch.no_grad():
        got = model(**batch).logits
    for row in range(2):
        wanted = plain(model, {name: tensor[row] for name, tensor in batch.items()})
        torch.testing.assert_close(got[row], wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_part_a_never_sees_part_b_and_blanks_never_what_follows() -> None:
    model, batch = make(), blanks(rows=1)
    before = model(**batch).logits[0]
    for place in (1, A, A + 2, A + 3):
        changed = dict(batch, input_ids=batch["input_ids"].clone())
        changed["input_ids"][0, place] = (changed["input_ids"][0, place] + 1) % VOCABULARY
        differs = (model(**changed).logits[0] - before).abs().amax(-1) > 1e-6
        wanted = [place < A or i >= place for i in range(len(differs))]
        assert differs.tolist() == wanted


@torch.no_grad()
def test_padding_and_a_cache_change_nothing() -> None:
    model, batch = make(), blanks()
    wanted = model(**batch).logits
    padded = {name: nn.functional.pad(tensor, (0, 3)) for name, tensor in batch.items()}
    torch.testing.assert_close(model(**padded).logits[:, :-3], wanted)
    cache, found = transformers.DynamicCache(), []
    for start, end in [(0, A), *((i, i + 1) for i in range(A, wanted.shape[1]))]:
        part = {name: tensor[:, start:end] for name, tensor in batch.items()}
        part["attention_mask"] = batch["attention_mask"][:, :end]
        found.append(model(**part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), wanted)


@torch.no_grad()
def test_the_second_position_can_be_left_out() -> None:
    model, batch = make(block_positions=False), blanks()
    assert not any("block_position" in name for name, _ in model.named_parameters())
    moved = dict(batch, block_position_ids=(batch["block_position_ids"] * 3).clamp(max=9))
    assert torch.equal(model(**batch).logits, model(**moved).logits)
    with_both = make()
    assert not torch.equal(with_both(**batch).logits, with_both(**moved).logits)


def test_labels_and_chosen_logits() -> None:
    model, batch = make(), blanks()
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, A:] = 5
    output = model(**batch, labels=labels)
    wanted = -output.logits.log_softmax(-1)[:, A:, 5].mean()
    torch.testing.assert_close(output.loss, wanted)
    some = model(**batch, logits_to_keep=torch.tensor([A, A + 2])).logits
    torch.testing.assert_close(some, output.logits[:, [A, A + 2]])


def test_transformers_saves_and_loads_it(tmp_path: Path) -> None:
    model, batch = make(), blanks()
    model.save_pretrained(tmp_path)
    for auto, kind in (("AutoModelForMaskedLM", GraftKitGlmForMaskedLM), ("AutoModel", GraftKitGlmModel)):
        loaded = getattr(transformers, auto).from_pretrained(tmp_path).eval()
        assert type(loaded) is kind
        wanted = model.glm if kind is GraftKitGlmModel else model
        assert torch.equal(loaded(**batch)[0], wanted(**batch)[0])
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.glm.word_embeddings.weight


def test_new_weights_are_small_and_smaller_before_residual_sums() -> None:
    torch.manual_seed(0)
    block = GraftKitGlmModel(config(hidden_size=64)).layers[0]
    assert block.attention.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 2, rel=0.1)


def test_its_parts_are_found() -> None:
    backbone = Backbone(make())
    roles = {site.name: site.role for site in backbone.sites}
    assert backbone.blocks == ("glm.layers.0", "glm.layers.1")
    assert [roles[f"glm.layers.0.{name}"] for name in (
        "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.up_proj", "mlp.down_proj",
        "input_layernorm",
    )] == ["q", "k", "v", "o", "up", "down", "norm"]  # fmt: skip
    assert roles["glm.word_embeddings"] == roles["glm.block_position_embeddings"] == "embedding"
    assert roles["lm_head"] == "head"
    assert not backbone.is_decoder and default_pooling(backbone) == "mean"


GLM = zoo.Model("graftkit_glm", "GLM", make, lambda generator: blanks(rows=3, seed=generator.initial_seed()))


@pytest.mark.parametrize("method", ["lora(rank=2)", "full()", "prefix(tokens=2)", "prompt(tokens=2)"])
def test_methods_keep_their_promises_on_it(method: str, tmp_path: Path) -> None:
    assert contract.check(GLM, method, tmp_path, method.startswith("lora")) == contract.PASSES
