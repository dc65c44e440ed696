"""Virtual tokens on models of pictures, sound and users' own; in the engine; and what is refused."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
import zoo
from shaken import message, shaken
from torch import Tensor, nn

from graftkit import Backbone, UserError, attach
from graftkit.engine.frozen import frozen_depth
from graftkit.tasks.classify.task import Classify

pytestmark = pytest.mark.sampled

W = tiny.WIDTH
METHODS = pytest.mark.parametrize("text", ["prompt(tokens=3)", "ptuning(tokens=3, hidden=5)"])


def prompt_of(model: nn.Module) -> Tensor:
    return model.prompt_default.embeddings()


# ---- more architectures of transformers

COMMON = {
    "vocab_size": 40, "hidden_size": W, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 4}
BART = {
    "vocab_size": 40, "d_model": W, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 48,
}  # fmt: skip
TEXTS = {
    "DistilBertForSequenceClassification": {
        "vocab_size": 40,
        "dim": W,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 24,
    },
    "ElectraForSequenceClassification": {**COMMON, "embedding_size": 8},
    "AlbertModel": {**COMMON, "embedding_size": 8},
    "MPNetModel": COMMON,
    "XLMRobertaForMaskedLM": COMMON,
    "BertForTokenClassification": COMMON,
    "OPTForCausalLM": {**COMMON, "ffn_dim": 24, "word_embed_proj_dim": W},
    "BloomForCausalLM": {"vocab_size": 40, "hidden_size": W, "n_layer": 2, "n_head": 4},
    "Gemma2ForCausalLM": GROUPED,
    "MistralForCausalLM": {**GROUPED, "sliding_window": 4},
    "MambaForCausalLM": {"vocab_size": 40, "hidden_size": W, "num_hidden_layers": 2},
    "XLNetModel": {"vocab_size": 40, "d_model": W, "n_layer": 2, "n_head": 4, "d_inner": 24},
    "T5EncoderModel": {
        "vocab_size": 40,
        "d_model": W,
        "d_kv": 4,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 4,
    },
    "BartModel": BART,
    "MBartForConditionalGeneration": BART,
}
ENDS = ("ForSequenceClassification", "ForCausalLM", "ForMaskedLM", "ForTokenClassification", "EncoderModel",
        "ForConditionalGeneration", "Model")  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_other_architectures(name):
    stem = next(name.removesuffix(end) for end in ENDS if name.endswith(end))
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, f"{stem}Config")(**TEXTS[name])).eval()
    tiny.randomize(model, 0)
    given = tiny.batch()
    more = {"decoder_input_ids": given["input_ids"][:, :4].clamp(min=3)} if TEXTS[name] is BART else {}
    graft = shaken(model, "prompt(tokens=3)")
    with torch.no_grad():
        got, base = model(**given, **more), None
        with graft.disabled():
            base = model(**given, **more)
            words = torch.cat(
                [prompt_of(model).expand(4, -1, -1), model.get_input_embeddings()(given["input_ids"])], 1
            )
            mask = nn.functional.pad(given["attention_mask"], (3, 0), value=1)
            wanted = model(inputs_embeds=words, attention_mask=mask, **more)
    real = given["attention_mask"].bool()
    for key, value in got.items():
        if isinstance(value, Tensor):
            assert value.shape == base[key].shape
            mine, theirs = value, wanted[key]
            if value.dim() == 3 and value.shape[1] == 7:
                mine, theirs = value[real], theirs[:, 3:][real]
            torch.testing.assert_close(mine, theirs)
    first = next(iter(got))
    assert not torch.allclose(got[first], base[first], atol=1e-3)


@pytest.mark.parametrize("name", ["OPT", "Gemma2", "Mistral", "Mamba", "Rwkv"])
def test_generation_of_other_architectures(name):
    """With what each keeps from one step to the next: keys and values in two forms, and the states of recurrent ones."""
    torch.manual_seed(0)
    settings = TEXTS.get(f"{name}ForCausalLM", TEXTS["MambaForCausalLM"])
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    tiny.randomize(model, 0)
    shaken(model, "prompt(tokens=3)")
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    found = [model.generate(**tiny.batch(rows=1), use_cache=cache, **settings) for cache in (True, False)]
    cached, plain = (torch.stack(each.logits) for each in found)
    torch.testing.assert_close(cached, plain, atol=1e-4, rtol=1e-4)


ENCODER = {"hidden_size": W, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
SOUND = {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 4,
         "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2, "classifier_proj_size": 12}  # fmt: skip
SMALL = {"image_size": 32, "patch_size": 8}
MAE = {"decoder_hidden_size": W, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4}
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 12, "pad_token_id": 0}
PATCHES = {
    "DeiTForImageClassification": ("DeiTConfig", {**ENCODER, **SMALL}, ("pixel_values", 3, 32, 32)),
    "Dinov2ForImageClassification": ("Dinov2Config", {**ENCODER, **SMALL}, ("pixel_values", 3, 32, 32)),
    "ViTMAEForPreTraining": ("ViTMAEConfig", {**ENCODER, **SMALL, **MAE}, ("pixel_values", 3, 32, 32)),
    "HubertForSequenceClassification": ("HubertConfig", {**ENCODER, **SOUND}, ("input_values", 120)),
    "WhisperForConditionalGeneration": ("WhisperConfig", WHISPER, ("input_features", 8, 24)),
}


@pytest.mark.parametrize("name", PATCHES)
def test_patches_and_frames_of_other_architectures(name):
    config, settings, (key, *shape) = PATCHES[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    tiny.randomize(model, 0)
    given = {key: torch.randn(2, *shape)}
    if name.startswith("Whisper"):
        given["decoder_input_ids"] = torch.tensor([[3, 4, 5], [6, 7, 8]])
    graft = shaken(model, "prompt(tokens=3)")
    with torch.no_grad():
        torch.manual_seed(1)
        got = model(**given)
        with graft.disabled():
            torch.manual_seed(1)
            base = model(**given)
    assert [tuple(v.shape) for v in got.values() if isinstance(v, Tensor)] == [
        tuple(v.shape) for v in base.values() if isinstance(v, Tensor)
    ]
    assert not torch.allclose(got.logits, base.logits, atol=1e-4)


# ---- patches, frames and a user's own encoder


def test_vit_reads_the_prompt_behind_its_patches():
    kind = zoo.BY_NAME["vit"]
    graft, plain, given = shaken(kind.fresh(), "prompt(tokens=3)"), kind.fresh(), kind.batch()
    with torch.no_grad():
        states = plain.vit.embeddings(given["pixel_values"])
        rows, length, _ = states.shape
        states = torch.cat([states, prompt_of(graft.model).expand(rows, -1, -1)], 1)
        for block in plain.vit.layers:
            states = block(states)
        wanted = plain.classifier(plain.vit.layernorm(states)[:, 0])
        got = graft.model(**given, output_hidden_states=True)
    torch.testing.assert_close(got.logits, wanted)
    assert {state.shape[1] for state in got.hidden_states} == {length}


@pytest.mark.parametrize("name", ["wav2vec2", "ast", "whisper"])
def test_sound(name):
    kind = zoo.BY_NAME[name]
    graft, given = shaken(kind.fresh(), "prompt(tokens=3)"), kind.batch()
    with torch.no_grad():
        got = graft.model(**given, output_hidden_states=True)
        base = kind.fresh()(**given, output_hidden_states=True)
    assert [s.shape for s in got.hidden_states] == [s.shape for s in base.hidden_states]
    assert tiny.relative(zoo.outputs(graft.model, given), zoo.outputs(kind.fresh(), given)) > 1e-2


def test_padding_of_sound_is_not_seen():
    kind = zoo.BY_NAME["wav2vec2"]
    model = shaken(kind.fresh(), "prompt(tokens=3)").model.eval()
    given = kind.batch()
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(kwargs["attention_mask"])

    model.wav2vec2.encoder.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**given)
    mask = seen[0] if seen[0].dtype == torch.bool else seen[0] == 0
    frames = model._get_feature_vector_attention_mask(mask.shape[-1] - 3, given["attention_mask"]).bool()
    assert not frames.all()
    wanted = nn.functional.pad(frames, (0, 3), value=True)
    assert torch.equal(mask, wanted[:, None, None, :].expand_as(mask))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_a_users_own_encoder(batch_first, causal):
    """Nothing of later tokens comes to earlier ones through the virtual ones."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(W, 4, 24, dropout=0.0, batch_first=batch_first)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    states = torch.randn(3, 6, W)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    mask = nn.Transformer.generate_square_subsequent_mask(6) if causal else None
    place = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    front = torch.randn(2, W)
    longer = torch.cat([states, front.expand(3, -1, -1)], 1)
    allowed = nn.functional.pad(mask, (0, 2, 0, 2)) if causal else None
    if causal:
        allowed[6:, :6] = float("-inf")
    kwargs = {"src_key_padding_mask": padding.float().masked_fill(padding, float("-inf"))}
    with torch.no_grad():
        wanted = place(
            plain(place(longer), allowed, nn.functional.pad(kwargs["src_key_padding_mask"], (0, 2)))
        )[:, :6]
        attach(plain, "prompt(tokens=2)")
        plain.prompt_default.values.copy_(front)
        got = place(plain(place(states), mask, **kwargs))
        torch.testing.assert_close(got, wanted)
        states[:, -1] += 1
        changed = place(plain(place(states), mask, **kwargs))
    same = torch.isclose(changed[0, 0], got[0, 0], atol=1e-6).all()
    assert bool(same) == causal


