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
from graftkit.recipe.schema import DEFAULT_OPTIMIZER


@dataclasses.dataclass(frozen=True)
class PutAway:
    """The trained values of base parameters, new modules and settings of a disabled graft, by name."""

    tensors: dict[str, Tensor]
    modules: dict[str, nn.Module]
    settings: dict[str, Any]


class Graft:
    """The trained parameters on one backbone, with what is needed to save, fold, silence or remove them.

    `labels`: parameter name -> `Group` for each parameter that is trained. `model`: the backbone's model,
    changed in place: called as before, it now computes with the graft.
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
        return {name: p for name, p in self.model.named_parameters() if name in self.labels}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that a graft folder and a checkpoint hold, by name.

        The trained parameters; the running statistics that move with them; what its additions keep beside, as frozen
        parameters or persistent buffers.
        """
        tensors: dict[str, Tensor] = dict(self.parameters)
        buffers = dict(self.model.named_buffers())
        tensors |= {name: buffers[name] for name in self.statistics}
        for prefix, module in self.additions():
            tensors |= module.state_dict(prefix=f"{prefix}.", keep_vars=True)
        return tensors

    @property
    def state(self) -> dict[str, Tensor]:
        """`tensors`, and what its additions keep for training alone: all that a checkpoint holds, by name."""
        buffers = [
            (f"{prefix}.{name}", buffer)
            for prefix, module in self.additions()
            for name, buffer in module.named_buffers()
        ]
        return self.tensors | dict(buffers)

    def additions(self) -> Iterator[tuple[str, Added]]:
        """(name, module) of each module that this graft added."""
        for name, module in self.model.named_modules():
            if isinstance(module, Added) and module.graft == self.name:
                yield name, module

    def param_groups(self, lr: float | None = None, weight_decay: float = 0.01) -> list[dict[str, Any]]:
        """Return groups for a torch optimizer, one for each combination of rate and decay.

        `lr` replaces the rate of every method whose options do not name one. Norms and biases (one
        dimension) are not decayed. Groups say whether their parameters are `hidden`: weights of the backbone's own
        linear layers, without embeddings and head.
        """
        hidden = hidden_matrices(self.backbone)
        return param_groups(self.parameters, self.labels, lr, weight_decay, hidden)

    def optimizer(
        self,
        lr: float | None = None,
        weight_decay: float = 0.01,
        optimizer: Optimizer | str = DEFAULT_OPTIMIZER,
    ) -> torch.optim.Optimizer:
        """Return an optimizer over `param_groups`: AdamW, or what `optimizer` says, as in 'galore(rank=8)'."""
        groups = self.param_groups(lr, weight_decay)
        chosen = as_optimizer(optimizer)
        chosen.check(groups)
        return chosen.make(groups)

    def labels_at(self, step: int, epoch: float) -> Labels:
        """The labels of what is trained in a step (from 0) of an epoch (step / steps an epoch): all, for most methods.

        In a loop of your own all of them are trained from the first step on, unless only what is named here requires a
        gradient.
        """
        return self.method.labels_at(self.backbone, self.labels, step, epoch)

    def extra_loss(self) -> Tensor | None:
        """What the method adds to the task's loss in each step, a scalar; None for most methods."""
        return self.method.extra_loss(self.backbone, self.name)

    def after_step(self, step: int, steps: int) -> None:
        """To be called after each optimizer step in a loop of your own, before gradients are set to zero.

        `step` counts from 1 to `steps`, the length of the whole training. Methods that follow a schedule of their
        own, such as adalora, move on here; without the call they stay as they began.
        """
        self.method.after_step(self.backbone, self.name, step, steps)

    def requires_grad_(self, requires_grad: bool = True) -> Graft:
        """Let this graft be trained, and no other on its model; False freezes it. Returns the graft."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(requires_grad and name in self.labels)
        if requires_grad:
            for module in self.model.modules():
                if isinstance(module, KeepStatistics):
                    module.holds = module.graft == self.name
        return self

    def disable(self) -> None:
        """Make the model compute what the base computed, until `enable`. Trained values are kept."""
        if not self.active:
            return
        with unfolded(self.model, but=self) if self.plain is not None else nullcontext():
            swap_base(self)
            self.set_active(False)

    def enable(self) -> None:
        """Undo `disable`. Raises `UserError` beside an active graft that trains the same part of the base."""
        if self.active:
            return
        refuse_mixed(self.model)
        refuse_conflict(self.backbone, self.name, self.changes, self.replaced)
        swap_base(self)
        self.set_active(True)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """`with graft.disabled(): ...` computes with the base."""
        self.disable()
        try:
            yield
        finally:
            self.enable()

    def fold(self) -> nn.Module:
        """Melt the graft into the plain weights and return the model. `unfold` restores the base bit for bit.

        A head stays on top. Raises `NotFoldable`, before anything is changed, where a method cannot be folded.
        """
        if self.plain is not None:
            return self.model
        self.enable()
        fold(self)
        return self.model

    def unfold(self) -> None:
        """Undo `fold`; what was folded later stays folded. Raises `NotFoldable`, with nothing changed, where it cannot."""
        if self.plain is None:
            return
        unfold(self)

    @property
    def changes(self) -> set[str]:
        """Names of the base's own tensors and modules that the graft puts its own in place of."""
        return (
            own_trained(self.backbone, self.labels, self.replaced)
            | set(self.replaced)
            | set(self.statistics)
            | lone_places(self.model, self.name)
        )

    @property
    def put_away(self) -> PutAway:
        """What a disabled graft would put in place of the base's own."""
        assert not self.active
        return PutAway(dict(self.originals or {}), dict(self.replaced), dict(self.settings))

    def save(self, path: str | Path, **about: Any) -> Path:
        """Write the graft folder: a PEFT adapter where PEFT can express it. See `graftkit.grafts.folder`."""
        was_active = self.active
        self.enable()
        try:
            with unfolded(self.model):
                return write(Path(path), contents_of(self, about))
        finally:
            if not was_active:
                self.disable()

    def set_active(self, active: bool, keep_head: bool = False) -> None:
        """Let the additions act, or silence them; `keep_head`: but for a head, and the graft counts as it was."""
        for _, module in self.additions():
            if not (keep_head and module.survives_fold):
                module.active = active
        self.active = active if not keep_head else self.active
