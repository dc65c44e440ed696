"""Methods that messages recommend: found by what they say of themselves, so that no message knows a name."""

from __future__ import annotations

from graftkit.recipe.catalogue import entries


def recommended(*properties: str) -> str:
    """`lora() or unfreeze()`: the methods that say one of these of themselves, as a recipe writes them."""
    known = entries("method").values()
    names = [entry.name for word in properties for entry in known if entry.constants.get(word) is True]
    return " or ".join(f"{name}()" for name in dict.fromkeys(names))


def general() -> str:
    """What fits most modules."""
    return recommended("is_general")


def selecting(sites: str = "") -> str:
    """What trains any part of the backbone that a selection names, with a selection where one is given."""
    return recommended("selects").replace("()", f"({sites!r})" if sites else "()")


def reading(peft_type: str) -> str:
    """What reads a kind of PEFT's adapters."""
    known = entries("method").values()
    names = [entry.name for entry in known if peft_type in entry.constants.get("peft_types", ())]
    return " or ".join(f"{name}()" for name in names)


def covering() -> str:
    """What trains all of the backbone."""
    return recommended("covers")
