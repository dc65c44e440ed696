"""Several grafts on one model: which are active, with which weights, and which one each row of a batch uses."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.anatomy import Added
from graftkit.backbone.walk import buffers_of, modules_of, parameters_of
from graftkit.errors import UserError, listing, nearest
from graftkit.grafts.graft import Graft
from graftkit.grafts.guards import refuse_lost
from graftkit.grafts.register import MIXED, folded_on, grafts_of
from graftkit.grafts.row_parameters import mix_rows, takes_all_rows
from graftkit.grafts.snapshot import set_settings, settings_of
from graftkit.methods.base import Addition

TIME_FIRST = ("xlnet",)
Key = tuple[str, str, type[Addition], Any]  # module, name without that of the graft, class, `alike`


@contextmanager
def using(
    model: nn.Module | Backbone,
    which: str | Iterable[str] | Mapping[str, float] | None = None,
    *,
    rows: Sequence[str | None] | None = None,
) -> Iterator[nn.Module]:
    """Compute with the given grafts of a model and no others inside a `with` block.

    On exit, the previous state is restored.

    `which`: the name of a graft, or several names; [] computes with the base alone. A mapping of names to weights is a
    weighted sum: the effect of each addition is scaled by its weight, a base parameter that grafts train is
    base + sum of weight * (trained - base), and heads are averaged, with weights divided by their sum.
    `rows`: a name, or None for the base, for each row of a batch. Each row gets the same output as on its own, to
    rounding; all are computed at once. This includes generation, where beams count as rows.

    Weights and rows work in eval mode only, and nothing can be attached, folded or saved inside the block. Raises
    `UserError` for an unknown name, for grafts that cannot be computed together, and, when the model is called, for a
    batch with a different number of rows.
    """
    root = model.model if isinstance(model, Backbone) else model
    if (which is None) == (rows is None):
        raise UserError(
            "graftkit.using takes either names of grafts or rows: using(model, 'a'), using(model, rows=['a', None])."
        )
    mixed = None
    if rows is not None:
        mixed = _of_rows(root, rows)
    elif isinstance(which, Mapping):
        mixed = _of_weights(root, which)
    else:
        names = _known(root, [which] if isinstance(which, str) else list(which or ()))
    state = _State(root)
    try:
        state.leave()
        if mixed is None:
            _activate(root, names)
        else:
            _activate(root, [])
            mixed.start()
        yield root
    finally:
        if mixed is not None:
            mixed.stop()
        state.restore()


def _known(model: nn.Module, names: Iterable[Any]) -> list[str]:
    """Return the names without duplicates. Raises `UserError` if no graft of the model has one of them."""
    grafts = grafts_of(model)
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in grafts:
            there = listing(map(repr, grafts)) or "none"
            raise UserError(
                f"no graft named {name!r} is attached to {type(model).__name__}; attached: {there}."
                f"{nearest(str(name), grafts)}"
            )
    return names


def _of_weights(model: nn.Module, which: Mapping[str, float]) -> _Mixed:
    names = _known(model, which)
    for name, weight in which.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UserError(f"the weight of the graft {name!r} is {weight!r}, but must be a finite number.")
    return _Mixed(model, names, torch.tensor([[float(which[name]) for name in names]]), None)


def _of_rows(model: nn.Module, rows: Sequence[str | None]) -> _Mixed:
    if isinstance(rows, str) or not len(rows):
        raise UserError("rows is a list with the name of a graft, or None, for each row of a batch.")
    names = _known(model, [name for name in rows if name is not None])
    weights = torch.tensor([[float(row == name) for name in names] for row in rows])
    return _Mixed(model, names, weights, len(rows))


def _activate(model: nn.Module, names: Sequence[str]) -> None:
    """Make these grafts the active ones."""
    grafts = grafts_of(model)
    for name, graft in grafts.items():
        if name not in names:
            graft.disable()
    for name in names:
        grafts[name].enable()


class _State:
    """Which grafts of a model are active, folded or mixed, so that this can be restored."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.active = [graft.name for graft in grafts_of(model).values() if graft.active]
        self.known = dict(grafts_of(model))
        self.folded = list(folded_on(model))
        self.mixed: _Mixed | None = vars(model).get(MIXED)

    def leave(self) -> None:
        if self.mixed is not None:
            self.mixed.stop()

    def restore(self) -> None:
        grafts = grafts_of(self.model)
        wanted = [
            name
            for name, graft in grafts.items()  # one that was attached meanwhile is unchanged
            if (name in self.active if self.known.get(name) is graft else graft.active)
        ]
        _activate(self.model, wanted)
        if folded_on(self.model) != self.folded:
            for graft in list(folded_on(self.model)):
                graft.unfold()
            for graft in self.folded:
                graft.fold()
        if self.mixed is not None:
            self.mixed.start()


