"""One batch whose rows use different grafts, against each row alone."""

from __future__ import annotations

import pytest
import tiny
import torch
import zoo
from shaken import ALL_KINDS, shaken
from side_by_side import HEADS, NAMES, assert_rows_are_those_alone, refusal, row, several, states
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from graftkit import UserError, attach, detach, using
from graftkit.grafts.attach import attach_chain
from graftkit.methods.base import read

pytestmark = pytest.mark.sampled

ROWS = ["support-de", None, "sales", "support-fr", "support-de"]
# three grafts each, of different sizes where the method has a size
TRIPLES = {
    "lora": ("lora(rank=2)", "lora(rank=3, use_rslora=True)", "lora(rank=5, alpha=3)"),
    "lora with biases": ("lora(rank=2, lora_bias=True)", "lora(rank=3, lora_bias=True, bias='lora_only')", "lora(rank=1)"),
    "lora on embeddings": ("lora(rank=2, sites='embeddings')", "lora(rank=3, sites='embeddings')", "lora(rank=2)"),
    "ranks": ("lora(rank=2, rank_pattern={'q': 4})", "lora(rank=3, sites='q,v')", "lora(rank=2, sites='blocks[0]')"),
    "dora": ("dora(rank=2)", "dora(rank=3)", "dora(rank=4)"),
    "adalora": ("adalora(rank=3, target_rank=2)", "adalora(rank=2, target_rank=1)", "adalora(rank=4, target_rank=1)"),
    "pissa": ("pissa(rank=2)", "pissa(rank=3)", "pissa(rank=1)"),
    "vera": ("vera(rank=4)", "vera(rank=6, seed=3)", "vera(rank=3)"),
    "loha": ("loha(rank=2)", "loha(rank=3)", "loha(rank=1)"),
    "lokr": ("lokr(rank=2)", "lokr(rank=3, factor=2)", "lokr(rank=1)"),
    "ia3": ("ia3()", "ia3(sites='k')", "ia3(feedforward='o')"),
    "adapter": ("adapter(bottleneck=3)", "adapter(bottleneck=4)", "adapter(bottleneck=5, norms=False)"),
    "adapter beside": (
        "adapter(bottleneck=3, placement='parallel')", "adapter(bottleneck=4, placement='parallel', scale=2)",
        "adapter(bottleneck=5)",
    ),
    "methods of every kind": ("lora(rank=2) + ia3()", "adapter(bottleneck=4)", "dora(rank=2)"),
    "norms": ("norms()", "lora(rank=2) + norms()", "norms()"),
    "unfreeze": ("unfreeze('blocks[-1:]')", "unfreeze('blocks[0]')", "lora(rank=2)"),
    "full": ("full()", "full()", "lora(rank=2)"),
}  # fmt: skip


# BERT and Llama, which are made of the same kinds of modules, in turn
@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for i, name in enumerate(TRIPLES) for kind in ("gpt2", ("bert", "llama")[i % 2])],
)
def test_each_row_comes_out_as_it_does_alone(kind, name):
    model = tiny.bare(kind)
    several(model, TRIPLES[name])
    assert_rows_are_those_alone(model, ROWS)


@pytest.mark.parametrize("name", HEADS)
@ALL_KINDS
def test_rows_with_heads(kind, name):
    model = tiny.with_head(kind) if name in ("own", "replaced") else tiny.bare(kind)
    several(model, HEADS[name])
    assert_rows_are_those_alone(model, [NAMES[1], NAMES[0], NAMES[1]])
    if name == "own":
        assert_rows_are_those_alone(model, [NAMES[1], None, NAMES[0]])


def test_rows_on_convolutions():
    def make() -> nn.Module:
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=2, stride=2), nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 1),
        )  # fmt: skip
        tiny.randomize(model, 0)
        model[1].running_mean.uniform_(-1, 1)
        model[1].running_var.uniform_(0.5, 2)
        return model.eval()

    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for texts in (
        ("lora(rank=2, sites='re:.*')", "lora(rank=4, sites='re:.*')"),
        ("loha(rank=2, sites='re:.*')", "lokr(rank=2, sites='re:.*')"),
        ("unfreeze('convs') + norms()", "ia3(sites='convs')"),
    ):
        model = make()
        several(model, texts)
        rows = [NAMES[1], None, NAMES[0], NAMES[1]]
        with torch.no_grad():
            with using(model, rows=rows):
                got = model(x)
            for i, name in enumerate(rows):
                with using(model, [name] if name else []):
                    assert tiny.relative(got[i], model(x[i : i + 1])[0]) < 1e-5, (texts, name)


