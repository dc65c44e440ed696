"""What methods place on modules: additions, and how they get there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftkit.backbone.anatomy import Added
from graftkit.errors import UserError

if TYPE_CHECKING:
    from graftkit.methods.shared.mixtures import Mixture


class Addition(Added):
    """New parameters at one site. `after` sees the site's output, `before` its input; both may change them.

    Subclasses override one of the two. An inactive addition leaves the site as it was.
    """

    replaces = (
        False  # something of the site during its call: `after` sets it right again, also after an error
    )
    adds = False  # True: only adds to what the site gives, and from its input alone, whatever else acts there

    mixture: Mixture | None = None  # stands in for it inside `graftkit.using`

    @classmethod
    def mix(cls, members: Sequence[Any], weights: Tensor, site: nn.Module) -> Any:
        """What the same additions of several grafts do at a site, at once: a `Mixture`, or an addition.

        weights (rows or 1, members): how much each row of a batch gets of each; a single row is for the whole batch.
        Raises `NotImplementedError`, with a reason if there is one, where there is no such thing.
        """
        raise NotImplementedError

    @property
    def alike(self) -> Any:
        """Additions of several grafts at one site can be mixed if this is the same for them."""
        return None

    @property
    def acting(self) -> Any:
        """The addition, or what stands in for it. Raises `UserError` where that is to be trained."""
        if self.mixture is None:
            return self
        if self.training:
            raise UserError(
                f"several grafts are mixed at {self.mixture.where!r} by graftkit.using, which is for outputs alone: call "
                "model.eval() first. To train a graft, leave the with block and call graft.requires_grad_()."
            )
        return self.mixture

    def before(self, site: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        return None

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        return output

    def _before(self, site: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        return self.acting.before(site, args, kwargs) if self.active else None

    def _after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        return self.acting.after(site, args, kwargs, output) if self.active else output


class OutputHead(Addition):
    """Turns features of the model into its outputs, and nothing comes after it: the engine may start from kept features.

    `pooling`: how states become features; `width`: of a feature; `per_token`: features are (batch, length, width), one
    for each token, else (batch, width). `steady`: nothing that the head trains has a part in the features.
    """

    pooling: str
    width: int
    per_token = False
    steady = True

    def logits(self, features: Tensor) -> Tensor:
        """Logits (batch, outputs) of features (batch, width), or of each token: (batch, length, outputs)."""
        raise NotImplementedError


def place(site: nn.Module, name: str, addition: nn.Module) -> None:
    """Make `addition` a child of the module at a site, in the site's device and mode, and register its hooks."""
    if hasattr(site, name):
        raise UserError(
            f"{type(site).__name__} already has {name!r}: a graft of this name is attached there."
        )
    device = next((p.device for p in site.parameters()), None)
    if device is not None:
        addition.to(device)
    addition.train(site.training)
    site.add_module(name, addition)
    if isinstance(addition, Addition):
        handles = []
        if type(addition).before is not Addition.before:
            handles.append(site.register_forward_pre_hook(addition._before, with_kwargs=True))
        if type(addition).after is not Addition.after:
            handles.append(
                site.register_forward_hook(addition._after, with_kwargs=True, always_call=addition.replaces)
            )
        addition.__dict__["handles"] = handles


def new_parameter(*shape: int, std: float | None = None) -> nn.Parameter:
    """A fp32 parameter of zeros, or drawn from a normal distribution."""
    values = torch.zeros(shape) if std is None else torch.randn(shape) * std
    return nn.Parameter(values)
