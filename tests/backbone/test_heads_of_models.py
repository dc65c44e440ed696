"""Heads on every kind of model: what they stand on, written out; masks; what is refused; stacked heads."""

from __future__ import annotations

import contract
import language_models
import pytest
import tiny
import torch
import zoo
from conftest import tune_words
from safetensors.torch import load_file
from shaken import message, shaken
from torch.nn import functional as F

import graftkit
from graftkit import Backbone, UserError, attach, detach

pytestmark = [pytest.mark.sampled, pytest.mark.usefixtures("few_compared")]


def zoo_head(name: str, text: str, seed: int = 3):
    """A graft on a model of the zoo whose head's values are random, and a batch."""
    model = zoo.BY_NAME[name]
    return shaken(model.fresh(), text, seed=seed), model.batch()


def frames(samples: int) -> int:
    """Frames of the zoo's Wav2Vec2 and WavLM for so many samples: kernels 10 and 3, strides 5 and 2."""
    return ((samples - 10) // 5 + 1 - 3) // 2 + 1


def expected_features(name: str) -> torch.Tensor:
    """What head(pooling='mean') stands on, written out for each kind of model."""
    model, given = zoo.BY_NAME[name].fresh().eval(), zoo.BY_NAME[name].batch()
    if name == "squeezenet":
        return model.features(given["x"]).mean((2, 3))
    if name == "resnet20":
        x = torch.relu(model.bn1(model.conv1(given["x"])))
        return model.layer3(model.layer2(model.layer1(x))).mean((2, 3))
    if name == "transformer":
        seen = []
        model.output.register_forward_hook(lambda module, args, output: seen.append(args[0]))
        model(**given)
        return seen[0]
    output = model.base_model(**given)
    if name == "convnext":
        return model.convnext.layernorm(output.last_hidden_state.mean((2, 3)))
    if name == "resnet":
        return output.last_hidden_state.mean((2, 3))
    states = output.last_hidden_state
    lengths = (
        given["attention_mask"].sum(1).tolist() if "attention_mask" in given else [states.shape[1]] * zoo.ROWS
    )
    if name in ("wav2vec2", "wavlm"):
        lengths = [frames(n) for n in lengths]
    if name == "t5":  # the decoder's states, and the batch has its input
        lengths = [states.shape[1]] * zoo.ROWS
    return torch.stack([row[:n].mean(0) for row, n in zip(states, lengths)])


@pytest.mark.parametrize("name", zoo.BY_NAME)
def test_mean_pooling_on_every_kind_of_model(name):
    graft, given = zoo_head(name, "head(classes=4, pooling='mean')")
    values = {n.removeprefix("head_default."): p for n, p in graft.parameters.items()}
    with torch.no_grad():
        wanted = F.linear(expected_features(name), values["output.weight"], values["output.bias"])
        got = graft.model(**given).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    features = expected_features(name).shape[1]
    assert sum(p.numel() for p in graft.parameters.values()) == 4 * (features + 1)


@pytest.mark.parametrize("name", zoo.BY_NAME)
def test_the_width_of_the_states_is_known(name):
    backbone = Backbone(zoo.BY_NAME[name].fresh())
    assert backbone.hidden_size == expected_features(name).shape[1]


@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        ("bert", "cls"), ("deberta_v2", "cls"), ("gpt2", "last"), ("mixtral", "last"), ("qwen3", "last"), ("t5", "last"),
        ("swin", "mean"), ("whisper", "mean"), ("vit", "own"), ("resnet", "own"), ("wav2vec2", "own"), ("squeezenet", "own"),
        ("transformer", "own"),
    ],
)  # fmt: skip
def test_what_a_head_stands_on_by_default(name, pooling):
    assert attach(zoo.BY_NAME[name].fresh(), "head(classes=3)").method.methods[0].pooling == pooling


@pytest.mark.parametrize(
    ("name", "pooling"), [("vit", "cls"), ("swin", "mean"), ("convnext", "mean"), ("resnet", "mean")]
)
def test_a_hidden_layer_means_that_the_own_head_is_passed_by(name, pooling):
    graft = attach(zoo.BY_NAME[name].fresh(), "full() + head(classes=3, hidden=5)")
    assert graft.method.methods[1].pooling == pooling
    assert not any(name.startswith("classifier") for name in graft.labels)


