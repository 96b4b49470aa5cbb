from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # report_cases.py lies beside the tests
from report_cases import ODD, Case, make_folder

from ssync_pl.compare.report import write_report
from ssync_pl.compare.report.load import load_comparison
from ssync_pl.compare.report.pictures import group_videos, match_slots, read_clips, slot_palette
from ssync_pl.compare.report.tables import group_tables
from ssync_pl.compare.statistics import t_quantile
from ssync_pl.errors import ConfigError

VOID = {"meta", "img", "source", "br", "link", "input", "hr"}
SMALL = {"videos": 1, "frames": 2, "size": 32}


class Page(HTMLParser):
    """Checks that tags are closed in order, and keeps what the tests ask for."""

    def __init__(self):
        super().__init__()
        self.open, self.wrong, self.tags, self.ids = [], [], [], []
        self.rows, self.text = [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            return
        self.text.append(data)
        if any(tag in ("td", "th") for tag in self.open):
            self.rows[-1][-1] += f" {data}"


def read_page(path):
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    return page


def numbers(page, first):
    row = next(row for row in page.rows if row and row[0].split() and row[0].split()[0] == first and len(row) > 2)
    return [[float(word.replace("−", "-")) for word in re.findall(r"[+−]?\d+\.?\d*", cell)] for cell in row[1:]]


@pytest.fixture
def no_figures(monkeypatch):
    """Figures take most of the time; a test that looks at other things does without."""
    monkeypatch.setattr("ssync_pl.compare.report.write.can_draw", lambda: False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("report") / "plain", Case(seeds=(0, 1, 2), **SMALL))
    return folder, write_report(folder)


def test_the_page_is_well_formed_and_needs_nothing_beside_it(plain):
    page = read_page(plain[1])
    assert not page.open
    assert not page.wrong
    assert len(page.ids) == len(set(page.ids))
    tags = {tag for tag, _ in page.tags}
    assert {"h1", "h2", "h3", "table", "caption", "th", "img"} <= tags
    assert not tags & {"script", "link", "iframe"}
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset"):
            if name in attrs:
                assert attrs[name].startswith(("data:", "#")), (tag, attrs[name][:60])
        if tag == "a" and attrs["href"].startswith("#"):
            assert attrs["href"][1:] in page.ids
        if tag == "img":
            assert attrs["alt"].strip()
        if tag == "th":
            assert attrs["scope"] in ("col", "row", "colgroup")
    assert "url(" not in plain[1].read_text(encoding="utf-8")
    assert "@import" not in plain[1].read_text(encoding="utf-8")


def test_every_table_has_a_caption(plain):
    tags = [tag for tag, _ in read_page(plain[1]).tags]
    assert tags.count("table") == tags.count("caption") >= 4


def test_the_numbers_are_those_of_the_rows(plain):
    folder, path = plain
    with open(folder / "report" / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    values = {
        name: {int(row["seed"]): float(row["video_ari"]) for row in rows if row["variant"] == name}
        for name in ("without", "with", "published")
    }
    width = t_quantile(0.975, 2) / math.sqrt(3)
    page = read_page(path)
    for name, found in values.items():
        shown = numbers(page, name)[1]
        expected = [statistics.mean(found.values()), width * statistics.stdev(found.values())]
        if name != "without":
            changes = [found[seed] - values["without"][seed] for seed in found]
            expected += [statistics.mean(changes), width * statistics.stdev(changes)]
        assert shown == pytest.approx(expected, abs=0.00051)
    markdown = (folder / "report" / "report.md").read_text(encoding="utf-8")
    shown = f"{statistics.mean(values['with'].values()):.3f} ± {width * statistics.stdev(values['with'].values()):.3f}"
    assert shown in markdown


def test_what_is_clear_of_zero_is_bold_and_the_headline_says_so(plain):
    html, markdown = plain[1].read_text("utf-8"), (plain[0] / "report" / "report.md").read_text("utf-8")
    lead = re.search(r'<p class="lead">(.*?)</p>', html, re.S)[1]
    assert re.search(r"“with” minus “without”: clear of zero: video FG-ARI \+0\.0\d\d\s±\s0\.0\d\d \(better\)", lead)
    assert re.search(r"“published” minus “without”: .*within noise", lead)
    bold = re.search(r"\| with \(3 seeds\) \|([^|]*)\|", markdown)[1]
    assert "**+0.0" in bold
    without = re.search(r"\| without [^|]*\|(.*)\|", markdown)[1]
    assert "**" not in without


def test_a_column_of_nan_is_left_out_and_a_single_one_counts_for_nothing(tmp_path, no_figures):
    folder = make_folder(tmp_path / "x", Case(seeds=(0, 1, 2), nan=("identity",), videos=0, curves=False))
    text = (folder / "results.csv").read_text(encoding="utf-8").splitlines()
    row = next(csv.DictReader(io.StringIO("\n".join(text[:2]))))
    text[1] = text[1].replace(row["video_ari"], "nan", 1)
    (folder / "results.csv").write_text("\n".join(text) + "\n", encoding="utf-8")
    for place in folder.glob("runs/*/*/*/*/evaluation.json"):
        place.write_text("{}", encoding="utf-8")
    group = load_comparison(folder).groups[0]
    assert group.mean("without", "video_ari").count == 2
    assert group.difference("with", "video_ari").count == 2
    labels = [label for table in group_tables(group) for label in table.columns]
    assert "identity kept" not in labels
    page = "".join(read_page(write_report(folder)).text)
    assert "nan" not in page.lower().split()


def test_odd_names_are_shown_as_they_are_and_never_as_markup(tmp_path):
    folder = make_folder(tmp_path / "<x> & y", Case(variants=("without", ODD), seeds=(0, 1), sets=("<s>",), **SMALL))
    path = write_report(folder)
    page = read_page(path)
    assert not page.open
    assert not page.wrong
    assert not {"b<", "i", "s", "x"} & {tag for tag, _ in page.tags}
    text = "".join(page.text)
    assert ODD in text
    assert "<s>" in text
    assert f"{ODD} as <i>described</i>" in text
    assert "<b>87</b>" in text
    markdown = (folder / "report" / "report.md").read_text(encoding="utf-8")
    assert "a\\<b\\>&" in markdown
    assert all(re.fullmatch(r"[\w.-]+", file.name) for file in (folder / "report").iterdir())


def test_runs_that_did_not_finish_are_listed_with_what_their_log_says(tmp_path, no_figures):
    case = Case(variants=("without", "with"), seeds=(0, 1, 2), absent=[("with", 1)], **SMALL)
    folder = make_folder(tmp_path / "x", case)
    text = " ".join(read_page(write_report(folder)).text)
    assert "5 of 6 runs finished" in text
    assert "default, 7 slots, with, seed 1: did not finish; its log ends with: RuntimeError: loss is <NaN>" in text
    assert load_comparison(folder).groups[0].difference("with", "video_ari").count == 2


def test_one_seed_has_no_interval_and_no_verdict(tmp_path):
    folder = make_folder(tmp_path / "x", Case(variants=("without", "with"), seeds=(3,), **SMALL))
    path = write_report(folder)
    page = read_page(path)
    text = " ".join(page.text)
    assert "With one seed there is no interval and no verdict" in text
    assert "±" not in " ".join(" ".join(row) for row in page.rows)
    assert "(better)" not in text
    assert len(numbers(page, "with")[0]) == 2


@pytest.mark.parametrize(
    "gone", ["matrix.json", "results.csv", "pictures.npz", "metrics.csv", "run.json", "summary.json"]
)
def test_a_missing_file_takes_only_what_it_tells(tmp_path, gone, monkeypatch):
    if gone not in ("metrics.csv", "results.csv"):
        monkeypatch.setattr("ssync_pl.compare.report.write.can_draw", lambda: False)
    folder = make_folder(tmp_path / "x", Case(variants=("without", "with"), seeds=(0, 1), **SMALL))
    for path in [folder / gone, *folder.glob(f"runs/*/*/*/*/{gone}")]:
        path.unlink(missing_ok=True)
    page = read_page(write_report(folder))
    assert not page.open
    assert not page.wrong
    text = " ".join(page.text)
    assert ("Validation videos" in text) == (gone != "pictures.npz")
    assert ("Learning curves" in text) == (gone == "results.csv")
    assert ("Seed by seed" in text) == (gone in ("metrics.csv", "results.csv"))
    assert "All 4 runs finished" in text
    assert len(numbers(page, "with")) == 8


def test_rows_come_from_the_runs_where_results_csv_lacks_them(tmp_path):
    folder = make_folder(tmp_path / "x", Case(variants=("without", "with"), seeds=(0, 1), videos=0))
    before = load_comparison(folder)
    (folder / "results.csv").unlink()
    after = load_comparison(folder)
    for key in ("video_ari", "probe_position_r2", "step_ms", "kmeans_rgb_video_ari", "wall_seconds"):
        assert after.groups[0].by_seed("with", key) == before.groups[0].by_seed("with", key), key


def test_damaged_files_are_as_missing_ones(tmp_path, no_figures):
    folder = make_folder(tmp_path / "x", Case(variants=("without", "with"), seeds=(0,), **SMALL))
    for name in ("pictures.npz", "metrics.csv", "summary.json"):
        for path in folder.glob(f"runs/*/*/*/*/{name}"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    page = read_page(write_report(folder))
    assert not page.open
    assert "Validation videos" not in " ".join(page.text)


def test_a_comparison_without_a_finished_run_has_a_report(tmp_path):
    (tmp_path / "matrix.json").write_text(
        json.dumps({"variants": [{"name": "with"}], "seeds": [0], "slots": [7], "sets": ["c"]}), encoding="utf-8"
    )
    text = " ".join(read_page(write_report(tmp_path)).text)
    assert "No run has finished yet." in text
    assert "c, 7 slots, with, seed 0: not started" in text


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="Give the folder that"):
        write_report(tmp_path)


def test_several_sets_and_slot_counts_with_a_variant_alone(tmp_path):
    case = Case(variants=("without",), seeds=(0, 1), slots=(7, 64), sets=("c", "cluttered"), **SMALL)
    folder = make_folder(tmp_path / "x", case)
    page = read_page(write_report(folder))
    text = " ".join(page.text)
    assert not page.open
    for title in ("Set c, 7 slots", "Set c, 64 slots", "Set cluttered, 64 slots", "Slot counts, set cluttered"):
        assert title in text
    assert "There is nothing to compare it with." in text
    assert len([tag for tag, _ in page.tags if tag == "details"]) >= 3
    links = re.findall(r"\]\(([^)]+)\)", (folder / "report" / "report.md").read_text("utf-8"))
    assert links
    assert not [name for name in links if not (folder / "report" / name).is_file()]


def test_pictures_of_an_earlier_report_go(plain):
    folder, _ = plain
    (folder / "report" / "paired_9_gone_3.png").write_bytes(b"x")
    write_report(folder)
    assert not (folder / "report" / "paired_9_gone_3.png").exists()


def test_without_matplotlib_the_report_says_what_is_missing(tmp_path, no_figures):
    folder = make_folder(tmp_path / "x", Case(variants=("without", "with"), seeds=(0,), **SMALL))
    text = " ".join(read_page(write_report(folder)).text)
    assert "pip install ssync-pl[bench]" in text
    assert "Validation videos" in text
    assert "Seed by seed" not in text


def test_an_object_has_one_colour_in_all_columns(tmp_path):
    case = Case(variants=("without", "with"), seeds=(0, 1), slots=(7,), videos=1, frames=2, size=64)
    folder = make_folder(tmp_path / "x", case)
    group = load_comparison(folder).groups[0]
    video = group_videos(group)[0]
    truth = video.columns[1].frames
    clip = next(iter(read_clips(group.of("with")[0].folder / "pictures.npz").values()))
    assert [column.title for column in video.variants["with"]] == ["encoder", "decoder", "regions"]
    big = np.asarray(Image.fromarray(clip.truth[0]).resize(truth.shape[2:0:-1], Image.Resampling.NEAREST))
    for name in ("without", "with"):
        decoder = video.variants[name][1].frames
        same = (decoder[0] == truth[0]).all(axis=-1)
        assert same[big > 0].mean() > 0.9, name


def test_slots_are_matched_one_to_one_and_others_are_pale():
    clip_truth = np.array([[[0, 0, 0, 1, 1, 2, 2, 2]]])
    slots = np.array([[[63, 63, 9, 4, 4, 5, 5, 5]]])
    from ssync_pl.compare.report.pictures import Clip

    matched = match_slots(Clip(np.zeros((1, 1, 8, 3), np.uint8), clip_truth, slots, slots, None, None))
    assert matched == {63: 0, 4: 1, 5: 2}
    palette = slot_palette(matched, 64)
    assert palette[63].tolist() == [70, 70, 70]
    assert palette[9].min() > 140
    assert len({tuple(color) for color in palette.tolist()}) == 64
