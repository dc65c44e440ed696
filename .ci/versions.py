#!/usr/bin/env python3
"""Constraints for pip, from the ranges in pyproject.toml. Needs nothing but Python 3.11.

versions.py oldest        pins of all lower bounds
versions.py newest        pins of the newest versions that were tested (the extra `tested`)
versions.py lock          pins of what `pip freeze` on standard input names, for constraints.txt
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
# parts of CUDA, which come with the torch that needs them and nowhere else
CUDA = re.compile(r"nvidia-|cuda-|triton$")


def requirements() -> list[str]:
    """Those of the package and of all extras but `tested`, each without its marker."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extras = (lines for name, lines in project["optional-dependencies"].items() if name != "tested")
    lines = [*project["dependencies"], *(line for part in extras for line in part)]
    return sorted({line.partition(";")[0].strip() for line in lines if not line.startswith("graftkit[")})


def bounds() -> list[str]:
    return tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]["tested"]


def oldest() -> list[str]:
    """`torch>=2.11,<3` as `torch==2.11`: the first version that is promised."""
    found = (re.match(r"([\w.-]+)>=([\d.]+)", line) for line in requirements())
    return [f"{match[1]}=={match[2]}" for match in found if match]


def newest() -> list[str]:
    """`torch<2.16` as `torch==2.15.*`."""
    pins = []
    for line in bounds():
        name, major, minor = re.fullmatch(r"([\w-]+)<(\d+)\.(\d+)", line).groups()  # type: ignore[union-attr]
        pins.append(f"{name}=={major}.{int(minor) - 1}.*")
    return pins


def lock(frozen: str) -> list[str]:
    """Without what is built here, and without a build's local version: `==2.13.0` takes 2.13.0+cpu too."""
    pins = (re.fullmatch(r"([\w.-]+)==([^+\s]+)(\+\S+)?", line.strip()) for line in frozen.splitlines())
    return sorted(
        f"{pin[1]}=={pin[2]}"
        for pin in pins
        if pin and pin[1] != "graftkit" and not CUDA.match(pin[1].lower())
    )


if __name__ == "__main__":
    which = sys.argv[1]
    lines = lock(sys.stdin.read()) if which == "lock" else {"oldest": oldest, "newest": newest}[which]()
    print("\n".join(lines))
