"""The report as HTML, on folders with made-up numbers."""

from __future__ import annotations

import base64
import math
import re
import statistics
from html.parser import HTMLParser

import pytest
from report_cases import ODD, Case, make_folder

from ssync_pl.compare.report import write_report
from ssync_pl.compare.results import load_comparison, read_results
from ssync_pl.compare.tables import groups_of, printed_tables
from ssync_pl.errors import ConfigError

VOID = {"meta", "img", "source", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and keeps what the tests ask for."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.rows, self.text = [], [], [], []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)
            if any(tag in ("td", "th") for tag in self.open):
                self.rows[-1][-1] += f" {data}"

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())

    def numbers(self, first):
        row = next(row for row in self.rows if row and row[0].split()[:1] == [first] and len(row) > 2)
        return [[float(word.replace("−", "-")) for word in re.findall(r"[+−]?\d+\.?\d*", cell)] for cell in row[1:]]


@pytest.fixture
def no_figures(monkeypatch):
    """Figures take most of the time; a test that looks at other things does without."""
    monkeypatch.setattr("ssync_pl.compare.report.group_figures", lambda *args: [])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("report") / "plain", Case())
    return folder, Page(write_report(folder))


def test_the_page_needs_nothing_beside_it(plain):
    page = plain[1]
    tags = [tag for tag, _ in page.tags]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert not set(tags) & {"script", "link", "iframe"}
    assert tags.count("table") == tags.count("caption") == 3
    assert "url(" not in page.html
    assert "@import" not in page.html
    for tag, attrs in page.tags:
        for name in {"src", "href", "srcset"} & set(attrs):
            assert attrs[name].startswith(("data:", "#")), (tag, attrs[name][:60])
        if tag == "a" and attrs["href"].startswith("#"):
            assert attrs["href"][1:] in ids
        assert tag != "img" or attrs["alt"].strip()
        assert tag != "th" or attrs["scope"] in ("col", "row")


def test_the_page_has_figures_and_the_last_sheet_of_each_run(plain):
    folder, page = plain
    for title in ("Seed by seed", "Learning curves", "Merging and slots in use", "Validation videos"):
        assert title in page.words
    assert "first logged at step 1549" in page.words
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    sheets = {attrs["alt"]: attrs["src"] for attrs in images if attrs["alt"].startswith("Pictures of")}
    assert (len(images), len(sheets)) == (3 + 3 * 3, 3 * 3)
    last = next(folder.glob("runs/*/*/published/seed_2/pictures/step-003000.png"))
    assert sheets["Pictures of published, seed 2"].endswith(base64.b64encode(last.read_bytes()).decode())
    made = sorted(path.name for path in (folder / "report").glob("*.png"))
    assert made == [f"{name}_1_default_7.png" for name in ("learning", "merging", "paired")]


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
    lead = " ".join(re.search(r'<p class="lead">(.*?)</p>', plain[1].html, re.S)[1].split())
    assert re.search(r"“with” minus “without”: clear of zero: video FG-ARI \+0\.0\d\d\s±\s0\.0\d\d \(better\)", lead)
    assert re.search(r"“published” minus “without”: .*within noise", lead)
    assert "All 9 runs finished, with 3 seeds each" in lead
    assert "With fewer than five seeds they are wide" in lead
    assert re.search(r'<small class="better"><b>\+0\.\d{3} ± 0\.\d{3}</b>', plain[1].html)
    assert "<b>" not in next(row for row in plain[1].html.split("<tr>") if "3 seeds, baseline" in row)


def test_printed_tables(plain):
    frame = load_comparison(plain[0]).frame
    text = printed_tables(frame, "without")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    (at,) = [place for place, line in enumerate(lines) if line.startswith("with ")]
    assert re.match(r"with 3 seeds 0\.\d{3} ± 0\.\d{3} ", lines[at])
    assert re.match(r"difference \+0\.0\d\d ± 0\.0\d\d ", lines[at + 1])
    assert lines[at + 2].startswith("up ")
    assert "within noise" in text
    assert re.search(r"fixed grid +no learning +0\.010", text)
    assert "identity" not in text  # no run has it
    assert "No run is finished" in printed_tables(frame[:0], "without")
    frame.loc[(frame["variant"] == "with") & (frame["seed"] == 1), "video_ari"] = math.nan
    (group,) = groups_of(frame, "without")
    assert group.mean("with", "video_ari").count == group.difference("with", "video_ari").count == 2


