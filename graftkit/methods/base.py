"""What a method is, and the few pieces that methods are made of.

A method is a frozen dataclass of hyperparameters. `attach` places its new modules at sites of a backbone
and returns labels for the parameters that are to be trained; what no method labels is frozen. New modules
are children of the module at their site and act through its forward hooks, so the base's own parameters keep
their names and values and a base checkpoint loads before or after grafting.
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
    """What a task wants of a head, and what the model's folder says, before the model is loaded.

    `count`: of outputs; `per_labels`: one for each label of the rows. `per_token`: answers for each token. `native`:
    transformers has a class of this model with a head for the task. `own_module`: the model is a user's own module.
    `pooled`: the folder says how states are pooled.
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

    peft_types: ClassVar[tuple[str, ...]] = ()  # kinds of PEFT's adapters that `from_peft` reads
    # What a method says of itself. The recipe reads these without importing the file, so they are plain values.
    gives_outputs: ClassVar[bool] = False  # a head: what it adds gives the outputs that a task asks for
    # whether it trains parameters of the backbone itself; a mapping: with which values of its options it does so
    # beside what it adds
    frees_base: ClassVar[bool | dict[str, tuple]] = False
    covers: ClassVar[bool] = False  # trains the whole backbone, and that from the first step
    updates_weights: ClassVar[bool] = False  # adds to weights (`updated_weights`), which stay as they are
    needs_base: ClassVar[bool] = False  # changes how others train the backbone, and is nothing without them
    takes_out: ClassVar[bool] = False  # takes parameters of others out of training
    is_product: ClassVar[bool] = False  # an update s B A of its A and B at each weight, and nothing else
    is_general: ClassVar[bool] = False  # what messages recommend where a method does not fit a module
    selects: ClassVar[bool] = False  # trains any parts of the backbone that `sites` names
    trains_biases: ClassVar[bool] = False  # of the backbone, and nothing else
    starts_from_values: ClassVar[bool] = False  # its update begins as a part of the weight itself
    composes: ClassVar[bool] = False  # it places bottlenecks, of which several can be composed
    repeats: ClassVar[bool] = False  # may be written more than once in a sum
    # where several methods claim a parameter, that which yields least has it; alike, they are refused
    # 0: what is named; 1: what comes along, such as the biases beside an update; 2: the whole backbone
    yields: ClassVar[int] = 0
    # methods of a sum act from the lowest stage to the highest, however it is written: 0 for weights, 1 for what
    # rescales them, 2 for vectors at outputs, 3 for modules in between, 4 for virtual tokens, 7 and 8 for those that
    # change the labels of others, 9 for heads
    stage: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_values(self)

    @property
    def name(self) -> str:
        """The name in recipes: that of the file."""
        return entry_name(type(self).__module__)

    def resolve(self, backbone: Backbone) -> Method:
        """The method with what only the backbone or other files tell written into its options, before `attach`."""
        return self

    def for_outputs(self, outputs: Outputs) -> Method:
        """The method with what a task needs of a head filled in. Raises `UserError` where they do not fit."""
        return self

    def without_outputs(self) -> Method:
        """The method without what `for_outputs` filled in, which other rows may say otherwise."""
        return self

    def own_head(self, outputs: Outputs) -> str | None:
        """How the head that the model brings is used: 'replaced' by one of other outputs, 'complete' as it is, or not."""
        return None

    def prepare(self, backbone: Backbone) -> None:
        """Put new modules in the place of the base's own. In a sum this comes before any method is attached."""

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        """Place new modules, named after the graft; return labels for all parameters to be trained."""
        raise NotImplementedError

    def updated_weights(self, backbone: Backbone) -> set[str]:
        """Names of the base's parameters that stay as they are and have an update beside them."""
        return set()

    def relabel(self, backbone: Backbone, labels: Labels) -> Labels:
        """Change the labels of all methods after they are attached."""
        return labels

    def labels_at(self, backbone: Backbone, labels: Labels, step: int, epoch: float) -> Labels:
        """Those of the labels whose parameters are trained in a step (from 0) of an epoch (step / steps an epoch).

        All of them, where a method does not free them one after another. Labels may only come, never go.
        """
        return labels

    def check_steps(self, steps: int) -> None:
        """Raise `UserError` where a run of so many steps is not one that the method can be trained in."""

    def extra_loss(self, backbone: Backbone, graft: str) -> Tensor | None:
        """What is added to the task's loss in each step, a scalar; None for nothing."""
        return None

    def after_step(self, backbone: Backbone, graft: str, step: int, steps: int) -> None:
        """Change what was added once optimizer step number `step` of `steps`, from 1, is taken.

        The gradients of the step are still there. What is remembered from one step to the next is a buffer of an
        addition, so that checkpoints keep it; one that is not persistent is left out of the graft's folder.
        """

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        """New values of base parameters that melt this method's additions into the plain architecture.

        Raises `NotFoldable` with the reason where there are none.
        """
        raise NotFoldable(f"{self.name} cannot be folded.")

    def gives_the_same(self, other: Method) -> bool:
        """Whether two methods with the same parameters compute the same; what has a part in training alone may differ."""
        return self == other

    def to_peft(self, backbone: Backbone, graft: str) -> PeftForm | None:
        """The PEFT configuration and tensors that mean the same; None where PEFT cannot express it."""
        return None

    @classmethod
    def reads_peft(cls, config: Mapping[str, Any]) -> bool:
        """Whether `from_peft` reads an adapter of this configuration."""
        return config.get("peft_type") in cls.peft_types

    @classmethod
    def from_saved_modules(cls, backbone: Backbone, tensors: Mapping[str, Tensor]) -> Method | None:
        """The method that trains what PEFT saved of the base beside an adapter; None where it trains none of it.

        `tensors`: by parameter, all that `modules_to_save` stands for.
        """
        return None

    @classmethod
    def from_peft(cls, reading: PeftReading) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The options of this method, and its parameters by the names they have in a graft called 'default'.

        Takes its tensors out of `reading` and asks it for each field that changes the result; what is left
        over is refused. `sites` is best written with `exactly`.
        """
        raise NotImplementedError

    def unpack(self, backbone: Backbone, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of `from_peft` by parameter, where PEFT keeps in one what has a name on this backbone only."""
        return tensors

    def stored(self) -> Method:
        """The method as it is written beside its trained values: without what is needed only to start."""
        return self

    def __add__(self, other: Method) -> Chain:
        return Chain((self,)) + other if isinstance(other, Method) else NotImplemented

    def __str__(self) -> str:
        return as_expression(self)


