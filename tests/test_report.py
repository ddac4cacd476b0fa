# SPDX-License-Identifier: Apache-2.0
"""The report of this repository's results, in a browser."""

from __future__ import annotations

import io
import json
import re
import subprocess
from pathlib import Path

import pytest
from browser import PROGRAM

from firstlm import cli, figures
from firstlm.figures import draw, swept
from firstlm.report import page
from firstlm.sections import Section, labelled, title

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


def row(arm: str, asked: float, **more) -> dict:
    """One row of a summary of questions."""
    found = {"file": "qa", "arm": arm, "policy": arm, "lora_of": arm, "skip_rate_asked": asked}
    found |= {"dataset": "set", "task": "qa", "model": "m", "metric": "f1", "primary": True}
    found |= {"trained_on": "set", "routers_of": more.get("dataset", "set"), "alpha": None}
    found |= {
        "l2": 0.0,
        "retention_ci95": [0.8, 1.0],
        "retention_of": "lora",
        "kv_recomputed": None,
    }
    found |= {"tpot_ratio_spread": None, "weights": ["float32"] * 2, "formats_differ": False}
    found |= {"reference_score": 55.0, "unit": "block", "prefill": "skip", "mask_of": arm}
    found |= {"skip_rate": asked, "score": 50.0, "ci95": [40.0, 60.0], "retention": 0.9}
    found |= {"seeds": 2, "n_test": 5, "gains": [], "tpot_ratio": None, "lora": True}
    found |= {"skip_rate_p5": asked, "skip_rate_p95": asked, "distinct_masks": 1.0}
    found |= {"mask_entropy": 0.0, "length_correlation": None, "layer_length_correlation": None}
    return found | more


@pytest.mark.parametrize("content", [b"", b'{"task": 1', b'{"a": "caf\xe9"}'])
def test_a_damaged_result_is_named(tmp_path, capsys, content):
    (tmp_path / "summary.json").write_text(json.dumps([row("first", 0.15)]))
    (tmp_path / "qa-first-1.json").write_bytes(content)
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "qa-first-1.json is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_overview_links_to_every_section_with_what_is_kept():
    rows = [row("first", 0.15), row("first", 0.25, retention=0.8), row("unified", 0.15)]
    rows += [row("first", 0.25, dataset="other", retention=0.7)]
    text = page(rows, [])
    table = text[: text.index("<h2")]
    assert re.findall(r'href="#(s\d)"', table) == re.findall(r'<h2 id="(s\d)"', text)
    assert re.findall(r"<td>(\d*%?)</td>", table) == ["90%", "80%", "2", "", "70%", "2"]


def test_an_arm_has_one_colour_in_all_pictures(monkeypatch):
    pytest.importorskip("matplotlib")
    used = []
    monkeypatch.setattr(figures, "_quality", lambda rows, colors, *_: used.append(colors) or b"")
    rows = [row(arm, rate) for arm in figures.COLORS for rate in (0.15, 0.25)]
    rows += [row("further", 0.25, policy="first", tpot_ratio=0.8)]  # timed, where `first` is not
    rows += [row("unified", 0.4, tpot_ratio=0.8)]
    draw(rows, {})
    quality, times = used
    assert quality == times
    assert len(set(quality.values())) == len(figures.COLORS) + 1
    assert quality["unified"] == figures.COLORS["unified"]


def test_pictures_of_results_that_are_gone_go(tmp_path):
    pytest.importorskip("matplotlib")
    summary, out = tmp_path / "summary.json", tmp_path / "report"
    out.mkdir()
    (out / "time-lapse.png").write_bytes(b"of a user")
    names = []
    for dataset in ("old", "new"):
        summary.write_text(json.dumps([row("first", 0.15, dataset=dataset)]))
        assert cli.main(["report", str(tmp_path)]) == 0
        names.append(sorted(file.name for file in out.glob("*.png")))
    assert names == [[f"quality-qa-{name}.png", "time-lapse.png"] for name in ("old", "new")]


