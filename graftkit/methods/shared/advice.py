"""Methods that messages recommend, found by their class attributes, so that no message names a method."""

from __future__ import annotations

from graftkit.recipe.catalogue import entries


def recommended(*properties: str) -> str:
    """Return the methods with one of these properties as a recipe writes them: `lora() or unfreeze()`."""
    known = entries("method").values()
    names = [entry.name for word in properties for entry in known if entry.constants.get(word) is True]
    return " or ".join(f"{name}()" for name in dict.fromkeys(names))


def general() -> str:
    """Return the methods that fit most modules."""
    return recommended("is_general")


def selecting(sites: str = "") -> str:
    """Return the methods that train any selected part of the backbone, with the given selection."""
    return recommended("selects").replace("()", f"({sites!r})" if sites else "()")


def reading(peft_type: str) -> str:
    """Return the methods that read a type of PEFT adapter."""
    known = entries("method").values()
    names = [entry.name for entry in known if peft_type in entry.constants.get("peft_types", ())]
    return " or ".join(f"{name}()" for name in names)


def covering() -> str:
    """Return the methods that train the whole backbone."""
    return recommended("covers")
