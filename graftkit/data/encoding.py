"""Decode text files. A wrong encoding is an error that names the offending byte and suggests another encoding."""

from __future__ import annotations

import codecs
import encodings.aliases
import re
import sys
from collections.abc import Iterable, Iterator

from graftkit.errors import UserError, listing, nearest

ENCODINGS = (
    "utf-8",
    "utf-16",
    "gb18030",
    "gbk",
    "big5",
    "shift_jis",
    "euc-kr",
    "cp1252",
    "latin-1",
    "cp1251",
)
UTF16_MARKS, UTF32_MARKS = (b"\xff\xfe", b"\xfe\xff"), (b"\xff\xfe\0\0", b"\0\0\xfe\xff")


def decode(raw: bytes, source: str, encoding: str) -> str:
    """Return the text of a file, without a byte-order mark."""
    return "".join(decode_blocks([raw], source, encoding))


def decode_blocks(blocks: Iterable[bytes], source: str, encoding: str) -> Iterator[str]:
    """Yield the text of a file given in blocks of at least a few kilobytes, without a byte-order mark.

    Raises `UserError` for bytes that cannot be decoded. The suggested encoding is guessed from the block that contains them.
    """
    offset, line, raw, begun = 0, 1, b"", False
    is_utf8 = False
    try:
        name = codecs.lookup(encoding).name
        is_utf8 = name in ("utf-8", "utf-8-sig")
        b"".decode(encoding)  # raises LookupError for codecs that are not text encodings
        for raw, last in _with_last(blocks):
            if not offset:
                if is_utf8:
                    refuse_wide_characters(raw, source, encoding)
                elif name in ("utf-16", "utf-32") and not raw.startswith(UTF16_MARKS + UTF32_MARKS):
                    name += f"-{sys.byteorder[0]}e"  # without a byte-order mark, native byte order
                decoder = codecs.getincrementaldecoder("utf-8" if is_utf8 else name)()
            text = decoder.decode(raw, last)
            offset, line = offset + len(raw), line + raw.count(b"\n")
            yield text if begun else text.removeprefix("\ufeff")
            begun = begun or bool(text)
    except UnicodeDecodeError as error:
        seen = bytes(error.object)  # starts with undecoded bytes of the previous block
        left = len(seen) - len(raw)
        byte, line = seen[error.start], line + seen.count(b"\n", left, error.start)
        raise UserError(
            f"{source} is not {encoding}: byte 0x{byte:02x} at offset {offset - left + error.start} (line {line}) "
            f"cannot be decoded. {suggest_encoding(seen, is_utf8)}"
        ) from None
    except UnicodeError as error:
        raise UserError(f"{source} is not {encoding}: {error}. {suggest_encoding(raw, False)}") from None
    except (LookupError, ValueError):
        hint = nearest(encoding, [*ENCODINGS, *encodings.aliases.aliases.values()])
        raise UserError(
            f"data.encoding='{encoding}' is not a known text encoding (such as {listing(ENCODINGS)}).{hint}"
        ) from None


def _with_last(blocks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yield each block, and whether it is the last."""
    before: bytes | None = None
    for block in blocks:
        if before is not None:
            yield before, False
        before = block
    yield before or b"", True


def refuse_wide_characters(raw: bytes, source: str, encoding: str) -> None:
    """Raise `UserError` for UTF-16 and UTF-32 files: if they contain only ASCII, they decode as UTF-8, with zero bytes."""
    if raw.startswith(UTF16_MARKS + UTF32_MARKS):
        name = (
            "utf-32" if raw.startswith(UTF32_MARKS) else "utf-16"
        )  # utf-32 first: its mark starts with that of utf-16
        raise UserError(f"{source} starts with the byte-order mark of {name}. Set data.encoding={name}")
    head = raw[:4096]
    if head.count(0) * 5 > len(head):
        even, odd = head[::2].count(0), head[1::2].count(0)
        if min(even, odd) * 4 < max(even, odd):
            guess = "utf-16-be" if even > odd else "utf-16-le"
            raise UserError(f"{source} looks like {guess}, not {encoding}. Set data.encoding={guess}")
        raise UserError(f"{source} is not a text file: it is full of zero bytes. Give a text file")


def suggest_encoding(raw: bytes, tried_utf8: bool) -> str:
    if len(re.findall(rb"[\x00-\x08\x0e-\x1f]", raw[:4096])) * 50 > len(raw[:4096]):
        return "It looks like a binary file: give a text file"
    as_utf8 = raw.decode("utf-8", errors="replace")
    wrong = as_utf8.count("\ufffd")
    if sum(character > "\x7f" for character in as_utf8) > 2 * wrong:
        return "The rest of the file is UTF-8: fix these bytes" if tried_utf8 else "Try data.encoding=utf-8"
    for guess in ("gb18030", "cp1252", "latin-1"):
        try:
            text = raw.decode(guess)
        except UnicodeDecodeError:
            continue
        foreign = [character for character in text if character > "\x7f"][:2000]
        # In Latin-1, an accented letter and an ASCII letter also form a rare GB18030 character, but never a GB2312 one.
        common = sum(bool(character.encode("gb2312", errors="ignore")) for character in foreign)
        if guess == "gb18030" and common * 10 < len(foreign) * 7:
            continue
        line = next((line for line in text.splitlines() if not line.isascii()), "")
        start = max(0, next((i for i, character in enumerate(line) if character > "\x7f"), 0) - 20)
        return f"Perhaps data.encoding={guess}, which reads it as '{line[start : start + 40].strip()}'"
    return "Set data.encoding to the encoding of the file"
