import csv
import importlib
import statistics
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import pixel_clips, tiny, window_clips

from operations import Operations
from ssync_pl import SSyncMaps, attach
from ssync_pl.hosts import SOLV, SAVi, VideoSAUR
from ssync_pl.hosts.nn import decoders
from ssync_pl.hosts.nn.decoders import MLPDecoder
from ssync_pl.method import ssync_loss

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


QUICK = ["--quick", "--rounds", "2", "--threads", "1"]
LOADER_WORDS = ["--videos", "16", "--frames", "8", "--resolution", "16", "--image-size", "24", "--batch-size", "4"]
LOADER_WORDS += ["--per-shard", "4", "--workers", "0", "--warmup", "1", "--seconds", "0.2", "--repeats", "1"]
LOADERS = {"reference": "| `reference` |", "mmap": "| ours, `mmap` |", "webdataset": "| ours, `webdataset` |"}
LOADERS["mmap + transform"] = "| ours, `mmap`, with"
KINDS = {"without", "warm-up", "with", "auto", "dense", "validation", "validation attached"}
# Each benchmark, its arguments, what the columns of its file hold, and a line that it prints.
RUNS = {
    "cost": (
        QUICK,
        {"method": {"torch", "vectorised", "loop", "dense"}, "table": {"main", "rival", "frames"}},
        "| frames T | torch | 2 – 8 |",
    ),
    "memory": (
        [*QUICK, "--rounds", "1", "--memory", "0.5", "2"],
        {"subject": {"decoder", "slotcontrast", "solv"}, "batch": {"1", "2"}, "layout": {"plain", "memory_efficient"}},
        "| solv | 2 GiB |",
    ),
    "step": ([*QUICK, "--hosts", "videosaur"], {"host": {"videosaur"}, "kind": KINDS}, "videosaur    with"),
    "loader": (LOADER_WORDS, {"loader": set(LOADERS)}, "mmap + transform"),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_benchmark_runs_and_writes_its_rows_and_its_figure(name, load, tmp_path, capsys):
    words, columns, line = RUNS[name]
    load(name).main([*words, "--out", str(tmp_path)])
    rows = rows_of(tmp_path / f"{name}_cpu.csv")
    assert {column: {row[column] for row in rows} for column in columns} == columns
    assert all(row["device"] and row["date"] and row["torch"] == torch.__version__ for row in rows)
    measured = [float(row[key]) for row in rows for key in ("median_ms", "step_ms", "peak_mib") if row.get(key)]
    assert name == "loader" or min(measured) > 0
    assert name == "loader" or (tmp_path / f"{name}_cpu.png").read_bytes().startswith(b"\x89PNG")
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(1, 1, 2, 3), (2, 3, 5, 6), (1, 2, 7, 5)])
@pytest.mark.parametrize("threshold", [0.2, 0.7])
def test_baselines_equal_the_package(load, shape, threshold):
    baselines, cost = load("_baselines"), load("cost")
    maps, grid = cost.clip(cost.Shape(*shape), "cpu"), (shape[3], shape[3])
    output = ssync_loss(SSyncMaps(*maps, grid=grid), merge_threshold=threshold, backend="torch")
    expected = torch.autograd.grad(output.loss, maps)
    for block in (baselines.loop_block, baselines.vectorised_block):
        loss = block(*maps, grid, threshold)
        torch.testing.assert_close(loss, output.loss)
        for got, grad in zip(torch.autograd.grad(loss, maps), expected, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-7)
        # A checkerboard has no interior, and one label no boundary.
        board, flat = torch.zeros(1, 1, 2, 4), torch.tensor([1.0, 0.0]).view(1, 1, 2, 1).expand(1, 1, 2, 4)
        board[:, :, 0, ::2] = board[:, :, 1, 1::2] = 9.0
        assert block(flat, board, (1, 4)).item() == 0


def test_spreads_exponents_sizes_and_intervals(load):
    timing, report = load("_timing"), load("_step_report")
    summary = timing.spread([0.001, 0.002, 0.003, 0.004, 0.005])
    assert summary == {"median_ms": 3.0, "low_ms": 2.0, "high_ms": 4.0, "min_ms": 1.0, "calls": 5}
    assert timing.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    memory = [{"batch": 1, "peak_mib": 300.0}, {"batch": 3, "peak_mib": 700.0}]  # 100 MiB, and 200 MiB per clip
    assert [load("memory").fitted_batch(memory, gib) for gib in (1, 0.2)] == [4, 0]
    base = [100.0, 300.0, 200.0, 150.0, 250.0]  # a machine whose speed drifts, which pairs take out
    exact = report.overhead([value + 4.0 for value in base], base)
    assert exact.percent == pytest.approx(2.0)
    assert 4 / 3 <= exact.low + 1e-9 < exact.high <= 4.0 + 1e-9


