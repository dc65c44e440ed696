"""Draw docs/images/report.png, the report in the README: `python docs/report_picture.py RUN` for a run of `graftkit demo`.

Makes the report of the run, opens it in headless Chromium, and stores the top of the page with 64 colours. Take a run from
a machine that does nothing else, as the page shows the time that it took.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from graftkit.report.making import make_report

PICTURE = Path(__file__).parent / "images" / "report.png"
NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1200, 1560
SHOWN = 1000  # pixels of the picture's width


def main(run: str) -> None:
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        sys.exit(f"none of these is installed: {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory() as folder:
        page, taken = Path(folder, "report.html"), Path(folder, "report.png")
        make_report(run, out=page)
        options = ("--headless", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={folder}/browser")
        size = f"--window-size={WIDTH},{HEIGHT}"
        command = [browser, *options, size, f"--screenshot={taken}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True)
        image = Image.open(taken).convert("RGB").crop((0, 0, WIDTH, HEIGHT))
    image = image.resize((SHOWN, SHOWN * HEIGHT // WIDTH), Image.Resampling.LANCZOS)
    image.quantize(64).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
