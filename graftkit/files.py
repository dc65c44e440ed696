"""Atomic writing (to a temporary name, synced, then renamed), and reading of files that nobody vouches for."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.claims import remove, temporary
from graftkit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_JSON = 2**28  # bytes; no description of a model or graft comes near
HEADER = 100_000_000  # bytes of a header of safetensors, the format's own limit
CHECKSUM = "checksum"  # in the metadata of the tensor files that GraftKit writes
# what libraries in Rust say of the operating system's errors
NATIVE = re.compile(r"(?:.*error: )?(?P<said>.+) \(os error \d+\)", re.IGNORECASE)


class NotWritten(UserError):
    """A file or folder could not be written; `said` is what the operating system said."""

    def __init__(self, path: Path, said: str) -> None:
        super().__init__(
            f"{path} cannot be written: {said}. Any earlier content is untouched; make room or check the permissions and "
            "try again."
        )
        self.said = said


@contextmanager
def replacing(path: Path, beside: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path to write; if the block succeeds, it is synced and renamed to `path`.

    It is beside `path`, or in the folder `beside`. On any error it is removed and `path` is unchanged. A full disk raises
    `UserError`. The file has the rights of a new one, whichever library writes it.
    """
    part = temporary(path) if beside is None else beside / temporary(path).name
    try:
        with _refusing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as new:
                rights = os.fstat(new.fileno()).st_mode & 0o777
            yield part
            part.chmod(rights)
            _sync(part)
            os.replace(part, path)
            _sync(path.parent)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


@contextmanager
def assembling(folder: Path, old: Collection[str], last: Collection[str]) -> Iterator[Path]:
    """Yield a temporary folder to write files into; if the block succeeds, they take the place of the files `old`.

    `last`: the files without which nothing opens the folder. They are removed first and moved in last, so that what a
    killed process leaves is incomplete, and never a mixture of old and new files. A folder that did not exist appears at
    once. On any error `folder` is unchanged; a full disk raises `UserError`.
    """
    part = temporary(folder)
    try:
        with _refusing(folder):
            remove(part)
            part.mkdir(parents=True)
            yield part
            rights = part.stat().st_mode & 0o666  # of a new file: those of a new folder without execution
            for path in [path for path in part.rglob("*") if path.is_file()]:
                path.chmod(rights)
                _sync(path)
            _move(part, folder, old, last)
    finally:
        remove(part)


def _move(part: Path, folder: Path, old: Collection[str], last: Collection[str]) -> None:
    """Move the files of a folder to another one."""
    if not folder.exists():
        os.replace(part, folder)
        _sync(folder.parent)
        return
    new = [str(path.relative_to(part)) for path in sorted(part.rglob("*")) if path.is_file()]
    gone = [name for name in old if name not in new]
    for name in (*last, *gone):
        (folder / name).unlink(missing_ok=True)
    _sync(folder)
    for name in sorted(new, key=lambda name: name in last):
        if name in last:
            _sync(folder)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(part / name, folder / name)
    _sync(folder)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Raise `NotWritten` for what the operating system refuses, also to libraries that wrap its errors."""
    try:
        yield
    except NotWritten as error:  # a file of a folder that is assembled
        raise NotWritten(path, error.said) from None
    except UserError:
        raise
    except OSError as error:
        raise NotWritten(path, error.strerror or str(error)) from None
    except Exception as error:
        found = NATIVE.search(str(error))
        if found is None:
            raise
        raise NotWritten(path, found["said"]) from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a text file (UTF-8) atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines to a text file (UTF-8) and sync it: all of them, or none if the disk is full."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, size)
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. Make room or check the permissions and try again."
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """Replace a safetensors file atomically. Return its checksum, which `read_tensors` compares."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {"format": "pt"} | (metadata or {})
    about[CHECKSUM] = checksum(contiguous, about)
    with replacing(path) as part:
        save_file(contiguous, part, metadata=about)
        _sort_metadata(part)
    return about[CHECKSUM]