def test_pooling_by_kind_of_token():
    for name, pooling, place in (
        ("vit", "cls", 0),
        ("ast", "cls", 0),
        ("whisper", "last", -1),
        ("llama", "cls", 0),
    ):
        graft, given = zoo_head(name, f"head(classes=4, pooling={pooling!r})")
        values = {n.removeprefix("head_default."): p for n, p in graft.parameters.items()}
        with torch.no_grad():
            states = zoo.BY_NAME[name].fresh().eval().base_model(**given).last_hidden_state[:, place]
            wanted = F.linear(states, values["output.weight"], values["output.bias"])
            torch.testing.assert_close(graft.model(**given).logits, wanted, rtol=1e-4, atol=1e-5)


# --- masks


def test_a_mask_of_samples_is_translated_to_frames():
    """Whisper's encoder halves the frames; its own forward does not look at the mask."""
    graft, given = zoo_head("whisper", "head(classes=4, pooling='mean')")
    mask = torch.ones(zoo.ROWS, 24, dtype=torch.long)
    mask[1, 15:] = 0
    values = {n.removeprefix("head_default."): p for n, p in graft.parameters.items()}
    with torch.no_grad():
        states = zoo.BY_NAME["whisper"].fresh().eval()(**given).last_hidden_state
        pooled = torch.stack([states[0].mean(0), states[1, :8].mean(0), states[2].mean(0)])
        wanted = F.linear(pooled, values["output.weight"], values["output.bias"])
        torch.testing.assert_close(
            graft.model(**given, attention_mask=mask).logits, wanted, rtol=1e-4, atol=1e-5
        )
        mask[2, 3] = 0  # a hole: which frames are real is not known
        with pytest.raises(
            UserError,
            match=r"attention_mask has shape \[3, 24\], but WhisperEncoder returns 12 states per row",
        ):
            graft.model(**given, attention_mask=mask)


class Encoder(torch.nn.Module):
    """A user's own encoder whose states may be fewer than its input."""

    def __init__(self, shorten: int = 1):
        super().__init__()
        self.embedding = torch.nn.Embedding(9, 6)
        self.blocks = torch.nn.ModuleList(
            [torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))] * 2
        )
        self.shorten = shorten

    def forward(self, tokens, attention_mask=None, padding_mask=None):
        x = self.embedding(tokens)[:, :: self.shorten]
        for block in self.blocks:
            x = block(x)
        return x


def test_masks_of_own_modules():
    tokens, mask = torch.randint(0, 9, (2, 4)), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    graft = shaken(Encoder(), "head(classes=2, pooling='mean')")
    graft.model.eval()
    graft.model.eval()
    padded = graft.model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(padded[1], graft.model(tokens[1:, :2]).logits[0])
    torch.testing.assert_close(graft.model(tokens, mask).logits, padded)
    with pytest.raises(
        UserError, match=r"'padding_mask' of Encoder.forward means.*rename the argument to attention_mask"
    ):
        graft.model(tokens, padding_mask=mask == 0)
    short = shaken(Encoder(shorten=2), "head(classes=2, pooling='mean')")
    assert short.model(tokens).logits.shape == (2, 2)
    with pytest.raises(
        UserError, match=r"attention_mask has shape \[2, 4\], but Encoder returns 2 states per row"
    ):
        short.model(tokens, attention_mask=mask)


# --- encoder and decoder


