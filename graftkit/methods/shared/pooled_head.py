"""A head on pooled states, or on the states of each token, as a module of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone.pooling import maps_to_features, mask_of_states, named, pool, shifted
from graftkit.backbone.weights import without_autocast
from graftkit.errors import UserError, listing
from graftkit.methods.shared.additions import OutputHead
from graftkit.methods.shared.mixtures import Mixture

IGNORED = -100  # label of tokens without a loss, as everywhere in transformers


class PooledHead(OutputHead):
    """Turns the states of the model it is placed on into logits, and labels into a loss.

    The states are the model's output, or that of a module in it (see `read_from`); for 'stacked', its logits.
    """

    survives_fold = lone = True

    def __init__(self, width: int, classes: int, pooling: str, hidden: int, dropout: float) -> None:
        super().__init__()
        self.pooling = pooling
        self.width = width
        self.per_token, self.steady = pooling == "tokens", pooling != "attention"
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
        self.shifts = False  # the decoder of an encoder-decoder also reads the encoder's input
        self.elsewhere = ""  # name of the module that computes the states, if it is not the model itself
        self.reads_input = False  # of that module, not its output
        self.given: dict[str, Any] = {}
        self.seen: Tensor | None = None

    def read_from(self, module: nn.Module, its_input: bool, name: str) -> None:
        """Take the states from the output, or the input, of a module in the model."""
        self.elsewhere, self.reads_input = name, its_input
        if its_input:
            handle: Any = module.register_forward_pre_hook(self._see_input)
        else:
            handle = module.register_forward_hook(self._see_output, with_kwargs=True)
        self.__dict__["handles"].append(handle)

    def _see_input(self, module: nn.Module, args: tuple) -> None:
        if self.active:
            self.seen = self.features(self.__dict__["caller"], args[0], self.given)

    def _see_output(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self.active:
            self.seen = self.features(module, output, named(module, args, kwargs))

    def features(self, module: nn.Module, output: Any, given: dict[str, Any]) -> Tensor:
        """Return fp32 features (batch, width), for 'tokens' (batch, length, width), of a module's output for `given`."""
        states: Tensor = output if isinstance(output, Tensor) else output[0]
        with without_autocast(states):
            result = self._pooled(module, states, output, given)
        dimensions, each = (3, "token") if self.pooling == "tokens" else (2, "row")
        if result.dim() != dimensions or result.shape[-1] != self.width:
            raise UserError(
                f"head(pooling={self.pooling!r}) expects {self.width} features per {each}, but {type(module).__name__} "
                f"returned {list(states.shape)}; set the module's attribute hidden_size to its width, or use another "
                "pooling."
            )
        return result

    def _pooled(self, module: nn.Module, states: Tensor, output: Any, given: dict[str, Any]) -> Tensor:
        if states.dim() == 4:
            return maps_to_features(states, output)
        states = states.float()
        if states.dim() != 3 or self.pooling in ("stacked", "tokens"):
            return states
        mask = mask_of_states(module, states, given)
        if self.pooling != "attention":
            return pool(states, mask, self.pooling)
        scores = self.acting.scores(states)
        if mask is not None:
            scores = scores.masked_fill(mask == 0, torch.finfo(states.dtype).min)
        return (states * scores.softmax(dim=1).unsqueeze(-1)).sum(dim=1)

    @property
    def reads(self) -> str:
        return f"{self.pooling} {self.shifts} {self.elsewhere} {self.reads_input}"

    @property
    def alike(self) -> Any:
        return self.pooling, self.elsewhere

    @classmethod
    def mix(cls, members: Sequence[Any], weights: Tensor, site: nn.Module) -> Any:
        return HeadMixture(members, weights)

    def scores(self, states: Tensor) -> Tensor:
        """Return the weight of each position (batch, length) of states (batch, length, width), before the softmax."""
        return self.query(states).squeeze(-1)

    def logits(self, features: Tensor) -> Tensor:
        """Return logits (batch, classes) for features (batch, width); (batch, length, classes) for 'tokens'."""
        if hasattr(self, "hidden"):
            features = nn.functional.gelu(self.hidden(features))
        return self.output(self.dropout(features))

    def _before(self, site: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        return self.before(site, args, kwargs) if self.active else None

    def _after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        return self.after(site, args, kwargs, output) if self.active else output

    def before(self, site: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        self.labels, self.items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
        kept = {key: value for key, value in kwargs.items() if key not in ("labels", "num_items_in_batch")}
        self.given = given = named(site, args, kept)
        self.__dict__["caller"] = site  # not a child
        from_text = self.shifts and given.get("input_ids") is not None
        if from_text and not any(name.startswith("decoder_") for name in given):
            kept["decoder_input_ids"] = shifted(given["input_ids"], site.config)
            kept["decoder_attention_mask"] = given.get("attention_mask")
        return args, kept

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

        features = self.seen if self.elsewhere else self.features(site, output, named(site, args, kwargs))
        if features is None:
            raise UserError(
                f"head(pooling={self.pooling!r}) reads the states at {self.elsewhere!r} of {type(site).__name__}, which was "
                "not called; use pooling='own' or 'stacked', or remove the unused part from the module."
            )
        with without_autocast(features):
            logits = self.acting.logits(features)
        loss = None
        if self.labels is not None:
            rows, labels = logits.flatten(0, -2), self.labels.flatten()
            summed = nn.functional.cross_entropy(rows, labels, ignore_index=IGNORED, reduction="sum")
            loss = summed / (self.items or (labels != IGNORED).sum().clamp(min=1))
        self.labels = self.items = self.seen = None
        self.given = {}
        del self.__dict__["caller"]
        output_class = TokenClassifierOutput if self.pooling == "tokens" else SequenceClassifierOutput
        return output_class(loss=loss, logits=logits)  # type: ignore[arg-type]


class HeadMixture(Mixture):
    """The weighted mean of the heads of several grafts, for each row or for all rows."""

    def __init__(self, members: Sequence[PooledHead], weights: Tensor) -> None:
        super().__init__(weights)
        shapes = {tuple((name, p.shape) for name, p in member.named_parameters()) for member in members}
        if len(shapes) > 1:
            classes = listing(str(member.output.out_features) for member in members)
            raise NotImplementedError(f"the heads have {classes} classes, or different hidden layers")
        total = weights.sum(dim=1, keepdim=True)
        if bool((total == 0).any()):
            rows = listing(map(str, (total == 0).flatten().nonzero().flatten().tolist()))
            raise NotImplementedError(
                f"row {rows} has no head" if len(weights) > 1 else "the weights of the heads add up to 0"
            )
        self.parts = {
            name: torch.einsum(
                "rg,g...->r...", weights / total, torch.stack([m.get_parameter(name) for m in members])
            )
            for name, _ in members[0].named_parameters()
        }

    def scores(self, states: Tensor) -> Tensor:
        self.check(states)
        return (states * self.parts["query.weight"]).sum(dim=-1)

    def logits(self, features: Tensor) -> Tensor:
        self.check(features)
        if "hidden.weight" in self.parts:
            features = nn.functional.gelu(self._map("hidden", features))
        return self._map("output", features)

    def _map(self, name: str, x: Tensor) -> Tensor:
        tokens, weight = (x if x.dim() == 3 else x.unsqueeze(1)), self.parts[f"{name}.weight"]
        product = tokens @ weight.mT + self.parts[f"{name}.bias"].unsqueeze(1)
        return product if x.dim() == 3 else product.squeeze(1)