# ---- the engine


@METHODS
def test_nothing_is_computed_once_behind_a_prompt(text):
    graft = attach(tiny.bare("bert"), f"{text} + head(classes=2, pooling='mean')")
    assert frozen_depth(graft) == 0


def test_virtual_tokens_take_positions():
    def room(text: str, wanted: int | None = None) -> int:
        backbone = Backbone(tiny.bare("bert"))
        attach(backbone, text)
        return Classify().max_length(wanted, backbone)

    assert room("lora(rank=2)") == 48
    assert room("prompt(tokens=8)") == room("prefix(tokens=8, shift=True)") == 40
    assert room("prompt(tokens=8) + ptuning(tokens=5, hidden=4)") == 35
    assert room("prefix(tokens=8)") == 48
    assert room("prompt(tokens=8)", 40) == 40
    with pytest.raises(UserError, match="41, but BertModel takes at most 40 tokens in addition to 8 virtual"):
        room("prompt(tokens=8)", 41)


@pytest.mark.parametrize(
    "text", ["prompt(tokens=4)", "ptuning(tokens=4)", "ptuning(tokens=4, encoder='lstm')"]
)
@pytest.mark.slow
def test_a_run_trains_them(text, ready):
    run = ready(f"{text} + head(pooling='mean')", steps=30, lr=0.02)
    losses = [step.loss for step in run.loop]  # the audit watches: each part has a gradient and moves
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


