"""Prompts, P-tuning and prefixes both ways between PEFT and graftkit, to the same outputs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import zoo
from peft_cache import for_peft
from shaken import shaken
from torch import Tensor, nn

from graftkit import UserError, attach, load

pytestmark = pytest.mark.sampled

peft = pytest.importorskip("peft")
TASKS = {"bare": "FEATURE_EXTRACTION", "head": "SEQ_CLS", "causal": "CAUSAL_LM"}
MODELS = [
    ("bert", "bare"), ("bert", "head"), ("gpt2", "bare"), ("gpt2", "head"), ("gpt2", "causal"), ("llama", "bare"),
    ("llama", "head"), ("llama", "causal"),
]  # fmt: skip
CONFIGS = {
    "prompt": (peft.PromptTuningConfig, {}),
    "mlp": (peft.PromptEncoderConfig, {"encoder_hidden_size": 5}),
    "lstm": (
        peft.PromptEncoderConfig,
        {"encoder_hidden_size": 5, "encoder_num_layers": 1, "encoder_reparameterization_type": "LSTM"},
    ),
    "prefix": (peft.PrefixTuningConfig, {}),
    "projected": (peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 5}),
}
OURS = {
    "prompt": "prompt(tokens=3)",
    "mlp": "ptuning(tokens=3, hidden=5)",
    "lstm": "ptuning(tokens=3, encoder='lstm', hidden=5, layers=1)",
    "prefix": "prefix(tokens=3, shift=True)",
    "projected": "prefix(tokens=3, hidden=5, shift=True)",
}
BOTH = pytest.mark.parametrize("kind,form", MODELS)
EACH = pytest.mark.parametrize("name", CONFIGS)


def made(kind: str, form: str, **changes: Any) -> nn.Module:
    return {"bare": tiny.bare, "head": tiny.with_head, "causal": tiny.causal}[form](kind, **changes)


def batch(kind: str, form: str) -> dict[str, Tensor]:
    """Rows with padding. On the left for a decoder's head: PEFT pools such a row on its last position, padding or not."""
    return tiny.batch(side="left" if form == "head" and kind != "bert" else "right")


def outputs(model: nn.Module, kind: str, form: str) -> Tensor:
    """All that a model gives on the positions of the text, as one vector; PEFT puts those of the prompt in front."""
    given = batch(kind, form)
    with torch.no_grad():
        output = model.eval()(**given)
    length = given["input_ids"].shape[1]
    for name, value in output.items():
        if isinstance(value, Tensor) and value.dim() == 3:
            output[name] = value[:, -length:]
    return tiny.flat(output, given["attention_mask"])