def test_odd_names_are_shown_as_they_are_and_never_as_markup(tmp_path):
    folder = make_folder(tmp_path / "<x> & y", Case(variants=("without", ODD), seeds=(0, 1), sets=("<s>",)))
    page = Page(write_report(folder))
    assert not {"b<", "i", "s", "x"} & {tag for tag, _ in page.tags}
    for text in (ODD, "<s>", f"{ODD} as <i>described</i>", "<b>87</b>"):
        assert text in page.words
    assert all(re.fullmatch(r"[\w.-]+", file.name) for file in (folder / "report").iterdir())


def test_one_seed_has_no_interval_and_no_verdict(tmp_path):
    folder = make_folder(tmp_path / "x", Case(variants=("without", "with"), seeds=(3,)))
    (folder / "report").mkdir()
    for name in ("paired_9_gone_3.png", "photo_2.png"):
        (folder / "report" / name).write_bytes(b"x")
    page = Page(write_report(folder))
    assert "With one seed there is no interval and no verdict" in page.words
    assert "±" not in " ".join(" ".join(row) for row in page.rows)
    assert "(better)" not in page.words
    assert len(page.numbers("with")[0]) == 2
    # figures of an earlier report go, other pictures stay
    assert {"photo_2.png"} == {path.name for path in (folder / "report").glob("*[92]*.png")}


@pytest.mark.parametrize("name", ["log.txt", "evaluation.json", "metrics.csv", "summary.json", "job.json"])
def test_a_run_that_is_missing_or_damaged_is_named_and_the_others_are_shown(tmp_path, no_figures, name):
    absent = [("with", 1)] if name == "log.txt" else []
    folder = make_folder(tmp_path / "x", Case(variants=("without", "with"), seeds=(0, 1), absent=absent))
    path = folder / "runs" / "default" / "slots_7" / "with" / "seed_1" / name
    if not absent:
        path.write_bytes(b"\xff\xfe" + path.read_bytes()[:20])
    page = Page(write_report(folder))
    why = "did not finish; its log ends with: RuntimeError: loss is <NaN>" if absent else f"{name} is damaged"
    assert f"default, 7 slots, with, seed 1: {why}" in page.words
    assert "3 of 4 runs finished" in page.words
    assert len(page.numbers("with")) >= 8


@pytest.mark.parametrize("name", ["pictures/step-*.png", "metrics.csv", "summary.json"])
def test_a_missing_file_takes_only_what_it_tells(tmp_path, no_figures, name):
    folder = make_folder(tmp_path / "x", Case(variants=("without", "with"), seeds=(0, 1)))
    for path in folder.glob(f"runs/*/*/*/*/{name}"):
        path.unlink()
    page = Page(write_report(folder))
    assert "All 4 runs finished" in page.words
    assert ("Validation videos" in page.words) == (name != "pictures/step-*.png")
    assert ("fixed grid" in page.words) == (name != "summary.json")


def test_a_comparison_without_a_finished_run_has_a_report_and_other_folders_none(tmp_path):
    folder = make_folder(tmp_path / "x", Case(variants=("without",), seeds=()))
    assert "No run has finished yet." in Page(write_report(folder)).words
    with pytest.raises(ConfigError, match="Pass the folder that"):
        write_report(tmp_path)


def test_several_sets_and_slot_counts_with_a_variant_alone(tmp_path):
    folder = make_folder(tmp_path / "x", Case(variants=("without",), seeds=(0, 1), slots=(7, 64), sets=("c", "e")))
    page = Page(write_report(folder))
    for title in ("Set c, 7 slots", "Set c, 64 slots", "Set e, 64 slots"):
        assert title in page.words
    assert "There is nothing to compare it with." in page.words
    assert len([tag for tag, _ in page.tags if tag == "details"]) >= 3
