"""The selection language: what can be written, what it means on a model, what is refused."""

from __future__ import annotations

import re

import pytest
import tiny

from graftkit.backbone import Backbone, select, select_parameters
from graftkit.errors import UserError
from graftkit.recipe.selection import ROLES_OF_WORD, parse

BERT_BLOCK = [
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm",
]  # fmt: skip


def bert(block: int, *names: str) -> list[str]:
    return [f"encoder.layer.{block}.{name}" for name in names]


@pytest.fixture(scope="module")
def backbones() -> dict[str, Backbone]:
    return {kind: Backbone(tiny.bare(kind)) for kind in tiny.KINDS}


def chosen(backbone: Backbone, selection: str) -> list[str]:
    return [site.name for site in select(backbone, selection)]


def test_roles_of_each_model(backbones):
    roles = {
        kind: [(site.name.split(".", 2)[-1] if kind != "bert" else site.name.split(".", 3)[-1], site.role)
               for site in backbone.sites if site.block == 1]
        for kind, backbone in backbones.items()
    }  # fmt: skip
    assert roles["bert"] == list(zip(BERT_BLOCK, ["q", "k", "v", "o", "norm", "up", "down", "norm"]))
    assert dict(roles["gpt2"]) == {
        "ln_1": "norm", "attn.c_attn": "qkv", "attn.c_proj": "o", "ln_2": "norm",
        "mlp.c_fc": "up", "mlp.c_proj": "down",
    }  # fmt: skip
    assert dict(roles["llama"]) == {
        "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o",
        "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down",
        "input_layernorm": "norm", "post_attention_layernorm": "norm",
    }  # fmt: skip
    outside = {s.name: s.role for b in backbones.values() for s in b.sites if s.block is None}
    assert outside == {
        "embeddings.word_embeddings": "embedding", "embeddings.position_embeddings": "embedding",
        "embeddings.token_type_embeddings": "embedding", "embeddings.LayerNorm": "norm", "pooler.dense": "pooler",
        "wte": "embedding", "wpe": "embedding", "ln_f": "norm", "embed_tokens": "embedding", "norm": "norm",
    }  # fmt: skip


@pytest.mark.parametrize("kind,head", [("bert", "classifier"), ("gpt2", "score"), ("llama", "score")])
def test_the_head_of_each_model(kind, head):
    assert chosen(Backbone(tiny.with_head(kind)), "head") == [head]


@pytest.mark.parametrize(
    "selection,wanted",
    [
        ("blocks[1]", bert(1, *BERT_BLOCK)),
        ("blocks[-1]", bert(2, *BERT_BLOCK)),
        ("blocks[-2:]", bert(1, *BERT_BLOCK) + bert(2, *BERT_BLOCK)),
        ("blocks[:1]", bert(0, *BERT_BLOCK)),
        ("blocks[ 1 : 2 ]", bert(1, *BERT_BLOCK)),
        ("blocks[1:99]", bert(1, *BERT_BLOCK) + bert(2, *BERT_BLOCK)),
        ("blocks[0].attention", bert(0, *BERT_BLOCK[:4])),
        ("blocks[0].ffn", bert(0, "intermediate.dense", "output.dense")),
        ("blocks[0].norms", bert(0, "attention.output.LayerNorm", "output.LayerNorm")),
        ("blocks[0].attention.output", bert(0, "attention.output.dense", "attention.output.LayerNorm")),
        ("q,v", [n for b in range(3) for n in bert(b, "attention.self.query", "attention.self.value")]),
        ("v, q", [n for b in range(3) for n in bert(b, "attention.self.query", "attention.self.value")]),
        ("query", [n for b in range(3) for n in bert(b, "attention.self.query")]),
        ("blocks[0].q, blocks[2].down", bert(0, "attention.self.query") + bert(2, "output.dense")),
        ("re:encoder\\.layer\\.1\\..*dense", bert(1, "attention.output.dense", "intermediate.dense", "output.dense")),
        ("re:encoder.layer.0|pooler", [*bert(0, *BERT_BLOCK), "pooler.dense"]),
        ("re:.*(query|key),?", [n for b in range(3) for n in bert(b, "attention.self.query", "attention.self.key")]),
        ("pooler", ["pooler.dense"]),
        ("word_embeddings", ["embeddings.word_embeddings"]),
        ("embeddings", [f"embeddings.{n}_embeddings" for n in ("word", "position", "token_type")]),
    ],
)  # fmt: skip
def test_what_selections_mean(backbones, selection, wanted):
    assert sorted(chosen(backbones["bert"], selection)) == sorted(wanted)


