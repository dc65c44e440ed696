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
from graftkit.errors import UserError
from graftkit.libraries import method_of
from graftkit.methods.base import Method, Outputs, labels_of, place
from graftkit.methods.shared.pooled_head import PooledHead
from graftkit.optim.labels import Group, Labels
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class Head(Method):
    """A new classification head: on pooled states, in place of the architecture's own head, or stacked on that.

    `pooling` says what it stands on. 'own': the head that the model brings, its last map (linear or a convolution)
    replaced where the number of classes differs. 'stacked': the outputs of the model's own head, which stays as it
    is, for example 1000 classes of ImageNet. Else on the states below any head: 'cls' (the first token), 'mean' (over
    tokens that are not padding, or over all places of a feature map), 'last' (the last token that is not padding),
    'attention' (a learned weighted mean) or 'tokens' (each token by itself, for tasks that answer for each). 'auto':
    what a sentence-transformers folder says, else 'own', else 'last' for causal models, 'cls' where a class token
    stands in front, 'mean' for the others.
    In a user's own module with a head, 'mean' is the mean of what comes into that head. An encoder with a decoder
    is pooled over the decoder's states; without decoder inputs it is given its own input, shifted by one.
    When: classes are predicted; alone it is the cheapest of all, since the backbone is computed once and kept.
    Parameters: classes * (width + 1), with a hidden layer hidden * (width + 1) + classes * (hidden + 1); 'attention'
    has width more. For 'stacked', width is the number of outputs of the old head.
    """

    gives_outputs: ClassVar[bool] = True
    frees_base: ClassVar[dict[str, tuple]] = {"pooling": ("own",)}
    stage: ClassVar[int] = 9

    classes: int | None = option(None, "number of outputs; the task knows it", at_least=1)
    pooling: str = option(
        "auto", "what the head stands on",
        choices=("auto", "own", "stacked", "cls", "mean", "last", "attention", "tokens"),
    )  # fmt: skip
    hidden: int = option(0, "width of a hidden layer; 0 for none", at_least=0)
    dropout: float = option(0.1, "dropout on pooled features; 'own' has the model's", at_least=0, below=1)
    lr: float | None = option(None, "learning rate; null means 0.005", above=0)

    def for_outputs(self, outputs: Outputs) -> Head:
        """The head with the number of classes; for a task that answers for each token, the head of each token."""
        if self.classes not in (None, outputs.count):
            needed = (
                "labels of the training rows"
                if outputs.per_labels
                else f"outputs that {outputs.task}() needs"
            )
            raise UserError(
                f"head(classes={self.classes}) does not fit the {outputs.count} {needed}; leave classes out, they are counted."
            )
        head = dataclasses.replace(self, classes=outputs.count)
        if not outputs.per_token and self.pooling == "tokens":
            raise UserError(
                f"head(pooling='tokens') answers for each token, but {outputs.task}() wants one answer for a row; use head(), "
                "or another pooling."
            )
        if outputs.per_token and self.pooling not in ("auto", "own", "tokens"):
            raise UserError(
                f"head(pooling={self.pooling!r}) gives one vector for a whole text, but this task answers for each token; "
                "use head(), or pooling='own' or 'tokens'."
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
        """The same head with its pooling chosen."""
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
                    f"head(pooling='stacked'): the weights of {backbone.source!r} hold no trained {last.name!r} to stack "
                    "on; use head() without pooling='stacked'."
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
                module, reads_input, next(n for n, m in backbone.model.named_modules() if m is module)
            )
        return labels_of(backbone, name, group)

    def _refuse_pooling(self, backbone: Backbone) -> None:
        """Raise `UserError` for a pooling of tokens where there are none, or no class token."""
        is_text = getattr(backbone.model, "main_input_name", "input_ids") == "input_ids"
        if not is_text and takes_decoder_inputs(backbone.model):
            raise UserError(
                f"head(pooling={self.pooling!r}): the decoder of {backbone.source} needs a text, which a head for classes "
                "has not; attach to the encoder alone (model.get_encoder()), or use pooling='own'."
            )
        if self.pooling == "mean":
            return
        instead = "use pooling='mean'" + (", 'own' or 'stacked'" if own_maps(backbone) else "")
        what = f"head(pooling={self.pooling!r}) takes tokens, but {backbone.source}"
        if is_convolutional(backbone):
            raise UserError(f"{what} gives feature maps (batch, channels, height, width); {instead}.")
        if self.pooling == "tokens":
            return  # `features` sees whether there is a state for each
        if below_head(backbone)[1]:
            own = next(site.name for site in backbone.sites if site.role == "head")
            raise UserError(f"{what} gives its head {own!r} one vector a row; {instead}.")
        if self.pooling == "cls" and not is_text and not has_class_token(backbone):
            raise UserError(f"{what} puts no class token in front; {instead}.")

    def _own_map(self, backbone: Backbone) -> Site:
        """The last map of the model's own head. Raises `UserError` where there is none for classes."""
        maps = own_maps(backbone)
        if not maps:
            raise UserError(
                f"head(pooling={self.pooling!r}): {backbone.source} has no head of its own; use pooling='mean', 'cls', "
                "'last' or 'attention'."
            )
        if predicts_tokens(backbone):
            raise UserError(
                f"head(pooling={self.pooling!r}): {maps[-1].name!r} of {backbone.source} predicts tokens and is no head "
                "for classes; use pooling='last', 'mean' or 'cls', or load the model's class for classification."
            )
        return maps[-1]

    def prepare(self, backbone: Backbone) -> None:
        """The last map of the model's own head gets the number of outputs."""
        if self.classes is None:
            raise UserError("head() needs the number of outputs: head(classes=3).")
        if self.pooling != "own":
            return
        if self.hidden:
            raise UserError(
                "head(pooling='own') has the layers that the architecture gives it, so hidden has no part in it; "
                "use pooling='mean', 'cls' or 'last' with it."
            )
        last = self._own_map(backbone)
        if widths(last.module)[1] == self.classes:
            return
        if not last.name:
            raise UserError(
                f"head(pooling='own'): {backbone.source} is a single {type(last.module).__name__}, which cannot be replaced in "
                f"itself by one with {self.classes} outputs. Put it into a module, such as torch.nn.Sequential."
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
        # transformers' classification losses are means of what they are given: Trainer has to average them
        backbone.model.accepts_loss_kwargs = False  # type: ignore[assignment]
        heads = {site.name for site in backbone.sites if site.role == "head"}
        # a pooler that the weights lack is random: train it
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
        """What this head passes by, a pooler or the model's own head, has no part in the output: it cannot be trained."""
        if self.pooling in ("own", "stacked"):
            return labels
        passed = ("head",) if below_head(backbone)[1] else ("head", "pooler")
        unused = {site.name for site in backbone.sites if site.role in passed}
        return {name: group for name, group in labels.items() if name.rpartition(".")[0] not in unused}

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        """A head stays on top: there is nothing in the plain architecture that it could melt into."""
        return {}


def own_maps(backbone: Backbone) -> list[Site]:
    """The linear maps and convolutions of the model's own head, in order."""
    return [
        site for site in backbone.sites
        if site.role == "head" and (is_linear(site.module) or is_conv(site.module))
    ]  # fmt: skip


def predicts_tokens(backbone: Backbone) -> bool:
    """Whether the model's own head has an output for each token of the vocabulary."""
    maps = own_maps(backbone)
    vocabulary = getattr(getattr(backbone.model, "config", None), "vocab_size", None)
    return bool(maps) and widths(maps[-1].module)[1] == vocabulary


def below_head(backbone: Backbone) -> tuple[nn.Module, bool]:
    """The module whose output the states are; with True: whose input they are, as nothing below it gives them."""
    model = backbone.model
    heads = [site.module for site in backbone.sites if site.role == "head"]
    if not heads:
        return model, False
    base: Any = model.base_model if hasattr(model, "base_model_prefix") else model
    return (heads[0], True) if heads[0] in set(base.modules()) else (base, False)


def entering(module: nn.Module) -> int:
    """Width of what comes into a norm or a map."""
    return next(p.shape[-1] for p in module.parameters()) if is_norm(module) else widths(module)[0]


def new_map(site: Site, classes: int) -> nn.Module:
    """A random map like that of a head, with another number of outputs."""
    old: Any = site.module
    if is_conv(old):
        if old.groups != 1:
            raise UserError(
                f"head(pooling='own'): {site.name!r} is a convolution in {old.groups} groups, which cannot have {classes} "
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
