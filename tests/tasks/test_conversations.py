"""Conversations in other people's forms: ShareGPT, calls of tools, a row for each answer; special tokens once."""

from __future__ import annotations

import json

import numpy as np
import pytest
from language_models import folder, model, tokenizer
from test_generate_rows import backbone, dataset, examples, learned

import graftkit
from graftkit.backbone import Backbone
from graftkit.data.chat import TEMPLATES
from graftkit.data.encode import encode_texts
from graftkit.errors import UserError
from graftkit.runs.check import check
from graftkit.tasks.generate.task import Generate

QWEN3 = (  # thinks in the last answer only
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}"
    "{%- endif %}{%- endfor %}{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{{- m.content + '<|im_end|>\n' }}{%- else %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
CALLS = (  # a call has no content
    "{% for m in messages %}{% if m.role == 'assistant' and not m.content %}{{ '[CALL]' }}{% for c in m.tool_calls %}"
    "{{ c.function.name + (c.function.arguments | tojson) }}{% endfor %}{{ eos_token }}{% elif m.role == 'assistant' %}"
    "{{ m.content + eos_token }}{% else %}{{ '[' + m.role + ']' + m.content }}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
CALL = {"type": "function", "function": {"name": "warm", "arguments": {"place": "here"}}}
TOOLS = [{"type": "function", "function": {"name": "warm", "description": "degrees of a place"}}]


def asked(call=CALL, **more) -> dict:
    return {"messages": [
        {"role": "user", "content": "how warm is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "21"},
        {"role": "assistant", "content": "21 degrees"},
    ], **more}  # fmt: skip


def stretches(task: Generate, template: str | None, rows: list[dict]) -> list[list[str]]:
    """What is learned of each row."""
    base = backbone(template=template)
    made = dataset(task, base, rows, max_length=400)
    return [learned(base.processor, ids, mask) for ids, mask in zip(made.ids, made.learned)]


# --- ShareGPT


def test_sharegpt_is_read_as_roles_and_contents():
    names = [
        ("system", "system"),
        ("human", "user"),
        ("gpt", "assistant"),
        ("function", "tool"),
        ("gpt", "assistant"),
    ]
    theirs = [{"from": name, "value": f"text {i}", "weight": None} for i, (name, _) in enumerate(names)]
    ours = [{"role": role, "content": f"text {i}"} for i, (_, role) in enumerate(names)]
    found = examples(Generate(), [{"conversations": theirs}, {"conversations": json.dumps(theirs)}])
    wanted = examples(Generate(), [{"conversations": ours}, {"conversations": ours}])
    assert found.values["messages"] == wanted.values["messages"] and found.targets == wanted.targets


@pytest.mark.parametrize(("message", "told"), [
    ({"from": "gtp", "value": "x"}, r"unknown role 'gtp' in message 2 \(roles: .*human, gpt.*Did you mean 'gpt'"),
    ({"from": "gpt"}, r"no role and content \(or from and value\) in message 2"),
    ({"from": "gpt", "value": ""}, r"message 2 \('assistant'\) is empty"),
    ({"role": "assistant", "content": "x", "tool_calls": 10**40}, "tool_calls in message 2 that are a int, not a list"),
    ({"role": "assistant", "content": "x", "tool_calls": True}, "tool_calls in message 2 that are a bool, not a list"),
])  # fmt: skip
def test_what_is_wrong_with_sharegpt(message, told):
    with pytest.raises(UserError, match=told):
        examples(Generate(), [{"conversations": [{"from": "human", "value": "hi"}, message]}])


# --- calls of tools


@pytest.mark.parametrize(("template", "call"), [
    (CALLS, '[CALL]warm{"place": "here"}</s>'),
    (TEMPLATES["chatml"], '<tool_call>\n{"name": "warm", "arguments": {"place": "here"}}\n</tool_call><|im_end|>'),
])  # fmt: skip
def test_calls_are_written_by_the_template_and_learned(template, call):
    ends = call[-4:] if template == CALLS else "<|im_end|>"
    as_text = {
        "function": {"name": "warm", "arguments": '{"place": "here"}'}
    }  # as OpenAI's API has arguments
    wide = {
        "id": None,
        "function": {"name": "warm", "arguments": {"place": "here", "unit": None}},
    }  # as Parquet has it
    for form in (CALL, as_text, wide, CALL["function"]):
        assert stretches(Generate(), template, [asked(form)]) == [[call, f"21 degrees{ends}"]]


def test_a_call_can_be_the_last_word():
    row = {"messages": asked()["messages"][:2]}
    assert stretches(Generate(), CALLS, [row]) == [['[CALL]warm{"place": "here"}</s>']]
    assert examples(Generate(), [row]).targets == ['{"name": "warm", "arguments": {"place": "here"}}']


def test_tools_are_given_to_the_template():
    base = backbone(template=TEMPLATES["chatml"])
    for given in (TOOLS, json.dumps(TOOLS)):
        made = dataset(Generate(), base, [asked(tools=given), asked(tools=None)], max_length=400)
        texts = [base.processor.decode(ids) for ids in made.ids]
        assert '{"type": "function", "function": {"name": "warm", "description": "degrees' in texts[0]
        assert texts[1] in texts[0] and "degrees of" not in texts[1]
        native = base.processor.apply_chat_template(
            asked()["messages"], tools=TOOLS, tokenize=False, add_generation_prompt=False
        )
        assert texts[0] == native


@pytest.mark.parametrize(("row", "told"), [
    (asked(), r"row 1: the chat template .* does not write the call of 'warm' in message 2; .*template='chatml'"),
    ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}], "tools": TOOLS},
     "does not write the tools of the row"),
])  # fmt: skip
def test_a_template_that_leaves_calls_or_tools_out_is_refused(row, told):
    with pytest.raises(UserError, match=told):
        dataset(Generate(), backbone(template=PLAIN), [row])


