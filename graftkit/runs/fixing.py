"""A CSV of suspicious labels to correct by hand, and a new file of rows with the corrected labels."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftkit.data.encoding import decode
from graftkit.data.json_text import parse_json
from graftkit.data.read import find_file, read_table, telling_why
from graftkit.data.rows import csv_lines, fields_of, read_header
from graftkit.data.table import BadRows
from graftkit.errors import UserError, listing, nearest
from graftkit.files import replacing
from graftkit.report.values import Check
from graftkit.tasks.shared.labels import label_text

LABEL, COLUMN, DIGEST = "label", "column", "sha256"
COLUMNS = ("file", "line", "row", "text", "given", "suggested", "score", "nearest", LABEL, COLUMN, DIGEST)
WRITTEN = ("csv", "tsv", "json lines", "json", "parquet")
BETWEEN = "; "  # labels of a set


@dataclass(frozen=True)
class Change:
    """A new label, None for a row to leave out. `where`: the line of the CSV."""

    label: str | None
    given: str
    where: str


def write_suspects(path: Path, found: Check) -> None:
    """Write suspects to a new CSV file to correct, worst first.

    Its column `label` holds the label as it is, to be replaced, or emptied to leave the row out; `nearest` has the labels
    and texts of the nearest training rows, and `sha256` tells if a file has changed when the corrections are applied.
    """
    refuse_existing(path)
    column = found.columns.get("label", "")
    digests: dict[str, str] = {}
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for one in found.suspects or ():
            source = Path(one["file"]).expanduser()
            if one["file"] not in digests:
                digests[one["file"]] = digest_of(source) if source.is_file() else ""
            given, suggested = _text(one["given"]), _text(one["suggested"])
            near = "\n".join(f"{_text(row['label'])}: {row['text']}" for row in one["nearest_rows"])
            line = "" if one["line"] is None else one["line"]
            text = f"{one['word']}: {one['text']}" if "word" in one else one["text"]
            writer.writerow((
                one["file"], line, one["row"], text, given, suggested, one["score"], near, given, column, digests[one["file"]],
            ))  # fmt: skip


def _text(label: str | list[str]) -> str:
    return label if isinstance(label, str) else BETWEEN.join(label)


def fix(corrected: str | Path, out: str | Path, file: str | None = None) -> dict[str, Any]:
    """Write a copy of a file of rows with the labels of a corrected CSV: `graftkit data fix` in Python.

    All other rows are copied as they are. `file`: which file to copy, if labels of several were changed. The result has
    `file`, `out`, and the numbers of rows `changed` and `left_out`. Raises `UserError` if the file has changed since its
    labels were checked, `out` exists or has another format, or a label is not one of the file's.
    """
    out = Path(out).expanduser()
    refuse_existing(out)
    source, rows = _chosen(str(corrected), file)
    if not all(row[COLUMN] for row in rows):
        raise UserError(
            f"{corrected}: the labels of {source} are in several columns, or words have them; correct them there."
        )
    path, kind = find_file(source)
    if kind not in WRITTEN:
        raise UserError(
            f"{source}: labels in {kind.title()} files cannot be rewritten. Save its rows as Parquet first."
        )
    if out.suffix.lower() != path.suffix.lower():
        raise UserError(f"{out} would have another format than {source}. Give it the ending {path.suffix!r}.")
    with telling_why(path, source):
        raw = path.read_bytes()
    if {row[DIGEST] for row in rows} != {hashlib.sha256(raw).hexdigest()}:
        raise UserError(
            f"{source} has changed since its labels were checked for {corrected}, so its lines may be others. Check its labels "
            "again, or restore the file."
        )
    changes = _changes(rows, str(corrected))
    left_out = sum(change.label is None for change in changes.values())
    if changes:
        raw = _rewritten(raw, source, kind, rows[0][COLUMN], changes)
    with replacing(out) as part:
        part.write_bytes(raw)
    return {"file": source, "out": str(out), "changed": len(changes) - left_out, "left_out": left_out}


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_existing(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists already, and is never overwritten. Name another file, or remove it.")


def _chosen(corrected: str, file: str | None) -> tuple[str, list[dict[str, str]]]:
    """Return the file to copy, and its rows in the CSV."""
    table = read_table(corrected)
    missing = [name for name in ("file", "line", "given", LABEL, COLUMN, DIGEST) if name not in table.columns]
    if missing:
        raise UserError(
            f"{corrected} has no column {listing(map(repr, missing))}, so it is not what `graftkit data check --labels --csv` "
            "wrote. Keep all its columns."
        )
    rows = [
        {name: str(values[at]) for name, values in table.columns.items()} | {"where": table.where(at)}
        for at in range(len(table))
    ]
    if rows and not any(row["line"] for row in rows):
        raise UserError(
            f"{corrected} has the labels of files in folders ({rows[0]['file']}, ...), which are named by their labels. Move each "
            "file to the folder of its label."
        )
    files = dict.fromkeys(row["file"] for row in rows)
    changed = dict.fromkeys(row["file"] for row in rows if row[LABEL].strip() != row["given"].strip())
    if file is not None and file not in files:
        raise UserError(
            f"{corrected} has no labels of {file!r}. Its files: {listing(files)}.{nearest(file, files)}"
        )
    if file is None and len(changed or files) > 1:
        raise UserError(
            f"{corrected} has labels of {len(changed or files)} files ({listing(changed or files)}). Choose one with --file."
        )
    chosen = file or next(iter(changed or files))
    return chosen, [row for row in rows if row["file"] == chosen]


def _changes(rows: Sequence[Mapping[str, str]], corrected: str) -> dict[int, Change]:
    """Return the changes of labels by line."""
    found: dict[int, Change] = {}
    for row in rows:
        if not row["line"].isdecimal():
            raise UserError(
                f"{row['where']}: {row['file']} is a file of a folder, which is named by its label. Move it to the folder of "
                "its label."
            )
        line, label = int(row["line"]), row[LABEL].strip()
        change = Change(label or None, row["given"].strip(), row["where"])
        if label == change.given:
            continue
        if line in found and found[line].label != change.label:
            raise UserError(
                f"{row['where']}: line {line} of {row['file']} has another label in {found[line].where}."
            )
        found[line] = change
    return found


def _rewritten(raw: bytes, source: str, kind: str, column: str, changes: Mapping[int, Change]) -> bytes:
    """Return the content of a file of rows with changed labels."""
    table = read_table(source, skip_bad=True)
    if column not in table.columns:
        raise UserError(
            f"{source} has no column {column!r} (columns: {listing(table.columns)}). Leave 'column' as it is."
        )
    known = {label_text(value): value for value in table.columns[column]}
    at = {number: row for row, number in enumerate(table.numbers)}
    new: dict[int, Any] = {}
    for line, change in changes.items():
        now = table.columns[column][at[line]] if line in at else None
        if now is None or label_text(now) != change.given:
            raise UserError(
                f"{change.where}: {table.unit} {line} of {source} has the label {now!r}, not {change.given!r}. Leave the columns "
                "'line' and 'given' as they are."
            )
        if change.label is not None and change.label not in known:
            raise UserError(
                f"{change.where}: label {change.label!r} is not among the {len(known)} labels of {source}."
                f"{nearest(change.label, known)}"
            )
        new[line] = None if change.label is None else known[change.label]
    if kind == "parquet":
        return _parquet(raw, column, new)
    text = decode(raw, source, "utf-8")
    if kind in ("csv", "tsv"):
        text = _separated(text, source, kind, column, new)
    elif kind == "json" and text.lstrip().startswith("["):
        whole = enumerate(parse_json(text), start=1)
        kept = [_with(record, column, new, at) for at, record in whole if new.get(at, "") is not None]
        text = json.dumps(kept, ensure_ascii=False, indent=1) + "\n"
    else:
        text = _json_lines(text, column, new)
    mark = codecs.BOM_UTF8 if raw.startswith(codecs.BOM_UTF8) else b""
    return mark + text.encode("utf-8")


def _with(record: dict[str, Any], column: str, new: Mapping[int, Any], number: int) -> dict[str, Any]:
    return {**record, column: new[number]} if number in new else record


def _json_lines(text: str, column: str, new: Mapping[int, Any]) -> str:
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        if number in new and new[number] is None:
            continue
        if number in new:
            closing = "\r" if line.endswith("\r") else ""
            line = json.dumps(_with(parse_json(line), column, new, number), ensure_ascii=False) + closing
        lines.append(line)
    return "\n".join(lines)


def _separated(text: str, source: str, kind: str, column: str, new: Mapping[int, Any]) -> str:
    """Return CSV or TSV with changed labels; only the lines of changed rows are written anew."""
    bad = BadRows(source, "line", True)
    end = "\n" if "\n" in text else "\r"
    lines = list(csv_lines([text])) if kind == "csv" else [f"{line}{end}" for line in text.split(end)]
    if kind == "tsv":
        lines[-1] = lines[-1].removesuffix(end)
    records, _ = fields_of(kind, text, [text], bad)
    place = read_header(records, bad).index(column)
    head = next(line for line in lines if line.strip())
    delimiter = "\t" if kind == "tsv" else next((mark for mark in ",;\t" if mark in head), ",")
    for start, stop, fields in records:
        if start not in new:
            continue
        old, written = "".join(lines[start - 1 : stop]), ""
        if new[start] is not None:
            fields[place] = str(new[start])
            buffer = io.StringIO()
            closing = old[len(old.rstrip("\r\n")) :]
            if kind == "csv":
                csv.writer(buffer, delimiter=delimiter, lineterminator=closing).writerow(fields)
                written = buffer.getvalue()
            else:
                cells = old.rstrip("\r\n").split("\t")
                cells[place] = fields[place]
                written = "\t".join(cells) + closing
        lines[start - 1 : stop] = [written, *[""] * (stop - start)]
    return "".join(lines)


def _parquet(raw: bytes, column: str, new: Mapping[int, Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(pyarrow.BufferReader(raw))
    values = table.column(column).to_pylist()
    kept = [number for number in range(1, len(values) + 1) if new.get(number, "") is not None]
    changed = [new.get(number, values[number - 1]) for number in kept]
    field = table.schema.field(column)
    kind = field.type.value_type if pyarrow.types.is_dictionary(field.type) else field.type
    table = table.take([number - 1 for number in kept])
    table = table.set_column(table.schema.get_field_index(column), column, pyarrow.array(changed, kind))
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out)
    return out.getvalue()