@pytest.mark.parametrize("pooling", ["last", "mean", "attention"])
def test_t5_reads_its_text_in_the_decoder_too(pooling):
    graft, given = zoo_head("t5", f"head(classes=4, pooling={pooling!r})")
    given.pop("decoder_input_ids")
    ids, mask = given["input_ids"], given["attention_mask"]
    shifted = F.pad(ids, (1, 0))[:, :-1]
    with torch.no_grad():
        got = graft.model(**given).logits
        both = graft.model(**given, decoder_input_ids=shifted, decoder_attention_mask=mask).logits
        torch.testing.assert_close(got, both)
        for row, length in enumerate(mask.sum(1).tolist()):  # padding changes nothing
            alone = graft.model(ids[row : row + 1, :length]).logits[0]
            torch.testing.assert_close(alone, got[row], rtol=1e-4, atol=1e-5)
    graft.model(**given, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(p.grad is not None for p in graft.parameters.values())


def test_the_head_on_t5_stands_where_that_of_t5_for_classification_does():
    import transformers as hf

    config = hf.T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        eos_token_id=1,
        num_labels=4,
        decoder_start_token_id=0,
    )
    native = hf.T5ForSequenceClassification(config).eval()
    tiny.randomize(native, 0)
    ids = torch.randint(3, 40, (2, 6))
    ids[:, -1] = 1
    seen = []
    native.classification_head.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        native(ids)
        graft = attach(native.transformer, "head(classes=16)")
        graft.parameters["head_default.output.weight"].copy_(torch.eye(16))
        torch.testing.assert_close(graft.model(ids).logits, seen[0])


# --- refused