@pytest.mark.parametrize(
    "name,first,second",
    [
        ("roberta", "lora(rank=2)", "full()"), ("modernbert", "full()", "adapter(bottleneck=2)"),
        ("t5", "lora(rank=2)", "dora(rank=3)"), ("mixtral", "ia3()", "lora(rank=2)"),
        ("vit", "adapter(bottleneck=2)", "unfreeze('blocks')"), ("wav2vec2", "norms()", "lora(rank=2)"),
        ("convnext", "lora(rank=2)", "ia3()"), ("resnet", "full()", "adapter(bottleneck=2)"),
        ("whisper", "lora(rank=2)", "loha(rank=2)"), ("squeezenet", "full()", "lokr(rank=2)"),
    ],
)  # fmt: skip
def test_rows_on_other_models(name, first, second):
    found = zoo.BY_NAME[name]
    model, batch = found.fresh(), found.batch()
    several(model, (first, second))

    def outputs() -> torch.Tensor:
        with torch.no_grad():
            given = model(**batch)
        given = given if isinstance(given, torch.Tensor) else given[0]
        mask = batch.get("attention_mask")
        whole = mask is not None and mask.shape == given.shape[:2]
        return given * mask.unsqueeze(-1) if whole else given

    model.eval()
    with using(model, NAMES[0]):
        wanted = list(outputs())
    rows = [NAMES[i % 2] for i in range(len(wanted))]
    with using(model, NAMES[1]):
        wanted[1::2] = list(outputs())[1::2]
    with using(model, rows=rows):
        got = outputs()
    for mine, alone in zip(got, wanted):
        assert tiny.relative(mine, alone) < 1e-5


def test_rows_of_a_mixed_batch_are_generated_as_each_alone():
    model = tiny.causal("llama")
    several(model, ("lora(rank=2)", "lora(rank=3)", "adapter(bottleneck=4)"))
    batch = tiny.batch(rows=len(ROWS), side="left")
    settings = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    with torch.no_grad(), using(model, rows=ROWS):
        together = model.generate(**batch, **settings)
    for i, name in enumerate(ROWS):
        with torch.no_grad(), using(model, [name] if name else []):
            alone = model.generate(**row(batch, i), **settings)
        assert torch.equal(together.sequences[i, -6:], alone.sequences[0, -6:])
        for mine, wanted in zip(together.scores, alone.scores):
            assert tiny.relative(mine[i].nan_to_num(neginf=0), wanted[0].nan_to_num(neginf=0)) < 1e-5
    assert len({tuple(tokens[-6:].tolist()) for tokens in together.sequences}) > 1


class Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "text", ["lora(rank=2)", "dora(rank=2)", "loha(rank=2)", "ia3()", "adapter(bottleneck=2)"]
)
def test_the_forward_pass_has_no_loop_over_grafts(text):
    counts = []
    for many in (2, 7):
        names = tuple(f"g{i}" for i in range(many))
        model = tiny.bare("bert")
        several(model, (text,) * many, names)
        rows = [names[i % many] for i in range(8)]
        with torch.no_grad(), using(model, rows=rows), Counter() as counter:
            model(**tiny.batch(rows=8))
        counts.append(counter.calls)
    assert counts[0] == counts[1]


# ---- refusals


def test_names_and_numbers_that_cannot_be():
    model = tiny.bare("bert")
    assert "attached: none" in refusal(model, "a")
    several(model, ("lora(rank=2)", "lora(rank=3)"))
    assert "attached: 'support-de', 'support-fr'. Did you mean 'support-fr'?" in refusal(model, "suport-fr")
    assert "'nobody'" in refusal(model, rows=["support-de", "nobody"])
    assert "either names of grafts or rows" in refusal(model)
    assert "either names of grafts or rows" in refusal(model, "support-de", rows=["support-de"])
    for weight in (float("nan"), float("inf"), True, "1"):
        assert "finite number" in refusal(model, {"support-de": weight})
    assert "a list with the name" in refusal(model, rows=[])
    assert "a list with the name" in refusal(model, rows="support-de")


def test_another_number_of_rows():
    model = tiny.bare("bert")
    several(model, ("lora(rank=2)", "lora(rank=3)"))
    with using(model, rows=["support-de", "support-fr"]):
        with pytest.raises(UserError, match="2 rows, but the batch has 3"):
            states(model, tiny.batch(rows=3))
        query = model.encoder.layer[0].attention.self.query
        with pytest.raises(
            UserError,
            match=r"'encoder.layer.0.attention.self.query' got an input of shape \(14, 16\).* the 2 rows",
        ):
            query(torch.zeros(14, tiny.WIDTH))
        with pytest.raises(UserError, match="2 rows"):
            query(torch.zeros(3, 4, tiny.WIDTH))
    for graft in vars(model)["graftkit_grafts"].values():
        assert not graft.active


