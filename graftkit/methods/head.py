"""A classification head."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.anatomy import features as widths
from graftkit.backbone.anatomy import is_linear
from graftkit.catalogue import option
from graftkit.errors import UserError
from graftkit.methods.base import Addition, Group, Labels, Method, labels_of, place


@dataclass(frozen=True)
class Head(Method):
    """A new head on pooled features of the last hidden states, or the architecture's own head.

    `pooling`: 'own' (the head that the model class brings), 'cls', 'mean' (over tokens that are not padding),
    'last' (the last token that is not padding), 'attention' (a learned weighted mean), or 'auto': what a
    sentence-transformers folder says, else 'own', else 'last' for causal models and 'cls' for the others.
    Parameters: classes * (width + 1), with a hidden layer also hidden * (width + 1).
    """

    classes: int | None = option(None, "number of outputs; the task knows it", at_least=1)
    pooling: str = option(
        "auto",
        "how token states become one vector",
        choices=("auto", "own", "cls", "mean", "last", "attention"),
    )
    hidden: int = option(0, "width of a hidden layer; 0 for none", at_least=0)
    dropout: float = option(0.1, "dropout on pooled features; 'own' has the model's", at_least=0, below=1)
    lr: float | None = option(None, "learning rate; null means 0.005", above=0)

    def resolve(self, backbone: Backbone) -> Head:
        """The same head with its pooling chosen."""
        if self.pooling != "auto":
            return self
        if any(site.role == "head" for site in backbone.sites) and not self.hidden:
            choice = "own"
        else:
            choice = backbone.pooling or ("last" if backbone.is_decoder else "cls")
        return dataclasses.replace(self, pooling=choice)

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        if self.classes is None:
            raise UserError("head() needs the number of outputs: head(classes=3).")
        group = Group("head", self.lr or 5e-3, self.name, self.lr is not None)
        if self.pooling == "own":
            if self.hidden:
                raise UserError(
                    "head(pooling='own') has the layers that the architecture gives it, so hidden has no part in it; "
                    "use pooling='mean', 'cls' or 'last' with it."
                )
            return self._use_own(backbone, group)
        name = f"head_{graft}"
        head = PooledHead(backbone.hidden_size, self.classes, self.pooling, self.hidden, self.dropout)
        place(backbone.model, name, head)
        return labels_of(backbone, name, group)

    def _use_own(self, backbone: Backbone, group: Group) -> Labels:
        sites = [site for site in backbone.sites if site.role == "head"]
        maps = [site for site in sites if is_linear(site.module)]
        if not maps:
            raise UserError(
                f"{backbone.source} has no head of its own; use pooling='mean', 'cls', 'last' or 'attention'."
            )
        last = maps[-1]
        inputs, outputs = widths(last.module)
        if outputs != self.classes:
            assert self.classes is not None
            old = last.module
            new = nn.Linear(inputs, self.classes, getattr(old, "bias", None) is not None)
            new.to(device=old.weight.device, dtype=old.weight.dtype)  # type: ignore[arg-type, union-attr, call-overload]
            nn.init.normal_(new.weight, std=0.02)
            if new.bias is not None:
                nn.init.zeros_(new.bias)
            parent, _, leaf = last.name.rpartition(".")
            setattr(backbone.module(parent), leaf, new)
            backbone.sites = tuple(
                dataclasses.replace(site, module=new) if site is last else site for site in backbone.sites
            )
            config = getattr(backbone.model, "config", None)
            if config is not None:
                config.num_labels = self.classes
            if hasattr(backbone.model, "num_labels"):
                backbone.model.num_labels = self.classes  # type: ignore[assignment]
        # transformers' classification losses are means of what they are given: Trainer has to average them
        backbone.model.accepts_loss_kwargs = False  # type: ignore[assignment]
        labels: Labels = {}
        for site in sites:
            labels |= labels_of(backbone, site.name, group)
        # a pooler that the weights lack is random: train it
        labels |= {name: group for name in backbone.missing if name in backbone.base_parameters}
        return labels

    def relabel(self, backbone: Backbone, labels: Labels) -> Labels:
        """A pooler that this head passes by has no part in the output, so it cannot be trained."""
        if self.pooling == "own":
            return labels
        unused = {site.name for site in backbone.sites if site.role == "pooler"}
        return {name: group for name, group in labels.items() if name.rpartition(".")[0] not in unused}

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        """A head stays on top: there is nothing in the plain architecture that it could melt into."""
        return {}


class PooledHead(Addition):
    """Turns the last hidden states of the model it is placed on into logits, and labels into a loss."""

    survives_fold = True

    def __init__(self, width: int, classes: int, pooling: str, hidden: int, dropout: float) -> None:
        super().__init__()
        self.pooling = pooling
        if pooling == "attention":
            self.query = nn.Linear(width, 1, bias=False)
            nn.init.normal_(self.query.weight, std=0.02)
        if hidden:
            self.hidden = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden or width, classes)
        nn.init.normal_(self.output.weight, std=0.02)
        nn.init.zeros_(self.output.bias)
        self.labels: Any = None
        self.items: Any = None

    def features(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """Pooled features (batch, width) of states (batch, length, width), in fp32; mask is 1 on real tokens."""
        states = states.float()
        if states.dim() == 2:
            return states
        if mask is None:
            mask = states.new_ones(states.shape[:2])
        if self.pooling == "cls":
            first = mask.long().argmax(dim=1)  # past the padding, where it is on the left
            return states[torch.arange(len(states), device=states.device), first]
        if self.pooling == "last":
            positions = torch.arange(mask.shape[1], device=mask.device)
            last = (positions * mask.long()).argmax(dim=1)
            return states[torch.arange(len(states), device=states.device), last]
        weights = mask.to(states.dtype)
        if self.pooling == "attention":
            scores = self.query(states).squeeze(-1).masked_fill(mask == 0, torch.finfo(states.dtype).min)
            weights = scores.softmax(dim=1)
            return (states * weights.unsqueeze(-1)).sum(dim=1)
        return (states * weights.unsqueeze(-1)).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp(min=1)

    def logits(self, features: Tensor) -> Tensor:
        """Logits (batch, classes) of features (batch, width)."""
        if hasattr(self, "hidden"):
            features = nn.functional.gelu(self.hidden(features))
        return self.output(self.dropout(features))

    def before(self, site: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        self.labels, self.items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
        kept = {key: value for key, value in kwargs.items() if key not in ("labels", "num_items_in_batch")}
        return args, kept

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        mask = kwargs.get("attention_mask")
        if mask is None and len(args) > 1:
            mask = inspect.signature(site.forward).bind(*args, **kwargs).arguments.get("attention_mask")
        states = output if isinstance(output, Tensor) else output[0]
        with torch.autocast(states.device.type, enabled=False):
            logits = self.logits(self.features(states, mask))
        loss = None
        if self.labels is not None:
            summed = nn.functional.cross_entropy(logits, self.labels, reduction="sum")
            loss = summed / (self.items if self.items is not None else len(logits))
        self.labels = self.items = None
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]
