"""The base class of methods, and the few pieces that methods are made of.

A method is a frozen dataclass of hyperparameters. `attach` places its new modules at sites of a backbone
and returns labels for the parameters to train; parameters without a label are frozen. New modules
are children of the module at their site and act through its forward hooks, so the base's own parameters keep
their names and values, and a base checkpoint loads before or after grafting.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graftkit.backbone import Backbone
from graftkit.backbone.walk import parameters_of
from graftkit.backbone.weights import multiply  # noqa: F401  (methods take it from here)
from graftkit.errors import NotFoldable, UserError, listing
from graftkit.methods.shared import sums
from graftkit.methods.shared.additions import Addition, OutputHead, new_parameter, place  # noqa: F401  (these too)
from graftkit.methods.shared.peft_reading import PeftReading
from graftkit.optim.labels import Group, Labels
from graftkit.recipe.catalogue import check_values, entry_name
from graftkit.recipe.expressions import as_expression, build, parse


@dataclass(frozen=True)
class Outputs:
    """The outputs that a task needs from a head, and facts from the model's folder, known before the model is loaded.

    `count`: number of outputs; `per_labels`: one for each label of the rows. `per_token`: outputs for each token.
    `native`: transformers has a class of this model with a head for the task. `own_module`: the model is a user's own
    module. `pooled`: the folder specifies how states are pooled.
    """

    task: str
    model: str
    count: int
    per_labels: bool = True
    per_token: bool = False
    native: bool = False
    own_module: bool = False
    pooled: bool = False


class Method:
    """Base of all methods. Subclasses are frozen dataclasses whose fields are declared with `option`."""

    peft_types: ClassVar[tuple[str, ...]] = ()  # PEFT types that `from_peft` reads
    # Properties of a method. The recipe reads these without importing the file, so they are plain values.
    aliases: ClassVar[tuple[str, ...]] = ()  # other names that recipes may use
    gives_outputs: ClassVar[bool] = False  # a head: it computes the outputs that a task needs
    # whether it trains parameters of the backbone itself; a mapping: the option values with which it does so
    # in addition to its own parameters
    frees_base: ClassVar[bool | dict[str, tuple]] = False
    covers: ClassVar[bool] = False  # trains the whole backbone from the first step
    updates_weights: ClassVar[bool] = False  # adds updates to weights (`updated_weights`) that stay frozen
    needs_base: ClassVar[bool] = False  # changes how other methods train the backbone; does nothing alone
    takes_out: ClassVar[bool] = False  # takes parameters of other methods out of training
    is_product: ClassVar[bool] = False  # an update s B A at each weight, and nothing else
    is_general: ClassVar[bool] = False  # messages recommend it if another method does not fit a module
    selects: ClassVar[bool] = False  # trains any part of the backbone that `sites` names
    trains_biases: ClassVar[bool] = False  # trains biases of the backbone, and nothing else
    starts_from_values: ClassVar[bool] = False  # its update starts as a part of the weight itself
    composes: ClassVar[bool] = False  # adds bottlenecks, of which several can be composed
    repeats: ClassVar[bool] = False  # may be written more than once in a sum
    # if several methods claim a parameter, the one with the lowest value gets it; with equal values, the sum is refused
    # 0: named parameters; 1: parameters that come along, such as biases beside an update; 2: the whole backbone
    yields: ClassVar[int] = 0
    # methods of a sum act from the lowest stage to the highest, whatever order they are written in: 0 updates weights,
    # 1 rescales them, 2 scales outputs by vectors, 3 inserts modules, 4 adds virtual tokens, 7 and 8 change the labels
    # of other methods, 9 is for heads
    stage: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_values(self)

    @property
    def name(self) -> str:
        """The name in recipes, which is that of the file."""
        return entry_name(type(self).__module__)

    def resolve(self, backbone: Backbone) -> Method:
        """Return the method with options that depend on the backbone or on other files filled in, before `attach`."""
        return self

    def for_outputs(self, outputs: Outputs) -> Method:
        """Return the method with the outputs of a task filled in. Raises `UserError` if the two do not fit."""
        return self

    def without_outputs(self) -> Method:
        """Undo `for_outputs`: return the method without options that depend on the rows."""
        return self

    def own_head(self, outputs: Outputs) -> str | None:
        """Return how the model's own head is used: 'replaced' by a new one, 'complete' (unchanged), or None: not at all."""
        return None

    def prepare(self, backbone: Backbone) -> None:
        """Replace modules of the base. In a sum, all methods are prepared before any is attached."""

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        """Place new modules, named after the graft; return labels for all parameters to train."""
        raise NotImplementedError

    def updated_weights(self, backbone: Backbone) -> set[str]:
        """Return the names of the base's parameters that stay frozen with an update beside them."""
        return set()

    def relabel(self, backbone: Backbone, labels: Labels) -> Labels:
        """Return the labels of all methods, changed after all are attached."""
        return labels

    def labels_at(self, backbone: Backbone, labels: Labels, step: int, epoch: float) -> Labels:
        """Return the labels of the parameters trained in a step (from 0) of an epoch (step / steps per epoch).

        These are all labels, unless a method unfreezes step by step. Labels may only be added over time, never removed.
        """
        return labels

    def check_steps(self, steps: int) -> None:
        """Raise `UserError` if the method cannot be trained in a run of that many steps."""

    @property
    def reads_gradients(self) -> bool:
        """Whether `after_step` may read the gradients of the step, so that they must be there until then."""
        return type(self).after_step is not Method.after_step

    def extra_loss(self, backbone: Backbone, graft: str) -> Tensor | None:
        """Return a scalar to add to the task's loss in each step, or None."""
        return None

    def after_step(self, backbone: Backbone, graft: str, step: int, steps: int) -> None:
        """Update the additions after optimizer step number `step`, from 1, of `steps`.

        The gradients of the step are still there. State kept between steps must be a buffer of an addition, so that
        checkpoints include it; non-persistent buffers are left out of the graft's folder.
        """

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        """Return new values of base parameters that merge this method's additions into the plain architecture.

        Raises `NotFoldable`, with the reason, if that is impossible.
        """
        raise NotFoldable(self.never_folds() or f"{self.name} cannot be folded.")

    def never_folds(self) -> str | None:
        """Return why no graft of this method can be folded; None if some or all can."""
        return None

    def gives_the_same(self, other: Method) -> bool:
        """Return whether two methods with equal parameters compute the same; options used only in training may differ."""
        return self == other

    def to_peft(self, backbone: Backbone, graft: str) -> PeftForm | None:
        """Return an equivalent PEFT configuration and tensors; None if PEFT cannot express the method."""
        return None

    @classmethod
    def reads_peft(cls, config: Mapping[str, Any]) -> bool:
        """Return whether `from_peft` reads an adapter of this configuration."""
        return config.get("peft_type") in cls.peft_types

    @classmethod
    def from_saved_modules(cls, backbone: Backbone, tensors: Mapping[str, Tensor]) -> Method | None:
        """Return the method for base modules that PEFT saved beside an adapter; None if this class trains none of them.

        `tensors`: the tensors of `modules_to_save`, by parameter.
        """
        return None

    @classmethod
    def from_peft(cls, reading: PeftReading) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the options of this method, and its parameters by their names in a graft called 'default'.

        Takes its tensors out of `reading` and asks it for each field that changes the result; any leftover
        is refused. Write `sites` with `exactly`.
        """
        raise NotImplementedError

    def unpack(self, backbone: Backbone, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of `from_peft` by parameter, splitting tensors whose parts are known only on the backbone."""
        return tensors

    def stored(self) -> Method:
        """Return the method as it is saved beside its trained values: without options used only for initialisation."""
        return self

    def __add__(self, other: Method) -> Chain:
        return Chain((self,)) + other if isinstance(other, Method) else NotImplemented

    def __str__(self) -> str:
        return as_expression(self)


