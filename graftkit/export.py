"""A run as a plain model: the graft is folded into the weights, and the result is compared with the run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from graftkit.backbone.load import find_source
from graftkit.data.read import read_table
from graftkit.engine.frozen import pooled_head
from graftkit.errors import UserError
from graftkit.files import TEMPORARY, write_json, write_tensors, write_text
from graftkit.graft import remove_additions
from graftkit.methods.head import PooledHead
from graftkit.use import Loaded, load_run, logits_of

ROWS = 64  # real rows on which export and run are compared
TOLERANCE = 1e-4  # of the largest logit


def export(folder: str | Path, to: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write the folded model of a run to `to`.

    With the architecture's own head it is an `AutoModelForSequenceClassification` folder. With a pooled head
    the backbone is an `AutoModel` folder, and `head.safetensors` and `classifier.py` beside it hold the head
    and the code that loads both with plain transformers. Raises `NotFoldable` where the method cannot be folded.
    """
    if to.exists() and (to.is_file() or any(to.iterdir())):
        if not overwrite:
            raise UserError(f"{str(to)!r} exists; name another folder or use --overwrite.")
        if not (to / "config.json").is_file():
            raise UserError(f"{str(to)!r} holds something other than a model, so it is not overwritten.")
    loaded = load_run(Path(folder), exact=True)
    base = find_source(loaded.recipe.model).folder
    if base is not None and to.resolve() == base.resolve():
        raise UserError(f"{str(to)!r} is the model that the run started from; name another folder.")
    texts, pairs = _real_rows(loaded)
    before = logits_of(loaded, texts, pairs)
    loaded.graft.fold()
    head = pooled_head(loaded.graft)
    temporary = to.with_name(f"{to.name}.{os.getpid()}{TEMPORARY}")
    try:
        written = _write(loaded, head, temporary)
        after = _reload(temporary, head, loaded, texts, pairs)
        difference = float((after - before).abs().max())
        if difference > TOLERANCE * max(1.0, float(before.abs().max())):
            raise UserError(
                f"the exported model differs from the run by {difference:.2g} in its logits on {len(texts)} rows, "
                "so nothing was written. Please report this with the recipe."
            )
        if to.exists():
            shutil.rmtree(to)
        temporary.replace(to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {
        "run": str(folder), "to": str(to), "files": written, "native": head is None,
        "rows_compared": len(texts), "largest_difference": difference,
        "same_answers": bool((after.argmax(-1) == before.argmax(-1)).all()), "load_with": _how(to, head),
    }  # fmt: skip


def _real_rows(loaded: Loaded) -> tuple[list[str], list[str] | None]:
    data = loaded.recipe.data
    try:
        table = read_table(data.train, encoding=data.encoding, skip_bad=True)
        columns = {name: column for name, column in loaded.columns.items() if name != "label"}
        examples = loaded.task.examples(table, columns, loaded.labels, True, targets=False)
        return examples.texts[:ROWS], examples.pairs[:ROWS] if examples.pairs else None
    except UserError:  # the training file has moved, or was in memory
        texts = [f"{label}: how does this compare?" for label in loaded.labels][:ROWS]
        return texts, texts[::-1] if "text_pair" in loaded.columns else None


def _write(loaded: Loaded, head: PooledHead | None, folder: Path) -> list[str]:
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
        }
        write_json(folder / "head.json", about)
        write_text(folder / "classifier.py", CLASSIFIER)
    else:
        remove_additions(model, loaded.graft.name)
        model.config.id2label = dict(enumerate(loaded.labels))  # type: ignore[union-attr, assignment]
        model.config.label2id = {label: i for i, label in enumerate(loaded.labels)}  # type: ignore[union-attr, assignment]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.config.use_cache = True  # type: ignore[union-attr, assignment]
    model.save_pretrained(folder)  # type: ignore[operator, union-attr]
    loaded.backbone.processor.save_pretrained(folder)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@torch.no_grad()
def _reload(
    folder: Path, head: PooledHead | None, loaded: Loaded, texts: list[str], pairs: list[str] | None
) -> torch.Tensor:
    """Logits of what was written, loaded with plain transformers."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if head is not None:
        space: dict[str, Any] = {"__name__": "classifier", "__file__": str(folder / "classifier.py")}
        exec(compile((folder / "classifier.py").read_text(encoding="utf-8"), "classifier.py", "exec"), space)
        return space["Classifier"](folder).logits(texts, pairs)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True).eval()
    results = []
    for i, text in enumerate(texts):
        given = (text,) if pairs is None else (text, pairs[i])
        batch = tokenizer(*given, truncation=True, max_length=loaded.max_length, return_tensors="pt")
        results.append(model(**batch).logits[0])
    return torch.stack(results)


def _how(to: Path, head: PooledHead | None) -> str:
    if head is None:
        return f"transformers.pipeline('text-classification', {json.dumps(str(to))})"
    return f"python {to / 'classifier.py'} 'a text'   (or import Classifier from it; it needs torch and transformers only)"


CLASSIFIER = '''"""The classifier in this folder with plain transformers: python classifier.py "a text" ..."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer


class Classifier:
    def __init__(self, folder=Path(__file__).parent):
        folder = Path(folder)
        self.about = json.loads((folder / "head.json").read_text(encoding="utf-8"))
        self.head = load_file(folder / "head.safetensors")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    def features(self, states, mask):
        """(rows, length, width) -> (rows, width)"""
        pooling, rows = self.about["pooling"], torch.arange(len(states))
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
            x = self.features(self.model(**batch)[0].float(), batch["attention_mask"])
            if self.about["hidden"]:
                x = torch.nn.functional.gelu(x @ self.head["hidden.weight"].T + self.head["hidden.bias"])
            results.append((x @ self.head["output.weight"].T + self.head["output.bias"])[0])
        return torch.stack(results)

    def __call__(self, texts, pairs=None):
        return [self.about["labels"][i] for i in self.logits(texts, pairs).argmax(dim=1)]


if __name__ == "__main__":
    for text, label in zip(sys.argv[1:], Classifier()(sys.argv[1:])):
        print(f"{label}\\t{text}")
'''
