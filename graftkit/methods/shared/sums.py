"""Rules for sums of methods, from their class attributes: their order, which one trains a parameter, what is refused.

The order in which a sum is written does not matter. `arranged` returns the order in which methods act: by `stage`, then
by name. If several methods claim a parameter, `yields` decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from graftkit.backbone import Backbone
from graftkit.errors import UserError, listing
from graftkit.optim.labels import Labels

if TYPE_CHECKING:
    from graftkit.methods.base import Method

Claims = Sequence[tuple["Method", Labels]]


def arranged(methods: Iterable[Method]) -> tuple[Method, ...]:
    """Return the methods in the order in which they act, whatever order they are written in."""
    return tuple(sorted(methods, key=lambda m: (m.stage, m.name, str(m) if m.repeats else "")))


def refuse_repeats(methods: Sequence[Method]) -> None:
    """Raise `UserError` for a method that is written twice although it does not allow that (`repeats`)."""
    names = [method.name for method in methods]
    for method in methods:
        if names.count(method.name) > 1 and not method.repeats:
            how = "write it once with both selections" if hasattr(method, "sites") else "write it once"
            raise UserError(f"{method.name}() appears twice in {' + '.join(names)}; {how}.")


def refuse_heads(methods: Iterable[Method]) -> None:
    """Raise `UserError` for two heads."""
    heads = [f"{method.name}()" for method in methods if method.gives_outputs]
    if len(heads) > 1:
        raise UserError(f"{' and '.join(heads)} both compute the outputs of the task; leave one of them out.")


def settle(claims: Claims, stored: bool = False) -> Labels:
    """Return one label for each parameter: that of the method with the lower `yields`; equal ones are refused.

    `stored`: the sum comes from a saved graft; of two methods that train the whole backbone the first one wins, as in
    earlier versions.
    """
    labels: Labels = {}
    owners: dict[str, Method] = {}
    for method, claimed in sorted(claims, key=lambda claim: claim[0].yields):
        for name, group in claimed.items():
            owner = owners.setdefault(name, method)
            if owner is method:
                labels[name] = group
            elif owner.yields == method.yields and not (stored and method.yields):
                selects = any(hasattr(m, "sites") for m in (owner, method))
                how = "narrow the selection of one of them" if selects else "leave one of them out"
                raise UserError(
                    f"{owner.name}() and {method.name}() both claim the parameter {name!r}; {how}."
                )
    return labels


def refuse_redundant(claims: Claims) -> None:
    """Raise `UserError` for a method that only trains what another one already trains, without its own learning rate."""
    for whole in (method for method, _ in claims if method.covers):
        for part, claimed in claims:
            if part is whole or not claimed or any(group.role != "base" for group in claimed.values()):
                continue
            if part.yields >= whole.yields or not any(group.fixed_lr for group in claimed.values()):
                raise UserError(redundant(whole.name, part.name, part.yields < whole.yields))


def redundant(whole: str, part: str, has_use: bool) -> str:
    """Return the message for a method that trains what another one trains anyway."""
    rate = f", or give {part}() its own learning rate, lr=..., for what it selects" if has_use else ""
    return f"{whole}() already trains what {part}() would; leave one of them out{rate}."


def refuse_silent(claims: Claims, labels: Labels, removed: dict[str, str], backbone: Backbone) -> None:
    """Raise `UserError` for a method that ends up training nothing.

    `removed`: for each parameter taken out of training, the method that did so. A head may be frozen: it still computes
    outputs.
    """
    if len(claims) < 2:
        return
    trained = {group.method for group in labels.values()}
    for method, claimed in claims:
        if not claimed or method.name in trained or method.gives_outputs:
            continue
        others = {labels[name].method for name in claimed if name in labels}
        takers = {removed[name] for name in claimed if name in removed}
        why = [f"{listing(f'{name}()' for name in sorted(others))} trains it"] if others else []
        why += [f"{listing(f'{name}()' for name in sorted(takers))} takes it out"] if takers else []
        why += [] if why else [f"it has no effect on the outputs of {backbone.source}"]
        raise UserError(
            f"{method.name}() would train nothing: {' and '.join(why)}. Leave one of them out, or change its selection."
        )


def refuse_useless(claims: Claims, backbone: Backbone, labels: Labels) -> None:
    """Raise `UserError` for updates of weights that are all trained anyway, by a method that trains everything.

    With a method that trains a selection, weight and update may both be trained: the selections can differ.
    """
    for whole in (method for method, _ in claims if method.covers):
        trained = {name for name, group in labels.items() if group.method == whole.name}
        for method, _ in claims:
            updated = method.updated_weights(backbone)
            if updated and updated <= trained:
                raise UserError(
                    f"{method.name}() adds an update to weights that {whole.name}() already trains, which gains nothing; "
                    "leave one of them out."
                )
