# SPDX-License-Identifier: Apache-2.0
"""The report of this repository's results, in a browser."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pytest
from browser import PROGRAM

from firstlm import cli

RESULTS = Path(__file__).resolve().parent.parent / "results"


def test_the_report_shows_its_pictures_in_a_browser(tmp_path):
    if not PROGRAM:
        pytest.skip("no Chromium is installed")
    image = pytest.importorskip("matplotlib.image")
    assert cli.main(["report", str(RESULTS), "--output", str(tmp_path)]) == 0
    shot = tmp_path / "shot.png"
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    words += ["--window-size=1100,9000", f"--user-data-dir={tmp_path / 'profile'}"]
    page = (tmp_path / "index.html").as_uri()
    subprocess.run(
        [PROGRAM, *words, f"--screenshot={shot}", page],
        check=True,
        capture_output=True,
        timeout=240,
    )
    seen = image.imread(io.BytesIO(shot.read_bytes()))[..., :3]
    assert seen.shape[:2] == (9000, 1100)
    # Maps of layers are drawn in blues, and the darkest is every layer that all prompts run.
    dark_blue = (abs(seen - [8 / 255, 48 / 255, 107 / 255]) < 0.02).all(-1)
    assert dark_blue.sum() > 20_000
    text = (seen < 0.5).all(-1)
    assert text.any(1).sum() > 500