def test_all_linear_leaves_head_and_pooler_out():
    for kind in tiny.KINDS:
        backbone = Backbone(tiny.with_head(kind))
        assert all(site.block is not None for site in select(backbone, "all-linear"))


def test_fused_maps_answer_to_each_of_their_parts(backbones):
    for word in ("q", "k", "v", "attention"):
        assert "h.0.attn.c_attn" in chosen(backbones["gpt2"], word)


def test_parameters_of_a_selection():
    backbone = Backbone(tiny.causal("llama", tie_word_embeddings=True))
    assert select_parameters(backbone, "embeddings") == ["model.embed_tokens.weight"]
    assert select_parameters(backbone, "head") == ["model.embed_tokens.weight"]  # tied: its first name
    assert select_parameters(backbone, "blocks[0].q, norms")[0] == "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "selection,said",
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("q,,v", "empty part"),
        ("blocks[]", "blocks[] cannot be read"),
        ("blocks[-]", "blocks[-] cannot be read"),
        ("blocks[-:2]", "cannot be read"),
        ("blocks[a]", "blocks[a] cannot be read"),
        ("blocks[1:2:3]", "cannot be read"),
        ("blocks[1", "cannot be read"),
        ("layers[1]", "cannot be read"),
        ("re:(", "regular expression is invalid"),
        ("*", "cannot be read"),
    ],
)
def test_what_cannot_be_read(selection, said):
    with pytest.raises(UserError) as caught:
        parse(selection)
    assert said in str(caught.value)


def test_a_selection_that_is_no_text():
    with pytest.raises(UserError, match="None"):
        parse(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "selection,near",
    [("atention", "attention"), ("quer", "query"), ("q,layrnorm", "LayerNorm"), ("blocks[9]", "blocks")],
)
def test_nothing_found_lists_what_there_is(backbones, selection, near):
    with pytest.raises(UserError) as caught:
        select(backbones["bert"], selection)
    said = str(caught.value)
    assert "attention, q, k, v, o, ffn" in said and "blocks[0] to blocks[2]" in said and "dense" in said
    assert near in said


def test_words_that_a_model_lacks(backbones):
    for word in ROLES_OF_WORD:
        try:
            assert chosen(backbones["llama"], word)
        except UserError as error:
            assert word in ("head", "pooler", "convs", "experts") and "matches nothing" in str(error)


def test_a_regular_expression_runs_out_of_time():
    from graftkit.recipe.patterns import Pattern

    endless = Pattern(r"(?:(\w)|(\w\w))*(?!\1)[^\w]", "sites")
    assert not endless.fullmatch("a")
    endless.left = 0.2
    with pytest.raises(UserError, match="sites: the regular expression takes longer"):
        endless.fullmatch("a" * 60)


def test_a_regular_expression_means_what_re_says():
    from graftkit.recipe.patterns import Pattern

    for text in (
        r"a{2}",
        r"a\{2\}",
        r"(?i)A[bc]?",
        r"(?:a|b)+\.c",
        "a$|b",
        r"(?P<x>a)(?P=x)",
        "a++b",
        "[a-z&&b]+",
    ):
        for name in ("a", "aa", "ab", "a.c", "b", "a{2}", "aaab", "b\n"):
            assert Pattern(text, "").fullmatch(name) == bool(re.fullmatch(text, name)), (text, name)
    for text in (r"\p{L}", "(?V1)a", "(?r)a", "(?<=a+)b", "a{e}", "(?P<x>a)(?P<x>b)"):
        with pytest.raises(UserError, match="invalid"):
            Pattern(text, "sites")
