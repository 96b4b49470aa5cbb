import base64
import html
import itertools
import json
import math
import re
import statistics

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ssync_pl.compare.report import write_report
from ssync_pl.compare.results import load_comparison, read_results
from ssync_pl.compare.tables import groups_of, printed_tables
from ssync_pl.errors import ConfigError
from ssync_pl.metrics.table import METRICS

ODD = "a<b>&\"c'|_x$y$ é"
LEVELS = {"video_fg_ari": 0.72, "video_ari": 0.26, "video_mbo": 0.5, "slots_per_object": 1.4, "used_slots": 6.8}


def make_folder(out, variants=("without", "with"), seeds=(0, 1), slots=(7,), absent=()):
    """A folder as `ssync-pl compare` writes it, where variant `with` is better by 0.05."""
    out.mkdir(parents=True)
    content = {"config": ["trainer:\n  max_epochs: 36  # <b>87</b> steps each\n"], "version": "0.1.0"}
    content |= {"seeds": seeds, "slots": slots, "baseline": variants[0]}
    content["variants"] = [{"name": name, "description": f"{name} as <i>described</i>"} for name in variants]
    content["command"] = ["ssync-pl", "compare", "--variants", ",".join(variants)]
    (out / "matrix.json").write_text(json.dumps(content), encoding="utf-8")
    for count, number, seed in itertools.product(slots, range(len(variants)), seeds):
        place = out / "runs" / f"slots_{count}" / variants[number] / f"seed_{seed}"
        (place / "pictures").mkdir(parents=True)
        if (variants[number], seed) in absent:
            (place / "log.txt").write_text("step 10\nRuntimeError: loss is <NaN>\n", encoding="utf-8")
        else:
            write_run(place, seed, count, number, effect=0.05 * (variants[number] == "with"))
    return out


