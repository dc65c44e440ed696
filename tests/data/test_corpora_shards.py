"""Shards: Megatron's form, the same for any number of processes, whole or made again, and those of others."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import forked
from corpora import make_documents, make_tokenizer, read_megatron, write_megatron
from killing import at_operation, die

from graftkit import UserError
from graftkit.claims import temporary
from graftkit.data.corpora import corpus as corpus_files
from graftkit.data.corpora import open_corpus, open_shards, split_sentences, tokenized, tokenizing
from graftkit.data.corpora.writing import Encoder

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(corpus_files, "SMALLEST_SHARD", 2000)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return make_documents(150)


@pytest.fixture
def corpus(documents, tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(documents))
    return open_corpus(path)


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of each file; descriptions without the seconds and what follows from them."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    for name, content in found.items():
        if name.startswith("shard") and name.endswith(".json"):
            about = json.loads(content)
            assert about.pop("seconds") >= 0 and about.pop("checksum")
            found[name] = json.dumps(about).encode()
    return found


@pytest.mark.parametrize("sentences", [False, True])
def test_megatron_reads_what_a_plain_tokenizer_says(
    sentences, corpus, documents, tokenizer, tmp_path
) -> None:
    shards = tokenized(corpus, tokenizer, tmp_path / "out", sentences=sentences)
    expected = [
        [
            tokenizer.encode(part, add_special_tokens=False).ids
            for part in (split_sentences(text) if sentences else [text])
        ]
        for text in documents
    ]
    found: list[list[list[int]]] = []
    prefixes = sorted(path.with_suffix("") for path in (tmp_path / "out").glob("*.idx"))
    assert len(prefixes) > 4
    for prefix in prefixes:
        sequences, index = read_megatron(prefix)
        assert index[-1] == len(sequences)
        found += [sequences[first:last] for first, last in itertools.pairwise(index)]
    assert found == expected
    flat = [tokens for one in expected for tokens in one]
    assert shards.lengths.tolist() == list(map(len, flat))
    assert shards.documents.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
    assert shards.document_bytes is not None
    assert shards.document_bytes.tolist() == [len(text.encode()) for text in documents]
    for sequence in (0, 1, 77, len(flat) - 1):
        tokens = shards.tokens(sequence)
        assert tokens.tolist() == flat[sequence] and tokens.dtype == np.int64
        assert shards.tokens(sequence, 2, 5).tolist() == flat[sequence][2:5]
        assert shards.tokens(sequence, 1).tolist() == flat[sequence][1:]
        assert shards.tokens(sequence, 3, 10**9).tolist() == flat[sequence][3:]
    assert shards.document(33).tolist() == [token for tokens in expected[33] for token in tokens]
    about = shards.statistics
    assert about["documents"] == 150 and about["tokens"] == sum(map(len, flat)) == shards.lengths.sum()
    assert about["bytes"] == sum(len(text.encode()) for text in documents)
    assert about["unknown"] == sum(tokens.count(0) for tokens in flat) > 0
    assert about.get("sentences", 150) == len(flat)


def test_the_number_of_processes_changes_nothing(corpus, tokenizer, tmp_path) -> None:
    one = tokenized(corpus, tokenizer, tmp_path / "one", processes=1, keep_duplicates=False)
    seen: list[tuple[int, int]] = []
    two = tokenized(
        corpus,
        tokenizer,
        tmp_path / "two",
        processes=2,
        keep_duplicates=False,
        show=lambda *now: seen.append(now),
    )
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert one.digest() == two.digest()
    assert seen[-1] == (corpus.size, corpus.size) and seen == sorted(seen) and len(seen) > 4


def test_duplicates_are_counted_or_left_out(documents, tokenizer, tmp_path) -> None:
    again = [
        documents[3].upper(),
        *documents[:50],
        documents[3].replace(" ", "  "),
        *documents[100:120],
        documents[110],
    ]
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join([*documents, *again]))
    corpus = open_corpus(path)
    kept = tokenized(corpus, tokenizer, tmp_path / "kept").statistics
    assert (kept["duplicates"], kept["left_out"], kept["documents"]) == (73, 0, 223)
    out = tokenized(corpus, tokenizer, tmp_path / "out", keep_duplicates=False)
    assert (out.statistics["duplicates"], out.statistics["left_out"], out.statistics["documents"]) == (
        73,
        73,
        150,
    )
    assert [out.document(i).tolist() for i in range(150)] == [
        tokenizer.encode(text, add_special_tokens=False).ids for text in documents
    ]


def test_repeated_fingerprints() -> None:
    found = np.random.default_rng(0).integers(0, 300, 1000).astype(np.uint64)
    seen: set[int] = set()
    expected = [bool(one in seen or seen.add(one)) for one in found.tolist()]
    assert tokenizing.is_repeated(found).tolist() == expected


def test_a_kill_at_any_moment(documents, tokenizer, tmp_path) -> None:
    """What a killed call leaves is whole or unfinished, and the next call makes the same as one that nothing stops."""
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(documents[:40]))
    corpus = open_corpus(path)
    tokenized(corpus, tokenizer, tmp_path / "whole", keep_duplicates=False)
    whole = files_of(tmp_path / "whole")
    moment, kept = 0, []
    while True:
        moment += 7
        folder = tmp_path / f"killed-{moment}"

        def work(folder=folder, moment=moment) -> None:
            at_operation(moment, folder, die)
            tokenized(corpus, tokenizer, folder, keep_duplicates=False)

        done = forked(work)
        if done.status == 0:
            break
        assert done.status == -signal.SIGKILL, done.err
        before = {path.name: path.stat().st_ino for path in folder.glob("shard-*.json")}
        if 0 < len(before) < sum(name.endswith(".idx") for name in whole):
            with pytest.raises(UserError, match="Tokenize the corpus again"):
                open_shards(folder)
        tokenized(corpus, tokenizer, folder, keep_duplicates=False)
        assert files_of(folder) == whole
        kept.append(sum((folder / name).stat().st_ino == number for name, number in before.items()))
        assert kept[-1] == len(before)  # finished shards are not made again
    assert len(kept) > 5 and max(kept) > 1


def test_a_killed_process_of_several(corpus, tokenizer, tmp_path) -> None:
    """The processes that tokenize end with the one that started them, and a call goes on from there."""
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    script = f"""
import os, signal
from tokenizers import Tokenizer
from graftkit.data.corpora import corpus as files, open_corpus, tokenized
files.SMALLEST_SHARD = 2000
made = Tokenizer.from_file({str(tmp_path / "tokenizer.json")!r})
def show(*_):
    os.kill(os.getpid(), signal.SIGKILL)