class _Mixed:
    """Grafts of a model that are computed together. weights (rows or 1, grafts); `rows`: None for a weighted sum."""

    def __init__(self, model: nn.Module, names: list[str], weights: Tensor, rows: int | None) -> None:
        self.model = model
        self.names = names
        self.weights = weights
        self.rows = rows
        self._undo = ExitStack()
        self._computed: dict[str, Any] = {}  # modules whose own parameters differ by row

    def start(self) -> None:
        """Let the additions of the first graft at each site compute those of all."""
        grafts = [grafts_of(self.model)[name] for name in self.names]
        kind = next((p.device.type for p in self.model.parameters()), "cpu")
        for graft in grafts:
            refuse_lost(self.model, graft.name, graft.replaced, grafts)
        try:
            with torch.no_grad(), torch.autocast(kind, enabled=False):
                if self.rows is None:
                    self._mix_base(grafts)
                else:
                    self._refuse_order()
                    self._computed = mix_rows(self.model, grafts, self.weights, self._undo)
                self._mix_additions(grafts)
            handle = self.model.register_forward_pre_hook(self._check_call, with_kwargs=True)
            self._undo.callback(handle.remove)
            self._undo.callback(self.model.register_forward_hook(self._check_called).remove)
            vars(self.model)[MIXED] = self
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Restore the state before `start`."""
        vars(self.model).pop(MIXED, None)
        self._undo.close()

    def _mix_additions(self, grafts: list[Graft]) -> None:
        modules = modules_of(self.model)
        groups = _groups(modules, grafts)
        self._refuse_several_heads(groups)
        for place in dict.fromkeys(key[0] for key in groups):
            here = {key: group for key, group in groups.items() if key[0] == place}
            for key, leader in _leaders(modules[place], place, here).items():
                columns, members = list(here[key]), list(here[key].values())
                weights = self.weights[:, columns]
                if len(members) > 1 or not bool((weights == 1).all()):
                    self._lead(grafts, key, leader, members, weights, modules[place])
                leader.active = True
                self._undo.callback(setattr, leader, "active", False)

    def _lead(
        self, grafts: list[Graft], key: Key, leader: Addition, members: list[Addition], weights: Tensor,
        site: nn.Module,
    ) -> None:  # fmt: skip
        """Let one addition compute all members."""
        name = key[0] or type(self.model).__name__
        device = next((t.device for t in (*leader.parameters(), *leader.buffers())), None)
        try:
            if self.rows is not None and takes_all_rows(name):
                raise NotImplementedError("its input is not split by the rows of a batch")
            mixture = type(leader).mix(members, weights.to(device), site)
            if key[0] in self._computed and getattr(mixture, "has_gains", False):
                raise NotImplementedError("it rescales a layer whose weight or bias the grafts train too")
        except NotImplementedError as reason:
            graft = next(graft for graft in grafts if graft.name == leader.graft)
            method = _method_of(graft, key[1])
            what = "weighted in a sum" if self.rows is None else "mixed with others in one batch"
            alone = f"using(model, {graft.name!r})"
            instead = (
                f"use {alone} for it alone" if self.rows is None else f"run its rows separately, with {alone}"
            )
            because = f": {reason}" if str(reason) else ""
            raise UserError(
                f"{method}() of the graft {graft.name!r} at {name!r} cannot be {what}{because}. Instead, {instead}."
            ) from None
        mixture.where = name
        vars(leader)["mixture"] = mixture
        self._undo.callback(vars(leader).pop, "mixture")

    def _refuse_several_heads(self, groups: dict[Key, dict[int, Addition]]) -> None:
        lone = [key for key in groups if key[2].lone]
        if len(lone) > 1:
            raise UserError(
                f"the heads of the grafts {listing(map(repr, self.names))} do not read the same states, so they cannot "
                "be computed together. Run their rows separately, or give them heads with the same pooling."
            )

    def _refuse_order(self) -> None:
        """Raise `UserError` for a model that does not keep the rows of a batch in the first dimension."""
        if getattr(getattr(self.model, "config", None), "model_type", "") in TIME_FIRST:
            raise UserError(
                f"{type(self.model).__name__} has the text length as its first dimension instead of the rows, so rows cannot "
                "have different grafts. Run the rows of each graft separately."
            )
        for name, module in modules_of(self.model).items():
            if getattr(module, "batch_first", True) is False:
                raise UserError(
                    f"{name or type(module).__name__!r} was created with batch_first=False, so rows are the second dimension. "
                    "Create it with batch_first=True, or run the rows of each graft separately."
                )

    def _check_call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module.training:
            raise UserError(
                f"{type(module).__name__} computes with several grafts at once, which works in eval mode only: call "
                "model.eval() first. To train a graft, leave graftkit.using and call graft.requires_grad_()."
            )
        if self.rows is None:
            return
        names = (getattr(module, "main_input_name", "input_ids"), "inputs_embeds", "encoder_outputs")
        given = [kwargs[name] for name in names if isinstance(kwargs.get(name), Tensor)] or list(args[:1])
        if given and isinstance(given[0], Tensor) and len(given[0]) != self.rows:
            raise UserError(
                f"graftkit.using(model, rows=[...]) names a graft for {self.rows} rows, but the batch has "
                f"{len(given[0])}: {tuple(given[0].shape)}. Name one for each row of the batch."
            )

    def _check_called(self, module: nn.Module, args: tuple, output: Any) -> None:
        missed = [name for name, rows in self._computed.items() if not rows.called]
        if missed:
            raise UserError(
                f"the grafts train {listing(map(repr, missed), 3)}, which {type(module).__name__} does not call as modules, so "
                "all rows used the values of the base. Run the rows of each graft separately."
            )

    def _mix_base(self, grafts: list[Graft]) -> None:
        """Replace the base's tensors that the grafts train by base + sum of weight * (trained - base)."""
        weights = self.weights[0].tolist()
        changes: dict[str, list[tuple[float, Tensor]]] = {}
        modules: dict[str, list[tuple[float, nn.Module]]] = {}
        settings: dict[str, Any] = {}
        for graft, weight in zip(grafts, weights):
            own = graft.put_away
            for name, trained in own.tensors.items():
                changes.setdefault(name, []).append((weight, trained))
            for name, module in own.modules.items():
                modules.setdefault(name, []).append((weight, module))
            settings = own.settings | settings
        tensors = {**parameters_of(self.model), **buffers_of(self.model)}
        for name, changed in changes.items():
            tensor = tensors[name]
            if any(name.startswith(f"{module}.") for module in modules) or any(
                trained.shape != tensor.shape for _, trained in changed
            ):
                raise self._heads_differ(name)
            base = tensor.data
            value = base.double() + sum(w * (t.to(base.device) - base).double() for w, t in changed)
            if not base.is_floating_point():
                value = base
            if name.endswith("running_var") and bool((value < 0).any()):
                raise UserError(f"with these weights {name!r} would be negative; use weights from 0 to 1.")
            self._undo.callback(setattr, tensor, "data", base)
            tensor.data = value.to(base.dtype)
        self._undo.callback(torch.clear_autocast_cache)
        torch.clear_autocast_cache()
        for name, parts in modules.items():
            self._undo.callback(self.model.set_submodule, name, self.model.get_submodule(name))
            self.model.set_submodule(name, self._averaged(name, parts))
        before = settings_of(self.model)
        self._undo.callback(set_settings, self.model, {name: before[name] for name in settings})
        set_settings(self.model, settings)

    def _averaged(self, name: str, parts: list[tuple[float, nn.Module]]) -> nn.Module:
        """Return the weighted mean of modules that replaced one of the base, which are heads."""
        total = sum(weight for weight, _ in parts)
        if total == 0:
            raise UserError(
                f"the weights of the grafts that replace {name!r} add up to 0; heads are averaged by them."
            )
        mean = copy.deepcopy(parts[0][1])
        others = [parameters_of(module) for _, module in parts]
        for key, parameter in mean.named_parameters():
            if any(key not in other or other[key].shape != parameter.shape for other in others):
                raise self._heads_differ(name)
            parameter.data = sum(w / total * o[key].data for (w, _), o in zip(parts, others))  # type: ignore[assignment]
        return mean

    def _heads_differ(self, name: str) -> UserError:
        return UserError(
            f"the grafts {listing(map(repr, self.names))} have {name!r} in different shapes: their heads are for "
            "different classes, which cannot be weighted in a sum. Use one of them at a time."
        )