def write_run(place, seed, slots, number, effect):
    common, own = np.random.default_rng([seed, slots]), np.random.default_rng([seed, slots, number])
    draws = {name: 0.03 * common.standard_normal() + 0.006 * own.standard_normal() for name in METRICS}
    scores = {name: LEVELS.get(name, 0.5) + noise + effect for name, noise in draws.items() if name != "identity"}
    scores |= {"merged_video_ari": 0.375, "merged_slots": 2.0}
    rows = {"grid": {"video_fg_ari": 0.01, "video_ari": 0.2}}
    evaluation = {"scores": scores, "first_step": 0, "step": 3000, "wall_seconds": 263.2, "cpu_seconds": 250.1}
    evaluation |= {"untrained": {"video_fg_ari": 0.0}, "device": "CPU x86_64", "torch": "2.9.0", "date": "2026-11-27"}
    job = {"recipe": "a1b2c3", "source": None, "command": ["ssync-pl", "fit", f"--seed_everything={seed}"]}
    for name, content in {"summary": {"step": 3000, "rows": rows}, "evaluation": evaluation, "job": job}.items():
        (place / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    for step in (1000, 3000):
        Image.new("RGB", (112, 227), (step // 20, 120, 150)).save(place / "pictures" / f"step-{step:06d}.png")
    steps = np.arange(49, 3000, 150)
    ssync = {"boundary_loss": np.exp(-steps / 3000), "merged_slots": steps / 1000, "weight": 0.1 * (steps >= 1500)}
    ssync = {f"ssync/{name}": value for name, value in ssync.items()}
    logged = pd.DataFrame({"step": steps} | (ssync if number else {}))
    validated = pd.DataFrame({"step": [1000, 2000, 3000], "val/video_fg_ari": [0.4, 0.55, 0.6], "val/video_ari": 0.1})
    pd.concat([logged, validated]).to_csv(place / "metrics.csv", index=False)


def words_of(markup):
    return " ".join(html.unescape(re.sub(r"<[^<>]*>", " ", markup)).split())


class Page:
    """A page as its text, and the cells of its tables."""

    def __init__(self, path):
        self.html = path.read_text(encoding="utf-8")
        self.body = self.html.partition("</style>")[2]
        self.words = words_of(self.body)
        rows = re.findall(r"<tr.*?</tr>", self.body, re.S)
        self.rows = [[words_of(cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", row, re.S)] for row in rows]

    def numbers(self, first):
        row = next(row for row in self.rows if row[0].split()[:1] == [first] and len(row) > 2)
        return [[float(word.replace("−", "-")) for word in re.findall(r"[+−]?\d+\.?\d*", cell)] for cell in row[1:]]


@pytest.fixture
def no_figures(monkeypatch):
    """Figures take most of the time; a test that looks at other things does without."""
    monkeypatch.setattr("ssync_pl.compare.report.group_figures", lambda *args: [])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "plain"
    make_folder(folder, ("without", "with", "published"), (0, 1, 2))
    return folder, Page(write_report(folder))


def test_the_page_needs_nothing_beside_it_and_reads_well_aloud(plain):
    page = plain[1].html
    assert not re.search(r"<(script|link|iframe)|url\(|@import", page)
    ids, targets = re.findall(r' id="([^"]*)"', page), re.findall(r' (?:src|href|srcset)="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert {target[:5] for target in targets if target[:1] != "#"} == {"data:"}
    assert {target[1:] for target in targets if target[:1] == "#"} <= set(ids)
    assert page.count("<table") == page.count("<caption") == 4
    assert all(re.search(r' alt="[^"\s]', image) for image in re.findall(r"<img [^>]*>", page))
    assert all(re.search(r' scope="(col|row)"', cell) for cell in re.findall(r"<th\b[^>]*>", page))


def test_the_page_has_figures_and_the_last_sheet_of_each_run(plain):
    folder, page = plain
    titles = ("Seed by seed", "Learning curves", "Merging and slots in use", "Validation videos")
    assert all(text in page.words for text in (*titles, "first logged at step 1549"))
    images = re.findall(r"<img [^>]*>", page.body)
    sheets = [image for image in images if 'alt="Pictures of' in image]
    assert (len(images), len(sheets)) == (3 + 3 * 3, 3 * 3)
    last = next(folder.glob("runs/*/published/seed_2/pictures/step-003000.png"))
    (sheet,) = [image for image in sheets if "Pictures of published, seed 2" in image]
    assert base64.b64encode(last.read_bytes()).decode() in sheet
    made = sorted(path.name for path in (folder / "report").glob("*.png"))
    assert made == [f"{name}_7.png" for name in ("learning", "merging", "paired")]


def test_the_numbers_are_those_of_the_rows(plain):
    folder, page = plain
    rows = read_results(folder / "results.csv")
    assert len(rows) == 9
    values = {name: part.set_index("seed")["video_ari"].to_dict() for name, part in rows.groupby("variant", sort=False)}
    width = 4.302653 / math.sqrt(3)  # of Student's t with two degrees of freedom
    for name, found in values.items():
        expected = [statistics.mean(found.values()), width * statistics.stdev(found.values())]
        if name != "without":
            changes = [found[seed] - values["without"][seed] for seed in found]
            expected += [statistics.mean(changes), width * statistics.stdev(changes)]
        assert page.numbers(name)[1] == pytest.approx(expected, abs=0.00051)


def test_what_is_clear_of_zero_is_bold_and_the_headline_says_so(plain):
    body = plain[1].body
    lead = words_of(re.search(r'<p class="lead">.*?</p>', body, re.S)[0])
    assert re.search(r"“with” minus “without”: clear of zero: video FG-ARI \+0\.0\d\d\s±\s0\.0\d\d \(better\)", lead)
    assert re.search(r"“published” minus “without”: .*within noise", lead)
    assert "All 9 runs finished, with 3 seeds each" in lead
    assert "With fewer than five seeds they are wide" in lead
    assert re.search(r'<small class="better"><b>\+0\.\d{3} ± 0\.\d{3}</b>', body)
    assert "<b>" not in next(row for row in body.split("<tr>") if "3 seeds, baseline" in row)


def test_printed_tables(plain):
    frame = load_comparison(plain[0]).frame
    text = printed_tables(frame, "without")
    assert re.search(
        r"\n *with +3 seeds +0\.\d{3} ± 0\.\d{3} .*\n *difference +\+0\.\d{3} ± 0\.\d{3} .*\n *better ", text
    )
    assert "within noise" in text
    assert re.search(r"fixed grid +no learning +0\.010", text)
    assert "identity" not in text  # no run has it
    assert "No run is finished" in printed_tables(frame[:0], "without")
    frame.loc[(frame["variant"] == "with") & (frame["seed"] == 1), "video_ari"] = math.nan
    (group,) = groups_of(frame, "without")
    assert (len(group.by_seed("with", "video_ari")), len(group.by_seed("without", "video_ari"))) == (2, 3)


def test_odd_names_are_shown_as_they_are_and_never_as_markup(tmp_path):
    folder = make_folder(tmp_path / "<x> & y", ("without", ODD))
    for job in folder.glob("runs/*/*/seed_0/job.json"):
        job.write_text(r'{"command": ["\ud800"]}')
    page = Page(write_report(folder))
    assert not re.search(r"<(i|x|b<|b>8)\b", page.body)
    assert all(text in page.words for text in (ODD, f"{ODD} as <i>described</i>", "<b>87</b>"))
    assert all(re.fullmatch(r"[\w.-]+", file.name) for file in (folder / "report").iterdir())


def test_one_seed_has_no_interval_and_no_verdict(tmp_path):
    folder = make_folder(tmp_path / "x", seeds=(3,))
    (folder / "report").mkdir()
    for name, content in (("paired_9.png", b"Software\0ssync_pl report"), ("paired_9_mine.png", b""), ("2.png", b"")):
        (folder / "report" / name).write_bytes(content)
    page = Page(write_report(folder))
    assert "With one seed there is no interval and no verdict" in page.words
    assert "±" not in " ".join(" ".join(row) for row in page.rows)
    assert "(better)" not in page.words
    assert len(page.numbers("with")[0]) == 2
    # figures of an earlier report go, other pictures stay
    assert {"2.png", "paired_9_mine.png"} == {path.name for path in (folder / "report").glob("*[92]*.png")}


@pytest.mark.parametrize("name", ["results.csv", "report/index.html", "report/merging_3.png", "report/paired_7.png"])
def test_files_of_others_are_refused_by_name_and_cells_are_no_formulas(tmp_path, no_figures, name):
    folder = make_folder(tmp_path / "x", ("without", "=1+1"))
    for path in folder.glob("runs/*/*/seed_0/pictures/step-003000.png"):
        path.unlink()
        path.mkdir()  # no picture
    for _ in range(2):  # an earlier one of ours is replaced
        write_report(folder)
    assert {*read_results(folder / "results.csv")["variant"]} == {"without", "'=1+1"}
    (folder / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"{name} to be absent"):
        write_report(folder)
    assert (folder / name).read_text() == "mine"


CUT = b'\xff\xfe{"scores": {'
DAMAGED = [  # file and content
    ("log.txt", None),
    *((name, CUT) for name in ("evaluation.json", "metrics.csv", "summary.json", "job.json")),
    *(("summary.json", '{"rows": null}'), ("evaluation.json", '{"first_step": 1e999}'), ("job.json", "[" * 9999)),
]


@pytest.mark.parametrize(("name", "content"), DAMAGED)
def test_a_run_that_is_missing_or_damaged_is_named_and_the_others_are_shown(tmp_path, no_figures, name, content):
    folder = make_folder(tmp_path / "x", absent=[] if content else [("with", 1)])
    path = folder / "runs" / "slots_7" / "with" / "seed_1" / name
    if content:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "runs" / "slots_7_old" / "with" / "seed_1").mkdir(parents=True)
    (folder / "runs" / "slots_7_old" / "with" / "seed_1" / "evaluation.json").touch()
    page = Page(write_report(folder))
    assert re.search(r"7 slots, with, seed 1: .*( is damaged|did not finish.*: loss is <NaN>)", page.words)
    assert "3 of 4 runs finished" in page.words
    assert len(page.numbers("with")) >= 8


@pytest.mark.parametrize("name", ["pictures/step-*.png", "metrics.csv", "summary.json"])
def test_a_missing_file_takes_only_what_it_tells(tmp_path, no_figures, name):
    folder = make_folder(tmp_path / "x")
    for path in folder.glob(f"runs/*/*/*/{name}"):
        path.unlink()
    page = Page(write_report(folder))
    assert "All 4 runs finished" in page.words
    assert ("Validation videos" in page.words) == (name != "pictures/step-*.png")
    assert ("fixed grid" in page.words) == (name != "summary.json")


def test_reports_without_a_finished_run_and_of_a_variant_alone_but_none_of_other_folders(tmp_path, no_figures):
    folder = make_folder(tmp_path / "x", ("without",), seeds=())
    assert "No run has finished yet." in Page(write_report(folder)).words
    with pytest.raises(ConfigError, match="Pass the folder that"):
        write_report(tmp_path)

    page = Page(write_report(make_folder(tmp_path / "y", ("without",), slots=(7, 64))))
    assert all(text in page.words for text in ("7 slots", "64 slots", "There is nothing to compare it with."))
