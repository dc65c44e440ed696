"""Resolve a selection (see `graftkit.recipe.selection`) to the sites and parameters of one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from graftkit.backbone.anatomy import Site
from graftkit.backbone.backbone import Backbone
from graftkit.backbone.walk import parameters_of
from graftkit.errors import UserError, listing, nearest
from graftkit.recipe import selection as language


def select(
    backbone: Backbone, selection: str, accepts: Callable[[Site], bool] | None = None,
    wanted: str | Callable[[], str] = "modules",
) -> list[Site]:  # fmt: skip
    """Return the sites that a selection matches, in model order.

    `accepts` narrows them to those a method supports (`wanted` describes these in messages; what it
    recommends is read from the files of all methods, so it is called only for a message).
    Raises `UserError` if any term of the selection has no site left, listing what the model has.
    """
    chosen: dict[str, Site] = {}
    for term in language.parse(selection):
        matches = [site for site in backbone.sites if _matches(site, term, backbone)]
        if not matches and term.roles == language.ROLES_OF_WORD["all-linear"]:
            convolutions = dataclasses.replace(term, roles=language.ROLES_OF_WORD["convs"])
            matches = [site for site in backbone.sites if _matches(site, convolutions, backbone)]
        if not matches:
            raise UserError(_nothing(term, selection, backbone))
        usable = [site for site in matches if accepts is None or accepts(site)]
        if not usable:
            kinds = listing(sorted({type(site.module).__name__ for site in matches}))
            raise UserError(
                f"selection {selection!r}: {term.text!r} matches {len(matches)} modules ({kinds}), "
                f"but none of them are {wanted if isinstance(wanted, str) else wanted()}."
            )
        chosen |= {site.name: site for site in usable}
    return [site for site in backbone.sites if site.name in chosen]


def select_parameters(backbone: Backbone, selection: str) -> list[str]:
    """Return the names of the parameters that the selected sites hold directly, in model order."""
    names = {id(parameter): name for name, parameter in parameters_of(backbone.model).items()}
    found = []
    for site in select(backbone, selection):
        for parameter in site.module.parameters(recurse=False):
            name = names[id(parameter)]  # the first name of a tied parameter
            if name not in found:
                found.append(name)
    return found


def _matches(site: Site, term: language.Term, backbone: Backbone) -> bool:
    if term.pattern is not None:
        parts = site.name.split(".")
        prefixes = (".".join(parts[: i + 1]) for i in range(len(parts)))
        return any(term.pattern.fullmatch(prefix) for prefix in prefixes)
    if term.in_blocks:
        if site.block is None:
            return False
        count = len(backbone.blocks)
        if isinstance(term.blocks, int):
            index = term.blocks + count if term.blocks < 0 else term.blocks
            if site.block != index:
                return False
        elif term.blocks is not None and site.block not in range(count)[term.blocks]:
            return False
    if term.roles is not None:
        return site.role in term.roles
    if term.suffix is not None:
        dotted = f".{site.name}."
        return f".{term.suffix}." in dotted
    return True


def _nothing(term: language.Term, selection: str, backbone: Backbone) -> str:
    roles = {site.role for site in backbone.sites}
    words = [word for word, of_word in language.ROLES_OF_WORD.items() if roles & set(of_word)]
    suffixes = sorted({site.name.rsplit(".", 1)[-1] for site in backbone.sites})
    blocks = f"blocks[0] to blocks[{len(backbone.blocks) - 1}]" if backbone.blocks else "no blocks"
    word = term.suffix or term.text
    return (
        f"selection {selection!r}: {term.text!r} matches nothing in {backbone.source}. "
        f"There is: {listing(words)}; {blocks}; modules named {listing(suffixes, 30)}."
        f"{nearest(word, sorted({*words, *suffixes, 'blocks'} - {word}))}"
    )
