"""Read and validate the messages of a conversation: roles and contents, ShareGPT's names, tool calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from graftkit.data.json_text import parse_json
from graftkit.errors import listing, nearest

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant", "function": "tool"}  # role names
FORM = "[{role: user, content: ...}, ...]"

Message = dict[str, Any]


def read_messages(value: Any) -> list[Message] | str:
    """Return the messages of one row, or what is wrong with them. A string is parsed as JSON.

    Messages in ShareGPT's format, {from, value}, are converted to {role, content}.
    """
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            return f"is a text, not a list of messages {FORM}"
    if value is None or (isinstance(value, list | tuple | np.ndarray) and not len(value)):
        return "is empty"
    if not isinstance(value, list | tuple | np.ndarray):
        return f"is a {type(value).__name__}, not a list of messages {FORM}"
    messages = []
    for number, message in enumerate(value, start=1):
        read = _read_message(message, number)
        if isinstance(read, str):
            return read
        messages.append(read)
    return _order_problem(messages) or messages


def _read_message(message: Any, number: int) -> Message | str:
    """Return one message, or what is wrong with it."""
    if not isinstance(message, dict):
        return f"has no role and content in message {number}, which is a {type(message).__name__}"
    found = {str(key): value for key, value in message.items() if value is not None}
    if "role" not in found and {"from", "value"} & set(found):
        found = {{"from": "role", "value": "content"}.get(key, key): value for key, value in found.items()}
    role = found.get("role")
    calls = found.pop("tool_calls", None) if role in ("assistant", "gpt") else None
    has_calls = calls is not None and not (hasattr(calls, "__len__") and len(calls) == 0)
    if role is None or not ({"content", "value"} & set(message) or has_calls):
        return f"has no role and content (or from and value) in message {number}"
    role = SHAREGPT.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        known = (*ROLES, *SHAREGPT)
        return f"has the unknown role {role!r} in message {number} (roles: {listing(known)}){nearest(str(role), known)}"
    content = found.get("content")
    is_empty = content is None or (isinstance(content, str) and not content.strip())
    if not (is_empty and has_calls) and (not isinstance(content, str) or (is_empty and role != "system")):
        what = "is empty" if is_empty else "is not a string"
        return f"has invalid content: message {number} ({role!r}) {what}"
    found |= {"role": role, "content": content}
    if has_calls:
        read = _read_calls(calls, number)
        if isinstance(read, str):
            return read
        found["tool_calls"] = read
    return found


def _read_calls(calls: Any, number: int) -> list[dict[str, Any]] | str:
    """Return tool calls as chat templates expect them, with arguments as a mapping; or what is wrong with one."""
    if not isinstance(calls, list | tuple | np.ndarray):
        return f"has tool_calls in message {number} that are a {type(calls).__name__}, not a list"
    found = []
    for place, call in enumerate(calls, start=1):
        where = f"has a tool call {place} in message {number}"
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"].strip():
            return f"{where} that is not {{function: {{name: ..., arguments: {{...}}}}}}"
        arguments = inner.get("arguments")
        if isinstance(arguments, str):  # OpenAI's format
            try:
                arguments = parse_json(arguments) if arguments.strip() else {}
            except ValueError:
                return f"{where} ({inner['name']}) whose arguments are not valid JSON: {arguments[:40]!r}"
        if not isinstance(arguments, dict | None):
            return (
                f"{where} ({inner['name']}) whose arguments are a {type(arguments).__name__}, not a mapping"
            )
        function = {**without_none(inner), "arguments": without_none(arguments or {})}
        more = {
            key: value for key, value in call.items() if key not in ("function", *inner) and value is not None
        }
        found.append({"type": "function", **more, "function": function})
    return found


def read_tools(value: Any) -> list[dict[str, Any]] | str | None:
    """Return the tools of one row as JSON schemas, None if it has none; or a string that says what is wrong with them."""
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = parse_json(value)
        except ValueError:
            return "is not valid JSON; it must be a list of tools"
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return None
    if not isinstance(value, list | tuple | np.ndarray):
        return f"is a {type(value).__name__}, not a list of tools [{{type: function, function: {{name: ...}}}}, ...]"
    found = []
    for number, tool in enumerate(value, start=1):
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            return f"has no name in tool {number}, which must be {{type: function, function: {{name: ...}}}}"
        found.append(without_none(tool))
    return found or None


def without_none(value: Any) -> Any:
    """Return a value without keys whose value is None; tables with one schema for all rows have every key in each row."""
    if isinstance(value, dict):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple | np.ndarray):
        return [without_none(inner) for inner in value]
    return value


def _order_problem(messages: Sequence[Message]) -> str | None:
    """Return what is wrong with the order of roles, or None.

    The order is an optional system message, then user and assistant in turn, with tool messages after an assistant.
    """
    before = None
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role == "system" and number > 1:
            return f"has a system message at position {number}; it must come first"
        wanted = {None: ("system", "user"), "system": ("user",), "user": ("assistant",),
                  "assistant": ("user", "tool"), "tool": ("assistant", "tool")}[before]  # fmt: skip
        if role not in wanted:
            where = "comes first" if before is None else f"follows {before!r}"
            return (
                f"has roles that do not alternate: message {number} ({role!r}) {where}; expected "
                f"{' or '.join(wanted)}"
            )
        before = role
    return None


def answer_text(message: Message) -> str:
    """Return the text of an assistant's message, followed by its tool calls as JSON."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join([*filter(None, [message["content"]]), *calls])
