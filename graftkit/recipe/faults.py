"""What is wrong with a recipe, in one sentence. No torch here."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from graftkit.errors import listing, nearest, shown


def message_of(error: ValidationError, origin: str, known: Mapping[str, str]) -> str:
    """Return the message for the first problem in a recipe. `known`: every key with its description."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path = [str(part) for part in first["loc"] if str(part) not in ("str", "float", "int", "bool")]
    path = [part for part in path if not part.startswith(("literal[", "function-"))]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        inner = [k for k in known if k.rpartition(".")[2] == path[-1]]
        suggestion = (
            f" Did you mean {inner[0]!r}?" if inner else nearest(key, known) or nearest(path[-1], known)
        )
        return f"{origin}: unknown key {shown(key)} (keys: {listing(known, 30)}).{suggestion}"
    if first["type"] == "missing":
        key = "data.train" if key == "data" else key  # the only key of this section without a default
        return f"{origin}: {key!r} is missing: {known.get(key, '') or 'it is needed'}."
    given = first.get("input")
    if first["type"] == "model_type":
        inner = [name.rpartition(".")[2] for name in known if name.startswith(f"{key}.")]
        return f"{origin}: {key} is {shown(given)}, but must be a section with keys ({listing(inner, 4)})."
    text = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    text = text[0].lower() + text[1:]
    options = [p for p in problems if ".".join(map(str, p["loc"])).startswith(key)]
    if len(options) > 1:
        text = " or ".join(
            dict.fromkeys(
                p["msg"].replace("Input should be", "").removeprefix("Value error, ").strip() for p in options
            )
        )
        text = f"must be {text.removeprefix('must be ')}"
    suggestion = ""
    if first["type"] == "literal_error" and isinstance(given, str):
        suggestion = nearest(
            given, str(first["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        )
    return f"{origin}: {key} is {shown(given)}, but {text}.{suggestion}"
