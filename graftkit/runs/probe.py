"""The probe of a pre-training run: how well a linear classifier tells labelled rows apart by frozen features."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graftkit.backbone import Backbone
from graftkit.backbone.pooling import pool
from graftkit.data.columns import Column, find_columns
from graftkit.data.encode import encode_texts
from graftkit.data.read import read_table
from graftkit.data.split import hold_out
from graftkit.engine.forward import evaluating
from graftkit.engine.precision import autocast
from graftkit.errors import UserError
from graftkit.recipe.schema import Recipe
from graftkit.tasks.shared.labels import LABEL
from graftkit.tasks.shared.texts import FIRST, TEXT

ROWS = 500  # at most
FOLDS = 5  # each row is predicted by a classifier that was fitted without its fold
BATCH = 32
METRIC = "probe_accuracy"


@dataclass(frozen=True)
class Probe:
    """Labelled rows to classify from features."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]

    def features(
        self, backbone: Backbone, device: torch.device, precision: str, max_length: int
    ) -> np.ndarray:
        """Return the last states of the model without its head, or of its encoder, averaged over the tokens of each text,
        (rows, width)."""
        model: Any = backbone.model
        body = getattr(model, "base_model", model)
        if getattr(model.config, "is_encoder_decoder", False):
            body = body.get_encoder()
        encoded = encode_texts(backbone.processor, self.texts, None, max_length)
        found: list[np.ndarray] = []
        with torch.no_grad(), evaluating(model), autocast(device, precision):
            for start in range(0, len(self.texts), BATCH):
                rows = np.arange(start, min(start + BATCH, len(self.texts)))
                given = {name: tensor.to(device) for name, tensor in encoded.pad(rows).items()}
                states = body(**given)[0].float()
                found.append(pool(states, given["attention_mask"], "mean").cpu().numpy())
        return np.concatenate(found)

    def accuracy(self, features: np.ndarray) -> float:
        """Return the accuracy of logistic regression on standardized features, in stratified cross-validation."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        labels = np.array(self.labels)
        folds = StratifiedKFold(min(FOLDS, min(Counter(self.labels).values())), shuffle=True, random_state=0)
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return float(np.mean(cross_val_score(classifier, features, labels, cv=folds)))


def read_probe(recipe: Recipe) -> Probe | None:
    """Return the probe that a recipe names. Raises `UserError` for a file without texts and labels, or too few of them."""
    source = recipe.data.probe
    if source is None:
        return None
    table = read_table(source, encoding=recipe.data.encoding, skip_bad=recipe.data.skip_bad, name="probe")
    columns = find_columns(
        table, (Column("text", (*FIRST, *TEXT), "text"), Column("label", LABEL, "label")), {}
    )
    texts, labels = (list(map(str, table.columns[columns[name]])) for name in ("text", "label"))
    common = {label for label, count in Counter(labels).items() if count > 1}
    if len(common) < 2:
        raise UserError(
            f"data.probe: {source} needs at least two labels with two rows each; name labelled rows."
        )
    rows = _sample([label if label in common else "" for label in labels], recipe.seed)
    chosen = [row for row in rows if labels[row] in common]
    kept = Counter(labels[row] for row in chosen)
    chosen = [row for row in chosen if kept[labels[row]] > 1]
    return Probe(tuple(texts[row] for row in chosen), tuple(labels[row] for row in chosen))


def _sample(labels: Sequence[str], seed: int) -> list[int]:
    """Return the numbers of at most 500 rows, with about as many of each label as in all."""
    if len(labels) <= ROWS:
        return list(range(len(labels)))
    try:
        return hold_out(labels, ROWS / len(labels), seed)[1]
    except UserError:
        return sorted(random.Random(seed).sample(range(len(labels)), ROWS))