def shake(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def write_with_peft(model: nn.Module, folder: Path, name: str, task: str, **settings: Any) -> nn.Module:
    """An adapter that PEFT made on `model`, all of its trained values random, and written."""
    make, known = CONFIGS[name]
    config = make(task_type=task, num_virtual_tokens=3, **{**known, **settings})
    wrapped = peft.get_peft_model(for_peft(model), config).eval()
    shake(p for p in wrapped.parameters() if p.requires_grad)
    wrapped.save_pretrained(str(folder))
    return wrapped


def with_peft(model: nn.Module, folder: Path) -> nn.Module:
    """PEFT's reading of a folder; a warning about keys is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|not found).*")
        return peft.PeftModel.from_pretrained(for_peft(model), str(folder)).eval()


@BOTH
@EACH
def test_we_read_what_peft_writes(name, kind, form, tmp_path):
    wrapped = write_with_peft(made(kind, form), tmp_path, name, TASKS[form])
    wanted = outputs(wrapped, kind, form)
    graft = load(made(kind, form), tmp_path)
    assert tiny.relative(outputs(graft.model, kind, form), wanted) < 1e-5
    assert tiny.relative(outputs(made(kind, form), kind, form), wanted) > 1e-2
    graft.save(tmp_path / "again")
    again = load(made(kind, form), tmp_path / "again")
    assert torch.equal(outputs(again.model, kind, form), outputs(graft.model, kind, form))


@BOTH
@EACH
def test_peft_reads_what_we_write(name, kind, form, tmp_path):
    text = OURS[name] + (" + head(classes=3)" if form == "head" else "")
    graft = shaken(made(kind, form), text)
    graft.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == TASKS[form]
    wanted = outputs(graft.model, kind, form)
    assert tiny.relative(outputs(with_peft(made(kind, form), tmp_path), kind, form), wanted) < 1e-5
    assert torch.equal(outputs(load(made(kind, form), tmp_path).model, kind, form), wanted)
    (tmp_path / "graft.json").unlink()  # and here, from PEFT's files alone
    (tmp_path / "graft.safetensors").unlink(missing_ok=True)
    alone = load(made(kind, form), tmp_path)
    assert tiny.relative(outputs(alone.model, kind, form), wanted) < 1e-5


@pytest.mark.parametrize(
    "text", ["prompt(tokens=3)", "ptuning(tokens=3, hidden=5)", "prefix(tokens=3, shift=True)"]
)
@pytest.mark.parametrize("model", ["roberta", "deberta_v2", "modernbert", "qwen3", "glm", "mixtral"])
def test_other_models(text, model, tmp_path):
    """RoBERTa's positions and heads that pool in themselves; routers, tied embeddings."""
    if text.startswith("prefix") and model in ("deberta_v2", "modernbert"):
        pytest.skip("neither takes a prefix of PEFT's")
    kind = zoo.BY_NAME[model]
    given = kind.batch()
    if model == "glm":
        given = {name: value.flip(1) for name, value in given.items()}
    headed = model in ("roberta", "modernbert", "glm")
    graft = shaken(kind.fresh(), text + " + head(classes=3)" if headed else text)
    graft.save(tmp_path)
    wrapped = with_peft(kind.fresh(), tmp_path)
    wanted = zoo.outputs(graft.model, given)
    assert tiny.relative(zoo.outputs(wrapped, given), wanted) < 1e-5
    assert tiny.relative(zoo.outputs(kind.fresh(), given), wanted) > 1e-2


@pytest.mark.slow
def test_encoder_and_decoder(tmp_path):
    """Of the two halves that PEFT keeps, its prompt tuning and P-tuning use the encoder's."""
    from transformers import T5Config, T5ForConditionalGeneration

    def model() -> nn.Module:
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
        return T5ForConditionalGeneration(config).eval()

    given = {**tiny.batch(), "labels": torch.randint(3, 40, (4, 5))}
    for name in ("prompt", "mlp"):
        wrapped = write_with_peft(model(), tmp_path / name, name, "SEQ_2_SEQ_LM")
        graft = load(model(), tmp_path / name)
        with torch.no_grad():
            assert tiny.relative(graft.model(**given).logits, wrapped(**given).logits) < 1e-5
    graft = shaken(model(), "prompt(tokens=3)")
    graft.save(tmp_path / "ours")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    with torch.no_grad():
        wanted = graft.model(**given).logits
        assert tiny.relative(with_peft(model(), tmp_path / "ours")(**given).logits, wanted) < 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_generation_is_that_of_peft(kind, name, tmp_path):
    wrapped = write_with_peft(made(kind, "causal"), tmp_path, name, "CAUSAL_LM")
    graft = load(made(kind, "causal"), tmp_path)
    given = tiny.batch(rows=2, length=5)
    given = {"input_ids": given["input_ids"][:1], "attention_mask": given["attention_mask"][:1]}
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(graft.model.generate(**given, **settings), wrapped.generate(**given, **settings))


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_gradients_are_those_of_peft(name):
    make, known = CONFIGS[name]
    wrapped = peft.get_peft_model(
        for_peft(tiny.causal("llama")), make(task_type="CAUSAL_LM", num_virtual_tokens=3, **known)
    ).eval()
    theirs = next(p for p in wrapped.parameters() if p.requires_grad)
    graft = attach(tiny.causal("llama"), OURS[name]).model.eval()
    mine = [p for p in graft.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter, part in zip(mine, theirs.split([p.shape[1] for p in mine], dim=1)):
            parameter.copy_(part)
    given = tiny.batch()
    for model in (wrapped, graft):
        logits = model(**given).logits[:, -7:]
        logits[given["attention_mask"].bool()].square().sum().backward()
    torch.testing.assert_close(torch.cat([p.grad for p in mine], dim=1), theirs.grad, rtol=1e-4, atol=1e-4)


# ---- what is refused


def refused(tmp_path: Path, name: str, changes: dict, matching: str, kind: str = "bert") -> None:
    write_with_peft(tiny.bare("bert"), tmp_path, name, "FEATURE_EXTRACTION")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    model = tiny.bare(kind)
    with pytest.raises(UserError, match=matching):
        load(model, tmp_path)
    assert torch.equal(tiny.outputs(model), tiny.outputs(tiny.bare(kind)))


@pytest.mark.parametrize("name", ["prompt", "mlp", "prefix"])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_virtual_tokens": 4}, {"num_virtual_tokens": 0}, {"num_virtual_tokens": None}, {"token_dim": "16"},
        {"token_dim": 8}, {"num_transformer_submodules": 2},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.slow
def test_fields_that_do_not_fit_the_tensors(name, changes, tmp_path):
    refused(tmp_path, name, changes, next(iter(changes)))


@pytest.mark.parametrize(
    "changes", [{"num_layers": 4}, {"num_attention_heads": 0}, {"num_attention_heads": 3}], ids=str
)
def test_a_prefix_of_other_layers(changes, tmp_path):
    refused(tmp_path, "prefix", changes, next(iter(changes)))


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_fields_that_are_not_read(name, tmp_path):
    refused(tmp_path, name, {"something_new": 3}, "something_new")


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_tensors_that_are_missing(name, tmp_path):
    from safetensors.torch import load_file, save_file

    write_with_peft(tiny.bare("bert"), tmp_path, name, "FEATURE_EXTRACTION")
    path = tmp_path / "adapter_model.safetensors"
    save_file({"other": load_file(path)["prompt_embeddings"]}, path)
    with pytest.raises(UserError, match="prompt_embeddings"):
        load(tiny.bare("bert"), tmp_path)


def test_a_prefix_for_another_model(tmp_path):
    refused(tmp_path, "prefix", {}, "belongs to another model", kind="llama")


def test_a_prompt_for_another_width(tmp_path):
    from transformers import BertConfig, BertModel

    write_with_peft(tiny.bare("bert"), tmp_path, "prompt", "FEATURE_EXTRACTION")
    with pytest.raises(
        UserError, match=r"prompt_default.values' has shape \(3, 16\), but should have \(3, 32\)"
    ):
        load(BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)), tmp_path)


