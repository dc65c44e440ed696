"""Rows and templates that nothing can be learned from, each with one clear error."""

from __future__ import annotations

import json

import pytest
from language_models import model, rows, tokenizer
from test_generate_rows import TALK, backbone, dataset, examples

from graftkit.backbone import Backbone
from graftkit.errors import UserError
from graftkit.tasks.generate.data import conversation
from graftkit.tasks.generate.task import Generate


def talk(*roles: str, content: str = "x") -> dict:
    return {"messages": [{"role": role, "content": content} for role in roles]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "a", "completion": ""},
            r"row 2: column 'completion' is empty, so there is nothing to learn",
        ),
        ({"prompt": "", "completion": "b"}, r"row 2: column 'prompt' is empty"),
        ({"prompt": ["a"], "completion": "b"}, r"row 2: column 'prompt' is a list, not a text"),
    ],
)
def test_bad_pairs(row, said):
    with pytest.raises(UserError, match=said):
        examples(Generate(), [rows(1)[0], row])
    assert len(examples(Generate(), [rows(1)[0], row], skip_bad=True)) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (talk("user", "user"), r"roles that do not alternate: message 2 \('user'\) follows 'user'; expected assistant"),
        (talk("assistant"), r"roles that do not alternate: message 1 \('assistant'\) comes first; expected system or user"),
        (talk("user", "assistant", "assistant"), r"message 3 \('assistant'\) follows 'assistant'"),
        (talk("user", "system", "assistant"), "a system message at position 2; it must come first"),
        (talk("user", "asistant"), "unknown role 'asistant' in message 2 .*Did you mean 'assistant'"),
        (talk("user", "assistant", "user"), "ends with a message of 'user', not of the assistant"),
        (talk("user"), "ends with a message of 'user', not of the assistant"),
        (talk("user", "assistant", content=" "), r"message 1 \('user'\) is empty"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]}, r"invalid content: message 2 \('assistant'\) is empty"),
        ({"messages": [{"role": "user"}]}, "has no role and content .* in message 1"),
        ({"messages": []}, "is empty"),
        ({"messages": None}, "is empty"),
        ({"messages": 3}, "is a int, not a list of messages"),
        ({"messages": "hello"}, "is a text, not a list of messages"),
    ],
)  # fmt: skip
def test_bad_messages(row, said):
    good = talk("system", "user", "assistant", "tool", "assistant")
    with pytest.raises(UserError, match=f"row 2: column 'messages' .*{said}"):
        examples(Generate(), [good, row])
    found = examples(Generate(), [good, row], skip_bad=True)
    assert len(found) == 1 and len(found.skipped) == 1


def test_messages_as_json_in_a_table_of_texts():
    found = examples(Generate(), [{"messages": json.dumps(TALK)}])
    assert conversation(found, 0) == TALK


def test_a_row_without_a_label_is_named_or_left_out():
    base = backbone()
    table = [*rows(2), {"prompt": "what colour is snow? " * 8, "completion": "white"}]
    said = r"row 3: nothing is left to learn of it: its completion begins after token \d+, and rows are truncated to 40"
    with pytest.raises(UserError, match=said):
        dataset(Generate(), base, table, 40)
    found = dataset(Generate(), base, table, 40, skip_bad=True)
    assert len(found) == 2 and len(found.examples.skipped) == 1 and (found.units > 0).all()
    with pytest.raises(UserError, match="no good rows"):
        dataset(Generate(), base, table[2:], 40, skip_bad=True)
    with pytest.raises(UserError, match="has no token to learn"):
        tok = tokenizer()
        tok.eos_token = None
        dataset(Generate(), Backbone(model("llama"), tok), [{"text": "?"}])


def test_templates_that_fail():
    raising = "{{ raise_exception('Only user and assistant roles are supported!') }}"
    for template, said in (
        (raising, "Only user and assistant"),
        ("{{ nothing.at.all }}", "fails"),
    ):
        with pytest.raises(
            UserError,
            match=rf"train \(in memory\), row 1: the chat template \(.*\) fails: .*{said if said != 'fails' else ''}",
        ):
            dataset(Generate(), backbone(template=template), rows(2))
        with pytest.raises(UserError, match=r"the recipe's own.* fails"):
            dataset(Generate(template=template), backbone(), rows(2))
    with pytest.raises(
        UserError, match=r"^the chat template \(the recipe's own\) is not valid Jinja: Expected an .*[^.]\.$"
    ):
        dataset(Generate(template="{% for x in %}"), backbone(), rows(2))
    with pytest.raises(UserError, match="rows of messages need a chat template"):
        dataset(Generate(), backbone(), [{"messages": TALK}])
    with pytest.raises(UserError, match=r"template 'chatlm' is neither a name .* Did you mean 'chatml'"):
        Generate(template="chatlm")


def test_forms_that_an_encoder_and_decoder_does_not_take():
    with pytest.raises(UserError, match="plain texts cannot be used"):
        dataset(Generate(), backbone("t5"), [{"text": "snow is white"}])
    with pytest.raises(UserError, match="only the completion is generated"):
        dataset(Generate(loss="all"), backbone("t5"), rows(2))
