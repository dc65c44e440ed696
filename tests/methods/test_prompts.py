"""Virtual tokens against models that are given the same embeddings by hand."""

from __future__ import annotations

import pytest
import tiny
import torch
import zoo
from shaken import ALL_KINDS, count, shaken
from torch import Tensor, nn

from graftkit import Backbone, attach, load

pytestmark = pytest.mark.sampled

W, V = tiny.WIDTH, tiny.VOCABULARY
METHODS = pytest.mark.parametrize("text", ["prompt(tokens=3)", "ptuning(tokens=3, hidden=5)"])


def prompt_of(model: nn.Module, name: str = "prompt") -> Tensor:
    return getattr(model, f"{name}_default").embeddings()


def by_hand(model: nn.Module, given: dict[str, Tensor], front: Tensor, **more) -> dict:
    """What a model without a graft gives for the embeddings of the tokens with `front` before them."""
    words = model.get_input_embeddings()(given["input_ids"])
    rows = len(words)
    mask = torch.cat([torch.ones(rows, len(front), dtype=torch.long), given["attention_mask"]], 1)
    states = torch.cat([front.expand(rows, -1, -1), words], 1)
    return model(inputs_embeds=states, attention_mask=mask, **more)


# ---- size and start


@ALL_KINDS
@pytest.mark.parametrize("tokens", [1, 5])
def test_parameters(kind, tokens):
    assert count(attach(tiny.bare(kind), f"prompt(tokens={tokens})")) == tokens * W
    for hidden, layers in [(3, 1), (5, 3), (None, 2)]:
        h = hidden or W
        text = f"tokens={tokens}, hidden={hidden}, layers={layers}"
        mlp = tokens * W + (W + 1) * h + (layers - 1) * (h + 1) * h + (h + 1) * W
        assert count(attach(tiny.bare(kind), f"ptuning({text})")) == mlp
        h = hidden or W // 2
        lstm = 8 * h * (W + h + 2) + (layers - 1) * 8 * h * (3 * h + 2) + (2 * h + 1) * (2 * h + W)
        assert count(attach(tiny.bare(kind), f"ptuning(encoder='lstm', {text})")) == tokens * W + lstm


