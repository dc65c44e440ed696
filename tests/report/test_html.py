"""The page of a report: valid, escaped, without network or scripts, and the figures that it shows."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from run_folders import PIXEL, SOUND, log, metrics, per_class, write_run

from graftkit.report.finished import read_finished
from graftkit.report.html import element, figure_text, short
from graftkit.report.page import run_page
from graftkit.report.several import several_page
from graftkit.report.style import STYLE
from graftkit.report.svg import Line, chart, thinned, tick_text, ticks

VOID = {"meta", "img", "br", "wbr"}
EVIL = "<script>alert('x')</script>\"'&\x1b[31m\u202eevil"


class Page(HTMLParser):
    """Read a page, and fail where its tags are not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def check(text: str) -> Page:
    """What holds for every page."""
    page = Page(text)
    assert len(text.encode("utf-8")) < 2_000_000
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            place = attributes.get(name)
            assert place is None or place.startswith(("#", "data:image/", "data:audio/")), place
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"] for a in page.all("a")} <= {f"#{name}" for name in ids}
    assert page.all("html")[0]["lang"] == "en" and len(page.all("main")) == len(page.all("h1")) == 1
    assert len(page.all("table")) == len(page.all("caption"))
    assert all("scope" in head for head in page.all("th"))
    assert all("alt" in image for image in page.all("img"))
    drawn = [svg for svg in page.all("svg") if svg.get("aria-hidden") != "true"]
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in drawn)
    assert all(labelled["aria-labelledby"] in ids for labelled in page.all("section"))
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", text)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
        assert "nan" not in svg and "inf " not in svg
    return page


def made(folder) -> Page:
    return check(run_page(read_finished(folder)))


def test_texts_become_markup_through_elements_alone():
    built = element("p", EVIL, None, [element("b", 1), "&"], title='"<', hidden=True, lang=None, class_="x")
    assert built.text == (
        '<p title="&quot;&lt;" hidden class="x">&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&quot;&#x27;&amp;'
        "\\u001b[31m\\u202eevil<b>1</b>&amp;</p>"
    )
    assert short("a \n b" * 100, 10) == "a ba ba b…"


def test_a_page_says_what_was_run_and_what_came_out(tmp_path):
    page = made(write_run(tmp_path / "run"))
    for told in (
        "0.8000", "95% interval 0.7000 to 0.8750", "Accuracy on 40 test rows", "1,234", "1 min 15 s", "1.5 GB",
        "lora(rank=8) + head()", "torch 2.13.0", "60 steps of 8 rows with adamw, fp32, seed 3", "train: train.csv",
        "1,200 tokens", "expected calibration error is 0.062",
    ):  # fmt: skip
        assert told in page.text, told
    labels = [svg["aria-label"] for svg in page.all("svg") if "aria-label" in svg]
    assert any("training goes from 1.967 to 0.7358 in 60 points" in label for label in labels)
    assert any("evaluation goes from 0.05 to 0.01667 in 3 points" in label for label in labels)


def test_classes_are_sorted_by_what_to_do_next(tmp_path):
    text = run_page(read_finished(write_run(tmp_path / "run")))
    rows = re.findall(
        r'<tr><th scope="row" dir="auto">(\w+)</th><td dir="auto">(.*?)</td><td dir="auto">(.*?)</td>', text
    )
    assert rows[:3] == [
        ("eel", "add training rows (it has 4)", "cat (3), dog (1)"),
        ("cat", "compare with dog", "dog (2)"),
        ("dog", "look at its rows", "cat (1)"),
    ]
    matrix = re.findall(r'<td class="(right|wrong|none)"[^>]*>(.)', text)
    assert [kind for kind, _ in matrix] == [
        "right",
        "wrong",
        "none",
        "wrong",
        "right",
        "none",
        "wrong",
        "wrong",
        "right",
    ]
    assert re.findall(r'class="right" style="--v:([\d.]+)">(\d+)', text) == [
        ("0.900", "18"),
        ("0.917", "11"),
        ("0.500", "4"),
    ]


