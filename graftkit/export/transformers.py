"""A run as a plain model: the graft is folded into the weights, and the result is compared with the run."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graftkit.backbone.load import find_source
from graftkit.data.columns import find_again
from graftkit.engine.frozen import head_of
from graftkit.errors import UserError, listing
from graftkit.files import TEMPORARY, read_json, write_json, write_tensors, write_text
from graftkit.grafts.snapshot import remove_additions
from graftkit.methods.base import OutputHead
from graftkit.runs.predict import Loaded, load_run
from graftkit.runs.prepare import reading_of
from graftkit.tasks.base import Dataset

ROWS = 64  # real rows on which export and run are compared
MARKER = "graftkit_export.json"  # the files that an export wrote: no others may be overwritten
TOLERANCE = 1e-4  # of the largest logit


def export(folder: str | Path, to: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write the folded model of a run to `to`.

    With the architecture's own head it is an `AutoModelForSequenceClassification` folder. With a pooled head
    the backbone is an `AutoModel` folder, and `head.safetensors` and `classifier.py` beside it hold the head
    and the code that loads both with plain transformers. `README.md` is the run's card. `overwrite` replaces an
    earlier export, and never a folder with other files. Raises `NotFoldable` where the method cannot be folded.
    """
    try:
        to = to.expanduser().resolve()
        _refuse(to, "the run itself", Path(folder).resolve())
        _refuse_others(to, overwrite)
    except (OSError, RuntimeError) as error:  # no permission, or a link that leads to itself
        raise UserError(f"{str(to)!r} cannot be written to: {error}.") from None
    loaded = load_run(Path(folder), exact=True)
    base = find_source(loaded.recipe.model, loaded.recipe.weights).folder
    if base is None:
        raise UserError(
            f"export writes models of transformers, and {loaded.backbone.source!r} is a module of your own. Load the run's "
            "graft on it with graftkit.load(module, RUN/graft); graft.fold() gives the module with the graft melted in."
        )
    _refuse(to, "the model that the run started from", base.resolve())
    if loaded.recipe.quantize is not None:
        raise UserError(
            f"the run's maps are stored as {loaded.recipe.quantize}, into which nothing can be folded. Put its graft on the "
            "model as it was: graftkit.load(model, RUN/graft).fold(), or read the graft as the adapter that it is."
        )
    head = head_of(loaded.graft)
    if head is not None and (loaded.task.name != "classify" or head.pooling == "tokens"):
        raise UserError(
            f"the head of this run, head(pooling={head.pooling!r}), has no place in a plain model for {loaded.task.name}; "
            "train it with head(pooling='own') where the architecture has such a head. graftkit.load(model, RUN/graft) "
            "loads it as it is."
        )
    if not loaded.task.trains:
        raise UserError(
            f"{loaded.task.name}() trained nothing, so there is nothing to export: {loaded.recipe.model} is the plain model."
        )
    dataset, real = _real_rows(loaded)
    rows = np.arange(min(ROWS, len(dataset)))
    before = _logits(loaded.forward.graft.model, dataset, rows)
    loaded.graft.fold()
    temporary = to.with_name(f"{to.name}.{os.getpid()}{TEMPORARY}")
    try:
        written = _write(loaded, head, temporary, _card(Path(folder), _how(to, head, loaded)))
        after = _reload(temporary, head, loaded, dataset, rows)
        differences = [float((a - b).abs().max()) for a, b in zip(after, before)]
        difference = max(differences)
        if difference > TOLERANCE * max(1.0, *(float(b.abs().max()) for b in before)):
            raise UserError(
                f"the exported model differs from the run by {difference:.2g} in its logits on {len(rows)} rows, "
                "so nothing was written. Please report this with the recipe."
            )
        _put(temporary, to, written)
    except OSError as error:
        raise UserError(f"{str(to)!r} cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {
        "run": str(folder), "to": str(to), "files": written, "native": head is None,
        "rows_compared": len(rows), "rows_real": real, "largest_difference": difference,
        "same_answers": all(bool((a.argmax(-1) == b.argmax(-1)).all()) for a, b in zip(after, before)),
        "load_with": _how(to, head, loaded), "outputs": loaded.task.plain(loaded.labels).get("how"),
    }  # fmt: skip


