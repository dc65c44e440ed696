"""No command opens a connection, with the hub allowed."""

from __future__ import annotations

import socket

import pytest
from conftest import tune_words

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_compared")]


@pytest.fixture
def unplugged(monkeypatch):
    """Sockets that fail the test, as `HF_HUB_OFFLINE` would hide what is asked of the hub."""

    def connect(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr(socket, "create_connection", connect)


def test_a_run_and_its_use(unplugged, command, tiny_bert, rows_folder, tmp_path):
    run = tmp_path / "run"
    words = tune_words(tiny_bert, rows_folder, run, "train.steps=2")
    assert command("plan", *words[1:]).status == 0
    assert command(*words).status == 0
    assert command("predict", run, "a plum").status == 0
    assert command("evaluate", run, "--data", rows_folder / "eval.csv").status == 0
    assert command("export", run, "--to", tmp_path / "plain").status == 0
    assert command("inspect", tiny_bert).status == 0


def test_a_hub_id_is_asked_for(unplugged, command, rows_folder, tmp_path):
    """The check can fail: a model of the hub needs a connection."""
    words = tune_words("someone/some-model", rows_folder, tmp_path / "run")
    with pytest.raises(AssertionError, match="a connection was opened"):
        command(*words)
