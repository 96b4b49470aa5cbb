import csv
import json
import math

import pytest

from ssync_pl.compare.collect import COLUMNS, collect_run, collect_runs, number, read_results, write_results
from ssync_pl.compare.table import comparison_tables, sentences, slot_drops
from ssync_pl.errors import ConfigError


def row(variant, seed, score, slots=7, **more):
    return {"set": "c", "slots": slots, "variant": variant, "seed": seed, "video_fg_ari": score, **more}


ROWS = [row("with", seed, 0.5 + 0.01 * seed, untrained_video_fg_ari=0.1, grid_video_fg_ari=0.3) for seed in range(3)]
ROWS += [
    row("without", seed, 0.4 + 0.01 * seed, untrained_video_fg_ari=0.1, grid_video_fg_ari=0.3) for seed in range(3)
]


def test_sentences_say_what_the_difference_is():
    assert sentences(ROWS, "without") == ["with: video FG-ARI +0.100 ± 0.000 against without: up (3 seeds)"]
    noisy = [row("a", seed, value) for seed, value in enumerate((0.1, 0.9))] + [row("b", s, 0.4) for s in (0, 1)]
    assert "within noise (2 seeds)" in sentences(noisy, "b")[0]
    single = [row("a", 0, 0.1), row("b", 0, 0.4)]
    assert sentences(single, "b") == ["a: video FG-ARI −0.300 against b: one seed: no interval"]


def test_tables_have_means_differences_and_what_needs_no_learning():
    text = comparison_tables(ROWS, "without", markdown=True)
    assert "| c | 7 | with | 3 | 0.510 ± 0.025 |" in text
    assert "| c | 7 | with | 3 | +0.100 ± 0.000 |" in text
    assert "| c | 7 | grid | 0.300 |" in text
    assert "| c | 7 | untrained | 0.100 ± 0.000 |" in text
    assert "fewer to more slots" not in text
    plain = comparison_tables(ROWS, "without").splitlines()
    (line,) = [line for line in plain if line.split()[:4] == ["c", "7", "with", "3"] and "+" not in line]
    assert "0.510 ± 0.025" in line


def test_metrics_that_no_run_has_are_left_out():
    assert "boundary F" not in comparison_tables(ROWS, "without")
    with_one = [{**ROWS[0], "boundary_f": "0.5"}, *ROWS[1:]]
    assert "boundary F" in comparison_tables(with_one, "without")


def test_a_slot_sweep_has_the_change_of_each_variant():
    more = [row("with", seed, 0.45 + 0.01 * seed, slots=11) for seed in range(2)]
    drops = slot_drops([*ROWS, *more])
    assert drops == [["c", "7", "11", "with", "2", "−0.050 ± 0.000"]]
    assert "fewer to more slots" in comparison_tables([*ROWS, *more], "without")
    assert "with [c, 7 slots]" in "".join(sentences([*ROWS, *more, row("without", 0, 0.4, slots=11)], "without"))


def test_no_rows():
    assert "No run is finished" in comparison_tables([], "without")


def finished_run(folder):
    folder.mkdir(parents=True)
    facts = {"set": "c", "slots": 7, "variant": "with", "seed": 0, "recipe": "r", "wall_seconds": 1.0}
    (folder / "run.json").write_text(json.dumps(facts))
    summary = {"this run": {"video_mbo": 0.1, "loss": 3.0}, "k-means RGB": {"video_mbo": 0.4}}
    (folder / "summary.json").write_text(json.dumps({"step": 9, "rows": summary}))
    scores = {"video_mbo": 0.2, "identity": math.nan}
    evaluation = {"scores": scores, "probe": {"color_r2": 0.7}, "steps": 10, "step_ms": 3.5}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "metrics.csv").write_text("ssync/merged_slots,step\n0.5,1\n0.75,2\n,3\n")
    return folder


def test_a_run_becomes_a_row(tmp_path):
    found = collect_run(finished_run(tmp_path / "run"))
    assert found["video_mbo"] == 0.2  # the evaluation is of the end, the summary of the last validation
    assert found["kmeans_rgb_video_mbo"] == 0.4
    assert (found["probe_color_r2"], found["merged_slots"], found["step"]) == (0.7, 0.75, 10)
    path = write_results(tmp_path / "results.csv", collect_runs([tmp_path / "run", tmp_path / "none"]))
    with open(path, newline="") as file:
        header = next(csv.reader(file))
    assert header == [*COLUMNS, "kmeans_rgb_video_mbo"]
    (read,) = read_results(path)
    assert read["identity"] == read["video_ari"] == ""
    assert number(read["video_mbo"]) == 0.2


def test_a_damaged_file_is_named(tmp_path):
    folder = finished_run(tmp_path / "run")
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(ConfigError, match=r"evaluation.json to hold JSON"):
        collect_run(folder)
