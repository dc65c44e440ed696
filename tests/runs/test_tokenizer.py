"""`graftkit tokenizer`: folders that transformers loads, the same from the same corpus, with honest figures."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import forked
from corpora import make_documents

import graftkit
from graftkit import UserError
from graftkit.cli.main import main
from graftkit.data.corpora.cleaning import fingerprint

pytestmark = pytest.mark.slow

SIZES = {"wordpiece": 140, "bpe": 330, "unigram": 100}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return make_documents(400, longest=12)


@pytest.fixture(scope="module")
def train(documents, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "train.txt"
    path.write_text("\n\n".join(documents))
    return path


@pytest.fixture(scope="module")
def folders(train, tmp_path_factory) -> dict[str, Path]:
    """A tokenizer of each kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    for kind, size in SIZES.items():
        graftkit.train_tokenizer(train, kind=kind, vocab=size, out=root / kind, special="glm")
    return {kind: root / kind for kind in SIZES}


def load(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("kind", SIZES)
def test_transformers_and_tokenizers_load_it(kind, folders, documents) -> None:
    from tokenizers import Tokenizer

    loaded, plain = load(folders[kind]), Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    assert len(loaded) == plain.get_vocab_size() <= SIZES[kind]
    for text in documents[:50]:
        assert loaded(text)["input_ids"] == plain.encode(text).ids
    assert (loaded.pad_token, loaded.unk_token, loaded.mask_token) == ("[PAD]", "[UNK]", "[MASK]")
    names = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "[sMASK]",
        "[gMASK]",
        "[dBLOCK]",
        "<|startofpiece|>",
        "<|endofpiece|>",
    ]
    assert loaded.convert_tokens_to_ids(names) == list(range(10))
    assert set(names) <= set(loaded.all_special_tokens)
    if kind == "bpe":
        assert loaded.eos_token == "<|endoftext|>"
        for text in ("Ünseen 🙂 text\n\n  of 天", *documents[:20]):
            assert loaded.decode(loaded(text)["input_ids"]) == text
    else:
        found = loaded("the pear", "a plum")
        ids, first = found["input_ids"], loaded.convert_tokens_to_ids(["[CLS]", "[SEP]"])
        assert [ids[0], ids[-1]] == first and ids.count(first[1]) == 2
        assert found["token_type_ids"][0] == 0 and found["token_type_ids"][-1] == 1
        assert " ".join(loaded.decode(ids, skip_special_tokens=True).split()) == "the pear a plum"
    masked = loaded("the [MASK] pear [gMASK]")["input_ids"]
    assert 4 in masked and 6 in masked


def test_chinese_characters_are_words_of_wordpiece(folders, tmp_path) -> None:
    assert load(folders["wordpiece"]).tokenize("天地the玄黃") == ["天", "地", "the", "玄", "黃"]
    draw = random.Random(0)
    signs = "春眠不覺曉處處聞啼鳥夜來風雨聲花落知多少"
    lines = [
        "".join(draw.choices(signs, k=5)) + "，" + "".join(draw.choices(signs, k=5)) + "。"
        for _ in range(300)
    ]
    (tmp_path / "poems.txt").write_text("\n".join(lines))
    for kind, size in (("wordpiece", 60), ("unigram", 60), ("bpe", 300)):
        found = graftkit.train_tokenizer(tmp_path / "poems.txt", kind=kind, vocab=size, out=tmp_path / kind)
        assert found["unknown_share"] == 0 and found["bytes_per_token"] > 2
        assert load(tmp_path / kind).decode(load(tmp_path / kind)(lines[0])["input_ids"], skip_special_tokens=True).replace(
            " ", ""
        ) == lines[0]  # fmt: skip