@METHODS
@pytest.mark.slow
def test_virtual_tokens_alone_learn(text):
    torch.manual_seed(0)
    model = attach(tiny.with_head("bert"), text).model.eval()
    given, labels = tiny.batch(), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(150):
        loss = model(**given, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.85 * losses[0]


# ---- what is refused


@pytest.mark.parametrize("name", ["swin", "resnet", "squeezenet"])
@METHODS
def test_models_without_a_place(name, text):
    model = zoo.BY_NAME[name].fresh()
    told = message(model, text)
    assert type(model).__name__ in told and "lora()" in told and text.partition("(")[0] in told


@METHODS
def test_more_tokens_than_positions(text):
    assert "48 positions" in message(tiny.bare("bert"), text.replace("tokens=3", "tokens=48"))
    attach(tiny.bare("bert"), text.replace("tokens=3", "tokens=47"))


def test_a_text_that_is_too_long():
    model = attach(tiny.bare("gpt2"), "prompt(tokens=8)").model
    model(input_ids=torch.ones(1, 40, dtype=torch.long))
    with pytest.raises(UserError, match=r"41 tokens and 8 virtual tokens .* 48 positions .* 40 tokens"):
        model(input_ids=torch.ones(1, 41, dtype=torch.long))
    rotary = attach(tiny.bare("llama"), "prompt(tokens=8)").model
    assert rotary(input_ids=torch.ones(1, 60, dtype=torch.long)).last_hidden_state.shape[1] == 60


def test_starts_that_cannot_be():
    bert = tiny.bare("bert")
    assert "a non-empty init_text" in message(bert, "prompt(init='text')")
    assert "a non-empty init_text" in message(bert, "prompt(init='text', init_text='  ')")
    assert "a non-empty init_text" in message(bert, "prompt(init_text='hello')")
    assert "tokenizer" in message(bert, "prompt(init='text', init_text='hello')")
    empty = Backbone(bert, lambda text, add_special_tokens: {"input_ids": []})
    assert "no tokens" in message(empty, "prompt(init='text', init_text='?')")
    for start in ("init='vocabulary'", "init='text', init_text='hello'"):
        assert "init='random'" in message(zoo.BY_NAME["vit"].fresh(), f"prompt({start})")


def test_masks_and_caches_that_do_not_fit():
    from transformers import DynamicCache

    model = attach(tiny.causal("llama"), "prompt(tokens=3)").model
    given = tiny.batch()
    with pytest.raises(UserError, match=r"attention_mask of \(rows, 7\), not \(4, 5\)"):
        model(input_ids=given["input_ids"], attention_mask=given["attention_mask"][:, :5])
    with pytest.raises(UserError, match="attention_mask"):
        model(input_ids=given["input_ids"], attention_mask=torch.ones(4, 1, 7, 7))
    cache = DynamicCache(config=model.config)
    tiny.causal("llama")(**given, past_key_values=cache)
    longer = torch.ones(4, 8, dtype=torch.long)
    model(input_ids=given["input_ids"][:, :1], attention_mask=longer, past_key_values=cache)
    with pytest.raises(UserError, match="attention_mask"):
        model.generate(**tiny.batch(side="left"), max_new_tokens=2, cache_implementation="static")