tokenized(open_corpus({str(tmp_path / "corpus.txt")!r}), made, {str(tmp_path / "out")!r}, processes=2, show=show)
"""
    root = Path(corpus_files.__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    stopped = subprocess.run([sys.executable, "-c", script], env=environment, timeout=120)
    assert stopped.returncode == -signal.SIGKILL
    first = {path: path.stat().st_ino for path in (tmp_path / "out").glob("shard-*.json")}
    assert first
    found = tokenized(corpus, tokenizer, tmp_path / "out", processes=1)
    assert [path for path, number in first.items() if path.stat().st_ino == number] == list(first)
    assert found.digest() == tokenized(corpus, tokenizer, tmp_path / "other").digest()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, halve, Path.unlink])
def test_damaged_shards_are_found_and_made_again(damage, corpus, tokenizer, tmp_path) -> None:
    folder = tmp_path / "out"
    whole = tokenized(corpus, tokenizer, folder).digest()
    for suffix in (".bin", ".idx", ".npy", ".json"):
        damage(folder / f"shard-00002{suffix}")
        kept = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*") if "00002" not in path.name}
        with pytest.raises(UserError, match=r"shard-00002.* Tokenize the corpus again"):
            open_shards(folder)
        assert tokenized(corpus, tokenizer, folder).digest() == open_shards(folder).digest() == whole
        assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_folder_of_something_else_is_refused(corpus, documents, tokenizer, tmp_path) -> None:
    folder = tmp_path / "out"
    tokenized(corpus, tokenizer, folder)
    before = files_of(folder)
    other = make_tokenizer()
    other.add_tokens(["yellow"])
    path = tmp_path / "corpus.txt"
    refused = [(lambda: tokenized(corpus, other, folder), "another tokenizer")]
    refused += [(lambda: tokenized(corpus, tokenizer, folder, sentences=True), "another value of sentences")]
    refused += [
        (lambda: tokenized(corpus, tokenizer, folder, keep_duplicates=False), "value of keep_duplicates")
    ]
    refused += [
        (lambda: tokenized(open_corpus(path, documents="lines"), tokenizer, folder), "divided otherwise")
    ]
    refused += [(lambda: tokenized(corpus, tokenizer, path), "is a file")]
    refused += [(lambda: tokenized(corpus, tokenizer, tmp_path), "not a tokenized corpus .corpus.txt, out")]
    for act, message in refused:
        with pytest.raises(UserError, match=message):
            act()
    path.write_text("\n\n".join([documents[1], documents[0], *documents[2:]]))  # as many bytes
    with pytest.raises(UserError, match="other files, or files that have changed since"):
        tokenized(open_corpus(path), tokenizer, folder)
    assert files_of(folder) == before
    (folder / "corpus.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="not of the form that this version"):
        open_shards(folder)


def test_a_moved_corpus_is_the_same(corpus, tokenizer, tmp_path) -> None:
    tokenized(corpus, tokenizer, tmp_path / "out")
    (tmp_path / "moved").mkdir()
    (tmp_path / "corpus.txt").rename(tmp_path / "moved" / "corpus.txt")
    before = files_of(tmp_path / "out")
    (tmp_path / "out" / temporary(Path("shard-00001.bin")).name).touch()  # of a killed process
    tokenized(open_corpus(tmp_path / "moved"), tokenizer, tmp_path / "out")
    assert files_of(tmp_path / "out") == before


def test_empty_and_undecodable_corpora(tokenizer, tmp_path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text(" \n\n \n")
    with pytest.raises(UserError, match=r"the corpus is empty: .* no document with text"):
        tokenized(open_corpus(path), tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    path.write_bytes(b"plain words\n\n" * 6000 + bytes(range(160, 250)) * 2000)
    with pytest.raises(UserError, match="characters cannot be decoded as utf-8"):
        tokenized(open_corpus(path), tokenizer, tmp_path / "out", processes=2)
    path.write_bytes(b"a plum\n\nthe \xff pear\n\n\x01")
    shards = tokenized(open_corpus(path), tokenizer, tmp_path / "good")
    assert shards.statistics["undecodable"] == shards.statistics["control"] == shards.statistics["empty"] == 1
    with pytest.raises(UserError, match="processes=0"):
        tokenized(open_corpus(path), tokenizer, tmp_path / "more", processes=0)


def test_a_finished_corpus_is_opened_where_nothing_can_be_written(
    corpus, tokenizer, tmp_path, monkeypatch
) -> None:
    whole = tokenized(corpus, tokenizer, tmp_path / "out").digest()

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("graftkit.claims.claimed", refused)
    assert tokenized(corpus, tokenizer, tmp_path / "out").digest() == whole
    with pytest.raises(UserError, match="cannot be written to: Permission denied"):
        tokenized(corpus, tokenizer, tmp_path / "other")


def test_parts_without_a_document(documents, tokenizer, tmp_path) -> None:
    """A document that is longer than a shard leaves shards in which none begins."""
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(documents) + "\n\na plum")
    corpus = open_corpus(path, documents="paragraphs")
    for keep in (True, False):
        shards = tokenized(corpus, tokenizer, tmp_path / f"out{keep}", keep_duplicates=keep)
        assert shards.statistics["shards"] > 4 and shards.statistics["documents"] == 2
        assert (
            shards.document(0).tolist()
            == tokenizer.encode("\n".join(documents), add_special_tokens=False).ids
        )
        assert len(open_shards(tmp_path / f"out{keep}").document(1)) == 2


def test_texts_that_spell_special_tokens(tokenizer, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("a [MASK] plum")
    found = tokenized(open_corpus(tmp_path / "a.txt"), tokenizer, tmp_path / "out").document(0)
    assert tokenizer.token_to_id("[MASK]") not in found and len(found) > 3


def test_tokenizers_of_transformers(corpus, tokenizer, tmp_path) -> None:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", model_max_length=4)
    fast("a plum, and a pear", truncation=True, max_length=2)  # which the tokenizer remembers
    whole = tokenized(corpus, tokenizer, tmp_path / "one")
    assert tokenized(corpus, fast, tmp_path / "fast").digest() == whole.digest()

    class Slow:  # as one that is written in Python
        unk_token_id = 0

        def __call__(self, texts, **_):
            return {"input_ids": [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]}

        def get_vocab(self):
            return tokenizer.get_vocab()

        def __len__(self):
            return tokenizer.get_vocab_size()

    assert tokenized(corpus, Slow(), tmp_path / "two", processes=2).digest() == whole.digest()
    assert Encoder.of(Slow()).digest() != Encoder.of(tokenizer).digest()


def test_large_vocabularies_have_wider_tokens(tmp_path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tmp_path / "a.txt").write_text("w69999 w5 none")
    shards = tokenized(open_corpus(tmp_path / "a.txt"), tokenizer, tmp_path / "out")
    assert (
        shards.document(0).tolist() == [69999, 5, 0] == read_megatron(tmp_path / "out" / "shard-00000")[0][0]
    )
    assert open_shards(tmp_path / "out", vocabulary=70_000).largest == 69_999
    with pytest.raises(UserError, match="token 69,999, but the vocabulary has 50,000"):
        open_shards(tmp_path / "out", vocabulary=50_000)


def test_pairs_that_others_wrote(tmp_path) -> None:
    sequences = [[1, 2, 3], [4], [], [70, 6]]
    write_megatron(tmp_path / "a", sequences, [0, 2, 4])
    write_megatron(tmp_path / "b", [[9, 9], [8]], [0, 1, 2], 8, np.uint16)
    for path in (tmp_path / "a", tmp_path / "a.idx", tmp_path / "a.bin"):
        shards = open_shards(path, vocabulary=71)
        assert [shards.tokens(i).tolist() for i in range(4)] == sequences
        assert [shards.document(i).tolist() for i in range(2)] == [[1, 2, 3, 4], [70, 6]]
        assert shards.document_bytes is None
        assert shards.statistics == {"documents": 2, "sequences": 4, "tokens": 6, "shards": 1}
    both = open_shards(tmp_path)
    assert both.documents.tolist() == [0, 2, 4, 5, 6] and both.tokens(4).tolist() == [9, 9]
    assert both.document(-1).tolist() == [8] and both.digest() != shards.digest()
    with pytest.raises(UserError, match="token 70, but the vocabulary has 70"):
        open_shards(tmp_path, vocabulary=70)


def test_bad_pairs_of_others(tmp_path) -> None:
    def refused(message: str, name: str = "a") -> None:
        with pytest.raises(UserError, match=message):
            open_shards(tmp_path / name, vocabulary=100)

    refused("neither do", "x")
    (tmp_path / "none").mkdir()
    refused("holds no pair", "none")
    write_megatron(tmp_path / "a", [[1, 2, 3], [4]], [0, 1, 2])
    good = {suffix: (tmp_path / f"a{suffix}").read_bytes() for suffix in (".bin", ".idx")}
    index = good[".idx"]
    changed = [
        (".bin", good[".bin"][:-4], "has 12 bytes, but .* up to byte 16"),
        (".idx", index[:-8], "its header announces"),
        (".idx", index[:20], "does not begin with MMIDIDX"),
        (".idx", b"X" + index[1:], "does not begin with MMIDIDX"),
        (".idx", index[:9] + b"\2" + index[10:], "version 2"),
        (".idx", index[:17] + b"\7" + index[18:], "numbers with a fraction"),
        (".idx", index[:17] + b"\x63" + index[18:], "unknown type .99"),
        (".idx", index[:34] + b"\xff\xff\xff\xff" + index[38:], "places sequences"),
        (".idx", index[:-8] + b"\1" + index[-7:], "impossible documents"),
        (".idx", index[:18] + b"\xff" * 16 + index[34:], "its header announces"),
        (".bin", np.array([1, -2, 3, 4], np.int32).tobytes(), "holds the token -2"),
    ]
    for suffix, content, message in changed:
        (tmp_path / f"a{suffix}").write_bytes(content)
        refused(message)
        (tmp_path / f"a{suffix}").write_bytes(good[suffix])
    (tmp_path / "a.bin").rename(tmp_path / "b.bin")
    refused("a.bin is missing")
    refused("lacks .*a.bin", "")
    write_megatron(tmp_path / "c", [], [0])
    refused("holds no tokens", "c")