@pytest.mark.parametrize(("row", "told"), [
    (asked({"function": {"arguments": {}}}), "tool call 1 in message 2 that is not"),
    (asked("warm"), "tool call 1 in message 2 that is not"),
    (asked({"name": "warm", "arguments": "{here"}), r"\(warm\) whose arguments are not valid JSON: '{here'"),
    (asked({"name": "warm", "arguments": [1]}), r"\(warm\) whose arguments are a list, not a mapping"),
    (asked(tools=[{"type": "function"}]), "column 'tools' has no name in tool 1"),
    (asked(tools=3), "column 'tools' is a int, not a list of tools"),
])  # fmt: skip
def test_what_is_wrong_with_calls_and_tools(row, told):
    with pytest.raises(UserError, match=told):
        examples(Generate(), [row])


# --- a row for each answer


def turns(count: int, number: int = 0) -> dict:
    return {"messages": [
        {"role": role, "content": f"{role} {number} {turn}"} for turn in range(count) for role in ("user", "assistant")
    ]}  # fmt: skip


def test_each_answer_is_a_row_of_its_own():
    with pytest.raises(UserError, match=r"row 1: .* otherwise once later ones .*generate\(turns='each'\)"):
        dataset(Generate(), backbone(template=QWEN3), [turns(2)])
    task, rows = Generate(turns="each"), [turns(2, 1), turns(1, 2), turns(3, 3)]
    thinks = "<think>\n\n</think>\n\n"
    assert stretches(task, QWEN3, rows) == [
        [f"{thinks}assistant {number} {turn}<|im_end|>"] for number, turn in ((1, 0), (1, 1), (2, 0), (3, 0), (3, 1), (3, 2))
    ]  # fmt: skip
    base = backbone(template=QWEN3)
    made = dataset(task, base, rows, max_length=400)
    for row, ids in enumerate(made.ids):  # each is what the template writes of the conversation up to there
        number, turn = ((1, 0), (1, 1), (2, 0), (3, 0), (3, 1), (3, 2))[row]
        talk = turns(turn + 1, number)["messages"]
        assert ids.tolist() == base.processor.apply_chat_template(talk)["input_ids"]
        assert made.where(row) == f"train (in memory), row {(1, 1, 2, 3, 3, 3)[row]}"


def test_turns_of_one_conversation_are_never_on_both_sides():
    task = Generate(turns="each")
    found = examples(task, [turns(3, number) for number in range(20)])
    kept, held = task.hold_out(found, 0.2, 0)
    numbers = [{found.table.numbers[row] for row in part} for part in (kept, held)]
    assert len(numbers[1]) == 4 and not numbers[0] & numbers[1] and len(kept) + len(held) == 60


