"""Base classes of methods that update weight matrices: W becomes W + dW, with few parameters for dW."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone, Site, select
from graftkit.backbone.anatomy import base_modules
from graftkit.backbone.walk import modules_of
from graftkit.backbone.weights import Weight, apply, input_of, weights_at, without_autocast
from graftkit.errors import NotFoldable, UserError
from graftkit.methods.base import Addition, Method, exactly, place
from graftkit.methods.shared.advice import recommended
from graftkit.methods.shared.mixtures import MatrixMixture
from graftkit.methods.shared.peft_reading import PeftReading
from graftkit.optim.labels import Group, Labels
from graftkit.recipe.catalogue import option
from graftkit.recipe.options import LARGEST
from graftkit.recipe.patterns import Pattern

MOST_RANK = 1_024  # accepted at every weight: some methods use ranks beyond the weight's own
MAPS = ("linear", "transposed")  # weights whose input is that of the module
KINDS = ("linear", "transposed", "conv", "embedding", "packed", "experts")


class Update(Addition):
    """An update of one weight. Subclasses implement `delta`, and `after` if they can add dW x without forming dW.

    The update stores where its weight is but not the module, which each call passes.
    """

    adds = True
    member: Any = None  # its place in the group that computes it, during a run (`methods/shared/joined.py`)

    @property
    def joinable(self) -> bool:
        """Whether it is s B A of two parameters, which an autograd function can compute with the layer."""
        return False

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.parameter = weight.parameter
        self.kind = weight.kind
        self.replaces = weight.replaced

    def delta(self, weight: Weight) -> Tensor:
        """Return dW in the layout of W: (out, in), (out, in / groups, *kernel) or (experts, out, in)."""
        raise NotImplementedError

    def updated(self, weight: Weight, value: Tensor | None = None) -> Tensor:
        """Return W + dW in the layout and dtype of the parameter; with `value`, value + dW."""
        value = weight.value if value is None else value
        return (value.float() + weight.stored(self.delta(weight))).to(value.dtype)

    @classmethod
    def mix(cls, members: Sequence[Any], weights: Tensor, site: nn.Module) -> Any:
        weight = members[0].of(site)
        matrices = [member.delta(weight) for member in members]
        if len(weights) == 1:
            return Sum(weight, torch.tensordot(weights[0], torch.stack(matrices), dims=1))
        refuse_rows(weight)
        return MatrixMixture(weight, matrices, weights)

    def of(self, site: nn.Module) -> Weight:
        """Return the weight in the module that is called."""
        return Weight(site, self.parameter, self.kind)

    def before(self, site: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Replace the weight by the updated one during the call, if no module multiplies by the weight alone."""
        if self.replaces:
            weight = self.of(site)
            owner, name = weight.owner, weight.parameter.rpartition(".")[2]
            standing = owner.__dict__.get(name)  # already replaced by another graft
            with without_autocast(weight.value):
                owner.__dict__[name] = self.updated(weight, standing)
        return None

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self.replaces:
            return output
        weight = self.of(site)
        return output + apply(weight, site, input_of(args, kwargs), self.delta(weight)).to(output.dtype)

    def _after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        member = self.member
        if member is not None and member.included and not torch.compiler.is_compiling():
            return output
        if self.replaces:
            weight = self.of(site)
            weight.owner.__dict__.pop(weight.parameter.rpartition(".")[2], None)
        return super()._after(site, args, kwargs, output)


class Sum(Update):
    """The weighted sum of the updates of several grafts."""

    def __init__(self, weight: Weight, matrix: Tensor) -> None:
        super().__init__(weight)
        self.__dict__["matrix"] = matrix

    def delta(self, weight: Weight) -> Tensor:
        return self.__dict__["matrix"]


def refuse_rows(weight: Weight) -> None:
    """Raise `NotImplementedError` for a weight that all rows of a batch must share."""
    if weight.replaced:
        raise NotImplementedError(f"{type(weight.module).__name__} multiplies all rows by one weight")