def test_another_process_makes_the_same(train, folders, tmp_path) -> None:
    """Hash maps have another order in each process."""
    script = f"""
import graftkit
for kind, size in {SIZES}.items():
    graftkit.train_tokenizer({str(train)!r}, kind=kind, vocab=size, out={str(tmp_path)!r} + "/" + kind, special="glm")
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(graftkit.__file__).parents[1]), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=300)
    for kind in SIZES:
        for path in folders[kind].iterdir():
            assert (tmp_path / kind / path.name).read_bytes() == path.read_bytes(), path


def test_the_figures_are_those_of_held_out_texts(train, folders, documents, tmp_path, capsys) -> None:
    words = ["tokenizer", "--train", train, "--kind", "bpe", "--vocab", 300, "--out", tmp_path / "out"]
    words += ["--compare", folders["wordpiece"], "--json"]
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 0
    said = json.loads(capsys.readouterr().out)
    held = [text for text in documents if fingerprint(text) % 20 == 0]
    assert said["texts"] == len(held) > 5 and said["held_out"]
    for figures, folder in ((said, tmp_path / "out"), (said["compare"], folders["wordpiece"])):
        tokenizer = load(folder)
        tokens = [tokenizer.encode(text, add_special_tokens=False) for text in held]
        total = sum(map(len, tokens))
        assert figures["vocab"] == len(tokenizer)
        assert figures["bytes_per_token"] == pytest.approx(sum(len(text.encode()) for text in held) / total)
        assert figures["characters_per_token"] == pytest.approx(sum(map(len, held)) / total)
        assert figures["unknown_share"] == sum(one.count(tokenizer.unk_token_id) for one in tokens) / total
    assert said["vocab"] == said["asked"] == 300 and said["warnings"] == []


def test_warnings_and_lower_case(tmp_path) -> None:
    (tmp_path / "small.txt").write_text("The cat SAT.\n\nthe Dog")
    found = graftkit.train_tokenizer(
        tmp_path / "small.txt", kind="wordpiece", vocab=500, out=tmp_path / "out", lowercase=True
    )
    assert found["vocab"] < 500 and not found["held_out"]
    assert (
        f"{found['vocab']:,} instead of 500" in found["warnings"][0] and "too small" in found["warnings"][1]
    )
    assert load(tmp_path / "out").tokenize("THE CAT") == ["the", "cat"]


@pytest.mark.parametrize("kind", SIZES)
def test_a_vocabulary_smaller_than_the_alphabet(kind, train, tmp_path) -> None:
    with pytest.raises(UserError, match=r"vocab=30 is smaller than the alphabet: .* need (\d+)") as caught:
        graftkit.train_tokenizer(train, kind=kind, vocab=30, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    needed = int(str(caught.value).partition(" need ")[2].split(".")[0])
    assert graftkit.train_tokenizer(train, kind=kind, vocab=needed, out=tmp_path / "out")["vocab"] <= needed


def test_mistakes(train, folders, tmp_path) -> None:
    def refused(message: str, **given) -> None:
        given = {"kind": "bpe", "vocab": 300, "out": tmp_path / "out", **given}
        with pytest.raises(UserError, match=message):
            graftkit.train_tokenizer(given.pop("train", train), **given)

    refused("Did you mean 'wordpiece'", kind="wordpeice")
    refused("special 'gml'", special="gml")
    refused("vocab=0", vocab=0)
    refused("does not exist", train=tmp_path / "none.txt")
    refused("lowercase is not for kind bpe", lowercase=True)
    refused("'.*none' does not exist", compare=str(tmp_path / "none"))
    refused("holds a tokenizer; replace it with --overwrite", out=folders["bpe"])
    refused("holds files that are not of this command", out=train.parent)
    refused("is a file", out=train)
    (tmp_path / "blank.txt").write_text(" \n ")
    refused("no document with text", train=tmp_path / "blank.txt")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "tokenizer.json").write_text('{"version": "1.0"}')
    refused("tokenizer of .* cannot be loaded", compare=str(tmp_path / "damaged"))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_tokenizer_as_it_was(train, folders, monkeypatch, tmp_path) -> None:
    def work() -> None:
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
        with pytest.raises(UserError, match="No space left"):
            graftkit.train_tokenizer(train, kind="bpe", vocab=290, out=folders["bpe"], overwrite=True)

    before = {path: path.read_bytes() for path in folders["bpe"].iterdir()}
    done = forked(work)
    assert done.status == 0, done.err
    assert {path: path.read_bytes() for path in folders["bpe"].iterdir()} == before