@pytest.mark.parametrize(
    ("name", "pooling", "told"),
    [
        ("resnet", "attention", "gives feature maps"), ("squeezenet", "last", "gives feature maps"),
        ("convnext", "cls", "gives feature maps"), ("transformer", "cls", "gives its head 'output' one vector a row"),
        ("swin", "cls", "puts no class token in front"), ("wav2vec2", "cls", "puts no class token in front"),
        ("bert", "own", "has no head of its own"), ("swin", "stacked", "has no head of its own"),
        ("qwen3", "own", "'lm_head' of Qwen3ForCausalLM predicts tokens"), ("qwen3", "stacked", "predicts tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(name, pooling, told):
    model = zoo.BY_NAME[name].fresh()
    text = message(model, f"head(classes=3, pooling={pooling!r})")
    assert (
        told in text
        and f"head(pooling={pooling!r})" in text
        and type(model).__name__ in text
        and "use " in text
    )


def test_a_decoder_of_sound_is_refused():
    import transformers as hf

    model = hf.WhisperModel(hf.WhisperConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, pad_token_id=0,
        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=12,
    ))  # fmt: skip
    assert "get_encoder()" in message(model, "head(classes=3)")
    assert attach(model.get_encoder(), "head(classes=3)")


def test_an_own_module_that_does_not_tell_its_width():
    class Silent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.scale

    assert "give the module an attribute hidden_size" in message(Silent(), "head(classes=2)")
    model = Silent()
    model.hidden_size = 3
    assert attach(model, "head(classes=2)").model(torch.ones(4, 3)).logits.shape == (4, 2)
    wrong = Silent()
    wrong.hidden_size = 5
    graft = attach(wrong, "head(classes=2)")
    with pytest.raises(UserError, match=r"expects 5 features per row, but Silent returned \[4, 3\]"):
        graft.model(torch.ones(4, 3))


# --- a head of convolutions, and one stacked on another


class Convolutional(torch.nn.Module):
    def __init__(self, groups: int = 1, **more):
        super().__init__()
        self.body = torch.nn.Conv2d(3, 4, 3)
        self.classifier = torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=groups, **more)

    def forward(self, x):
        return self.classifier(self.body(x)).mean((2, 3))


@pytest.mark.parametrize("more", [{}, {"bias": False}, {"padding_mode": "reflect"}])
def test_a_convolution_is_replaced_by_one_like_it(more):
    model = Convolutional(**more)
    old = model.classifier
    graft = shaken(model, "head(classes=5)")
    new = model.classifier
    assert new is not old and set(graft.labels) == {f"classifier.{n}" for n, _ in new.named_parameters()}
    for name in ("in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(new, name) == getattr(old, name), name
    assert new.out_channels == 5 and (new.bias is None) == (old.bias is None)
    x = torch.randn(2, 3, 9, 9)
    maps = model.body(x)
    if more.get("padding_mode"):
        maps = F.pad(maps, (1, 1, 1, 1), mode="reflect")
    padding = 0 if more.get("padding_mode") else 1
    wanted = F.conv2d(maps, new.weight, new.bias, stride=2, padding=padding, dilation=2).mean((2, 3))
    torch.testing.assert_close(model(x), wanted)
    detach(graft)
    assert model.classifier is old


def test_a_convolution_in_groups_is_refused():
    assert "is a convolution with 2 groups" in message(Convolutional(groups=2), "head(classes=5)")
    assert attach(Convolutional(groups=2), "head(classes=6)"), "with as many classes it stays"


@pytest.mark.parametrize("name", ["squeezenet", "resnet20", "vit", "roberta", "wav2vec2", "transformer"])
@pytest.mark.parametrize("hidden", [0, 4])
def test_a_head_stacked_on_the_own_one(name, hidden):
    graft, given = zoo_head(name, f"head(classes=2, pooling='stacked', hidden={hidden})")
    values = {n.removeprefix("head_default."): p for n, p in graft.parameters.items()}
    with torch.no_grad():
        output = zoo.BY_NAME[name].fresh().eval()(**given)
        logits = output if isinstance(output, torch.Tensor) else output.logits
        features = (
            F.gelu(F.linear(logits, values["hidden.weight"], values["hidden.bias"])) if hidden else logits
        )
        wanted = F.linear(features, values["output.weight"], values["output.bias"])
        torch.testing.assert_close(graft.model(**given).logits, wanted, rtol=1e-4, atol=1e-5)
    width = logits.shape[1]
    count = 2 * (width + 1) if not hidden else hidden * (width + 1) + 2 * (hidden + 1)
    assert sum(p.numel() for p in graft.parameters.values()) == count


@pytest.mark.parametrize("name", ["squeezenet", "roberta", "glm", "convnext"])
@pytest.mark.slow
def test_a_stacked_head_keeps_all_promises(name, tmp_path):
    assert (
        contract.check(zoo.BY_NAME[name], "head(classes=4, pooling='stacked')", tmp_path, False)
        == contract.PASSES
    )


def test_nothing_is_stacked_on_a_random_head(tiny_bert, tmp_path, rows_folder, command):
    backbone = Backbone(tiny.with_head("bert"), missing=("classifier.weight", "classifier.bias"))
    assert "contain no trained 'classifier'" in message(backbone, "head(classes=2, pooling='stacked')")
    words = tune_words(tiny_bert, rows_folder, tmp_path / "run", method="head(pooling='stacked')")
    done = command(*words)
    assert (
        done.status == 1
        and "contain no trained head (classifier.bias, classifier.weight are missing)" in done.err
    )


@pytest.mark.slow
def test_a_run_with_a_stacked_head_is_exported(tiny_bert, tmp_path, rows_folder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=4)
    tiny.randomize(model, 3)
    model.save_pretrained(tmp_path / "four")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "four")
    run = graftkit.tune(
        model=str(tmp_path / "four"), method="lora(rank=2) + head(pooling='stacked')", out=tmp_path / "run",
        train=rows_folder / "train.csv", settings={"train.steps": 3, "train.precision": "fp32"},
    )  # fmt: skip
    done = run.export(tmp_path / "plain")
    assert done["largest_difference"] < 1e-4 and done["same_answers"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("four", "plain"))
    assert torch.equal(before["classifier.weight"], after["classifier.weight"]), "the old head stays"


def test_an_own_head_that_is_never_called_is_no_place_to_stand_on():
    class Idle(Encoder):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Linear(6, 3)

    graft = attach(Idle(), "head(classes=2, pooling='mean')")
    with pytest.raises(UserError, match="'unused' of Idle, which was not called"):
        graft.model(torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.slow
def test_the_end_token_that_an_encoder_and_decoder_s_own_head_reads(tmp_path, rows_folder, command):
    language_models.folder(tmp_path / "bare", "t5")
    language_models.folder(tmp_path / "ends", "t5", post="$A </s>")
    for name, method, fine in (
        ("bare", "head()", False),
        ("bare", "head(pooling='mean')", True),
        ("ends", "head()", True),
    ):
        words = [
            "--model",
            tmp_path / name,
            "--train",
            rows_folder / "train.csv",
            "--out",
            tmp_path / f"{name}{fine}",
        ]
        done = command("tune", *words, "data.eval=null", "--method", method, "train.steps=1")
        assert (done.status == 0) == fine, done.err
        if not fine:
            assert "puts no end token after a text" in done.err and "pooling='mean'" in done.err