def test_long_legends_are_not_cut_off():
    image = pytest.importorskip("matplotlib.image")
    name = "first of a name that is far too long for any picture to hold besides another one"
    for arms in ((), (name, name.upper())):
        rows = [row(arm, rate) for arm in ("first", *arms) for rate in (0.15, 0.25)]
        (picture,) = draw(rows, {})
        seen = image.imread(io.BytesIO(picture.png))[..., :3]
        margins = (seen[:, :5], seen[:, -5:])
        assert all(bool((margin == 1).all()) for margin in margins), picture.name


def test_policies_of_one_rate_stand_beside_the_curves(monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(figures, "_png", lambda figure: drawn.append(figure) or b"")
    rows = [row(arm, rate) for arm in ("first", "unified") for rate in (0.15, 0.25)]
    rows += [row("base", 0.0, score=80.0), row("early_exit", 0.25, score=10.0)]
    rows += [row("skip_decode", 0.2, score=70.0), row("length_only", 0.25, score=60.0)]
    draw(rows, {})
    rows.append(row("random_fixed", 0.25, score=0.0))
    draw(rows, {})
    few, many = drawn
    assert [len(figure.axes) for figure in drawn] == [1, 2]
    assert len(few.legends[0].texts) == 6
    assert [text.get_text() for text in many.legends[0].texts] == [
        "base + LoRA, all layers",
        "FiRST",
        "unified",
    ]
    names = [text.get_text() for text in many.axes[1].get_yticklabels()]
    assert names == ["random fixed (25)", "early exit (25)", "length only (25)", "skip decode (20)"]
    shown = [line.get_xdata()[0] for line in many.axes[1].lines if line.get_marker() == "o"]
    assert shown == [0.0, 10.0, 60.0, 70.0]


def test_models_of_one_file_are_told_apart():
    pytest.importorskip("matplotlib")
    rows = [
        row("first", 0.15, model="a/Deep-3.2-1B"),
        row("large", 0.15, policy="first", lora_of="first", model="b/Small-0.5.gguf"),
    ]
    assert title(Section("qa", "set"), rows) == "qa: qa on set, Deep-3.2-1B and Small-0.5"
    assert [name for name, _ in labelled(rows)] == ["FiRST of Deep-3.2-1B", "FiRST of Small-0.5"]
    reports = {
        f"qa-{arm}-0": {
            "inputs": {"data": "set/test.jsonl"},
            "runs": {"router@0.15": {"items": [{"keep": keep}]}},
        }
        for arm, keep in (("first", "1011"), ("large", "10"), ("gone", "1"))
    }
    names = [picture.name for picture in draw(rows, reports)]
    assert names == ["quality-qa-set", "masks-qa-set-4-layers", "masks-qa-set-2-layers"]


def test_a_page_that_cannot_be_made_leaves_the_older_one(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    summary, folder = tmp_path / "summary.json", tmp_path / "report"
    summary.write_text(json.dumps([row("first", 0.15)]))
    assert cli.main(["report", str(tmp_path)]) == 0
    before = {file: file.read_bytes() for file in folder.iterdir()}
    older = row("first", 0.25)
    del older["task"]
    for rows, says in (
        ([older], "rows without task"),
        ([row("first", 0.25, gains=[{"value": 1.0}])], "rows without .*low"),
        ([], "has no rows: nothing was scored yet"),
    ):
        summary.write_text(json.dumps(rows))
        assert cli.main(["report", str(tmp_path)]) == 2
        assert re.search(says, capsys.readouterr().err)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_points_of_a_sweep_differ_in_nothing_else():
    def point(alpha, weights="float32", **more):
        return row("first", None, **{"alpha": alpha, "lora": False, "weights": [weights], **more})

    points = [point(alpha) for alpha in (0.2, 0.0, 0.1)]
    others = [point(0.05, "bfloat16"), point(0.3, unit="mlp"), point(0.4, l2=1.0)]
    others += [point(0.5, lora=True), point(0.6, model="another")]
    assert [one["alpha"] for one in swept([*others, *points], "alpha")] == [0.0, 0.1, 0.2]
    assert swept([*others, *points[:2]], "alpha") == []
