"""Hostile and broken models, grafts and adapters."""

from __future__ import annotations

import pytest
from attacks import Attack

ATTACKS = [
    Attack("weights-missing", "has no weights", files={"model/model.safetensors": None}),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack(attack, command, tmp_path, tiny_bert, rows_folder, finished):
    attack.place(tmp_path, tiny_bert, rows_folder, finished)
    attack.check(command, tmp_path)