def _sort_metadata(path: Path) -> None:
    """Order the metadata of a safetensors file, which come in a random order, so that equal contents are equal files."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:  # otherwise it escapes characters that safetensors does not
            file.seek(8)
            file.write(text.ljust(length))


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return a checksum of tensors with their names, types and shapes, and of metadata: it tells damage, not forgery."""
    import torch
    import xxhash

    found = xxhash.xxh3_64()
    for key, value in sorted(metadata.items()):
        if key != CHECKSUM:
            found.update(json.dumps([key, value]).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


PERMIT = "change its permissions (chmod u+r), or those of the folders above it (chmod u+rx)"


def irregular(path: Path) -> str | None:
    """Return why a path that is there cannot be read: it is no regular file, which reading might never end, or this user
    may not read it; else None.

    Links are followed, as the Hugging Face cache stores files behind links.
    """
    try:
        os.stat(path)
        forbidden = not os.access(path, os.R_OK)
    except PermissionError:
        forbidden = True
    except (OSError, ValueError):
        forbidden = False
    if forbidden:
        return f"may not be read by this user: {PERMIT}"
    if path.is_symlink() and not path.exists():
        return "is a link that leads nowhere: download the file, or restore it from a copy"
    kind = "a folder" if path.is_dir() else special(path)
    return kind and f"is {kind}, not a regular file: download the file, or restore it from a copy"


def refuse_irregular(path: Path) -> None:
    """Raise `UserError` if a path is there and is no regular file, or may not be read."""
    wrong = irregular(path)
    if wrong is not None:
        raise UserError(f"{path} {wrong}.")


def fault(path: Path) -> str | None:
    """Return what is wrong with a file and how to fix it, or None: not a regular file, a Git LFS pointer, an empty file,
    or a truncated safetensors or JSON file.
    """
    wrong = irregular(path)
    if wrong is not None:
        return wrong
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if POINTER.startswith(start) and len(start) == 8:
            return (
                f"is a Git LFS pointer of {size:,} bytes, not the file itself: run `git lfs pull` in {path.parent}, or "
                "download the file"
            )
        if not size:
            return "is empty: download it again, or restore it from a copy"
        if path.suffix == ".safetensors":
            whole = _whole_size(start, file.read(min(HEADER, int.from_bytes(start, "little"))))
            if whole is None:
                return "is cut short, or not a safetensors file: download it again, or restore it from a copy"
            if whole > size:
                return f"is cut short ({size:,} of {whole:,} bytes): download it again, or restore it from a copy"
        if path.suffix == ".json":
            file.seek(max(0, size - 64))
            if not file.read().rstrip().endswith((b"}", b"]")):
                return f"is cut short after {size:,} bytes: download it again, or restore it from a copy"
    return None


def special(path: Path) -> str | None:
    """Return what kind of special file a path leads to, such as a pipe, which may never end; None for all others."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return None
    kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    kinds |= {stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(mode))


POINTER = b"version https://git-lfs.github.com/spec/"


def _whole_size(start: bytes, header: bytes) -> int | None:
    """Return the minimum size in bytes of a safetensors file according to its header; None if that is invalid."""
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > HEADER:
        return None
    if len(header) < length:
        return 8 + length
    try:
        ends = [
            entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"
        ]
        return 8 + length + int(max(ends, default=0))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError):
        return None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a safetensors file. Raises `UserError` if it is broken, missing, or damaged since it was
    written, or if a tensor contains NaN or infinite values.
    """
    with _opened(path) as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    if CHECKSUM in metadata and metadata[CHECKSUM] != checksum(tensors, metadata):  # older files have none
        raise UserError(
            f"{path} is damaged: its contents do not match the checksum that they were written with; restore it from a copy."
        )
    for name, tensor in tensors.items():
        kind = tensor.dtype
        if kind.is_floating_point and not (tensor.float() if kind.itemsize < 2 else tensor).isfinite().all():
            found = "NaN" if tensor.isnan().any() else "infinite"
            raise UserError(f"{path}: {name!r} contains {found} values; restore the file from a copy.")
    return tensors, metadata


def map_tensors(
    path: Path, wanted: Callable[[dict[str, Tensor]], bool]
) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Map the tensors of a safetensors file that GraftKit wrote into memory, and check them if they are `wanted`.

    `wanted` is called before the check, with tensors that may hold anything; if it returns False, so does None. The pages
    of the file are read when they are used, and are not memory of this process. Raises `UserError` if the file is broken,
    missing, or not what was written under its checksum.
    """
    with _opened(path) as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    if not wanted(tensors):
        return None
    if metadata.get(CHECKSUM) != checksum(tensors, metadata):
        raise UserError(
            f"{path} is damaged: its contents do not match the checksum that they were written with."
        )
    return tensors, metadata


def read_shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read dtype and shape of each tensor of a safetensors file, from its header alone. Raises `UserError` if it is broken
    or missing.
    """
    with _opened(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    refuse_irregular(path)
    if not path.is_file():
        raise UserError(f"{path} is missing.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is broken or cut short ({_fault(path) or error}); restore it from a copy."
        ) from None


def read_json(path: Path, kind: type = dict) -> Any:
    """Read a JSON file that holds an object, or another `kind` of value. Raises `UserError` if it is broken or missing."""
    refuse_irregular(path)
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise UserError(f"{path} has {size:,} bytes, too many for a description; restore it from a copy.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing.") from None
    except RecursionError:
        raise UserError(f"{path} cannot be read: it is nested too deeply; restore it from a copy.") from None
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path} cannot be read: {_fault(path) or f'it is not valid JSON: {error}'}."
        ) from None
    if not isinstance(value, kind):
        raise UserError(
            f"{path} contains {_json_kind(value)}, not {JSON_KINDS[kind]}; restore it from a copy."
        )
    return value


JSON_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    float: "a number",
    int: "a number",
}


def _json_kind(value: Any) -> str:
    return JSON_KINDS.get(type(value), "null")


def _fault(path: Path) -> str | None:
    try:
        wrong = fault(path)
    except OSError:
        return None
    return wrong and f"it {wrong}"
