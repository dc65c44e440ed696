"""A classification head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from graftkit.backbone import Backbone, Site
from graftkit.backbone.anatomy import is_conv, is_linear, is_norm
from graftkit.backbone.backbone import widths
from graftkit.backbone.pooling import (
    default_pooling,
    has_class_token,
    is_convolutional,
    takes_decoder_inputs,
)
from graftkit.backbone.walk import modules_of
from graftkit.errors import UserError
from graftkit.libraries import method_of
from graftkit.methods.base import Method, Outputs, labels_of, place
from graftkit.methods.shared.pooled_head import PooledHead
from graftkit.optim.labels import Group, Labels
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class Head(Method):
    """Add a new classification head: on pooled states, in place of the architecture's own head, or stacked on it.

    `pooling` selects the input of the head. 'own': the model's own head, whose last layer (linear or a convolution) is
    replaced if the number of classes differs. 'stacked': the outputs of the model's own head, which stays unchanged,
    for example 1000 classes of ImageNet. The others use the states below any head: 'cls' (the first token), 'mean'
    (over tokens that are not padding, or over all positions of a feature map), 'last' (the last token that is not
    padding), 'attention' (a learned weighted mean) or 'tokens' (each token by itself, for token-level tasks). 'auto':
    the pooling of a sentence-transformers folder, else 'own', else 'last' for causal models, 'cls' if the model puts a
    class token first, and 'mean' otherwise.
    In your own module with a head, 'mean' averages the input of that head. An encoder-decoder is pooled over the
    decoder's states; if it gets no decoder inputs, the decoder reads the encoder's input, shifted by one.
    When: the task predicts classes; alone it is the cheapest method, since the backbone is computed once and cached.
    Parameters: classes * (width + 1), with a hidden layer hidden * (width + 1) + classes * (hidden + 1); 'attention'
    adds width. For 'stacked', width is the number of outputs of the old head.
    """

    gives_outputs: ClassVar[bool] = True
    frees_base: ClassVar[dict[str, tuple]] = {"pooling": ("own",)}
    stage: ClassVar[int] = 9

    classes: int | None = option(None, "number of outputs; null means as many as the task needs", at_least=1)
    pooling: str = option(
        "auto", "input of the head",
        choices=("auto", "own", "stacked", "cls", "mean", "last", "attention", "tokens"),
    )  # fmt: skip
    hidden: int = option(0, "width of a hidden layer; 0 for none", at_least=0)
    dropout: float = option(0.1, "dropout on pooled features; 'own' uses the model's", at_least=0, below=1)
    lr: float | None = option(None, "learning rate; null means 0.005", above=0)

    def for_outputs(self, outputs: Outputs) -> Head:
        """Return the head with its number of classes; for a token-level task, with a pooling that keeps the tokens."""
        if self.classes not in (None, outputs.count):
            needed = (
                "labels of the training rows"
                if outputs.per_labels
                else f"outputs that {outputs.task}() needs"
            )
            raise UserError(
                f"head(classes={self.classes}) does not fit the {outputs.count} {needed}; leave classes out to have them "
                "counted."
            )
        head = dataclasses.replace(self, classes=outputs.count)
        if not outputs.per_token and self.pooling == "tokens":
            raise UserError(
                f"head(pooling='tokens') gives an output for each token, but {outputs.task}() needs one for each row; use "
                "head(), or another pooling."
            )
        if outputs.per_token and self.pooling not in ("auto", "own", "tokens"):
            raise UserError(
                f"head(pooling={self.pooling!r}) gives one vector for a whole text, but this task needs an output for each "
                "token; use head(), or pooling='own' or 'tokens'."
            )
        if outputs.per_token and self.pooling == "auto" and (self.hidden or not outputs.native):
            return dataclasses.replace(head, pooling="tokens")
        return head

    def without_outputs(self) -> Head:
        return dataclasses.replace(self, classes=None)

    def own_head(self, outputs: Outputs) -> str | None:
        if outputs.own_module:
            return None
        pooling = self.pooling
        if pooling == "auto" and not self.hidden and outputs.native and not outputs.pooled:
            pooling = "own"
        if pooling not in ("own", "stacked"):
            return None
        if not outputs.native:
            others = "'tokens'" if outputs.per_token else "'mean', 'cls' or 'last'"
            raise UserError(
                f"transformers has no head for {outputs.model!r} that {outputs.task}() could use; use head(pooling={others})."
            )
        return "replaced" if pooling == "own" else "complete"

    def resolve(self, backbone: Backbone) -> Head:
        """Return the head with 'auto' replaced by the pooling that fits the backbone."""
        if self.pooling != "auto":
            return self
        if own_maps(backbone) and not predicts_tokens(backbone) and not self.hidden:
            choice = "own"
        else:
            choice = backbone.pooling or default_pooling(backbone)
        return dataclasses.replace(self, pooling=choice)

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        assert self.classes is not None
        group = Group("head", self.lr or 5e-3, self.name, self.lr is not None)
        if self.pooling == "own":
            return self._use_own(backbone, group)
        name = f"head_{graft}"
        if self.pooling == "stacked":
            last = self._own_map(backbone)
            if set(backbone.missing) & set(labels_of(backbone, last.name, group)):
                raise UserError(
                    f"head(pooling='stacked'): the weights of {backbone.source!r} contain no trained {last.name!r} to stack "
                    "a head on; use head() without pooling='stacked'."
                )
            head = PooledHead(widths(last.module)[1], self.classes, self.pooling, self.hidden, self.dropout)
            place(backbone.model, name, head)
            return labels_of(backbone, name, group)
        self._refuse_pooling(backbone)
        module, reads_input = below_head(backbone)
        width = entering(module) if reads_input else backbone.hidden_size
        head = PooledHead(width, self.classes, self.pooling, self.hidden, self.dropout)
        place(backbone.model, name, head)
        head.shifts = takes_decoder_inputs(backbone.model) and bool(method_of(backbone.model, "_shift_right"))
        if module is not backbone.model:
            head.read_from(
                module, reads_input, next(n for n, m in modules_of(backbone.model).items() if m is module)
            )
        return labels_of(backbone, name, group)

    def _refuse_pooling(self, backbone: Backbone) -> None:
        """Raise `UserError` for a pooling of tokens if the model has none, or for 'cls' without a class token."""
        is_text = getattr(backbone.model, "main_input_name", "input_ids") == "input_ids"
        if not is_text and takes_decoder_inputs(backbone.model):
            raise UserError(
                f"head(pooling={self.pooling!r}): the decoder of {backbone.source} needs a text, which a classification "
                "head cannot give it; attach to the encoder alone (model.get_encoder()), or use pooling='own'."
            )
        if self.pooling == "mean":
            return
        instead = "use pooling='mean'" + (", 'own' or 'stacked'" if own_maps(backbone) else "")
        what = f"head(pooling={self.pooling!r}) takes tokens, but {backbone.source}"
        if is_convolutional(backbone):
            raise UserError(f"{what} gives feature maps (batch, channels, height, width); {instead}.")
        if self.pooling == "tokens":
            return  # `features` checks that there is a state for each token
        if below_head(backbone)[1]:
            own = next(site.name for site in backbone.sites if site.role == "head")
            raise UserError(f"{what} gives its head {own!r} one vector a row; {instead}.")
        if self.pooling == "cls" and not is_text and not has_class_token(backbone):
            raise UserError(f"{what} puts no class token in front; {instead}.")

    def _own_map(self, backbone: Backbone) -> Site:
        """Return the last layer of the model's own head. Raises `UserError` if the model has no classification head."""
        maps = own_maps(backbone)
        if not maps:
            raise UserError(
                f"head(pooling={self.pooling!r}): {backbone.source} has no head of its own; use pooling='mean', 'cls', "
                "'last' or 'attention'."
            )
        if predicts_tokens(backbone):
            raise UserError(
                f"head(pooling={self.pooling!r}): {maps[-1].name!r} of {backbone.source} predicts tokens, not "
                "classes; use pooling='last', 'mean' or 'cls', or load the model's class for classification."
            )
        return maps[-1]

    def prepare(self, backbone: Backbone) -> None:
        """Give the last layer of the model's own head the right number of outputs."""
        if self.classes is None:
            raise UserError("head() needs the number of outputs: head(classes=3).")
        if self.pooling != "own":
            return
        if self.hidden:
            raise UserError(
                "head(pooling='own') has the layers that the architecture gives it, so hidden has no effect; "
                "use hidden with pooling='mean', 'cls' or 'last'."
            )
        last = self._own_map(backbone)
        if widths(last.module)[1] == self.classes:
            return
        if not last.name:
            raise UserError(
                f"head(pooling='own'): {backbone.source} is a single {type(last.module).__name__}, which cannot be replaced "
                f"by one with {self.classes} outputs. Wrap it in a module such as torch.nn.Sequential."
            )
        new = new_map(last, self.classes)
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

    def _use_own(self, backbone: Backbone, group: Group) -> Labels:
        # transformers' classification losses are means over their batch: Trainer has to average them
        backbone.model.accepts_loss_kwargs = False  # type: ignore[assignment]
        heads = {site.name for site in backbone.sites if site.role == "head"}
        # a pooler that is missing from the weights is random: train it
        return {
            name: group
            for name in backbone.base_parameters
            if name in backbone.missing or name.rpartition(".")[0] in heads
        }

    def gives_the_same(self, other: Method) -> bool:
        mine, others = (
            [getattr(one, name, None) for name in ("name", "classes", "pooling", "hidden")]
            for one in (self, other)
        )
        return mine == others

    @classmethod
    def from_saved_modules(cls, backbone: Backbone, tensors: Mapping[str, Tensor]) -> Head | None:
        maps = [site.name for site in backbone.sites if site.role == "head" and is_linear(site.module)]
        weight = tensors.get(f"{maps[-1]}.weight") if maps else None
        return cls(classes=len(weight), pooling="own") if weight is not None else None

    def relabel(self, backbone: Backbone, labels: Labels) -> Labels:
        """Drop the labels of parts that this head bypasses, a pooler or the model's own head: they get no gradient."""
        if self.pooling in ("own", "stacked"):
            return labels
        passed = ("head",) if below_head(backbone)[1] else ("head", "pooler")
        unused = {site.name for site in backbone.sites if site.role in passed}
        return {name: group for name, group in labels.items() if name.rpartition(".")[0] not in unused}

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        """Return nothing: a head stays on top, as the plain architecture has no weight to fold it into."""
        return {}


