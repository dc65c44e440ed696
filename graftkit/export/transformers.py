"""Export a run as a plain transformers model, with the graft folded into the weights.

With the architecture's own head it is a folder that `pipeline` or `from_pretrained` loads. With a head that pools, the
backbone is an `AutoModel` folder; `head.safetensors` and `classifier.py` beside it are the head and the code that loads
both with transformers alone.
"""

from __future__ import annotations

import json
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES

from graftkit.engine.frozen import head_of
from graftkit.errors import UserError
from graftkit.export.base import Exportable, Sample, logits
from graftkit.files import write_json, write_tensors, write_text
from graftkit.grafts.snapshot import remove_additions

SCRIPT = "classifier.py"
PIPELINES = {
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "ImageClassification": "image-classification",
    "AudioClassification": "audio-classification",
    "ForCausalLM": "text-generation",
}


@dataclass(frozen=True)
class Transformers:
    """An exporter to a transformers model folder."""

    @property
    def opened_by(self) -> tuple[str, ...]:
        return ("config.json",)

    def refuse(self, run: Exportable) -> None:
        if run.base is None:
            raise UserError(
                f"export writes transformers models, but {run.backbone.source!r} is your own module. Load the run's graft "
                "onto it with graftkit.load(module, RUN/graft); graft.fold() then folds the graft into the module."
            )
        if run.quantize is not None:
            raise UserError(
                f"the run's weights are quantized as {run.quantize}, and nothing can be folded into them. Load its graft onto "
                "the original model: graftkit.load(model, RUN/graft).fold(), or use the graft as an adapter."
            )
        head = head_of(run.graft)
        if head is not None and ("kind" not in run.task.plain(run.labels) or head.pooling == "tokens"):
            raise UserError(
                f"the head of this run, head(pooling={head.pooling!r}), has no place in a plain model for {run.task.name}; "
                "train it with head(pooling='own') if the architecture has a head, or load it as a graft with "
                "graftkit.load(model, RUN/graft)."
            )
        if not run.task.trains:
            raise UserError(
                f"{run.task.name}() trained nothing, so there is nothing to export: {run.model} is the plain model."
            )

    def native(self, run: Exportable) -> bool:
        return head_of(run.graft) is None

    def write(self, run: Exportable, folder: Path) -> None:
        model: Any = run.graft.model
        if self.native(run):
            _describe_outputs(model.config, run)
        else:
            _write_head(run, folder)
        remove_additions(model, run.graft.name)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.config.use_cache = True
        model.save_pretrained(folder)
        run.backbone.processor.save_pretrained(folder)

    @torch.no_grad()
    def outputs(self, run: Exportable, folder: Path, sample: Sample) -> list[Tensor]:
        if (folder / SCRIPT).is_file():
            values, count = sample.dataset.examples.values, len(sample.rows)
            pairs = values.get("text_pair")
            script = runpy.run_path(str(folder / SCRIPT), run_name="classifier")
            classifier = script["Classifier"](folder, device=run.device)
            found = classifier.logits(values["text"][:count], pairs and pairs[:count])
            return list(found.cpu().unsqueeze(1))
        own = type(run.graft.model)
        kind: Any = getattr(transformers, own.__name__, own)  # transformers lacks those of graftkit itself
        model = kind.from_pretrained(folder, local_files_only=True).to(run.device)
        return logits(model.eval(), sample, run.device)

    def how(self, run: Exportable, to: Path) -> str:
        if not self.native(run):
            asked = "'a text' 'its pair'" if "text_pair" in run.columns else "'a text'"
            return f"python {to / SCRIPT} {asked}   (or import Classifier from it; it needs torch and transformers only)"
        kind, place = type(run.graft.model), json.dumps(str(to))
        name = kind.__name__
        if not hasattr(transformers, name):
            return f"{kind.__module__}.{name}.from_pretrained({place})"
        pipeline = _pipeline(name)
        if pipeline is None:
            return f"transformers.{name}.from_pretrained({place})"
        return f"transformers.pipeline({pipeline!r}, {place})"


def _describe_outputs(config: Any, run: Exportable) -> None:
    """Describe the outputs in a model's configuration."""
    names = run.task.output_names(run.labels) if run.task.head else ()
    if names:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
    plain = run.task.plain(run.labels)
    config.problem_type = plain.get("problem_type")
    if "how" in plain:
        config.graftkit = plain


def _write_head(run: Exportable, folder: Path) -> None:
    """Write the head, its description, and the script that applies it."""
    head = head_of(run.graft)
    assert head is not None
    tensors = dict(head.state_dict())
    write_tensors(folder / "head.safetensors", tensors)
    about = {
        "labels": list(run.labels),
        "pooling": head.pooling,
        "hidden": "hidden.weight" in tensors,
        "max_length": run.max_length,
        "pairs": "text_pair" in run.columns,
        **run.task.plain(run.labels),
    }
    write_json(folder / "head.json", about)
    code = Path(__file__).with_name(SCRIPT).read_text(encoding="utf-8")
    write_text(folder / SCRIPT, code)


def _pipeline(name: str) -> str | None:
    """Return the transformers pipeline for a model class, or None."""
    if name in MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES.values():
        return PIPELINES["AudioClassification"]  # wav2vec2 and similar models have classes "for sequences"
    return next((pipeline for ending, pipeline in PIPELINES.items() if name.endswith(ending)), None)