def test_marks_pictures_and_sounds_of_the_worst_rows(tmp_path):
    long = "x" * 5000
    rows = [
        {"where": "a.conll, line 3", "text": f"{long} In Paris {long}", "expected": "[Paris](place)", "answer": "no entity",
         "marks": {"of": "text", "expected": [[5004, 5009, "place"]], "answer": [[9, 2, "bad"], ["x"], [0, 10**9, ""]]},
         "loss": 2.5},
        {"where": "b", "image": "cat.png", "expected": "cat", "answer": "dog", "loss": float("nan")},
        {"where": "c", "audio": "hen.wav", "expected": "hen", "answer": ["a", "b"]},
    ]  # fmt: skip
    shown = [{}, {"image": PIXEL}, {"sound": SOUND, "spectrogram": PIXEL}, {"image": PIXEL}]
    text = run_page(read_finished(write_run(tmp_path / "run", worst=rows, previews=shown)))
    page = check(text)
    assert '<mark class="c2">Paris<small>place</small></mark>' in text and text.count("<mark") == 1
    assert len(page.text) < 6000  # the text is cut to what is around its marks
    assert [image["alt"] for image in page.all("img")] == [
        "cat.png: cat, answered dog",
        "Spectrogram of hen.wav",
    ]
    assert page.all("audio")[0]["src"] == SOUND and "autoplay" not in page.all("audio")[0]
    bad = [
        "javascript:alert(1)",
        "http://x/y.png",
        'data:image/png;base64,"onload="x',
        "data:text/html;base64,AAAA",
        7,
    ]
    folder = write_run(tmp_path / "bad", worst=rows, previews=[{"image": b} for b in bad])
    assert not made(folder).all("img")


def test_attacks_in_every_text(tmp_path):
    names = [EVIL, "y" * 100_000, "\ud800 half", "مرحبا", *(f"class {i}" for i in range(10_000))]
    draw = random.Random(0)
    counts = {name: (draw.randrange(9), 0, draw.randrange(3)) for name in names}
    cells = [[draw.randrange(10_004), draw.randrange(10_004), 1] for _ in range(1000)]
    found = metrics(
        per_class=per_class(counts), confusion=[*cells, [10**9, 0, 1], ["x"], None], loss=float("nan"), rows=float("inf"),
        accuracy=float("nan"), accuracy_interval=[float("nan"), 1],
    )  # fmt: skip
    found[EVIL] = 0.5
    worst = [
        {
            "where": EVIL,
            EVIL: EVIL,
            "text": "z" * 10**5,
            "expected": EVIL,
            "answer": {"a": [EVIL]},
            "loss": EVIL,
        }
    ] * 20
    lines = [
        line | {"loss": float("nan") if line["step"] % 3 else 1e300, "gradient_norm": EVIL} for line in log()
    ]
    folder = write_run(
        tmp_path / "<b>run", task=f"classify({EVIL!r})", found=found, lines=lines, worst=worst,
        previews=[{"image": "data:image/png;base64," + "A" * 150_000}] * 20,
        result={"problems": [EVIL] * 100, "warnings": ["w" * 10**5], "method": EVIL, "versions": {EVIL: EVIL}, "headline": [EVIL, 3]},
        recipe={"model": EVIL, "seed": EVIL}, plan={"statistics": {EVIL: {"rows": EVIL}, "train": 7}, "warnings": "text"},
    )  # fmt: skip
    page = made(folder)
    assert "<script>alert('x')</script>" in page.text and "\\u202eevil" in page.text
    assert 5 <= len(page.all("img")) < 20  # as many as there is room for


@pytest.mark.parametrize("seed", range(3))
def test_values_of_wrong_types_do_not_stop_a_report(tmp_path, seed):
    """A result that somebody edited, or another version wrote."""
    draw = random.Random(seed)
    odd = [None, True, -1, 1e308, float("nan"), "text", [], {}, [1], {"a": None}, 10**30]

    def shaken(value):
        if draw.random() < 0.25:
            return draw.choice(odd)
        if isinstance(value, dict):
            return {key: shaken(one) for key, one in value.items()}
        return [shaken(one) for one in value] if isinstance(value, list) else value

    keys = ("seconds", "headline", "evaluation", "problems", "versions", "task", "predicted", "measured",
            "trained_parameters", "rows_skipped", "unused_parameters")  # fmt: skip
    for i in range(8):
        found = shaken(metrics())
        row = {key: draw.choice(odd) for key in ("where", "text", "marks", "expected")}
        made(write_run(
            tmp_path / str(i), found=found if isinstance(found, dict) else {}, lines=[shaken(log()[0])] * 3,
            result={key: draw.choice(odd) for key in keys if draw.random() < 0.5}, worst=[row], previews=[draw.choice(odd)],
            plan={"statistics": draw.choice(odd), "batch_size": draw.choice(odd), "batch_tokens": draw.choice(odd)},
        ))  # fmt: skip


def test_a_page_of_no_metrics_and_no_steps(tmp_path):
    page = made(write_run(tmp_path / "run", found={}, lines=[]))
    assert [a["id"] for a in page.all("section")] == ["run"] and not page.all("figure")