def test_a_prefix_at_the_texts_own_positions_stays_ours(tmp_path):
    """PEFT moves the text behind the prefix; with learned positions that is another model."""
    graft = shaken(tiny.bare("gpt2"), "prefix(tokens=3)")
    graft.save(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    moved = shaken(tiny.bare("gpt2"), "prefix(tokens=3, shift=True)")
    assert tiny.relative(tiny.outputs(graft.model), tiny.outputs(moved.model)) > 1e-2


@pytest.mark.parametrize("kind", ["Phi", "StableLm", "GPTNeoX"])
def test_keys_of_which_a_part_is_turned(kind, tmp_path):
    """Rotary positions on the first half of each head: PEFT's keys, turned back by the prefix, mean the same."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    more = {"num_key_value_heads": 2} if kind == "StableLm" else {}
    config = getattr(transformers, f"{kind}Config")(vocab_size=60, **sizes, **more)
    assert config.rope_parameters["partial_rotary_factor"] < 1

    def fresh():
        torch.manual_seed(0)
        return getattr(transformers, f"{kind}ForCausalLM")(config).eval()

    graft = shaken(fresh(), "prefix(tokens=3)")
    graft.save(tmp_path)
    given = tiny.batch()
    with torch.no_grad():
        wanted = graft.model.eval()(**given).logits
        got = with_peft(fresh(), tmp_path)(**given).logits
        base = fresh()(**given).logits
    mask = given["attention_mask"].bool()
    assert tiny.relative(got[mask], wanted[mask]) < 1e-5
    assert tiny.relative(base[mask], wanted[mask]) > 1e-2
