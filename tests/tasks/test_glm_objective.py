"""The objective glm: rows of a corpus with blanks, its loss on part B alone, a run of it, and blanks filled by the run."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from conftest import WORDS
from torch.nn.functional import cross_entropy

from graftkit import UserError
from graftkit.backbone import Backbone
from graftkit.backbone.glm import GraftKitGlmConfig, GraftKitGlmForMaskedLM
from graftkit.data.source import Pass
from graftkit.engine.forward import Forward
from graftkit.grafts.attach import attach
from graftkit.tasks.base import Reading
from graftkit.tasks.objectives.base import PLACES, ROWS, TARGETS, TOKENS
from graftkit.tasks.objectives.glm import Glm
from graftkit.tasks.shared.blanks import NAMES, marks_of
from graftkit.tasks.shared.filling import fill

pytestmark = pytest.mark.slow

LENGTH = 64


def tokenizer_with_marks(folder: Path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *Glm.special_tokens)
    words = (*special, *WORDS, ".")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", extra_special_tokens=list(special[5:]), model_max_length=LENGTH,
    )  # fmt: skip


def glm(tokenizer, **changes) -> GraftKitGlmForMaskedLM:
    torch.manual_seed(0)
    return GraftKitGlmForMaskedLM(
        GraftKitGlmConfig(
            **{
                "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                "intermediate_size": 64, "max_position_embeddings": LENGTH, "pad_token_id": 0,
            } | changes
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A GLM folder with a tokenizer of words, and corpus.txt, in which the second word of each sentence repeats its first."""
    folder = tmp_path_factory.mktemp("models") / "tiny-glm"
    tokenizer = tokenizer_with_marks(folder)
    tokenizer.save_pretrained(folder)
    glm(tokenizer).save_pretrained(folder)
    random = np.random.default_rng(0)
    lines = []
    for _ in range(240):
        sentences = []
        for _ in range(random.integers(1, 5)):
            first, *others = random.choice(WORDS, random.integers(2, 6)).tolist()
            sentences.append(" ".join([first, first, *others, "."]))
        lines.append(" ".join(sentences))
    (folder / "corpus.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    tokenizer = tokenizer_with_marks(folder)
    model = glm(tokenizer)
    zoo.randomize(model, 3)
    return Backbone(model, tokenizer, "tiny-glm", max_length=LENGTH)


def rows_of(task: Glm, backbone: Backbone, folder: Path, training: bool = True):
    table = task.read(folder / "corpus.txt", Reading(), "train")
    return task.dataset(task.examples(table, {"text": "text"}, (), False), backbone, LENGTH, training)


def assembled(batch, row: int, marks) -> list[int]:
    """The text of a row from its inputs and targets."""
    ids, places, numbers = (
        batch[name][row].tolist() for name in ("input_ids", "position_ids", "block_position_ids")
    )
    part_a = [
        token
        for token, number, real in zip(ids, numbers, batch["attention_mask"][row])
        if real and not number
    ]
    blanks: dict[int, list[int]] = {}
    for place, target in zip(
        batch[PLACES][batch[ROWS] == row].tolist(), batch[TARGETS][batch[ROWS] == row].tolist()
    ):
        blank = blanks.setdefault(places[place], [])
        blank += [] if target == marks.end else [target]
    return [t for i, token in enumerate(part_a) for t in blanks.get(i, [token])]


@pytest.mark.parametrize("mode", ["token", "sentence", "document", "mixture"])
def test_rows_hold_the_whole_corpus(mode: str, backbone: Backbone, folder: Path) -> None:
    tokenizer, task = backbone.processor, Glm(mode=mode, documents="lines")
    rows = rows_of(task, backbone, folder)
    marks = marks_of(tokenizer, "glm()")
    texts = (folder / "corpus.txt").read_text().splitlines()
    stream = [t for text in texts for t in [*tokenizer(text, add_special_tokens=False)["input_ids"], 3]][:-1]
    batch = rows.inputs(np.arange(len(rows)), Pass(1, 2))
    assert batch["input_ids"].shape[1] <= LENGTH
    found = []
    for row in range(len(rows)):
        text = assembled(batch, row, marks)
        assert text[0] == 2 and text[-1] == 3 and len(text) == rows.length
        found += text[1:-1]
    assert found == stream[: len(found)] and len(stream) - len(found) == rows.dropped < rows.body
    seen = {token for token in marks.masks if (batch["input_ids"] == token).any()}
    of_mode = {"token": 0, "sentence": 1, "document": 2}
    assert seen == (
        set(marks.masks) if mode == "mixture" else {marks.masks[of_mode[mode]]} | seen & {marks.token}
    )


def test_rows_are_functions_of_seed_epoch_and_row(backbone: Backbone, folder: Path) -> None:
    rows, again = (rows_of(Glm(documents="lines"), backbone, folder) for _ in range(2))
    few = np.array([3, 0, 5])
    batch = rows.inputs(few, Pass(1, 1))
    rows.inputs(few[::-1], Pass(1, 2))
    for name, tensor in again.inputs(few, Pass(1, 1)).items():
        assert torch.equal(tensor, batch[name])
    for at in (Pass(1, 2), Pass(2, 1)):
        assert not torch.equal(again.inputs(few, at)[TARGETS][:20], batch[TARGETS][:20])
    assert rows.count(few, Pass(1, 1)) == {TOKENS: float(len(batch[TARGETS]))}


def test_evaluation_has_plain_tokens_in_the_order_of_the_text(backbone: Backbone, folder: Path) -> None:
    rows = rows_of(Glm(documents="lines", block=0.9), backbone, folder, training=False)
    marks = marks_of(backbone.processor, "glm()")
    batch = rows.inputs(np.arange(len(rows)), Pass())
    assert not (batch["input_ids"] == marks.block).any()
    training = rows_of(Glm(documents="lines", block=0.9), backbone, folder).inputs(
        np.arange(len(rows)), Pass()
    )
    assert (training["input_ids"] == marks.block).any()
    for given, falls in ((batch, False), (training, True)):
        places = [p[n > 0] for p, n in zip(given["position_ids"], given["block_position_ids"])]
        assert any((np.diff(p) < 0).any() for p in places) == falls


def test_the_loss_is_the_cross_entropy_of_part_b(backbone: Backbone, folder: Path) -> None:
    task = Glm(documents="lines")
    rows = rows_of(task, backbone, folder)
    graft = attach(Backbone(backbone.model, backbone.processor), "full()")
    forward = Forward(graft, torch.device("cpu"), "fp32")
    forward.graft.model.eval()
    batch = rows.batch(np.array([2, 7]), at=Pass(5, 1))
    term = task.learner(rows, (), 0.0)(forward, batch)[TOKENS]
    with torch.no_grad():
        inputs = {n: t for n, t in batch.inputs.items() if n not in (TARGETS, ROWS, PLACES)}
        logits = backbone.model(**inputs).logits[batch.inputs[ROWS], batch.inputs[PLACES]]
    wanted = cross_entropy(logits, batch.inputs[TARGETS], reduction="none")
    assert term.losses.item() == pytest.approx(wanted.sum().item(), rel=1e-5)
    assert term.correct.item() == (logits.argmax(-1) == batch.inputs[TARGETS]).sum().item()
    assert term.each().sum().item() == pytest.approx(wanted.sum().item(), rel=1e-5)


def test_without_the_second_position_places_go_on(backbone: Backbone, folder: Path) -> None:
    model = glm(backbone.processor, block_positions=False)
    rows = rows_of(Glm(documents="lines"), Backbone(model, backbone.processor), folder)
    batch = rows.inputs(np.array([0, 1]), Pass())
    for row in range(2):
        length = int(batch["attention_mask"][row].sum())
        assert batch["position_ids"][row, :length].tolist() == list(range(length))
        assert (batch["block_position_ids"][row] > 0).any()


def test_a_named_tokenizer_gets_the_tokens_that_it_lacks(tiny_bert: Path, tiny_gpt2: Path) -> None:
    import transformers

    from graftkit.runs.starting import with_tokens

    for folder in (tiny_bert, tiny_gpt2):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        size, mask = len(tokenizer), tokenizer.mask_token_id
        with_tokens(tokenizer, Glm.special_tokens)
        marks = marks_of(tokenizer, "glm()")
        assert len(tokenizer) == size + len(Glm.special_tokens) - (mask is not None)
        assert marks.token == tokenizer.mask_token_id and mask in (None, marks.token)
        ids = tokenizer("[sMASK] <|startofpiece|>", add_special_tokens=False)["input_ids"]
        assert [i for i in ids if i >= size] == [marks.sentence, marks.start]


def test_rows_too_short_for_blanks_are_refused(backbone: Backbone, folder: Path) -> None:
    task = Glm(documents="lines")
    table = task.read(folder / "corpus.txt", Reading(), "train")
    examples = task.examples(table, {"text": "text"}, (), False)
    with pytest.raises(UserError, match=r"data.max_length is 15, but glm\(\) needs at least 16"):
        task.dataset(examples, backbone, 15)
    rows = task.dataset(examples, backbone, 16, training=True)
    assert rows.inputs(np.arange(len(rows)), Pass())["input_ids"].shape[1] <= 16


def test_models_and_tokenizers_that_do_not_fit_are_refused(backbone: Backbone, tiny_bert: Path) -> None:
    import transformers

    bert = transformers.AutoModelForMaskedLM.from_pretrained(tiny_bert)
    with pytest.raises(UserError, match=r"pre-trains a GLM, but .* is a BertForMaskedLM.*glm-mini"):
        Glm().refuse(backbone.processor, Backbone(bert, backbone.processor))
    plain = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    with pytest.raises(UserError, match=r"tokenizer of the model lacks \[sMASK\], \[gMASK\]"):
        Glm().refuse(plain, backbone)
    with pytest.raises(UserError, match="fill\\(\\) needs a GLM"):
        fill(bert, backbone.processor, "[MASK]")


@pytest.mark.slow
def test_a_run_learns_and_fills_blanks(folder: Path, tmp_path: Path, command, monkeypatch) -> None:
    """In each text every word is followed by the same one, so the words of a blank are known but for their number."""
    import graftkit

    monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path / "cache"))
    random, words = np.random.default_rng(0), WORDS[:10]
    sizes = zip(random.integers(0, 10, 240), random.integers(8, 30, 240))
    texts = [" ".join(words[(start + i) % 10] for i in range(size)) for start, size in sizes]
    (tmp_path / "corpus.txt").write_text("\n".join(texts))
    run = graftkit.tune(
        model=str(folder), task="glm(documents='lines', block=0.0)", train=str(tmp_path / "corpus.txt"),
        out=tmp_path / "run", settings={
            "train.steps": 100, "train.batch_size": 8, "train.lr": 0.01, "train.precision": "fp32", "data.max_length": 32,
        },
    )  # fmt: skip
    metrics = run.result["metrics"]
    assert metrics["loss"] < 1.6 < np.log(10) and metrics["token_accuracy"] > 0.4
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"]))
    text = f"{words[5]} {words[6]} [MASK] {words[9]} {words[0]} {words[1]} [MASK] {words[4]}"
    (answer,) = run.predict([text])
    assert answer["text"] == text and "[MASK]" not in answer["filled"]
    pairs = [pair for blank in answer["blanks"] for pair in pairwise(blank.split())]
    assert sum(words.index(b) == (words.index(a) + 1) % 10 for a, b in pairs) >= 0.6 * len(pairs)
    assert command("predict", str(tmp_path / "run"), text).out.strip() == answer["filled"]
    rows = [{"text": text}, {"text": "[gMASK]"}]
    assert [row["row"] for row in run.predict(rows, {"temperature": 1.0, "max_new_tokens": 3})] == [1, 2]
    evaluated = run.evaluate(str(tmp_path / "corpus.txt"))
    assert evaluated["targets"] > metrics["targets"] and evaluated["loss"] < 1.6
    with pytest.raises(UserError, match="has no blank"):
        run.predict(["no blank"])


def test_marks_are_the_special_tokens_of_the_task() -> None:
    assert {"[MASK]", *NAMES.values()} == set(Glm.special_tokens)