def test_turns_each_in_a_run(tmp_path):
    made = folder(tmp_path / "model", "llama", QWEN3)
    rows = [turns(2, number) for number in range(10)]
    run = graftkit.tune(
        model=made, task="generate(turns='each', max_new_tokens=3)", train=rows, eval=0.2, out=tmp_path / "run",
        settings={"train.steps": 2, "train.precision": "fp32"},
    )  # fmt: skip
    assert run.metrics["rows"] == 4 and run.evaluate(rows)["rows"] == 20
    assert len(run.predict([turns(2)["messages"][:3]])) == 1


# --- special tokens once


def decoded(task: Generate, base: Backbone, rows: list[dict]) -> list[str]:
    return [base.processor.decode(ids) for ids in dataset(task, base, rows).ids]


def test_a_begin_or_end_token_that_is_there_already_comes_once():
    for post in ("<s> $A", "<s> $A </s>"):
        base = Backbone(model("llama"), tokenizer(post=post))
        texts = [
            {"text": "hello there"},
            {"text": "<s>hello there"},
            {"text": "<s>hello there</s>"},
            {"text": "hello there</s>"},
        ]
        assert set(decoded(Generate(), base, texts)) == {"<s>hello there</s>"}
        pairs = [
            {"prompt": "hello", "completion": end}
            for end in ("there", "there</s>", "there</s></s>", "there</s>\n")
        ]
        assert set(decoded(Generate(), base, pairs)) == {"<s>hello\nthere</s>"}
        pairs = [{"prompt": "<s>hello", "completion": "there"}]
        assert decoded(Generate(), base, pairs) == ["<s>hello\nthere</s>"]


def test_what_is_learned_does_not_move_when_a_token_is_dropped():
    base = Backbone(model("llama"), tokenizer(post="<s> $A"))
    made = dataset(Generate(), base, [{"prompt": "<s>hello", "completion": "there"}])
    assert learned(base.processor, made.ids[0], made.learned[0]) == ["there</s>"]


@pytest.mark.parametrize("template", ["{{ bos_token }}" + PLAIN, PLAIN])
def test_chat_templates_and_begin_tokens(template):
    """Whatever writes it, the template or nobody, the tokenizer adds none to it."""
    base = Backbone(model("llama"), tokenizer(template, post="<s> $A </s>"))
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo<|im_end|>"}]
    (text,) = decoded(Generate(), base, [{"messages": talk}])
    begin = "<s>" if "bos_token" in template else ""
    assert text == f"{begin}<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"


def test_an_answer_that_is_nothing_but_an_end_stays():
    base = Backbone(model("llama"), tokenizer())
    assert decoded(Generate(), base, [{"prompt": "hello", "completion": "</s>"}]) == ["hello\n</s></s>"]


def test_an_encoder_and_a_decoder():
    base = Backbone(model("t5"), tokenizer(post="$A </s>"))
    rows = [{"prompt": "hello", "completion": "there"}, {"prompt": "hello</s>", "completion": "there</s>"}]
    made = dataset(Generate(), base, rows)
    assert made.ids[0].tolist() == made.ids[1].tolist()
    assert made.prompts[0].tolist() == made.prompts[1].tolist()


def test_special_tokens_typed_in_texts_to_classify(tiny_bert):
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(tiny_bert)
    typed = ["the cat", "[CLS] the cat [SEP]", "[CLS]the cat", "the cat [SEP]"]
    ids = encode_texts(tok, typed, None, 32).features["input_ids"]
    assert all(np.array_equal(row, ids[0]) for row in ids)
    pairs = encode_texts(tok, typed, ["a dog", "a dog [SEP]", "[CLS] a dog", "a dog"], 32).features[
        "input_ids"
    ]
    assert all(np.array_equal(row, tok("the cat", "a dog")["input_ids"]) for row in pairs)
    inside = encode_texts(tok, ["the [SEP] cat", "[SEP]"], None, 32).features["input_ids"]
    assert inside[0].tolist() == tok("the [SEP] cat")["input_ids"] and len(inside[1]) == 3


def test_check_reads_them_all(tmp_path):
    made = folder(tmp_path / "model", "llama", TEMPLATES["chatml"], max_position_embeddings=512)
    assert check(model=str(made), task="generate", train=[asked(tools=TOOLS) for _ in range(10)]).ok
