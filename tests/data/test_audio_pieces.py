"""Tables of sounds are read piece by piece."""

import csv

from audio_models import RATE, tone, write_tones

from graftkit.tasks.audio_classify.task import AudioClassify
from graftkit.tasks.base import Reading


def test_a_table_of_sounds_comes_in_pieces_and_says_where_they_lie(tmp_path):
    write_tones(tmp_path / "train", 3, 1)
    paths = sorted(path.relative_to(tmp_path) for path in (tmp_path / "train").rglob("*.wav"))
    with (tmp_path / "table.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["audio"], *([path] for path in paths)])
    task, reading = AudioClassify(), Reading("utf-8", False, {})
    pieces = list(task.pieces(str(tmp_path / "table.csv"), reading, "data", 4))
    assert [len(piece) for piece in pieces] == [4, 2]
    for piece in pieces:
        found = task.examples(piece, {"audio": "audio"}, (), False, targets=False)
        assert len(found) == len(piece)
    folder = list(task.pieces(str(tmp_path / "train"), reading, "data", 4))
    assert [len(piece) for piece in folder] == [4, 2]
    held = [{"audio": {"array": tone(0.3, 500), "sampling_rate": RATE}}] * 3
    assert [len(piece) for piece in task.pieces(held, reading, "data", 2)] == [2, 1]