class UpdateMethod(Method):
    """A method that places an `Update` at each weight of its `sites`. Subclasses are dataclasses with `sites`."""

    sites: str
    kinds: tuple[str, ...] = KINDS  # kinds of weights that the method can update
    updates_weights: ClassVar[bool] = True

    def make(self, weight: Weight, name: str) -> Update:
        """Return the update of the weight with this dotted name. Raises `UserError` if there can be none."""
        raise NotImplementedError

    def maker(self, backbone: Backbone) -> Callable[[Weight, str], Update]:
        """Return the function that makes the updates: `make`, unless a method has to look at the whole model first."""
        return self.make

    def group(self) -> Group:
        """Return the label of the new parameters."""
        raise NotImplementedError

    def accepts(self, weight: Weight) -> bool:
        """Return whether the method can update a weight; other weights in a selection are skipped."""
        return weight.kind in self.kinds

    @property
    def wanted(self) -> str:
        """The weights that the method accepts, as messages describe them."""
        instead = recommended("selects") if self.is_general else recommended("is_general", "selects")
        return f"weights that {self.name}() can update; use {instead} there"

    def targets(self, backbone: Backbone) -> list[tuple[Site, Weight]]:
        """Return each updated weight with the site that holds it."""
        return self._chosen(backbone, self.sites)

    def _chosen(self, backbone: Backbone, selection: str) -> list[tuple[Site, Weight]]:
        """Return the selected weights. If a site has several, each has its own name, such as `experts.down_proj`."""
        held = [(site, weights_at(backbone, site)) for site in backbone.sites]
        parts, weights = [], {}
        for site, at_site in held:
            for weight in at_site:
                apart = weight.module is site.module and weight.parameter != "weight"
                name = f"{site.name}.{weight.parameter}" if apart else site.name
                parts.append(Site(name, site.module, site.role, site.block))
                weights[name] = (site, weight)
            if not at_site:
                parts.append(site)

        def usable(part: Site) -> bool:
            return part.name in weights and self.accepts(weights[part.name][1])

        view = dataclasses.replace(backbone, sites=tuple(parts))
        return [weights[part.name] for part in select(view, selection, usable, lambda: self.wanted)]

    def named(self, backbone: Backbone) -> dict[str, tuple[Site, Weight]]:
        """Return `targets` by the name of the weight's parameter."""
        names = {id(module): name for name, module in modules_of(backbone.model).items()}
        return {
            f"{names[id(weight.module)]}.{weight.parameter}".lstrip("."): (site, weight)
            for site, weight in self.targets(backbone)
        }

    def updated_weights(self, backbone: Backbone) -> set[str]:
        return set(self.named(backbone))

    def added_name(self, weight: Weight, graft: str) -> str:
        """Return the name of the new module below the module that is called."""
        if weight.parameter == "weight":
            return f"{self.name}_{graft}"
        return f"{self.name}_{weight.parameter.removesuffix('.weight').replace('.', '_')}_{graft}"

    def update_at(self, weight: Weight, graft: str) -> Update:
        """Return the update that `attach` placed."""
        return getattr(weight.module, self.added_name(weight, graft))

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        labels: Labels = {}
        make = self.maker(backbone)
        for name, (_, weight) in self.named(backbone).items():
            owner = name[: -len(weight.parameter)]
            added = self.added_name(weight, graft)
            update = make(weight, name)
            place(weight.module, added, update)
            labels |= {f"{owner}{added}.{own}": self.group() for own, _ in update.named_parameters()}
        return labels

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        values = {}
        for name, (_, weight) in self.named(backbone).items():
            refuse_quantized(self, weight, name)
            with torch.no_grad():
                values[name] = self.update_at(weight, graft).updated(weight)
        return values