def words_of(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
    """A tokenizer: a word is its length."""
    ids = [len(word) for word in text.split()]
    return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


@pytest.mark.parametrize("tokens,ids", [(2, [5, 3]), (3, [5, 3, 4]), (7, [5, 3, 4, 5, 3, 4, 5])])
def test_start_from_a_text(tokens, ids):
    model = tiny.bare("bert")
    graft = attach(
        Backbone(model, words_of), f"prompt(tokens={tokens}, init='text', init_text='which was said')"
    )
    assert torch.equal(prompt_of(model), model.embeddings.word_embeddings.weight[ids])
    assert "which was said" in str(graft.method)


@ALL_KINDS
def test_start_from_the_vocabulary(kind):
    model = tiny.bare(kind).bfloat16()
    torch.manual_seed(1)
    attach(model, "prompt(tokens=6, init='vocabulary')")
    rows = {tuple(row.tolist()) for row in model.get_input_embeddings().weight.float()}
    drawn = [tuple(row.tolist()) for row in prompt_of(model)]
    assert set(drawn) <= rows and len(set(drawn)) > 2


def test_random_start_is_as_wide_as_the_table():
    model = tiny.bare("llama")
    attach(model, "prompt(tokens=40)")
    wanted = float(model.embed_tokens.weight.std())
    assert 0.8 * wanted < float(prompt_of(model).std()) < 1.25 * wanted


def test_a_stored_prompt_needs_no_tokenizer(tmp_path):
    graft = attach(
        Backbone(tiny.bare("bert"), words_of), "prompt(tokens=3, init='text', init_text='a few words')"
    )
    graft.save(tmp_path)
    again = load(tiny.bare("bert"), tmp_path)
    assert torch.equal(tiny.outputs(again.model), tiny.outputs(graft.model))


# ---- what is computed


@METHODS
@pytest.mark.parametrize(
    "name", ["bert", "roberta", "deberta_v2", "modernbert", "gpt2", "llama", "qwen3", "mixtral"]
)
def test_the_model_reads_the_prompt_in_front(name, text):
    kind = zoo.BY_NAME[name]
    graft = shaken(kind.fresh(), text)
    given = kind.batch()
    with torch.no_grad():
        got = graft.model(**given, output_hidden_states=True)
        front = prompt_of(graft.model, text.partition("(")[0])
        wanted = by_hand(kind.fresh(), given, front, output_hidden_states=True)
    length = given["input_ids"].shape[1]
    for key, value in got.items():
        if isinstance(value, Tensor):
            cut = wanted[key][:, 3:] if value.dim() == 3 else wanted[key]
            assert value.dim() == 2 or value.shape[1] == length
            torch.testing.assert_close(value, cut)
    assert len(got.hidden_states) == len(wanted.hidden_states) > 1
    for mine, theirs in zip(got.hidden_states, wanted.hidden_states):
        torch.testing.assert_close(mine, theirs[:, 3:])


def test_the_encoder_of_p_tuning():
    model = shaken(tiny.bare("bert"), "ptuning(tokens=3, hidden=5, layers=1)").model
    E, W1, b1, W2, b2 = (p for name, p in model.named_parameters() if "ptuning" in name)
    wanted = torch.relu(E @ W1.T + b1) @ W2.T + b2
    torch.testing.assert_close(prompt_of(model, "ptuning"), wanted)


@ALL_KINDS
def test_ways_to_call(kind):
    """By position, with embeddings, without a mask, as a tuple: all the same."""
    model = shaken(tiny.bare(kind), "prompt(tokens=3)").model
    ids = tiny.batch()["input_ids"]
    ones = torch.ones_like(ids)
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=ones).last_hidden_state
        assert wanted.shape[1] == ids.shape[1]
        others = [
            model(ids).last_hidden_state,
            model(ids, **{"attention_mask": ones.bool()}).last_hidden_state,
            model(inputs_embeds=model.get_input_embeddings()(ids)).last_hidden_state,
            model(input_ids=ids, position_ids=torch.arange(7).expand(4, -1)).last_hidden_state,
            model(input_ids=ids, return_dict=False)[0],
        ]
        if kind == "bert":
            others += [model(ids, ones, torch.zeros_like(ids)).last_hidden_state]
    for other in others:
        torch.testing.assert_close(other, wanted)


def test_token_types_and_positions_of_the_text():
    model = shaken(tiny.bare("bert"), "prompt(tokens=3)").model
    given = tiny.batch()
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).expand(4, -1)
    places = torch.tensor([[4, 5, 6, 0, 1, 2, 3]]).expand(4, -1)
    with torch.no_grad():
        got = model(**given, token_type_ids=types, position_ids=places)
        wanted = by_hand(
            tiny.bare("bert"), given, prompt_of(model), token_type_ids=nn.functional.pad(types, (3, 0)),
            position_ids=torch.cat([torch.arange(3).expand(4, -1), places + 3], 1),
        )  # fmt: skip
    torch.testing.assert_close(got.last_hidden_state, wanted.last_hidden_state[:, 3:])
    torch.testing.assert_close(got.pooler_output, wanted.pooler_output)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "attention"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_head_pools_the_text_alone(pooling, first, side):
    head = f"head(classes=2, pooling='{pooling}')"
    given = tiny.batch(side=side)
    graft = shaken(tiny.bare("gpt2"), f"prompt(tokens=3) + {head}" if first else f"{head} + prompt(tokens=3)")
    placed = graft.model.head_default
    with torch.no_grad():
        got = graft.model.eval()(**given).logits
        states = by_hand(tiny.bare("gpt2"), given, prompt_of(graft.model)).last_hidden_state[:, 3:]
        wanted = placed.logits(placed.features(graft.model, states, given))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_decoders_own_head_pools_the_last_token(kind):
    """Also with padding on the right, where PEFT takes the last position."""
    model = shaken(tiny.with_head(kind), "prompt(tokens=3) + head(classes=3)").model.eval()
    given = tiny.batch(rows=3)
    with torch.no_grad():
        together = model(**given).logits
        alone = [model(input_ids=ids[mask.bool()][None]).logits for ids, mask in zip(*given.values())]
    torch.testing.assert_close(together, torch.cat(alone))