@dataclass(frozen=True)
class PeftForm:
    """A graft in PEFT's format: the configuration, and the tensors by PEFT's keys."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Chain(Method):
    """A sum of methods. `arranged` puts them into the order in which they act, whatever order they are written in."""

    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        sums.refuse_repeats(self.methods)
        sums.refuse_heads(self.methods)

    def arranged(self) -> Chain:
        return Chain(sums.arranged(self.methods))

    def __add__(self, other: Method) -> Chain:
        if not isinstance(other, Method):
            return NotImplemented
        return Chain(self.methods + (other.methods if isinstance(other, Chain) else (other,)))

    def __str__(self) -> str:
        return " + ".join(str(method) for method in self.methods)

    def for_outputs(self, outputs: Outputs) -> Chain:
        return Chain(tuple(method.for_outputs(outputs) for method in self.methods))

    def without_outputs(self) -> Chain:
        return Chain(tuple(method.without_outputs() for method in self.methods))

    def own_head(self, outputs: Outputs) -> str | None:
        return next(filter(None, (method.own_head(outputs) for method in self.methods)), None)

    def unpack(self, backbone: Backbone, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for method in self.methods:
            tensors = method.unpack(backbone, tensors)
        return tensors

    def stored(self) -> Chain:
        return Chain(tuple(method.stored() for method in self.methods))

    def attach(self, backbone: Backbone, graft: str, stored: bool = False) -> Labels:
        """Attach all methods in order. `stored`: the sum comes from a saved graft, so skip newer checks of sums."""
        for method in self.methods:
            with _named(method):
                method.prepare(backbone)
        claims = []
        for method in self.methods:
            with _named(method):
                claims.append((method, method.attach(backbone, graft)))
        if not stored:
            sums.refuse_redundant(claims)
        labels = sums.settle(claims, stored)
        removed: dict[str, str] = {}
        for method in self.methods:
            with _beside(method, self.methods):
                kept = method.relabel(backbone, labels)
            removed |= {name: method.name for name in labels if name not in kept}
            labels = kept
        idle = backbone.idle
        order = {name: i for i, name in enumerate(parameters_of(backbone.model))}
        labels = {name: labels[name] for name in sorted(labels, key=order.__getitem__) if name not in idle}
        if not stored:
            sums.refuse_silent(claims, labels, removed, backbone)
            sums.refuse_useless(claims, backbone, labels)
        return labels

    def labels_at(self, backbone: Backbone, labels: Labels, step: int, epoch: float) -> Labels:
        for method in self.methods:
            labels = method.labels_at(backbone, labels, step, epoch)
        return labels

    def check_steps(self, steps: int) -> None:
        for method in self.methods:
            method.check_steps(steps)

    def extra_loss(self, backbone: Backbone, graft: str) -> Tensor | None:
        losses = [method.extra_loss(backbone, graft) for method in self.methods]
        given = [loss for loss in losses if loss is not None]
        return torch.stack(given).sum() if given else None

    def after_step(self, backbone: Backbone, graft: str, step: int, steps: int) -> None:
        for method in self.methods:
            method.after_step(backbone, graft, step, steps)


@contextmanager
def _named(method: Method) -> Iterator[None]:
    """Prefix errors raised inside with the method's name."""
    try:
        yield
    except NotFoldable:
        raise
    except UserError as error:
        if f"{method.name}(" in str(error):
            raise
        raise UserError(f"{method.name}(): {error}") from None


