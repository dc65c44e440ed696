"""Chat templates are programs of others: none of them may run forever or write without end."""

from __future__ import annotations

import threading
import time

import pytest
from language_models import tokenizer

from graftkit.data import template_limits
from graftkit.data.chat import Template, TemplateFails
from graftkit.errors import UserError

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
LOOP = "{% for i in range(9999) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (LOOP, r"chat template \(.*, of some/model\) takes more than 0 s.*endless loop"),
        ("{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}", "fails: maximum recursion depth"),
        ("{% for i in range(10**9) %}{% endfor %}", r"\(.*, of some/model\) uses the operator '\*\*'"),
        ("{{ 9 ** messages|length ** 9 }}", r"uses the operator '\*\*'"),
        ("{% for i in range(1000000000) %}{% endfor %}", "fails: Range too big"),
        ("{{ messages[0].content * 20000000 }}", "fails: its text has 20,000,000 characters"),
        ("{{ 'x' * 10000000000 }}", r"\(.*, of some/model\) takes more than 1 GB of memory"),
        ("{% set a = messages[0].content * 9999999999 %}", "takes more than 1 GB of memory"),
        ("{{ '%9999999999d' % 1 }}", "takes more than 1 GB of memory|fails"),
        ("{% for i in range(9999) %}{{ 'x' * 2000 }}{% endfor %}", "fails: its text has"),
    ],
)
def test_a_template_has_limits(template, says, monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.3)
    monkeypatch.setattr("graftkit.data.chat.SECONDS", 0.3)
    words = tokenizer()
    words.chat_template = template
    with pytest.raises((UserError, TemplateFails), match=says):
        Template(words, None, "some/model").write(TALK, False)


def test_stars_that_are_no_power():
    text = "{% macro m(a) %}**{{ a }}**{% endmacro %}{{ m(**{'a': messages[0].content}) }} {# 2 ** 3 #}"
    assert not template_limits.has_power(text)
    assert Template(tokenizer(), text, "m").write(TALK, False).strip() == "**a**"


@pytest.mark.parametrize("text", ["{{ messages[0].content }}", LOOP])
def test_in_a_thread(text, monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.3)
    found: list[object] = []

    def work() -> None:
        write = Template(tokenizer(), text, "m").write
        for _ in range(2):
            try:
                found.append(write(TALK, False))
            except UserError as error:
                found.append("endless loop" in str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ([True] * 2 if text == LOOP else ["a"] * 2)


def test_threads_leave_the_limit_of_memory_as_it_was(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(template_limits, "SECONDS", 0.2)
    before = resource.getrlimit(resource.RLIMIT_AS)

    def work() -> None:
        with pytest.raises(UserError, match="endless loop"):
            Template(tokenizer(), LOOP, "m").write(TALK, False)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)  # so that the second begins before the first has ended
    for thread in threads:
        thread.join()
    assert resource.getrlimit(resource.RLIMIT_AS) == before