def test_the_lean_decoder_takes_half_of_the_memory(load, monkeypatch):
    memory, device = load("memory"), torch.device("cpu")
    monkeypatch.setattr(decoders, "_CHUNK_BYTES", {"cpu": 1 << 17})
    decoder, slots = MLPDecoder(8, 48, [128] * 3, 144), torch.randn(4, 11, 8, requires_grad=True)

    def lean():
        out = decoder(slots)
        (out["reconstruction"].square().mean() + out["masks"].square().mean()).backward()
        decoder.zero_grad()

    def all_pairs():
        decoded = decoder.mlp(slots.unsqueeze(2) + decoder.pos_emb)
        masks = decoded[..., -1].softmax(1)
        ((decoded[..., :-1] * masks.unsqueeze(-1)).sum(1).square().mean() + masks.square().mean()).backward()
        decoder.zero_grad()

    assert 0 < memory.peak_bytes(lean, device) <= 0.5 * memory.peak_bytes(all_pairs, device)


@pytest.mark.parametrize("kind", [VideoSAUR, SOLV, SAVi])
def test_nothing_is_added_and_nothing_kept_while_ssync_is_off(kind):
    host, batch = tiny(kind), pixel_clips() if kind is SAVi else window_clips()

    def step(ssync=None):
        torch.manual_seed(0)
        with Operations() as operations:
            loss = host.training_step(batch, 0)
            (loss if ssync is None else ssync.add(loss, batch)).backward()
        host.zero_grad()
        assert ssync is None or not any(ssync._session.capture._records.values())
        return operations.counts

    def validation():
        torch.manual_seed(0)
        host.eval()
        with torch.no_grad(), Operations() as operations:
            host.segment(batch)
        host.train()
        return operations.counts

    host.train()
    step()  # a host may look at itself once as well
    plain, plain_validation = step(), validation()
    with attach(host, warmup_steps=3, guard_window=1) as ssync:
        step(ssync)  # the first step looks at the host once
        assert not ssync._session.capture.is_open
        assert step(ssync) == plain
        assert validation() == plain_validation
        assert ssync.maps is None
        step(ssync)  # the guard counts the slots in use
        assert step(ssync).total() > plain.total()
        maps = ssync.maps
        assert validation() == plain_validation
        assert ssync.maps is maps
    assert step() == plain


def page_cells(start, section=""):
    page = (BENCHMARKS / "README.md").read_text("utf-8")
    text = page.partition(section)[2].partition("\n## ")[0] if section else page
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_real_video_says_which_map_is_right_where_and_draws_its_tables(load, tmp_path):
    real = load("real_video")
    labels = torch.tensor([[[[0, 0, 1, 2]]]])
    # Slot 1 and 2 stand for the object; the patch of slot 0 that shows it is wrong.
    assert real.right(labels, torch.tensor([[[[0, 0, 1, 1]]]])).tolist() == [[[[True, True, True, True]]]]
    assert real.right(labels.roll(1), torch.tensor([[[[0, 0, 1, 1]]]])).tolist() == [[[[True] * 2 + [False, True]]]]
    host = real.SlotContrast(
        num_slots=3, slot_dim=8, backbone=None, feature_dim=6, grid=(4, 5), decoder_hidden=(16,)
    ).eval()
    truth = torch.zeros(2, 2, 2, 8, 10, dtype=torch.bool)
    truth[:, :, 0] = True
    rows = real.teachers(host, [{"features": torch.randn(2, 2, 20, 6), "segmentations": truth}])
    assert [row["region"] for row in rows] == ["boundary", "interior"]
    # With nothing but background every patch is right in every map.
    assert all(row["teacher_right"] in (0.0, 1.0) and row["teacher_better"] == 0 for row in rows)
    for path in RESULTS.glob("real_*.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert real.main(["figure", "--results", str(tmp_path)]) == 0
    assert (tmp_path / "real_video.png").read_bytes().startswith(b"\x89PNG")


def spread_of(values, digits):
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} – {max(values):.{digits}f})"


def test_the_page_prints_the_committed_results(load, capsys):
    rows = rows_of(RESULTS / "loader_cpu.csv")
    for loader, start in LOADERS.items():
        for cell, workers in zip(page_cells(start), ("0", "2"), strict=False):
            rates = [float(row["clips_per_s"]) for row in rows if (row["loader"], row["workers"]) == (loader, workers)]
            assert cell == spread_of(rates, 0)
    rows = rows_of(RESULTS / "savi_synthetic.csv")
    for arm, start in (("with", "| with SSync |"), ("without", "| without |")):
        cells = page_cells(start, "## The SAVi example")
        for cell, key in zip(cells, ("video_fg_ari", "video_ari", "video_mbo"), strict=False):
            assert cell == spread_of([float(row[key]) for row in rows if row["arm"] == arm], 3)
    assert load("tables").main(["--check"]) == 0, capsys.readouterr().out


def test_the_picture_of_the_method_shows_merging_and_both_regions(load, tmp_path):
    module = load("method_picture")
    output = ssync_loss(module.toy_maps(), merge_threshold=0.7)
    assert output.winners.tolist() == [[0, 1, 1, 3]]  # two slots of the disk, as the page says
    assert output.boundary.any()
    assert output.interior.any()
    module.main(["--out", str(tmp_path / "method.svg")])
    assert (tmp_path / "method.svg").stat().st_size > 10_000