def test_modules_that_are_given_something_else_than_rows():
    found = zoo.BY_NAME["deberta_v2"]
    for text, what in (
        ("lora(rank=2)", r"query_proj' got an input of shape \(1, "),
        ("unfreeze('embeddings')", "'encoder.rel_embeddings', which DebertaV2Model does not call"),
    ):
        model = found.fresh().eval()
        several(model, (text, "lora(rank=2, sites='ffn')"))
        with using(model, rows=[NAMES[0], NAMES[1], None]), pytest.raises(UserError, match=what):
            model(**found.batch())
    model = zoo.BY_NAME["t5"].fresh()
    several(model, ("unfreeze('blocks')", "lora(rank=2)"))
    assert "relative_attention_bias" in refusal(model, rows=NAMES[:2])


def test_training_is_refused():
    model = tiny.bare("bert")
    several(model, ("lora(rank=2)", "unfreeze('blocks[0]')"))
    for how in ({"which": {"support-de": 0.5}}, {"which": {"support-fr": 0.5}}, {"rows": ["support-de"] * 2}):
        with using(model, **how):
            model.train()
            with pytest.raises(UserError, match="eval"):
                model(**tiny.batch(rows=2))
            model.eval()
            with torch.no_grad():
                model(**tiny.batch(rows=2))


@pytest.mark.parametrize("text", ["prefix(tokens=2)", "prompt(tokens=2)", "ptuning(tokens=2)"])
def test_methods_without_a_mixture_are_named(text):
    model = tiny.bare("bert")
    several(model, ("lora(rank=2)", text))
    method = text.partition("(")[0]
    for message in (
        refusal(model, {"support-fr": 0.5, "support-de": 0.5}),
        refusal(model, rows=["support-de", "support-fr", None]),
    ):
        assert f"{method}() of the graft 'support-fr'" in message and "using(model, 'support-fr')" in message


def test_heads_that_do_not_go_together():
    model = tiny.bare("bert")
    several(model, ("head(classes=2)", "head(classes=3)", "head(classes=2, pooling='mean')"))
    lora = shaken(model, "lora(rank=2)", name="plain")
    lora.disable()
    assert "2, 3 classes" in refusal(model, rows=["support-de", "support-fr"])
    assert "same pooling" in refusal(model, rows=["support-de", "sales"])
    assert "row 1 has no head" in refusal(model, rows=["support-de", None])
    assert "row 0 has no head" in refusal(model, rows=["plain", "support-de"])
    own = tiny.with_head("bert")
    several(own, ("head(classes=5)", "head(classes=4)"))
    assert "'classifier'" in refusal(own, rows=["support-de", "support-fr"])
    assert "row 1" in refusal(own, rows=["support-de", None])
    assert "different classes" in refusal(own, {"support-de": 0.5, "support-fr": 0.5})


def test_parameters_that_rows_share_are_named():
    model = tiny.causal("llama", tie_word_embeddings=True)
    several(model, ("unfreeze('embeddings')", "lora(rank=2)"))
    assert "one tied weight" in refusal(model, rows=["support-de", "support-fr"])
    model = tiny.bare("bert")
    several(model, ("dora(rank=2) + unfreeze('blocks')", "lora(rank=2)"))
    assert "dora() of the graft 'support-de'" in refusal(model, rows=["support-de", "support-fr"])
    transformer = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False)
    several(transformer, ("lora(rank=2, sites='re:.*linear.')", "lora(rank=1, sites='re:.*linear.')"))
    assert "batch_first" in refusal(transformer, rows=["support-de", "support-fr"])


def test_methods_in_another_order():
    model = tiny.bare("llama")
    texts = (
        "adapter(bottleneck=2, norms=False) + lora(rank=2)",
        "lora(rank=2) + adapter(bottleneck=2, norms=False)",
    )
    several(model, texts)
    assert_rows_are_those_alone(model, ["support-de", None, "support-fr"])
    model = tiny.bare("llama")
    for name, text in zip(
        ("support-de", "support-fr"), texts
    ):  # as saved before sums had an order of their own
        attach_chain(model, read(text), name)
    assert "different orders" in refusal(model, rows=["support-de", "support-fr"])
    model = tiny.bare("llama")
    several(model, ("lora(rank=2)", "adapter(bottleneck=2)", "adapter(bottleneck=2) + lora(rank=2)"))
    assert_rows_are_those_alone(model, ROWS)


def test_nothing_else_is_done_meanwhile(tmp_path):
    model = tiny.bare("bert")
    first, second = several(model, ("lora(rank=2)", "lora(rank=3)"))
    with using(model, {"support-de": 0.5}):
        for action in (
            first.enable, first.fold, lambda: first.save(tmp_path / "graft"), lambda: detach(second),
            lambda: attach(model, "lora()", name="new"),
        ):  # fmt: skip
            with pytest.raises(UserError, match="leave the with block"):
                action()
    detach(second)
    assert first.save(tmp_path / "graft").is_dir()