@METHODS
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_loss_of_a_language_model_is_that_of_the_text(kind, text):
    model = shaken(tiny.causal(kind), text).model.eval()
    given = tiny.batch()
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    output = model(**given, labels=labels)
    wanted = nn.functional.cross_entropy(output.logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(output.loss, wanted)


def test_routers_give_their_logits_of_the_text():
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM(zoo.BY_NAME["mixtral"].fresh().config).eval()
    attach(model, "prompt(tokens=3)")
    given = tiny.batch()
    output = model(**given, labels=given["input_ids"], output_router_logits=True)
    assert {tuple(logits.shape) for logits in output.router_logits} == {(4 * 7, 3)}
    assert torch.isfinite(output.aux_loss)


@METHODS
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_generation_with_and_without_cache(kind, text, side):
    model = shaken(tiny.causal(kind), text).model
    given = tiny.batch(rows=3, length=5, side=side)
    if side == "none":
        given["attention_mask"] = torch.ones_like(given["attention_mask"])
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(**given, use_cache=True, **settings)
    plain = model.generate(**given, use_cache=False, **settings)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-4)
    base = tiny.causal(kind).generate(**given, **settings)
    assert not torch.allclose(torch.stack(base.logits), torch.stack(plain.logits), atol=1e-2)
    for row, (ids, mask) in enumerate(zip(*given.values())):  # what is padded is as if it were alone
        alone = {"input_ids": ids[mask.bool()][None], "attention_mask": mask[mask.bool()][None]}
        alone = model.generate(**alone, **settings)
        assert torch.equal(alone.sequences[0, -6:], cached.sequences[row, -6:])


def test_beams():
    model = shaken(tiny.causal("llama"), "prompt(tokens=3)").model
    given = tiny.batch(rows=2, length=5, side="left")
    settings = {
        "max_new_tokens": 5,
        "num_beams": 3,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    found = [model.generate(**given, use_cache=cache, **settings) for cache in (True, False)]
    assert torch.equal(*found)


def test_encoder_and_decoder():
    kind = zoo.BY_NAME["t5"]
    graft = shaken(kind.fresh(), "prompt(tokens=3)")
    given = kind.batch()
    decoder = given["decoder_input_ids"]
    with torch.no_grad():
        got = graft.model(**given)
        wanted = by_hand(kind.fresh(), given, prompt_of(graft.model), decoder_input_ids=decoder)
    torch.testing.assert_close(got.last_hidden_state, wanted.last_hidden_state)
    torch.testing.assert_close(got.encoder_last_hidden_state, wanted.encoder_last_hidden_state[:, 3:])


def test_encoder_and_decoder_generate():
    from transformers import T5ForConditionalGeneration

    torch.manual_seed(0)
    config = zoo.BY_NAME["t5"].fresh().config
    config.decoder_start_token_id = 0
    model = shaken(T5ForConditionalGeneration(config).eval(), "prompt(tokens=3)").model
    given = tiny.batch()
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    found = [model.generate(**given, use_cache=cache, **settings) for cache in (True, False)]
    assert torch.equal(*found)
    with torch.no_grad():
        logits = model(**given, decoder_input_ids=found[0][:, :-1]).logits
    assert torch.equal(logits.argmax(-1), found[0][:, 1:])


def test_two_prompts_stand_one_before_the_other():
    graft = shaken(
        tiny.bare("bert"), "prompt(tokens=3) + ptuning(tokens=2, hidden=4) + head(classes=2, pooling='mean')"
    )
    given = tiny.batch()
    with torch.no_grad():
        got = graft.model.eval()(**given).logits
        front = torch.cat([prompt_of(graft.model, "ptuning"), prompt_of(graft.model)])
        states = by_hand(tiny.bare("bert"), given, front).last_hidden_state[:, 5:]
        head = graft.model.head_default
        torch.testing.assert_close(got, head.logits(head.features(graft.model, states, given)))


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_blocks_that_are_computed_again_for_their_gradients(name):
    kind = zoo.BY_NAME[name]

    def gradients(again: bool) -> Tensor:
        model = kind.fresh()
        torch.manual_seed(0)
        graft = shaken(model, "prompt(tokens=3)")
        if again:
            graft.model.gradient_checkpointing_enable({"use_reentrant": False})
        graft.model.train()
        zoo.flat(graft.model(**kind.batch()), kind.batch()).square().sum().backward()
        return graft.parameters["prompt_default.values"].grad

    torch.testing.assert_close(gradients(True), gradients(False))
