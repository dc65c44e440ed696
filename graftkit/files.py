"""Atomic writing (to a temporary name, synced, then renamed), and reading of files that nobody vouches for."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY = ".part"
LOCK = ".lock"  # in a folder that a process writes to; the operating system frees it when that process ends
LARGEST_JSON = 2**28  # bytes; no description of a model or graft comes near
HEADER = 100_000_000  # bytes of a header of safetensors, the format's own limit
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # of file systems that have no locks


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; if the block succeeds, it is synced and renamed to `path`.

    On any error the temporary file is removed and `path` is unchanged. A full disk raises `UserError`.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. Any earlier content is untouched; "
            "make room or check the permissions and try again."
        ) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
    """Append lines to a text file (UTF-8): all of them, or none if the disk is full."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, size)
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. Make room or check the permissions and try again."
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Replace a safetensors file atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata={"format": "pt"} | (metadata or {}))
        except SafetensorError as error:  # safetensors wraps what the operating system said
            raise OSError(str(error)) from None


def irregular(path: Path) -> str | None:
    """Return what a path is if it is there and is no regular file, which reading might never end; else None.

    Links are followed, as the Hugging Face cache stores files behind links.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        if not path.is_symlink():
            return None
        return "is a link that leads nowhere: download the file, or restore it from a copy"
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    kind = kinds.get(stat.S_IFMT(mode), "device")
    return f"is a {kind}, not a regular file: download the file, or restore it from a copy"


def refuse_irregular(path: Path) -> None:
    """Raise `UserError` if a path is there and is no regular file."""
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
    """Read tensors and metadata of a safetensors file. Raises `UserError` if it is broken or missing, or if a tensor
    contains NaN or infinite values.
    """
    with _opened(path) as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    for name, tensor in tensors.items():
        kind = tensor.dtype
        if kind.is_floating_point and not (tensor.float() if kind.itemsize < 2 else tensor).isfinite().all():
            found = "NaN" if tensor.isnan().any() else "infinite"
            raise UserError(f"{path}: {name!r} contains {found} values; restore the file from a copy.")
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


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of killed processes."""
    for path in folder.rglob(f"*{TEMPORARY}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def claimed(folder: Path, *, new: bool = False) -> Iterator[Path]:
    """Hold a folder, creating it if needed, so that no other process writes to it.

    `new`: raise `FileExistsError` if it already exists. Raises `UserError` if another process holds it. A killed process
    releases its folders. On exit, folders that were created here and are empty are removed.
    """
    made, descriptor = _take(folder, new)
    try:
        yield folder
    finally:
        _release(folder, descriptor)
        with suppress(OSError):  # something is in it
            for path in made:
                path.rmdir()


def holder(folder: Path) -> str | None:
    """Return the process that holds a folder, or None."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return None
    try:
        return None if _lock(descriptor) else _named(descriptor)
    finally:
        os.close(descriptor)


def _take(folder: Path, new: bool) -> tuple[list[Path], int]:
    """Create and lock a folder. Return the created folders, innermost first, and the lock's descriptor."""
    while True:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=not new)
        try:
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another process released the folder between the two calls
            continue
        if not _lock(descriptor):
            who = _named(descriptor)
            os.close(descriptor)
            raise UserError(
                f"{folder} is in use by {who}, which is still writing to it. Wait until it has finished, or name another "
                "folder."
            )
        if _is_there(folder, descriptor):  # and not a lock that its owner has just removed
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return made, descriptor
        os.close(descriptor)


def _release(folder: Path, descriptor: int) -> None:
    with suppress(OSError):
        if _is_there(folder, descriptor):
            (folder / LOCK).unlink()
    os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file without waiting. Return False if another process holds it."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    return True


def _is_there(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(folder / LOCK), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _named(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode("utf-8", "replace") or "another process"
