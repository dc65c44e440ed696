"""A graft: what a method attached to a backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.anatomy import Added
from graftkit.backbone.walk import buffers_of, modules_of, parameters_of
from graftkit.grafts.contents import contents_of
from graftkit.grafts.fold import fold, unfold, unfolded
from graftkit.grafts.folder import write
from graftkit.grafts.guards import lone_places, own_trained, refuse_conflict, refuse_mixed
from graftkit.grafts.snapshot import Snapshot
from graftkit.grafts.still import KeepStatistics, moving_statistics
from graftkit.grafts.switch import swap_base
from graftkit.methods.base import Chain
from graftkit.optim.base import Optimizer, as_optimizer
from graftkit.optim.groups import hidden_matrices, param_groups
from graftkit.optim.labels import Labels
from graftkit.recipe.sections import DEFAULT_OPTIMIZER


@dataclasses.dataclass(frozen=True)
class PutAway:
    """The trained values of base parameters, new modules and settings of a disabled graft, by name."""

    tensors: dict[str, Tensor]
    modules: dict[str, nn.Module]
    settings: dict[str, Any]


class Graft:
    """The trained parameters on one backbone, with methods to save, fold, disable or remove them.

    `labels`: parameter name -> `Group` for each trained parameter. `model`: the backbone's model, changed in place. It
    is called as before and computes with the graft.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: Chain,
        labels: Labels,
        name: str,
        originals: dict[str, Tensor] | None,
        snapshot: Snapshot,
    ) -> None:
        self.backbone = backbone
        self.method = method
        self.labels = labels
        self.name = name
        self.snapshot = snapshot
        self.processor = backbone.processor  # as the method left it
        self.originals = originals
        self.replaced = snapshot.replaced(backbone.model)
        self.settings = snapshot.changed_settings(backbone.model)
        self.plain: dict[str, Tensor] | None = None
        self.active = True
        self.statistics = tuple(dict.fromkeys(moving_statistics(backbone, labels)))

    @property
    def model(self) -> nn.Module:
        return self.backbone.model

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, in model order."""
        return {name: p for name, p in parameters_of(self.model).items() if name in self.labels}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a graft folder, by name.

        The trained parameters, the running statistics that move with them, and frozen parameters and persistent buffers
        of the additions.
        """
        tensors: dict[str, Tensor] = dict(self.parameters)
        buffers = buffers_of(self.model)
        tensors |= {name: buffers[name] for name in self.statistics}
        for prefix, module in self.additions():
            tensors |= module.state_dict(prefix=f"{prefix}.", keep_vars=True)
        return tensors

    @property
    def state(self) -> dict[str, Tensor]:
        """`tensors`, and the buffers that additions need only for training: the tensors of a checkpoint, by name."""
        buffers = [
            (f"{prefix}.{name}", buffer)
            for prefix, module in self.additions()
            for name, buffer in buffers_of(module).items()
        ]
        return self.tensors | dict(buffers)

    def additions(self) -> Iterator[tuple[str, Added]]:
        """Yield (name, module) for each module that this graft added."""
        for name, module in modules_of(self.model).items():
            if isinstance(module, Added) and module.graft == self.name:
                yield name, module

    def param_groups(self, lr: float | None = None, weight_decay: float = 0.01) -> list[dict[str, Any]]:
        """Return parameter groups for a torch optimizer, one for each combination of learning rate and weight decay.

        `lr` replaces the learning rate of every method whose options do not name one. Norms and biases (one
        dimension) are not decayed. A group says whether its parameters are `hidden`: weights of the backbone's own
        linear layers, without embeddings and head; and in which of the backbone's `blocks` each parameter lies.
        """
        hidden, blocks = hidden_matrices(self.backbone), self.backbone.blocks
        return param_groups(self.parameters, self.labels, lr, weight_decay, hidden, blocks)

    def optimizer(
        self,
        lr: float | None = None,
        weight_decay: float = 0.01,
        optimizer: Optimizer | str = DEFAULT_OPTIMIZER,
    ) -> torch.optim.Optimizer:
        """Return an optimizer over `param_groups`: AdamW, or the one given by `optimizer`, such as 'galore(rank=8)'."""
        groups = self.param_groups(lr, weight_decay)
        chosen = as_optimizer(optimizer)
        chosen.check(groups)
        return chosen.make(groups)

    def labels_at(self, step: int, epoch: float) -> Labels:
        """Return the labels trained in a step (from 0) of an epoch (step / steps per epoch): all, for most methods.

        Your own loop trains all of them from the first step on, unless you set `requires_grad` for these alone.
        """
        return self.method.labels_at(self.backbone, self.labels, step, epoch)

    def extra_loss(self) -> Tensor | None:
        """Return the scalar that the method adds to the loss in each step; None for most methods."""
        return self.method.extra_loss(self.backbone, self.name)

    def after_step(self, step: int, steps: int) -> None:
        """Update methods with their own schedule, such as adalora. Call it after each optimizer step of your own
        loop, before gradients are set to zero.

        `step` counts from 1 to `steps`, the length of the whole training. Without the call, such methods keep their
        initial state.
        """
        self.method.after_step(self.backbone, self.name, step, steps)

    def requires_grad_(self, requires_grad: bool = True) -> Graft:
        """Train this graft and no other on its model; False freezes it. Return the graft."""
        for name, parameter in parameters_of(self.model).items():
            parameter.requires_grad_(requires_grad and name in self.labels)
        if requires_grad:
            for module in modules_of(self.model).values():
                if isinstance(module, KeepStatistics):
                    module.holds = module.graft == self.name
        return self

    def disable(self) -> None:
        """Make the model compute what the base computes, until `enable`. Trained values are kept."""
        if not self.active:
            return
        with unfolded(self.model, but=self) if self.plain is not None else nullcontext():
            swap_base(self)
            self.set_active(False)

    def enable(self) -> None:
        """Undo `disable`. Raises `UserError` if another active graft trains the same part of the base."""
        if self.active:
            return
        refuse_mixed(self.model)
        refuse_conflict(self.backbone, self.name, self.changes, self.replaced)
        swap_base(self)
        self.set_active(True)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Compute with the base inside a `with` block."""
        self.disable()
        try:
            yield
        finally:
            self.enable()

    def fold(self) -> nn.Module:
        """Merge the graft into the plain weights and return the model. `unfold` restores the base bit for bit.

        A head stays on top. Raises `NotFoldable`, before anything is changed, if a method cannot be folded.
        """
        if self.plain is not None:
            return self.model
        self.enable()
        fold(self)
        return self.model

    def unfold(self) -> None:
        """Undo `fold`; grafts folded later stay folded. Raises `NotFoldable` if that is impossible, and changes nothing."""
        if self.plain is None:
            return
        unfold(self)

    @property
    def changes(self) -> set[str]:
        """Names of the base's tensors and modules that the graft replaces with its own."""
        return (
            own_trained(self.backbone, self.labels, self.replaced)
            | set(self.replaced)
            | set(self.statistics)
            | lone_places(self.model, self.name)
        )

    @property
    def put_away(self) -> PutAway:
        """The saved values, modules and settings that a disabled graft would put into the base."""
        assert not self.active
        return PutAway(dict(self.originals or {}), dict(self.replaced), dict(self.settings))

    def save(self, path: str | Path, **about: Any) -> Path:
        """Write the graft folder: a PEFT adapter if PEFT can express it. See `graftkit.grafts.folder`."""
        was_active = self.active
        self.enable()
        try:
            with unfolded(self.model):
                return write(Path(path), contents_of(self, about))
        finally:
            if not was_active:
                self.disable()

    def set_active(self, active: bool, keep_head: bool = False) -> None:
        """Turn the additions on or off; with `keep_head`, all but a head, without changing `active`."""
        for _, module in self.additions():
            if not (keep_head and module.survives_fold):
                module.active = active
        self.active = active if not keep_head else self.active
