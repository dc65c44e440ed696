"""Rows of language models: templates and masks, packing, losses where there are labels, bad rows."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from language_models import EOS, model, rows, tokenizer

from graftkit.backbone import Backbone
from graftkit.data.chat import TEMPLATES, Template, TemplateFails, tokens_of
from graftkit.data.columns import find_columns
from graftkit.data.packing import leaks, pack, positions
from graftkit.data.read import read_table
from graftkit.errors import UserError
from graftkit.grafts.attach import attach
from graftkit.methods.base import read as read_method
from graftkit.tasks.generate.data import conversation
from graftkit.tasks.generate.task import Generate
from graftkit.tasks.shared.scores import scores_of, token_scores

pytestmark = pytest.mark.sampled

TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "what colour is snow?"},
    {"role": "assistant", "content": "white"},
    {"role": "user", "content": "and coal?"},
    {"role": "assistant", "content": "black"},
]
LLAMA3 = (  # begins with a token of its own, ends turns with another, and trims
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim "
    "+ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
INST = (  # Llama 2 and Mistral: no generation prompt, and the end token behind an answer
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
BARE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"  # fmt: skip
THINKS = (  # in the manner of Qwen3: what was thought in earlier turns is left out
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' and not "
    "loop.last %}{{ message['content'].split('</think>')[-1] }}{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (  # marks what the assistant says itself, as templates for training do
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def backbone(kind: str = "llama", template: str | None = None, **more) -> Backbone:
    return Backbone(model(kind, **more), tokenizer(template))


def examples(task: Generate, table, skip_bad: bool = False, targets: bool = True):
    read = read_table(table, name="train")
    columns = task.used(find_columns(read, task.columns, {}), {}, read)
    return task.examples(read, columns, (), skip_bad, targets)


def dataset(
    task: Generate, base: Backbone, table, max_length: int = 90, training: bool = True, skip_bad: bool = False
):
    return task.dataset(examples(task, table, skip_bad), base, max_length, training)


def learned(tok, ids, mask) -> list[str]:
    """The stretches that are learned."""
    cuts = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    return [tok.decode(ids[a:b]) for a, b in pairwise(cuts) if mask[a]]


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (LLAMA3, ["white<|im_end|>", "black<|im_end|>"]),
        (INST, [" white</s>", " black</s>"]),
        (BARE, [" white\n", " black</s>"]),  # no turn is ended, so the end token is added
        (TEMPLATES["chatml"], ["white<|im_end|>", "black<|im_end|>"]),
        (TEMPLATES["alpaca"], ["white</s>", "black</s>"]),
        (TEMPLATES["plain"], ["white</s>", "black</s>"]),
    ],
)
def test_what_is_learned_of_a_conversation(template, answers):
    tok = tokenizer(template)
    marked = Template(tok, None, "here").mark(TALK, False)
    ((ids, mask),) = tokens_of(tok, [marked])
    assert learned(tok, ids, mask) == answers
    native = tok.apply_chat_template(TALK, tokenize=True)["input_ids"]
    assert ids.tolist() == (native if template != BARE else [*native[:-1], EOS])
    if (
        template != BARE
    ):  # after whose prompt it depends on the answer whether the space is of its first token
        ((prompt, _),) = tokens_of(tok, [Template(tok, None, "here").prompt(TALK[:-1])])
        assert ids[: len(prompt)].tolist() == prompt.tolist()
        assert mask[len(prompt) :][0] and not mask[len(prompt) - 1]
        assert prompt.tolist() == tok.apply_chat_template(TALK[:-1], add_generation_prompt=True)["input_ids"]


def test_masks_are_those_of_a_template_that_marks_them_itself():
    tok = tokenizer(MARKED)
    ((ids, mask),) = tokens_of(tok, [Template(tok, None, "here").mark(TALK, False)])
    native = tok.apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)
    assert ids.tolist() == native["input_ids"]
    assert mask.astype(int).tolist() == native["assistant_masks"]


def test_everything_but_the_first_token_is_learned_with_loss_all():
    tok = tokenizer(LLAMA3)
    ((_, mask),) = tokens_of(tok, [Template(tok, None, "here").mark(TALK, True)])
    assert mask[1:].all() and not mask[0]


def test_a_template_that_rewrites_earlier_turns_is_refused_for_several_answers_only():
    tok = tokenizer(THINKS)
    template = Template(tok, None, "here")
    talk = [dict(message) for message in TALK]
    talk[2]["content"] = "<think>hm</think>white"
    with pytest.raises(TemplateFails, match=r"writes the turns before message .* otherwise"):
        template.mark(talk, False)
    ((ids, mask),) = tokens_of(tok, [template.mark(talk[:3], False)])
    assert learned(tok, ids, mask) == ["<think>hm</think>white<|im_end|>"]


def test_what_the_tokenizer_puts_around_texts():
    """A start token stays in front; an end token is learned once, behind the completion and not behind a prompt."""
    tok = tokenizer(post="<s> $A </s>")
    base = Backbone(model("llama"), tok)
    data = dataset(Generate(), base, rows(2))
    assert tok.decode(data.ids[0]) == "<s>what colour is grass?\ngreen</s>"
    assert learned(tok, data.ids[0], data.learned[0]) == ["green</s>"]
    asked = Generate().dataset(examples(Generate(), rows(2), targets=False), base, 90)
    assert tok.decode(asked.prompts[0]) == "<s>what colour is grass?\n"
    texts = dataset(Generate(), base, [{"text": "snow is white"}])
    assert learned(tok, texts.ids[0], texts.learned[0]) == ["snow is white</s>"]


def test_instructions_with_input():
    table = [
        {"instruction": "Name it.", "input": "green stuff", "output": "grass"},
        {"instruction": "Be.", "input": "", "output": "I am"},
    ]
    found = examples(Generate(), table)
    assert conversation(found, 0)[0]["content"] == "Name it.\n\ngreen stuff"
    tok = tokenizer()
    texts = [Template(tok, "alpaca", "here").write(conversation(found, row), False) for row in (0, 1)]
    assert texts[0] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
        "that appropriately completes the request.\n\n### Instruction:\nName it.\n\n### Input:\ngreen stuff\n\n### Response:\n"
        "grass</s>"
    )
    assert texts[1] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nBe.\n\n### Response:\nI am</s>"
    )


def test_chatml_ends_turns_with_the_end_token_where_there_is_no_other():
    tok = tokenizer()
    assert Template(tok, "chatml", "here").end() == "<|im_end|>"
    tok = transformers_tokenizer_without_chatml()
    assert Template(tok, "chatml", "here").end() == "</s>"


def transformers_tokenizer_without_chatml():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "snow": 2}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize(
    ("names", "used"),
    [
        (("question", "answer"), {"prompt": "question", "completion": "answer"}),
        (("input", "output"), {"prompt": "input", "completion": "output"}),
        (("instruction", "input", "output", "text"), {"prompt": "instruction", "input": "input", "completion": "output"}),
        (("conversations",), {"messages": "conversations"}),
        (("id", "text"), {"text": "text"}),
    ],
)  # fmt: skip
def test_columns_of_each_form(names, used):
    table = read_table([{name: "x" for name in names}])
    assert Generate().used(find_columns(table, Generate.columns, {}), {}, table) == used


def test_columns_that_are_named_are_taken():
    table = read_table([{"prompt": "x", "completion": "y", "text": "z"}])
    named = {"text": "text"}
    assert Generate().used(find_columns(table, Generate.columns, named), named, table) == {"text": "text"}
    with pytest.raises(UserError, match="needs 'prompt' and 'completion', or 'messages', or 'text'"):
        other = read_table([{"a": "x", "b": "y"}])
        Generate().used(find_columns(other, Generate.columns, {}), {}, other)


# packing


def test_pack_fills_rows_and_leaves_none_out():
    lengths = np.random.default_rng(0).integers(1, 60, 200).tolist()
    packed = pack(lengths, 64)
    assert sorted(row for group in packed for row in group) == list(range(200))
    sums = [sum(lengths[row] for row in group) for group in packed]
    assert max(sums) <= 64 and len(packed) <= 1.1 * sum(lengths) / 64 + 1
    assert positions([3, 2]).tolist() == [0, 1, 2, 0, 1]


def losses_and_gradients(task: Generate, base: Backbone, table, **more):
    """Scores of each learned token by (id, score), summed loss and gradients, of all rows in one batch."""
    data = dataset(task, base, table, **more)
    batch = data.batch(np.arange(len(data)))
    base.model.zero_grad()
    found = data.call(base.model, batch)
    total = task.learner(data, (), 0.0)(lambda _: found, batch)["loss"].losses.sum()
    total.backward()
    gradients = {name: p.grad.clone() for name, p in base.model.named_parameters() if p.grad is not None}
    scores = sorted(zip(batch.targets.tolist(), found.detach()[:, 0].tolist()))
    return data, torch.tensor([score for _, score in scores]), total.detach(), gradients


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mistral"])
@pytest.mark.parametrize("method", [None, "lora()", "prefix(tokens=3)"])
def test_packed_rows_are_as_if_alone(kind, method):
    base = backbone(kind, TEMPLATES["chatml"])
    if method:
        if (kind, method) == ("gemma2", "prefix(tokens=3)"):
            pytest.skip("prefix cannot be added to attention with capped scores")
        attach(base, read_method(method))
        with torch.no_grad():
            for name, parameter in base.model.named_parameters():
                if "_default" in name:
                    parameter.normal_(std=0.3)
    table = rows(15)
    alone, scores, loss, gradients = losses_and_gradients(Generate(), base, table)
    packed, scores2, loss2, gradients2 = losses_and_gradients(Generate(packing=True), base, table)
    assert len(alone) == 15 and len(packed) < 10 and sum(packed.units) == sum(alone.units)
    assert torch.allclose(scores, scores2, atol=1e-5 * float(scores.abs().max()))
    assert torch.allclose(loss, loss2, rtol=1e-5)
    assert gradients.keys() == gradients2.keys() and gradients
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, gradients2[name], atol=1e-5 * float(gradient.abs().max()) + 1e-9), (
            name
        )


def test_logits_of_packed_rows():
    """All logits, compared with each row in a model of its own."""
    made = model("llama").requires_grad_(False)
    parts = [torch.randint(6, 300, (n,)) for n in (5, 9, 3)]
    ids = torch.cat(parts)[None]
    numbers = torch.from_numpy(positions([5, 9, 3]))[None]
    packed = made(input_ids=ids, position_ids=numbers, use_cache=False).logits[0]
    alone = torch.cat([made(input_ids=part[None]).logits[0] for part in parts])
    assert torch.allclose(packed, alone, atol=1e-5 * float(alone.abs().max()))


def test_models_that_cannot_be_packed_are_refused_with_the_reason():
    table = rows(6)
    for kind in ("mamba", "bloom"):
        with pytest.raises(
            UserError, match=r"ForCausalLM\) cannot be packed: its logits for packed and separate rows differ"
        ):
            dataset(Generate(packing=True), backbone(kind), table)
    assert dataset(Generate(packing=True), backbone("opt"), table).packed, (
        "its own mask would not keep rows apart"
    )
    with pytest.raises(UserError, match="encoder and a decoder, and packing does not support such models"):
        dataset(Generate(packing=True), backbone("t5"), table)
    base = backbone("llama")
    attach(base, read_method("prompt(tokens=3)"))
    with pytest.raises(UserError, match="virtual tokens are added once per packed row"):
        dataset(Generate(packing=True), base, table)
    assert leaks(model("gpt2"), [np.arange(6, 12), np.arange(9, 20)]) is None


def test_evaluation_rows_are_not_packed():
    data = dataset(Generate(packing=True), backbone(), rows(6), training=False)
    assert len(data) == 6 and not data.packed


# the loss


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "t5", "bart"])
@pytest.mark.parametrize("chunk", [1 << 24, 700, 1])
def test_scores_equal_those_of_all_logits(kind, chunk):
    """In one and in parts; Gemma 2 caps its logits, whose mean has a gradient only where the output layer is called."""
    base = backbone(kind)
    task = Generate()
    data = dataset(task, base, rows(5))
    batch = data.batch(np.arange(5))
    where, places = data.places(batch.rows)
    mean = kind != "gemma2" or chunk == 1
    found = token_scores(base.model, batch.inputs, where, places, batch.targets, chunk, mean)
    found[:, 0].sum().backward()
    gradients = {name: p.grad.clone() for name, p in base.model.named_parameters()}
    base.model.zero_grad()
    logits = base.model(**batch.inputs).logits[where, places]
    expected = logits.log_softmax(-1)
    labels = expected[torch.arange(len(places)), batch.targets]
    labels.sum().backward()
    assert torch.allclose(found[:, 0], labels, atol=1e-5)
    assert not mean or torch.allclose(found[:, 2], expected.mean(-1), atol=1e-5)
    assert ((found[:, 0] >= found[:, 1]) == (expected.argmax(-1) == batch.targets)).all()
    for name, parameter in base.model.named_parameters():
        scale = float(parameter.grad.abs().max())
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-5 * scale + 1e-7), name


@pytest.mark.parametrize("kind", ["llama", "t5", "bart"])
def test_loss_is_that_of_transformers(kind):
    base = backbone(kind)
    task = Generate()
    data = dataset(task, base, rows(7))
    batch = data.batch(np.arange(7))
    losses = task.learner(data, (), 0.0)(lambda _: data.call(base.model, batch), batch)["loss"].losses
    for row in range(7):
        inputs = {name: tensor[row : row + 1] for name, tensor in batch.inputs.items()}
        labels = torch.full((1, max(map(len, data.ids))), -100)
        labels[0, : len(data.ids[row])] = torch.from_numpy(np.where(data.learned[row], data.ids[row], -100))
        inputs.pop("decoder_input_ids", None)  # made of the labels
        expected = base.model(**inputs, labels=labels).loss * data.units[row]
        assert losses[row].item() == pytest.approx(expected.item(), rel=1e-4)
    assert data.units.sum() == len(batch.targets)


def test_label_smoothing_is_that_of_torch():
    logits, targets = torch.randn(6, 9), torch.tensor([0, 4, 8, 1, 1, 2])
    scores = scores_of(logits, targets, mean=True)
    expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.2, reduction="none")
    assert torch.allclose(-0.8 * scores[:, 0] - 0.2 * scores[:, 2], expected, atol=1e-6)


def test_logits_are_computed_for_labels_alone_and_in_parts():
    base = backbone("llama")
    data = dataset(Generate(), base, rows(20))
    batch = data.batch(np.arange(20))
    sizes = []
    base.model.lm_head.register_forward_hook(lambda m, a, output: sizes.append(output.numel()))
    data.call(base.model, batch)
    assert sizes == [2 * 300, len(batch.targets) * 300], "two rows show what becomes of logits"
    where, places = data.places(batch.rows)
    token_scores(base.model, batch.inputs, where, places, batch.targets, 3000)
    assert max(sizes[2:]) <= 3000 and sum(sizes[2:]) == (1 + len(batch.targets)) * 300


@pytest.mark.parametrize("kind", ["llama", "gemma2", "t5", "bart"])
def test_how_logits_are_computed_is_found_out_once(kind, monkeypatch):
    """From the second batch on there is one pass, and nothing waits for a number of the device."""
    base = backbone(kind)
    data = dataset(Generate(), base, rows(6))
    batch = data.batch(np.arange(6))
    where, places = data.places(batch.rows)
    passes, waits = [], []
    base.model.register_forward_pre_hook(lambda model, args: passes.append(model))

    def score():
        return token_scores(base.model, batch.inputs, where, places, batch.targets, 700)

    first = score()
    passes.clear()
    for name in ("__bool__", "item", "tolist", "__float__"):
        plain = getattr(torch.Tensor, name)

        def counted(tensor, name=name, plain=plain):
            if "graftkit" in sys._getframe(1).f_code.co_filename:  # and not transformers
                waits.append(name)
            return plain(tensor)

        monkeypatch.setattr(torch.Tensor, name, counted)
    plain_equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda *pair: waits.append("equal") or plain_equal(*pair))
    assert plain_equal(score(), first)
    assert len(passes) == 1 and not waits


@pytest.mark.parametrize("small", [1e-3, 0.0])
def test_capped_logits_are_told_though_they_are_small_at_first(small):
    """A cap does nothing to small logits; what is found out in the first batch holds for later ones."""
    base = backbone("gemma2")
    head = base.model.get_output_embeddings()
    whole = head.weight.detach().clone()
    data = dataset(Generate(), base, rows(6))
    batch = data.batch(np.arange(6))
    where, places = data.places(batch.rows)
    head.weight.data = whole * small
    token_scores(base.model, batch.inputs, where, places, batch.targets, 700)
    head.weight.data = whole * 20
    found = token_scores(base.model, batch.inputs, where, places, batch.targets, 700)
    logs = base.model(**batch.inputs).logits[where, places].log_softmax(-1)
    assert torch.allclose(found[:, 0], logs[torch.arange(len(places)), batch.targets], atol=1e-5)
