"""Limits on what a compressed table becomes in memory: a few bytes of Parquet or Arrow can stand for any number of values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graftkit.errors import UserError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

BYTES, RATIO = (
    2**30,
    200,
)  # unpacked, of any file, and for each byte of it; text is compressed to a tenth at best
VALUES, DENSITY = 10**7, 20  # rows times columns, of any file, and for each byte of it


def open_parquet(file: Any, size: int, source: str) -> pyarrow.parquet.ParquetFile:
    """Open a Parquet file of `size` bytes. Texts that it stores once for many rows stay that way when they are read.

    Raises `UserError` if its footer announces more than such a file can honestly contain.
    """
    import pyarrow
    import pyarrow.parquet

    opened = pyarrow.parquet.ParquetFile(file)
    about = opened.metadata
    unpacked = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
    refuse_inflated(unpacked, about.num_rows * max(1, about.num_columns), size, source)
    texts = [field.name for field in opened.schema_arrow if pyarrow.types.is_string(field.type)]
    file.seek(0)
    return pyarrow.parquet.ParquetFile(file, read_dictionary=texts) if texts else opened


def refuse_inflated(unpacked: int, values: int, size: int, source: str) -> None:
    """Raise `UserError` for a table of `size` bytes that has too many bytes or values when it is unpacked."""
    if unpacked > max(BYTES, RATIO * size) or values > max(VALUES, DENSITY * size):
        raise UserError(
            f"{source} has {size:,} bytes, but {values:,} values of {unpacked:,} bytes when it is unpacked, too many for "
            "its size. Write its rows as CSV or JSON lines"
        )


def text_bytes(column: pyarrow.Array | pyarrow.ChunkedArray) -> int:
    """Return the bytes of all texts of a column, when each row has its own; 0 for other types."""
    import pyarrow
    from pyarrow import compute

    found = 0
    for part in getattr(column, "chunks", [column]):
        kind = part.type
        if pyarrow.types.is_dictionary(kind) and pyarrow.types.is_string(kind.value_type):
            lengths = compute.binary_length(part.dictionary).cast(pyarrow.int64())
            found += compute.sum(lengths.take(part.indices)).as_py() or 0
        elif pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
            found += compute.sum(compute.binary_length(part)).as_py() or 0
    return found
