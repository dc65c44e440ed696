"""Additions: the modules that methods place on modules of the model."""

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
    """New parameters at one site. `after` can change the site's output, `before` its input.

    Subclasses override one of the two. An inactive addition does not change the site.
    """

    # True: replaces something of the site during its call; `after` restores it, even after an error
    replaces = False
    # True: only adds to the site's output, and computes that from its input alone
    adds = False

    mixture: Mixture | None = None  # replaces it inside `graftkit.using`

    @classmethod
    def mix(cls, members: Sequence[Any], weights: Tensor, site: nn.Module) -> Any:
        """Return a `Mixture` or an addition that computes the additions of several grafts at a site at once.

        weights (rows or 1, members): weight of each member for each row of a batch; a single row applies to all rows.
        Raises `NotImplementedError`, possibly with a reason, if they cannot be computed together.
        """
        raise NotImplementedError

    @property
    def alike(self) -> Any:
        """A key: additions of several grafts at one site can be mixed if their keys are equal."""
        return None

    @property
    def acting(self) -> Any:
        """The addition, or the mixture that replaces it. Raises `UserError` for a mixture in training mode."""
        if self.mixture is None:
            return self
        if self.training:
            raise UserError(
                f"several grafts are mixed at {self.mixture.where!r} by graftkit.using, which works in eval mode only: "
                "call model.eval() first. To train a graft, leave the with block and call graft.requires_grad_()."
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
    """The last module: it turns features of the model into outputs, so the engine may start from cached features.

    `pooling`: how states become features; `width`: width of a feature; `per_token`: features are (batch, length, width),
    one for each token, else (batch, width). `steady`: the features do not depend on parameters of the head.
    """

    pooling: str
    width: int
    per_token = False
    steady = True

    @property
    def reads(self) -> str:
        """How the features are found: heads of which this is equal have the same features in a frozen model."""
        return self.pooling

    def logits(self, features: Tensor) -> Tensor:
        """Return logits (batch, outputs) for features (batch, width); (batch, length, outputs) if `per_token`."""
        raise NotImplementedError


def place(site: nn.Module, name: str, addition: nn.Module) -> None:
    """Make `addition` a child of the module at a site, on its device and in its mode, and register its hooks."""
    if hasattr(site, name):
        raise UserError(
            f"{type(site).__name__} already has {name!r}: a graft of this name is attached to it."
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
    """Return an fp32 parameter of zeros, or drawn from a normal distribution with standard deviation `std`."""
    values = torch.zeros(shape) if std is None else torch.randn(shape) * std
    return nn.Parameter(values)
