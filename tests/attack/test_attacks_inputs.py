"""Hostile and broken recipes, tables and commands."""

from __future__ import annotations

import pytest
from attacks import Attack

ATTACKS = [
    Attack("table-missing", "nope.csv", "plan --model model --task classify --train nope.csv"),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack(attack, command, tmp_path, tiny_bert, rows_folder, finished):
    attack.place(tmp_path, tiny_bert, rows_folder, finished)
    attack.check(command, tmp_path)