@dataclass(frozen=True)
class SizedMethod(UpdateMethod):
    """A method whose updates have a rank and a scale alpha / rank, the same for all sites or set by site."""

    rank: int = option(8, "rank of the update", at_least=1)
    sites: str = option("all-linear", "layers to adapt, as a selection")
    alpha: float | None = option(None, "scale times rank; null means rank, a scale of 1", above=0)
    rank_pattern: dict | None = option(
        None,
        "other ranks for some sites: {'blocks[-2:]': 16}; the last match wins",
        formerly="ranks",
    )
    alpha_pattern: dict | None = option(
        None, "other alphas for some sites, in the same form", formerly="alphas"
    )
    lr: float | None = option(None, "learning rate; null means 0.01", above=0)

    default_lr = 1e-2
    default_scale = 1.0  # if alpha is null

    def group(self) -> Group:
        return Group("added", self.lr or self.default_lr, self.name, self.lr is not None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, kinds, least in (("rank_pattern", int, 1), ("alpha_pattern", int | float, 0)):
            for selection, value in (getattr(self, key) or {}).items():
                good = isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= LARGEST
                if not isinstance(selection, str) or not good or value == 0:
                    raise UserError(
                        f"{self.name}(): {key} has {selection!r}: {value!r}; write a selection and a positive "
                        f"number, for example {key}={{'blocks[-2:]': 16}}."
                    )

    def factors(self, weight: Weight, name: str, rank: int, scale: float) -> Update:
        """Return the update of the weight with this dotted name."""
        raise NotImplementedError

    def maker(self, backbone: Backbone) -> Callable[[Weight, str], Update]:
        sizes = self.sizes(backbone)

        def make(weight: Weight, name: str) -> Update:
            rank, alpha = sizes[name]
            return self.factors(weight, name, rank, alpha / rank)

        return make

    def sizes(self, backbone: Backbone) -> dict[str, tuple[int, float]]:
        """Return rank and alpha of each weight, by the name of its parameter."""
        ranks = self._by_name(backbone, "rank_pattern")
        alphas = self._by_name(backbone, "alpha_pattern")
        found = {}
        for name, (_, weight) in self.named(backbone).items():
            rank = int(ranks.get(name, self.rank))
            refuse_rank(self, rank, weight, name)
            found[name] = (rank, float(alphas.get(name, self.alpha_at(rank))))
        return found

    def alpha_at(self, rank: int) -> float:
        """Return the alpha for a rank, for weights not matched by `alpha_pattern`."""
        return self.default_scale * rank if self.alpha is None else self.alpha

    def _by_name(self, backbone: Backbone, key: str) -> dict[str, float]:
        """Return `rank_pattern` or `alpha_pattern` by the names of parameters; if selections overlap, the last one wins."""
        named = self.named(backbone)
        found: dict[str, float] = {}
        for selection, value in (getattr(self, key) or {}).items():
            chosen = {weight for _, weight in self._chosen(backbone, selection)}
            names = [name for name, (_, weight) in named.items() if weight in chosen]
            if not names:
                raise UserError(
                    f"{self.name}(): {key} has {selection!r}, which is not among sites={self.sites!r}; "
                    "widen one of them."
                )
            found |= dict.fromkeys(names, value)
        return found


def refuse_rank(method: Method, rank: int, weight: Weight, name: str) -> None:
    """Raise `UserError` for a rank above both what an update of the weight can have and 1,024."""
    shape = weight.shape[1:] if weight.kind == "experts" else weight.shape
    useful = min(shape[0], math.prod(shape[1:]))
    most = max(MOST_RANK, useful)
    if rank > most:
        raise UserError(
            f"{method.name}(): the rank at {name!r} is {rank:,}. An update of {' x '.join(map(str, shape))} values can use "
            f"{useful:,} at most; ranks up to {most:,} are accepted."
        )


def refuse_quantized(method: Method, weight: Weight, name: str) -> None:
    """Raise `NotFoldable` for a weight that is stored as integers."""
    if weight.is_quantized:
        raise NotFoldable(
            f"{method.name}() cannot be folded into {name!r}, which is stored as {weight.value.dtype}. "
            "Keep the graft folder, or fold it into the unquantized model."
        )


def refuse_kinds(method: Method, weight: Weight, name: str, kinds: Iterable[str], instead: str) -> None:
    """Raise `UserError` for a weight of a kind that a method cannot update."""
    if weight.kind in kinds:
        raise UserError(
            f"{method.name}() cannot update {name!r} ({type(weight.module).__name__}); {instead}."
        )


def peft_targets(backbone: Backbone, names: Iterable[str]) -> list[str] | str:
    """Return PEFT's `target_modules` for these modules: a list, or a regular expression if a list would match more.

    A name in a list matches every module whose name ends with it.
    """
    names = list(dict.fromkeys(names))
    endings = tuple(f".{name}" for name in names)
    if any(name.endswith(endings) and name not in names for name, _ in base_modules(backbone.model)):
        return "|".join(re.escape(name) for name in names)
    return names


def by_site(reading: PeftReading, field: str, keys: dict[str, list[str]]) -> dict[str, float] | None:
    """Return `rank_pattern` or `alpha_pattern` as a selection of sites for each value, by PEFT's rules.

    `keys`: names that PEFT matches its patterns against, and the sites that each stands for.
    """
    patterns = reading.field(field, None, (dict, type(None))) or {}
    compiled = {p: Pattern(rf"(.*\.)?({p})", reading.where(f"{field} has {p!r}")) for p in patterns}
    values: dict[str, float] = {}
    for key, sites in keys.items():
        pattern = next((p for p, at in compiled.items() if at.fullmatch(key)), None)
        if pattern is not None:
            for site in sites:
                if values.setdefault(site, patterns[pattern]) != patterns[pattern]:
                    raise reading.error(f"{field} has two values for {site!r}, which graftkit does not read.")
    by_value: dict[float, list[str]] = {}
    for site, value in values.items():
        by_value.setdefault(value, []).append(site)
    return {exactly(sites): value for value, sites in by_value.items()} or None