@dataclass(frozen=True)
class PeftForm:
    """A graft as PEFT writes it: the configuration and the tensors by PEFT's keys."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Chain(Method):
    """Several methods. `arranged` has them in the order in which they act, whatever the one in which they are written."""

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
        """Attach all in order. `stored`: as the sum was trained once, though it would be refused today."""
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
        order = {name: i for i, (name, _) in enumerate(backbone.model.named_parameters())}
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
    """What a method refuses inside is told under its name."""
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
    """What a method refuses because of those beside it names these too."""
    try:
        yield
    except UserError as error:
        others = [f"{other.name}()" for other in methods if other.name != method.name]
        unnamed = [name for name in dict.fromkeys(others) if name[:-1] not in str(error)]
        raise UserError(
            f"{error} Beside it there is {listing(unnamed)}." if unnamed else str(error)
        ) from None


def read(expression: str) -> Chain:
    """The method that an expression such as `lora(rank=8) + head()` describes."""
    return Chain(tuple(build(parse(expression, "method"), "method")))


def as_chain(method: Method | str) -> Chain:
    """Any way of writing a method as a chain."""
    if isinstance(method, str):
        return read(method)
    return method if isinstance(method, Chain) else Chain((method,))


def exactly(names: Iterable[str]) -> str:
    """The selection of the modules of these names and no others."""
    return "re:" + "|".join(re.escape(name) for name in dict.fromkeys(names))


def labels_of(backbone: Backbone, module_name: str, group: Group) -> Labels:
    """The same label for each parameter under a module."""
    prefix = f"{module_name}." if module_name else ""
    return {name: group for name, _ in backbone.model.named_parameters() if name.startswith(prefix)}


def refuse_unless(labels: Mapping[str, Group], message: str) -> None:
    """Raise `UserError` where a method found nothing to train."""
    if not labels:
        raise UserError(message)