def own_maps(backbone: Backbone) -> list[Site]:
    """Return the linear layers and convolutions of the model's own head, in order."""
    return [
        site for site in backbone.sites
        if site.role == "head" and (is_linear(site.module) or is_conv(site.module))
    ]  # fmt: skip


def predicts_tokens(backbone: Backbone) -> bool:
    """Return whether the model's own head has an output for each token of the vocabulary."""
    maps = own_maps(backbone)
    vocabulary = getattr(getattr(backbone.model, "config", None), "vocab_size", None)
    return bool(maps) and widths(maps[-1].module)[1] == vocabulary


def below_head(backbone: Backbone) -> tuple[nn.Module, bool]:
    """Return the module whose output the states are; with True, the states are its input, as no module outputs them."""
    model = backbone.model
    heads = [site.module for site in backbone.sites if site.role == "head"]
    if not heads:
        return model, False
    base: Any = model.base_model if hasattr(model, "base_model_prefix") else model
    return (heads[0], True) if heads[0] in set(modules_of(base).values()) else (base, False)


def entering(module: nn.Module) -> int:
    """Return the width of the input of a norm, a linear layer or a convolution."""
    return next(p.shape[-1] for p in module.parameters()) if is_norm(module) else widths(module)[0]


def new_map(site: Site, classes: int) -> nn.Module:
    """Return a randomly initialised layer like the one at `site`, with another number of outputs."""
    old: Any = site.module
    if is_conv(old):
        if old.groups != 1:
            raise UserError(
                f"head(pooling='own'): {site.name!r} is a convolution with {old.groups} groups, which cannot have {classes} "
                "outputs; use pooling='mean' or 'stacked'."
            )
        new = type(old)(
            old.in_channels, classes, old.kernel_size, old.stride, old.padding, old.dilation,
            bias=old.bias is not None, padding_mode=old.padding_mode,
        )  # fmt: skip
    else:
        new = nn.Linear(widths(old)[0], classes, getattr(old, "bias", None) is not None)
    new.to(device=old.weight.device, dtype=old.weight.dtype)
    nn.init.normal_(new.weight, std=0.02)
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    return new
