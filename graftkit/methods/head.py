"""A classification head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone, Site
from graftkit.backbone.anatomy import is_conv, is_linear, is_norm
from graftkit.backbone.backbone import widths
from graftkit.backbone.pooling import (
    default_pooling,
    has_class_token,
    is_convolutional,
    maps_to_features,
    mask_of_states,
    named,
    pool,
    shifted,
    takes_decoder_inputs,
)
from graftkit.errors import UserError, listing
from graftkit.methods.base import Method, OutputHead, Outputs, labels_of, place
from graftkit.methods.shared.mixtures import Mixture
from graftkit.optim.labels import Group, Labels
from graftkit.recipe.catalogue import option

IGNORED = -100  # the label of what has no part in the loss, as in all of transformers


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
        head.shifts = takes_decoder_inputs(backbone.model) and hasattr(backbone.model, "_shift_right")
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


class PooledHead(OutputHead):
    """Turns the states of the model it is placed on into logits, and labels into a loss.

    The states are the model's output, or those of a module in it (see `read_from`); 'stacked': its logits.
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
        self.shifts = False  # the input of an encoder-decoder is its decoder's too
        self.elsewhere = ""  # name of the module that gives the states, where it is not the model itself
        self.given: dict[str, Any] = {}
        self.seen: Tensor | None = None

    def read_from(self, module: nn.Module, its_input: bool, name: str) -> None:
        """Take the states from the module of that name in the model: its output, or its input."""
        self.elsewhere = name
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
        """Features (batch, width), for 'tokens' (batch, length, width), in fp32 of what a module gave for `given`."""
        states: Tensor = output if isinstance(output, Tensor) else output[0]
        with torch.autocast(states.device.type, enabled=False):
            result = self._pooled(module, states, output, given)
        dimensions, each = (3, "token") if self.pooling == "tokens" else (2, "row")
        if result.dim() != dimensions or result.shape[-1] != self.width:
            raise UserError(
                f"head(pooling={self.pooling!r}) was made for {self.width} features a {each}, but {type(module).__name__} gives "
                f"{list(states.shape)}; give the module an attribute hidden_size that says its width, or use another "
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
    def alike(self) -> Any:
        return self.pooling, self.elsewhere

    @classmethod
    def mix(cls, members: Sequence[Any], weights: Tensor, site: nn.Module) -> Any:
        return HeadMixture(members, weights)

    def scores(self, states: Tensor) -> Tensor:
        """How much each place (batch, length) of states (batch, length, width) counts, before the softmax."""
        return self.query(states).squeeze(-1)

    def logits(self, features: Tensor) -> Tensor:
        """Logits (batch, classes) of features (batch, width), or of each token: (batch, length, classes)."""
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
        self.__dict__["caller"] = site  # not as a child of its own
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
                f"head(pooling={self.pooling!r}) reads what goes through {self.elsewhere!r} of {type(site).__name__}, but that "
                "was not called; use pooling='own' or 'stacked', or leave out of the module what it does not use."
            )
        with torch.autocast(features.device.type, enabled=False):
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
    """A head for each row, or one for all: the mean of the heads of several grafts by their weights."""

    def __init__(self, members: Sequence[PooledHead], weights: Tensor) -> None:
        super().__init__(weights)
        shapes = {tuple((name, p.shape) for name, p in member.named_parameters()) for member in members}
        if len(shapes) > 1:
            classes = listing(str(member.output.out_features) for member in members)
            raise NotImplementedError(f"the heads have {classes} classes, or hidden layers of their own")
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
