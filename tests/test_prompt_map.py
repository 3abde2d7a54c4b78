"""The prompt map, also in a real browser: wide and narrow, light and dark, and hostile texts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from chunkcache.prompt_map import COLOURS, STYLE, MapRow, html_map, terminal_map
from chunkcache.tokens.plan import Kind, Span

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTHS = (300, 480, 900, 1600)
HOSTILE = (
    '</span></div><script>top.hacked=1</script><img src=x onerror=top.hacked=1>"&\'<b title="x">'
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="needs chromium"
)


def prompt(tokens: int, each: int) -> MapRow:
    """Spans of `each` tokens of all kinds; a word is never broken where a space could."""
    kinds = list(Kind)
    spans = [
        Span(start, min(start + each, tokens), kinds[start // each % 4], f"{start:064x}", "store")
        for start in range(0, tokens, each)
    ]
    return MapRow(spans, ["some words " * (span.tokens // 2 + 1) for span in spans])


def browse(tmp_path: Path, page: str, *flags: str) -> str:
    """Open a page, and return what has become of its DOM."""
    assert CHROMIUM is not None, "in CI, chromium has to be there"
    (tmp_path / "page.html").write_text(f"<!doctype html><meta charset=utf-8>{page}")
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}/profile", *flags, "page.html"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def drawn(*rows: MapRow) -> str:
    return f'<div style="{STYLE}">{html_map(rows)}</div>'


@needs_browser
def test_nothing_is_wider_than_the_page_and_hostile_texts_stay_texts(tmp_path: Path) -> None:
    hostile = [
        Span(0, 1, Kind.REUSED, HOSTILE, HOSTILE, HOSTILE),
        Span(1, 2, Kind.COMPUTED, reason=HOSTILE),
    ]
    maps = [
        drawn(prompt(8000, 128)),
        drawn(prompt(8000, 3)),
        drawn(prompt(200, 50), prompt(90, 9)),
        drawn(MapRow([Span(0, 9, Kind.REUSED)], ["x" * 5000])),
        drawn(MapRow(hostile, [HOSTILE, HOSTILE])),
    ]
    frames = "".join(
        f'<iframe width={width} height=600 srcdoc="{escape(drawing)}"></iframe>'
        for drawing in maps
        for width in WIDTHS
    )
    script = """<script>onload = () => {
        const tell = []
        for (const frame of document.querySelectorAll("iframe")) {
            const page = frame.contentDocument
            const wide = [page.documentElement, ...page.querySelectorAll("div")].filter(
                (box) => box.scrollWidth > box.clientWidth)
            const tags = [...page.body.querySelectorAll("*")].map((one) => one.localName)
            tell.push([wide.length, [...new Set(tags)].sort().join(" ")].join(":"))
        }
        document.body.innerText = [...tell, "hacked:" + window.hacked].join("|")
    }</script>"""
    dom = browse(tmp_path, frames + script, "--dump-dom")
    found = re.sub("<[^>]*>", "", dom).split("onload")[-1].split("|")
    texts = {"div span", "details div span summary"}
    *pages, hacked = found
    assert hacked.strip() == "hacked:undefined"
    assert len(pages) == len(maps) * len(WIDTHS)
    for page in pages:
        wide, tags = page.strip().split(":")
        assert (wide, tags in texts) == ("0", True), pages


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_on_light_and_dark_pages(scheme: str, tmp_path: Path) -> None:
    page = f"<style>:root{{color-scheme:{scheme}}}</style>{drawn(prompt(400, 100))}"
    browse(tmp_path, page, "--screenshot=page.png", "--window-size=900,500")
    image = imread(tmp_path / "page.png")[:, :, :3]
    assert image.shape == (500, 900, 3)
    for colour in COLOURS.values():
        wanted = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        assert (np.abs(image - wanted).max(axis=-1) < 0.02).sum() > 500, colour
    box = image[60:200, 20:600].mean(axis=-1)  # where the text is
    background = image[-1, -1].mean()
    assert (background > 0.9) == (scheme == "light")
    assert np.abs(box - background).max() > 0.7
    assert np.abs(np.median(box) - background) < 0.5


def test_a_chunk_that_goes_on_has_no_border() -> None:
    row = MapRow(
        [
            Span(0, 4, Kind.MOVED, "a"),
            Span(4, 5, Kind.RECOMPUTED, "a"),
            Span(5, 9, Kind.MOVED, "b"),
            Span(9, 10, Kind.COMPUTED),
        ],
        ["one", "", "three", "four"],
    )
    assert row.opens_chunk() == [False, False, True, True]
    assert html_map([row]).count("border-left:2px solid #808080") == 2
    assert terminal_map([row], 10, coloured=False).plain.endswith(
        "[moved] one[recomputed] ·│[moved] three│[computed] four"
    )


def test_colours_of_a_terminal() -> None:
    row = MapRow([Span(0, 3, Kind.REUSED), Span(3, 4, Kind.COMPUTED)], ["one", "two"])
    text = terminal_map([row], 8, coloured=True)
    bar, legend, _, words = text.plain.split("\n")
    assert len(bar) == 8
    assert "reused 3 (75.0%)" in legend
    assert words == "one│two"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["      "] == f"on {COLOURS[Kind.REUSED]}"
    assert styles["one"] == f"black on {COLOURS[Kind.REUSED]}"
    assert "two" not in styles


def test_of_a_large_batch_the_first_rows_are_shown() -> None:
    rows = [prompt(20, 5)] * 10
    html, text = html_map(rows), terminal_map(rows, 20, coloured=True).plain
    assert html.count('role="img"') == 10
    assert html.count("<details>") == 8
    assert "and 2 rows more" in html
    assert text.count("20 tokens, 25% reused") == 8
    assert "and 2 rows more" in text


def test_without_tokens() -> None:
    assert "0 tokens" in html_map([MapRow([])])
    assert html_map([]) == "<div></div>"
    assert terminal_map([MapRow([])], 20, coloured=True).plain.strip() == ""
