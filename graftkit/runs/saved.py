"""Read what a run has written about itself, which someone may have edited or damaged since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graftkit.backbone import values
from graftkit.data.json_text import parse_json
from graftkit.errors import UserError, shown
from graftkit.files import read_json

ROWS = "rows_sha256"  # in the plan: a digest of each data split
FORCED = "changed_when_resumed"  # in the plan: the changes of its inputs that were accepted with --force
AGAIN = "Restore it from a copy"


def read_plan(path: Path) -> dict[str, Any]:
    """Return the plan of a run; empty if it was stopped before writing one."""
    if not path.exists():
        return {}
    plan = read_json(path)
    digests = plan.get(ROWS, {})
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        raise _wrong(path, ROWS, "digests of rows by name", digests)
    samples = plan.get(values.KEY)
    if samples is not None and not (isinstance(samples, dict) and all(map(_numbers, samples.values()))):
        raise _wrong(path, values.KEY, "lists of numbers by name", samples)
    forced = plan.get(FORCED, [])
    if not isinstance(forced, list) or not all(isinstance(change, str) for change in forced):
        raise _wrong(path, FORCED, "a list of texts", forced)
    return plan


def read_result(path: Path) -> dict[str, Any]:
    """Return the result of a finished run."""
    result = read_json(path)
    if not isinstance(result.get("metrics"), dict):
        raise _wrong(path, "metrics", "numbers by name", result.get("metrics"))
    return result


def log_lines(path: Path) -> list[tuple[str, Any]]:
    """Return the lines of a log with their values; None for a line that was cut short when the process was killed."""
    try:
        whole, end, last = path.read_bytes().rpartition(b"\n")
        text = (whole + end).decode("utf-8") + last.decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). {AGAIN}, or move it away to resume without the earlier lines."
        ) from None
    found = []
    for line in filter(None, text.split("\n")):
        try:
            found.append((line, parse_json(line)))
        except ValueError:
            found.append((line, None))
    return found


def stays(value: Any, step: int) -> bool:
    """Return whether a log line belongs to the run up to `step`; the final lines are written again."""
    try:
        return value["step"] <= step and value["kind"] != "final"
    except (KeyError, TypeError):
        return False  # cut short when the process was killed


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(number, int | float) and not isinstance(number, bool) for number in value
    )


def _wrong(path: Path, field: str, wanted: str, value: Any) -> UserError:
    return UserError(f"{path}: {field} is {shown(value, 60)}, but must be {wanted}. {AGAIN}.")
