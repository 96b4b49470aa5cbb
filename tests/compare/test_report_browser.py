"""The page in a real browser: what a parser cannot see, such as things that are wider than the window."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # report_cases.py lies beside the tests
from report_cases import ODD, Case, make_folder

from ssync_pl.compare.report import write_report

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium on PATH")

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files"]

# Headless windows are at least 500 pixels wide, so that narrow ones are frames within the page.
MEASURE = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<iframe src="{page}" style="width:{width}px;height:900px;border:0"></iframe><pre id="out"></pre><script>
document.querySelector("iframe").onload = event => {{
  const page = event.target.contentDocument;
  page.querySelectorAll("details").forEach(one => one.open = true);
  setTimeout(() => measure(page, page.documentElement), 1000);
}};
function measure(page, root) {{
  const outside = [...page.querySelectorAll("body *")].filter(one => !one.closest(".scroll") && !one.closest(".unseen")
    && one.getBoundingClientRect().right > {width} + 0.5).map(one => one.tagName);
  const boxes = [...page.querySelectorAll(".scroll")].filter(one => one.offsetParent);
  const wrong = boxes.filter(one => (one.scrollWidth > one.clientWidth + 1)
    != (getComputedStyle(one.querySelector(".hint")).visibility == "visible"));
  const broken = [...page.images].filter(one => one.offsetParent && !one.naturalWidth);
  document.getElementById("out").textContent = ["width", root.scrollWidth, "outside", outside.length, "boxes",
    boxes.length, "scrolling", boxes.filter(one => one.scrollWidth > one.clientWidth + 1).length, "hints wrong",
    wrong.length, "broken", broken.length, "images", page.images.length].join(" ");
}}</script>"""


def browse(folder: Path, *arguments: str) -> str:
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=8000", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=170, check=True).stdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    small = Case(variants=("without", "with"), seeds=(0, 1), videos=1)
    many = (*("without", "with", "published", "a-very-long-name-of-a-variant-that-does-not-end_so_soon"), ODD)
    wide = Case(variants=many, seeds=(0, 1), slots=(7, 64), sets=("c",), videos=1, size=32, absent=[("with", 1)])
    made = {"small": small, "wide": wide}
    return folder, {name: write_report(make_folder(folder / name, case)) for name, case in made.items()}


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["small", "wide"])
def test_nothing_is_wider_than_the_window_but_what_scrolls_and_says_so(pages, name, width):
    folder, found = pages
    wrapper = folder / f"{name}-{width}.html"
    wrapper.write_text(MEASURE.format(page=found[name].as_uri(), width=width), encoding="utf-8")
    dom = browse(folder, "--dump-dom", f"--window-size={max(width, 500)},900", wrapper.as_uri())
    said = re.search(
        r"width (\d+) outside (\d+) boxes (\d+) scrolling (\d+) hints wrong (\d+) broken (\d+) images (\d+)", dom
    )
    assert said, dom[-500:]
    page_width, outside, boxes, scrolling, hints, broken, images = map(int, said.groups())
    assert page_width <= width
    assert outside == 0
    assert boxes >= 7
    assert scrolling >= (7 if width == 390 else 0)
    assert hints == 0
    assert broken == 0
    assert images >= 12


@pytest.mark.parametrize(("scheme", "light"), [(1, True), (0, False)], ids=["light", "dark"])
def test_a_screenshot_has_content_in_the_colours_of_the_system(pages, scheme, light):
    folder, found = pages
    path = folder / f"{scheme}.png"
    arguments = [f"--screenshot={path}", "--window-size=1280,3000", f"--blink-settings=preferredColorScheme={scheme}"]
    browse(folder, *arguments, found["small"].as_uri())
    pixels = np.asarray(Image.open(path).convert("L"), dtype=np.float64)
    assert pixels.shape[1] == 1280
    assert (np.median(pixels) > 200) == light
    # Tables, figures and pictures: each part of the page has something on it.
    for part in np.array_split(pixels[:2400], 6):
        assert part.std() > 5
