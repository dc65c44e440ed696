"""From the bytes of a text file to text; a wrong encoding is an error that names the byte and suggests another."""

from __future__ import annotations

import codecs
import encodings.aliases
import re

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
    """The file's text without byte-order mark."""
    try:
        is_utf8 = codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")
        if is_utf8:
            _refuse_wide_characters(raw, source, encoding)
        return raw.decode("utf-8" if is_utf8 else encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte, line = raw[error.start], raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{source} is not {encoding}: byte 0x{byte:02x} at offset {error.start} (line {line}) does not "
            f"belong there. {_suggest_encoding(raw, is_utf8)}"
        ) from None
    except UnicodeError as error:
        raise UserError(f"{source} is not {encoding}: {error}. {_suggest_encoding(raw, False)}") from None
    except (LookupError, ValueError):
        hint = nearest(encoding, [*ENCODINGS, *encodings.aliases.aliases.values()])
        raise UserError(
            f"data.encoding='{encoding}' is not a known text encoding (such as {listing(ENCODINGS)}).{hint}"
        ) from None


def _refuse_wide_characters(raw: bytes, source: str, encoding: str) -> None:
    """UTF-16 and UTF-32 without a mark still decode as UTF-8 where they are ASCII; their zero bytes tell."""
    if raw.startswith(UTF16_MARKS + UTF32_MARKS):
        name = "utf-32" if raw.startswith(UTF32_MARKS) else "utf-16"  # its mark begins that of utf-32
        raise UserError(f"{source} begins with the byte-order mark of {name}. Set data.encoding={name}")
    head = raw[:4096]
    if head.count(0) * 5 > len(head):
        even, odd = head[::2].count(0), head[1::2].count(0)
        if min(even, odd) * 4 < max(even, odd):
            guess = "utf-16-be" if even > odd else "utf-16-le"
            raise UserError(f"{source} looks like {guess}, not {encoding}. Set data.encoding={guess}")
        raise UserError(f"{source} is not a text file: it is full of zero bytes. Name a file of text")


def _suggest_encoding(raw: bytes, tried_utf8: bool) -> str:
    if len(re.findall(rb"[\x00-\x08\x0e-\x1f]", raw[:4096])) * 50 > len(raw[:4096]):
        return "It looks like a binary file: name a file of text"
    as_utf8 = raw.decode("utf-8", errors="replace")
    wrong = as_utf8.count("\ufffd")
    if sum(character > "\x7f" for character in as_utf8) > 2 * wrong:
        return "The rest of the file is UTF-8: mend these bytes" if tried_utf8 else "Try data.encoding=utf-8"
    for guess in ("gb18030", "cp1252", "latin-1"):
        try:
            text = raw.decode(guess)
        except UnicodeDecodeError:
            continue
        foreign = [character for character in text if character > "\x7f"][:2000]
        # An accented letter before an ASCII letter is also a rare GB18030 character, never a GB2312 one.
        common = sum(bool(character.encode("gb2312", errors="ignore")) for character in foreign)
        if guess == "gb18030" and common * 10 < len(foreign) * 7:
            continue
        line = next((line for line in text.splitlines() if not line.isascii()), "")
        start = max(0, next((i for i, character in enumerate(line) if character > "\x7f"), 0) - 20)
        return f"Perhaps data.encoding={guess}, which reads it as '{line[start : start + 40].strip()}'"
    return "Set data.encoding to the encoding it was written in"