def _refuse(to: Path, what: str, kept: Path) -> None:
    if kept.is_relative_to(to):
        holds = "is" if kept == to else "holds"
        raise UserError(f"{str(to)!r} {holds} {what}; name another folder.")


def _refuse_others(to: Path, overwrite: bool) -> None:
    """Raise `UserError` where `to` is in use by anything, with `overwrite` by anything but an export."""
    file = next((path for path in (to, *to.parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise UserError(f"{str(file)!r} is a file; name a folder to write the model to.")
    if not to.exists() or not any(to.iterdir()):
        return
    files = _written_before(to)
    folders = {str(parent) for name in files for parent in Path(name).parents}
    there = ((path, str(path.relative_to(to))) for path in sorted(to.rglob("*")))
    others = [
        name for path, name in there
        if name not in (folders if path.is_dir() and not path.is_symlink() else files)
    ]  # fmt: skip
    if others:
        raise UserError(
            f"{str(to)!r} holds something other than an exported model ({listing(others, 4)}), so it is not "
            "overwritten; name another folder."
        )
    if not overwrite:
        raise UserError(f"{str(to)!r} exists; name another folder or use --overwrite.")


def _written_before(to: Path) -> set[str]:
    """The files that exports wrote to a folder, as they noted there."""
    try:
        return {str(name) for name in read_json(to / MARKER)["files"]}
    except (UserError, KeyError, TypeError):
        return set()


def _put(temporary: Path, to: Path, written: list[str]) -> None:
    """Give a whole export its place. In a folder that is there the files are exchanged one by one: it may be
    someone's working folder. All of them are noted first, so that a half-done exchange can be done again.
    """
    if not to.exists():
        temporary.replace(to)
        return
    old = _written_before(to)
    write_json(to / MARKER, {"files": sorted({*old, *written})})
    for name in written:
        if name != MARKER:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / name, to / name)
    for name in old - set(written):
        (to / name).unlink(missing_ok=True)
    os.replace(temporary / MARKER, to / MARKER)


def _real_rows(loaded: Loaded) -> tuple[Dataset, bool]:
    """Rows of the first data file of the run that can be read, else made-up ones; and whether they are real."""
    data, task = loaded.recipe.data, loaded.task
    for source in (data.train, data.eval, data.test):
        if not isinstance(source, str):
            continue
        try:
            table = task.read(source, replace(reading_of(loaded.recipe), skip_bad=True), source)
            table = table.take(range(min(4 * ROWS, len(table))))
            columns = find_again(table, task.columns, loaded.columns)
            examples = task.examples(table, columns, loaded.labels, True)
        except UserError:  # it has moved, or was in memory
            continue
        return task.dataset(examples, loaded.backbone, loaded.max_length), True
    texts = [f"{label}: how does this compare?" for label in loaded.labels or ("an export",)][:ROWS]
    paired = bool({"text_pair", "context"} & set(loaded.columns))
    items: list[Any] = list(zip(texts, texts[::-1])) if paired else texts
    given = task.given(items, loaded.columns) if task.modality == "text" else None
    if given is None:
        raise UserError(
            "no data file of the run can be read, and export compares the plain model with the run on real rows; put "
            "the files back where recipe.yaml says."
        )
    table = task.read(given, reading_of(loaded.recipe), "rows")
    columns = find_again(table, task.columns, loaded.columns, leave_out=task.labelled)
    examples = task.examples(table, columns, loaded.labels, False, targets=False)
    return task.dataset(examples, loaded.backbone, loaded.max_length), False


@torch.no_grad()
def _logits(model: Any, dataset: Dataset, rows: np.ndarray) -> list[torch.Tensor]:
    """What the model gives for each row alone, in fp32."""
    return [dataset.call(model, dataset.batch(rows[i : i + 1])).float().cpu() for i in range(len(rows))]


def _card(run: Path, how: str) -> str:
    """The run's card, with how the plain model is loaded in the place of how the graft is used."""
    card = run / "README.md"
    about = (
        card.read_text(encoding="utf-8").partition("\n## Use\n")[0] if card.is_file() else f"# {run.name}\n"
    )
    return f"{about}\n## Use\n\nThis folder is the plain model, with the graft folded into its weights.\n\n```\n{how}\n```\n"


def _write(loaded: Loaded, head: OutputHead | None, folder: Path, card: str) -> list[str]:
    model = loaded.graft.model
    if head is not None:
        tensors = dict(head.state_dict())
        remove_additions(model, loaded.graft.name)
        write_tensors(folder / "head.safetensors", tensors)
        about = {
            "labels": list(loaded.labels),
            "pooling": head.pooling,
            "hidden": "hidden.weight" in tensors,
            "max_length": loaded.max_length,
            "pairs": "text_pair" in loaded.columns,
            **loaded.task.plain(loaded.labels),
        }
        write_json(folder / "head.json", about)
        write_text(folder / "classifier.py", CLASSIFIER)
    else:
        remove_additions(model, loaded.graft.name)
        names = loaded.task.output_names(loaded.labels) if loaded.task.head else ()
        if names:
            model.config.id2label = dict(enumerate(names))  # type: ignore[union-attr, assignment]
            model.config.label2id = {name: i for i, name in enumerate(names)}  # type: ignore[union-attr, assignment]
        plain = loaded.task.plain(loaded.labels)
        model.config.problem_type = plain.get("problem_type")  # type: ignore[union-attr, assignment]
        if "how" in plain:
            model.config.graftkit = plain  # type: ignore[union-attr, assignment]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.config.use_cache = True  # type: ignore[union-attr, assignment]
    model.save_pretrained(folder)  # type: ignore[operator, union-attr]
    loaded.backbone.processor.save_pretrained(folder)
    write_text(folder / "README.md", card)
    written = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    written = sorted([*written, MARKER])
    write_json(folder / MARKER, {"files": written})
    return written


@torch.no_grad()
def _reload(
    folder: Path, head: OutputHead | None, loaded: Loaded, dataset: Dataset, rows: np.ndarray
) -> list[torch.Tensor]:
    """Logits of what was written, loaded with plain transformers."""
    import transformers

    if head is not None:
        space: dict[str, Any] = {"__name__": "classifier", "__file__": str(folder / "classifier.py")}
        exec(compile((folder / "classifier.py").read_text(encoding="utf-8"), "classifier.py", "exec"), space)
        values = dataset.examples.values
        pairs = values.get("text_pair")
        logits = space["Classifier"](folder).logits(values["text"][: len(rows)], pairs and pairs[: len(rows)])
        return list(logits.unsqueeze(1))
    plain = getattr(transformers, type(loaded.graft.model).__name__)
    model = plain.from_pretrained(folder, local_files_only=True).eval()
    return _logits(model, dataset, rows)


PIPELINES = {
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "ImageClassification": "image-classification",
    "AudioClassification": "audio-classification",
    "ForCausalLM": "text-generation",
}


def _how(to: Path, head: OutputHead | None, loaded: Loaded) -> str:
    if head is not None:
        asked = "'a text' 'its pair'" if "text_pair" in loaded.columns else "'a text'"
        return f"python {to / 'classifier.py'} {asked}   (or import Classifier from it; it needs torch and transformers only)"
    name = type(loaded.graft.model).__name__
    pipeline = next((pipeline for ending, pipeline in PIPELINES.items() if name.endswith(ending)), None)
    if loaded.task.modality == "audio":  # wav2vec2 and its kin have classes "for sequences"
        pipeline = PIPELINES["AudioClassification"]
    place = json.dumps(str(to))
    return (
        f"transformers.pipeline({pipeline!r}, {place})"
        if pipeline
        else f"transformers.{name}.from_pretrained({place})"
    )


CLASSIFIER = '''"""The classifier in this folder with plain transformers: python classifier.py "a text" ..."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer


class Classifier:
    def __init__(self, folder=Path(__file__).parent):
        folder = Path(folder)
        self.about = json.loads((folder / "head.json").read_text(encoding="utf-8"))
        self.head = load_file(folder / "head.safetensors")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        stacked = self.about["pooling"] == "stacked"  # on the logits of the model's own head
        self.model = (AutoModelForSequenceClassification if stacked else AutoModel).from_pretrained(folder).eval()

    def features(self, states, mask):
        """(rows, length, width) -> (rows, width)"""
        pooling, rows = self.about["pooling"], torch.arange(len(states))
        if pooling == "stacked":
            return states
        if pooling == "cls":
            return states[rows, mask.argmax(dim=1)]
        if pooling == "last":
            return states[rows, (torch.arange(mask.shape[1]) * mask).argmax(dim=1)]
        weights = mask.to(states.dtype)
        if pooling == "attention":
            scores = (states @ self.head["query.weight"].T).squeeze(-1)
            weights = scores.masked_fill(mask == 0, torch.finfo(states.dtype).min).softmax(dim=1)
        return (states * weights.unsqueeze(-1)).sum(dim=1) / weights.sum(dim=1, keepdim=True)

    @torch.no_grad()
    def logits(self, texts, pairs=None):
        """One row of logits for each text, in the order of the labels."""
        results = []
        for i, text in enumerate(texts):
            given = (text,) if pairs is None else (text, pairs[i])
            batch = self.tokenizer(*given, truncation=True, max_length=self.about["max_length"], return_tensors="pt")
            if hasattr(self.model, "_shift_right"):  # an encoder with a decoder reads the text in both
                ids, start = batch["input_ids"], getattr(self.model.config, "decoder_start_token_id", None)
                first = torch.full_like(ids[:, :1], self.model.config.pad_token_id if start is None else start)
                batch["decoder_input_ids"] = torch.cat([first, ids[:, :-1]], dim=1)
            x = self.features(self.model(**batch)[0].float(), batch["attention_mask"])
            if self.about["hidden"]:
                x = torch.nn.functional.gelu(x @ self.head["hidden.weight"].T + self.head["hidden.bias"])
            results.append((x @ self.head["output.weight"].T + self.head["output.bias"])[0])
        return torch.stack(results)

    def __call__(self, texts, pairs=None):
        """The answer to each text: a label, a list of labels, or a number."""
        logits, about = self.logits(texts, pairs), self.about
        kind, labels = about.get("kind", "single"), about["labels"]
        if kind == "regression":
            return (logits[:, 0].double() * about["scale"] + about["center"]).tolist()
        if kind == "multi":
            return [[labels[i] for i in torch.where(row > about["threshold"])[0]] for row in logits.sigmoid()]
        if kind == "ordinal":
            return [labels[i] for i in (logits.sigmoid().cumprod(dim=1) > 0.5).sum(dim=1)]
        return [labels[i] for i in logits.argmax(dim=1)]


if __name__ == "__main__":
    classifier, texts, pairs = Classifier(), sys.argv[1:], None
    if classifier.about["pairs"]:
        if len(texts) % 2:
            sys.exit("the texts are read in pairs, so give two, or four, ...")
        texts, pairs = texts[::2], texts[1::2]
    for i, answer in enumerate(classifier(texts, pairs)):
        answer = "; ".join(answer) if isinstance(answer, list) else f"{answer:g}" if isinstance(answer, float) else answer
        print(answer, texts[i], *([pairs[i]] if pairs else []), sep="\\t")
'''
