"""Bits that rot in a tensor file are noticed when it is read, wherever they are; files of older versions have no checksum."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftkit.errors import UserError
from graftkit.files import CHECKSUM, checksum, read_tensors, write_tensors

TENSORS = {
    "a": torch.arange(2000, dtype=torch.float32).reshape(40, 50),
    "b": torch.ones(7, dtype=torch.bfloat16),
    "c": torch.tensor(3),
    "empty": torch.zeros(0, 4),
    "flags": torch.tensor([True, False]),
    "small": torch.ones(3).to(torch.float8_e4m3fn),
}


def test_every_type_is_written_and_read(tmp_path):
    path = tmp_path / "t.safetensors"
    written = write_tensors(path, TENSORS, {"position": '{"ü": 1}'})
    tensors, metadata = read_tensors(path)
    assert metadata[CHECKSUM] == written == checksum(tensors, metadata)
    assert all(torch.equal(tensors[name].float(), TENSORS[name].float()) for name in TENSORS)
    assert tensors.keys() == load_file(path).keys(), "and by safetensors alone"
    first = path.read_bytes()
    write_tensors(path, dict(reversed(TENSORS.items())), {"position": '{"ü": 1}'})
    assert path.read_bytes() == first


def test_any_bit_that_is_flipped(tmp_path):
    path, draw = tmp_path / "t.safetensors", random.Random(0)
    write_tensors(path, TENSORS, {"position": "7"})
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    text = whole[:header]
    places = [draw.randrange(header, len(whole)) for _ in range(150)] + list(range(8, header))
    survived = []
    for place in places:
        path.write_bytes(
            bytes([*whole[:place], whole[place] ^ (1 << draw.randrange(8)), *whole[place + 1 :]])
        )
        try:
            tensors, _ = read_tensors(path)
        except UserError as error:
            assert str(path) in str(error)
        else:
            survived.append(place)
            assert checksum(tensors, {}) == checksum(TENSORS, {}), "what is read is right"
    key = text.index(CHECKSUM.encode())
    for place in survived:  # the word itself is then an unknown entry of the metadata, or it is a blank
        assert key <= place < key + len(CHECKSUM) or whole[place : place + 1].isspace(), text[
            place - 5 : place + 5
        ]


def test_a_page_of_zeros_and_tensors_that_are_exchanged(tmp_path):
    path = tmp_path / "t.safetensors"
    write_tensors(path, TENSORS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-6000] + bytes(4096) + whole[-1904:])
    with pytest.raises(UserError, match="is damaged"):
        read_tensors(path)
    path.write_bytes(whole.replace(b"[40,50]", b"[50,40]"))
    with pytest.raises(UserError, match="is damaged"):
        read_tensors(path)


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def tensors_of(run: Path) -> Path:
    return run / "graft" / "adapter_model.safetensors"


def test_a_graft_that_rots_is_refused(command, run):
    path = tensors_of(run)
    content = bytearray(path.read_bytes())
    content[-100] ^= 16
    path.write_bytes(content)
    for words in (
        ["predict", run, "a plum"],
        ["export", run, "--to", "model"],
        ["merge", run, run, "--out", "merged"],
    ):
        done = command(*words)
        assert done.status == 1 and f"{path} is damaged" in done.err and "restore it from a copy" in done.err


def test_tensors_of_another_graft_are_refused(command, run):
    tensors, _ = read_tensors(tensors_of(run))
    write_tensors(tensors_of(run), {name: tensor + 1 for name, tensor in tensors.items()})
    done = command("predict", run, "a plum")
    assert done.status == 1 and "is not the file that graft.json beside it was written with" in done.err


def test_files_of_older_versions_have_no_checksum(command, run):
    right = command("predict", run, "a plum").out
    path = tensors_of(run)
    save_file(load_file(path), path, metadata={"format": "pt"})
    assert command("predict", run, "a plum").out == right
    (run / "graft" / "confidence.safetensors").unlink()  # which they have not either
    right = command("predict", run, "a plum").out
    about = json.loads((run / "graft" / "graft.json").read_text())
    del about["checksums"]
    (run / "graft" / "graft.json").write_text(json.dumps(about))
    assert command("predict", run, "a plum").out == right