@contextmanager
def _beside(method: Method, methods: Iterable[Method]) -> Iterator[None]:
    """Add the names of the other methods to errors that a method raises because of them."""
    try:
        yield
    except UserError as error:
        others = [f"{other.name}()" for other in methods if other.name != method.name]
        unnamed = [name for name in dict.fromkeys(others) if name[:-1] not in str(error)]
        raise UserError(
            f"{error} It is combined with {listing(unnamed)}." if unnamed else str(error)
        ) from None


def read(expression: str) -> Chain:
    """Return the method that an expression such as `lora(rank=8) + head()` describes."""
    return Chain(tuple(build(parse(expression, "method"), "method")))


def as_chain(method: Method | str) -> Chain:
    """Return a method, a chain or an expression as a chain."""
    if isinstance(method, str):
        return read(method)
    return method if isinstance(method, Chain) else Chain((method,))


def exactly(names: Iterable[str]) -> str:
    """Return a selection of exactly the modules with these names."""
    return "re:" + "|".join(re.escape(name) for name in dict.fromkeys(names))


def labels_of(backbone: Backbone, module_name: str, group: Group) -> Labels:
    """Return the same label for each parameter of a module and its submodules."""
    prefix = f"{module_name}." if module_name else ""
    return {name: group for name in parameters_of(backbone.model) if name.startswith(prefix)}


def refuse_unless(labels: Mapping[str, Group], message: str) -> None:
    """Raise `UserError` if a method found nothing to train."""
    if not labels:
        raise UserError(message)