def _groups(modules: dict[str, nn.Module], grafts: list[Graft]) -> dict[Key, dict[int, Addition]]:
    """Return groups of additions that can be computed together, each with the column of its graft."""
    columns = {graft.name: column for column, graft in enumerate(grafts)}
    groups: dict[Key, dict[int, Addition]] = {}
    inside = "\0"  # skip additions below another addition, which handles them itself
    for name, module in modules.items():
        if not isinstance(module, Added) or module.graft not in columns or not module.changes_outputs:
            continue
        if name.startswith(inside):
            continue
        inside = f"{name}."
        place, _, child = name.rpartition(".")
        stem, column = child.removesuffix(f"_{module.graft}"), columns[module.graft]
        if not isinstance(module, Addition):
            raise UserError(
                f"{_method_of(grafts[column], stem)}() of the graft {module.graft!r} cannot be computed together with other "
                f"grafts. Instead, run its rows separately, with using(model, {module.graft!r})."
            )
        groups.setdefault((place, stem, type(module), module.alike), {})[column] = module
    return groups


def _leaders(site: nn.Module, place: str, groups: dict[Key, dict[int, Addition]]) -> dict[Key, Addition]:
    """Return one member of each group at a site, such that their hooks run in the order that every graft has."""
    order = {id(module): i for i, module in enumerate(site.children())}
    earlier: dict[Key, set[Key]] = {key: set() for key in groups}
    for column in {column for group in groups.values() for column in group}:
        own = [key for key, group in groups.items() if column in group]
        own.sort(key=lambda key: order[id(groups[key][column])])
        for first, second in pairwise(own):
            earlier[second].add(first)
    leaders: dict[Key, Addition] = {}
    try:
        for key in TopologicalSorter(earlier).static_order():
            after = max((order[id(leaders[other])] for other in earlier[key]), default=-1)
            members = sorted(groups[key].values(), key=lambda member: order[id(member)])
            leaders[key] = next(member for member in members if order[id(member)] > after)
    except (CycleError, StopIteration):
        raise UserError(
            f"the grafts add {listing(sorted({key[1] for key in groups}))} at {place!r} in different orders, so they cannot "
            "be computed together. Attach them with their methods in the same order."
        ) from None
    return leaders


def _method_of(graft: Graft, stem: str) -> str:
    """Return the method that places additions with this name."""
    names = [method.name for method in graft.method.methods if stem.startswith(method.name)]
    return max(names, key=len, default=stem)