def test_the_plan_beside_what_happened(tmp_path):
    planned, took = {"peak_memory_bytes": 1e9, "seconds": 60}, {"peak_memory_bytes": 1.1e9, "seconds": 75}
    text = made(write_run(tmp_path / "run", result={"predicted": planned, "measured": took})).text
    assert "Peak memory 1.0 GB 1.1 GB +10.0%" in text and "Time 1 min 0 s 1 min 15 s +25.0%" in text
    assert "planned" not in made(write_run(tmp_path / "none", result={"measured": took})).text


def test_warnings_and_problems_come_first(tmp_path):
    told = {"problems": ["finding the worst rows failed"], "warnings": ["labels differ"], "rows_skipped": 3}
    page = made(write_run(tmp_path / "run", result=told, plan={"warnings": ["labels differ", "few rows"]}))
    assert page.all("aside")[0]["aria-label"] == "Warnings and problems"
    for text in (*told["problems"], "few rows", "3 bad rows were skipped"):
        assert page.text.count(text) == 1
    assert page.text.count("labels differ") == 1 and not made(write_run(tmp_path / "good")).all("aside")


def test_several_runs_side_by_side(tmp_path):
    runs = []
    for name, right in (("a", 0.9), ("b", 0.8), (EVIL.replace("/", ""), 0.7)):
        found = metrics(accuracy=right, accuracy_interval=[right - 0.05, right + 0.05])
        runs.append(read_finished(write_run(tmp_path / name, found=found, recipe={"seed": int(right * 10)})))
    page = check(several_page(runs))
    for told in ("3 runs compared", "0.9000", "0.8500 to 0.9500", "seed", "9", "8"):
        assert told in page.text
    assert any("a goes from" in (svg.get("aria-label") or "") for svg in page.all("svg"))
    other = read_finished(write_run(tmp_path / "c", found=metrics(rows=39)))
    assert "different numbers of test rows" in check(several_page([runs[0], other])).text


def test_ticks_are_round_and_within():
    draw = random.Random(0)
    for _ in range(300):
        low = draw.uniform(-1, 1) * 10 ** draw.randint(-6, 8)
        high = low + draw.random() * 10 ** draw.randint(-6, 8)
        found = ticks(low, high)
        width = high - low
        assert 1 <= len(found) <= 6 and all(
            low - 1e-6 * width <= value <= high + 1e-6 * width for value in found
        ), (low, high)
        if len(found) > 1 and width > 1e-9 * abs(high):
            step = found[1] - found[0]
            assert re.match(r"[125]\.0000e", f"{step:.4e}"), step
    assert list(map(tick_text, (0, 0.25, 1500, 20_000, 1.5e6, 2e-5))) == [
        "0",
        "0.25",
        "1,500",
        "20k",
        "1.5M",
        "2e-05",
    ]
    assert [figure_text(v) for v in (0.5, 3, float("nan"), None, float("inf"), 12345.678)] == [
        "0.5000", "3", "NaN", "–", "∞", "12,346",
    ]  # fmt: skip


def test_long_lines_are_thinned_without_changing_their_mean():
    points = [(float(i), float(i % 7)) for i in range(30_000)]
    few = thinned(points)
    assert len(few) <= 241 and few[-1] == points[-1]
    mean = sum(y for _, y in few[:-2]) / len(few[:-2])
    assert abs(mean - 3) < 0.02
    drawn = chart("Loss", [Line("training", points, noisy=True)])
    assert drawn is not None and len(drawn.text) < 20_000
    assert chart("Loss", [Line("training", [(1, 2.0)]), Line("evaluation", [(1, float("nan"))] * 9)]) is None


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_is_aa_in_light_and_dark():
    """WCAG 2.1, 1.4.3 and 1.4.11: 4.5 to 1 for text, 3 to 1 for lines."""
    themes = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", theme))
        for ground in ("ground", "raised", "note"):
            for ink, least in (
                ("ink", 4.5),
                ("quiet", 4.5),
                ("link", 4.5),
                *((f"c{i}", 3) for i in range(8)),
            ):
                one, other = sorted((luminance(colours[ink]), luminance(colours[ground])))
                assert (other + 0.05) / (one + 0.05) >= least, (ink, ground)


def test_the_curve_of_a_range_test(tmp_path):
    folder = write_run(tmp_path / "run")
    assert "Loss by learning rate tried" not in run_page(read_finished(folder))
    curve = {"rates": [1e-6, 1e-4, 1e-2, 0, "x"], "smoothed": [2.0, 1.5, 3.0, 1.0, 1.0], "chosen": 2.5e-5}
    (folder / "lr-find.json").write_text(json.dumps(curve))
    page = run_page(read_finished(folder))
    assert "Loss by learning rate tried" in page and "the one chosen, 2.5e-05" in page
    (folder / "lr-find.json").write_text(json.dumps({"rates": 3}))
    assert "Loss by learning rate tried" not in run_page(read_finished(folder))
