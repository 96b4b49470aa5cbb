"""Benchmarks run, their numbers are right, and what README prints is what their result files hold."""

from __future__ import annotations

import csv
import importlib
import os
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
    """Imports a benchmark; its modules are let go of."""
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


def check_facts(rows, image):
    """Every row names the device, the day and the version; the figure is a picture."""
    assert rows
    assert all(row["device"] and row["date"] and row["torch"] == torch.__version__ for row in rows)
    assert image.read_bytes().startswith(b"\x89PNG")


def test_the_cost_of_the_block(load, tmp_path, capsys):
    assert load("cost").main(["--quick", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "cost_cpu.csv")
    check_facts(rows, tmp_path / "cost_cpu.png")
    assert {row["method"] for row in rows} == {"torch", "vectorised", "loop", "dense"}
    assert {row["table"] for row in rows} == {"main", "rival", "frames"}
    for row in rows:
        assert 0 < float(row["min_ms"]) <= float(row["low_ms"]) <= float(row["median_ms"]) <= float(row["high_ms"])
        assert float(row["ops"]) > 30
    printed = capsys.readouterr().out
    assert "| frames T | torch | 2 – 8 |" in printed
    assert printed.count("| dense |") == 3


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


def test_counters_and_clocks(load):
    counting, timing = load("_counting"), load("_timing")

    def call():
        first = torch.zeros(1 << 20)
        second = first + 1.0
        del first
        return second * 2.0 + 1.0

    counted = counting.count_call(call)
    # Two arrays of 4 MiB at first, then `second`, the product and the sum.
    assert counted["peak_mib"] == pytest.approx(12.0, abs=0.1)
    assert counted["ops"] == 4
    seen = []
    times = timing.interleaved({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, rounds=3)
    assert seen == list("aabbababab")
    assert [len(values) for values in times.values()] == [3, 3]
    assert len(timing.interleaved({"a": lambda: torch.randn(1000).sort()}, rounds=9, seconds=0.0)["a"]) == 3
    summary = timing.spread([0.001, 0.002, 0.003, 0.004, 0.005])
    assert summary == {"median_ms": 3.0, "low_ms": 2.0, "high_ms": 4.0, "min_ms": 1.0, "calls": 5}
    assert timing.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)


def test_the_memory_of_every_subject(load, tmp_path, capsys):
    words = ["--quick", "--rounds", "1", "--threads", "1", "--memory", "0.5", "2", "--out", str(tmp_path)]
    memory = load("memory")
    memory.main(words)
    rows = rows_of(tmp_path / "memory_cpu.csv")
    check_facts(rows, tmp_path / "memory_cpu.png")
    layouts = ("plain", "memory_efficient")
    expected = [(s, b, l) for s in ("decoder", "slotcontrast", "solv") for b in ("1", "2") for l in layouts]  # noqa: E741
    assert [(row["subject"], row["batch"], row["layout"]) for row in rows] == expected
    assert all(float(row["peak_mib"]) > 0 for row in rows)
    assert all((row["median_ms"] == "") == (row["subject"] != "decoder") for row in rows)
    batches = rows_of(tmp_path / "memory_batches_cpu.csv")
    assert len(batches) == 3 * 2 * 2
    for small, large in zip(batches[::2], batches[1::2], strict=True):
        assert 0 < int(small["largest_batch"]) < int(large["largest_batch"])
    assert "| solv | 2 GiB |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        memory.main(["--batches", "2"])
    assert "two sizes or more" in capsys.readouterr().err


def test_peaks_and_largest_batches(load, monkeypatch):
    memory, shape, kept = load("memory"), (1024, 256), []  # a MiB

    def step():
        kept.clear()
        first = torch.ones(shape)
        second = torch.ones(shape)
        del first
        third = torch.ones(shape)
        kept.append(second + third)

    assert memory.peak_bytes(step, torch.device("cpu")) == pytest.approx(3 * 2**20, rel=0.01)
    monkeypatch.setattr(decoders, "_CHUNK_BYTES", {"cpu": 1 << 17})
    decoder, slots = MLPDecoder(8, 48, [128] * 3, 144), torch.randn(4, 11, 8, requires_grad=True)

    def lean():
        decoder.zero_grad()
        out = decoder(slots)
        (out["reconstruction"].square().mean() + out["masks"].square().mean()).backward()

    def all_pairs():
        decoder.zero_grad()
        decoded = decoder.mlp(slots.unsqueeze(2) + decoder.pos_emb)
        masks = decoded[..., -1].softmax(1)
        ((decoded[..., :-1] * masks.unsqueeze(-1)).sum(1).square().mean() + masks.square().mean()).backward()

    assert memory.peak_bytes(lean, torch.device("cpu")) <= 0.5 * memory.peak_bytes(all_pairs, torch.device("cpu"))
    rows = [{"batch": 1, "peak_mib": 300.0}, {"batch": 3, "peak_mib": 700.0}]
    # 100 MiB and 200 MiB per clip
    assert memory.fitted_batch(rows, 1) == 4
    assert memory.fitted_batch(rows, 0.2) == 0


def test_the_time_of_every_kind_of_step(load, tmp_path, capsys):
    words = ["--quick", "--rounds", "2", "--threads", "1", "--hosts", "videosaur", "solv", "--out", str(tmp_path)]
    assert load("step").main(words) == 0
    rows = rows_of(tmp_path / "step_cpu.csv")
    check_facts(rows, tmp_path / "step_cpu.png")
    kinds = ["without", "warm-up", "with", "dense", "validation", "validation attached"]
    expected = Counter({("videosaur", kind): 2 for kind in kinds})
    expected.update({("solv", kind): 2 for kind in kinds if kind != "dense"})
    assert Counter((row["host"], row["kind"]) for row in rows) == expected
    for row in rows:
        if row["kind"].startswith("validation"):
            assert not row["forward_ms"]
            continue
        parts = sum(float(row[name]) for name in ("forward_ms", "backward_ms", "optimizer_ms"))
        assert float(row["step_ms"]) == pytest.approx(parts, abs=1e-3)
        own = [row[name] for name in ("hooks_ms", "losses_ms", "losses_backward_ms")]
        if row["kind"] == "with":
            assert all(float(value) > 0 for value in own)
            assert float(own[0]) + float(own[1]) < float(row["forward_ms"])
        elif row["kind"] == "warm-up":
            assert float(own[2]) == 0
        else:
            assert not any(own)
    assert "videosaur    with" in capsys.readouterr().out


def test_an_overhead_is_paired_and_its_interval_holds_it(load):
    report = load("_step_report")
    base = [100.0, 300.0, 200.0, 150.0, 250.0]  # a machine whose speed drifts, which pairs take out
    exact = report.overhead([value + 4.0 for value in base], base)
    assert exact.percent == pytest.approx(2.0)
    assert exact.low + 1e-9 >= 4 / 3
    assert exact.high <= 4.0 + 1e-9
    noisy = report.overhead([104.0, 306.0, 199.0, 155.0, 253.0], base)
    assert noisy.percent == pytest.approx(2.0)
    assert noisy.low < 2.0 < noisy.high
    own = {"hooks_ms": 0.5, "losses_ms": 1.0, "losses_backward_ms": 0.5}
    rows = [{"host": "h", "kind": "without", "round": i, "step_ms": 200.0} for i in range(3)]
    rows += [{"host": "h", "kind": "with", "round": i, "step_ms": 999.0, **own} for i in range(3)]
    assert report.own_share(rows, "h", "with") == pytest.approx((1.0, 1.0, 1.0))


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked to do."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


SIZES = {"slot_dim": 8, "backbone": None, "feature_dim": 8, "grid": (3, 3), "decoder_hidden": (16,)}
LAYERS = {"encoder_channels": (8,), "encoder_strides": (2,), "decoder_channels": (8,), "decoder_strides": (2,)}
HOSTS = {
    "videosaur": lambda: (VideoSAUR(3, decoder="mlp", similarity_weight=0.0, **SIZES), (2, 9, 8)),
    "solv": lambda: (SOLV(3, clip_length=3, temporal_heads=2, edge_probability=0.0, **SIZES), (3, 9, 8)),
    "savi": lambda: (SAVi(2, slot_dim=8, decoder_broadcast=(4, 4), **LAYERS), (2, 3, 16, 16)),
}


@pytest.mark.parametrize("name", HOSTS)
def test_nothing_is_added_and_nothing_kept_while_ssync_is_off(name):
    host, shape = HOSTS[name]()
    batch = {"video" if name == "savi" else "features": torch.rand(1, *shape)}
    host.log = host.log_dict = lambda *args, **kwargs: None

    def step(ssync=None):
        torch.manual_seed(0)
        with Operations() as operations:
            loss = host.training_step(batch, 0)
            (loss if ssync is None else ssync.add(loss, batch)).backward()
        host.zero_grad()
        return operations.counts

    def validation():
        torch.manual_seed(0)
        host.eval()
        with torch.no_grad(), Operations() as operations:
            host.segment(batch)
        host.train()
        return operations.counts

    def held(ssync):
        return any(ssync._session.capture._records.values())

    host.train()
    step()  # a host may look at itself once as well
    plain, plain_validation = step(), validation()
    with attach(host, warmup_steps=10**6) as ssync:
        step(ssync)
        assert not ssync._session.capture.is_open
        host.training_step(batch, 0)
        assert not held(ssync)
    with attach(host, warmup_steps=3, guard_window=1) as ssync:
        step(ssync)  # the first step looks at the host once
        assert step(ssync) == plain
        assert validation() == plain_validation
        assert ssync.maps is None
        step(ssync)  # the guard counts the slots in use
        assert step(ssync).total() > plain.total()
        maps = ssync.maps
        assert validation() == plain_validation
        assert ssync.maps is maps
        assert not held(ssync)
    assert step() == plain


def page_cells(start, section=""):
    """Cells of the one row of benchmarks/README.md that starts so."""
    page = (BENCHMARKS / "README.md").read_text("utf-8")
    text = page.partition(section)[2].partition("\n## ")[0] if section else page
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_loader_and_its_table(load, tmp_path, capsys):
    words = ["--videos", "16", "--frames", "8", "--resolution", "16", "--image-size", "24", "--batch-size", "4"]
    words += ["--per-shard", "4", "--workers", "0", "--warmup", "1", "--seconds", "0.2", "--repeats", "1"]
    assert load("loader").main([*words, "--out", str(tmp_path)]) == 0
    assert "mmap + transform" in capsys.readouterr().out
    loaders = {"reference": "| `reference` |", "mmap": "| ours, `mmap` |", "webdataset": "| ours, `webdataset` |"}
    loaders["mmap + transform"] = "| ours, `mmap`, with"
    assert {row["loader"] for row in rows_of(tmp_path / "loader_cpu.csv")} == set(loaders)
    rows = rows_of(RESULTS / "loader_cpu.csv")
    for loader, start in loaders.items():
        for cell, workers in zip(page_cells(start), ("0", "2"), strict=False):
            rates = [float(row["clips_per_s"]) for row in rows if (row["loader"], row["workers"]) == (loader, workers)]
            assert cell == f"{statistics.median(rates):.0f} ({min(rates):.0f} – {max(rates):.0f})"


def test_the_page_prints_the_committed_results(load, capsys):
    rows = rows_of(RESULTS / "savi_synthetic.csv")
    for arm, start in (("with", "| with SSync |"), ("without", "| without |")):
        cells = page_cells(start, "## The SAVi example")
        for cell, key in zip(cells, ("video_fg_ari", "video_ari", "video_mbo"), strict=False):
            values = [float(row[key]) for row in rows if row["arm"] == arm]
            assert len(values) >= 3
            assert cell == f"{statistics.median(values):.3f} ({min(values):.3f} – {max(values):.3f})"
    assert load("tables").main(["--check"]) == 0, capsys.readouterr().out


def test_a_table_that_is_out_of_date_is_found_and_mended(load, tmp_path, monkeypatch, capsys):
    module = load("tables")
    (page,) = [path for path in module.PAGES if path.parent == ROOT]
    text = page.read_text("utf-8")
    (wanted,) = [line for line in text.splitlines() if line.startswith("| paired difference |")]
    rows = rows_of(RESULTS / "quality_main.csv")
    arms = [
        {int(row["seed"]): float(row["video_mbo"]) for row in rows if row["variant"] == variant}
        for variant in ("with", "without")
    ]
    assert len(arms[0]) >= 5
    # Worked out here once more: the mean of the differences, and 2.776 standard errors of five of them.
    found = [arms[0][seed] - arms[1][seed] for seed in arms[0]]
    mean, error = statistics.mean(found), statistics.stdev(found) / len(found) ** 0.5
    assert f"+{mean:.3f} ± {2.7764 * error:.3f}" in wanted

    copy = tmp_path / "README.md"
    copy.write_text(text.replace(wanted, wanted.replace("± 0.0", "± 0.1")), "utf-8")
    monkeypatch.setattr(module, "PAGES", (copy,))
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert module.main(["--check"]) == 1
    assert capsys.readouterr().out == "README.md: out of date\n"
    assert module.main([]) == 0
    assert copy.read_text("utf-8") == text


def test_seeds_of_another_configuration_are_refused(load, tmp_path):
    folder = tmp_path / "runs" / "with" / "seed_0"
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text('{"recipe": "another"}', encoding="utf-8")
    with pytest.raises(SystemExit, match="another configuration"):
        load("example_seeds").main(["--seeds", "1", "--runs", str(tmp_path / "runs"), "--processes", "1"])


@pytest.mark.slow
def test_both_arms_run_and_a_second_call_keeps_them(load, tmp_path, capsys):
    words = [
        "--seeds",
        "1",
        "--runs",
        str(tmp_path / "runs"),
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "r.csv"),
    ]
    words += ["--data.init_args.num_train=8", "--data.init_args.num_validation=2", "--trainer.max_epochs=2"]
    words += ["--trainer.check_val_every_n_epoch=1", "--trainer.accelerator=cpu"]
    module = load("example_seeds")
    module.main(words)
    first = capsys.readouterr().out
    assert "| with SSync" in first
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    assert len(times) == 2
    module.main(words)
    assert capsys.readouterr().out == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")} == times


def gpu_script(*words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", str(BENCHMARKS / "gpu.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env={**os.environ, "PATH": path})


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
class TestGpuScript:
    @pytest.mark.slow
    def test_every_part_runs_and_names_the_device_in_each_row(self, tmp_path):
        done = gpu_script("--device", "cpu", "--quick", "--out", str(tmp_path))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert "All parts finished" in done.stdout
        for name in ("cost_cpu.csv", "step_cpu.csv", "loader_cpu.csv"):
            assert all(row["device"] and row["torch"] == torch.__version__ for row in rows_of(tmp_path / name)), name

    @pytest.mark.parametrize("words", [("--device", "tpu"), ("--quik",)])
    def test_a_wrong_option_is_refused(self, words):
        done = gpu_script(*words)
        assert done.returncode == 2
        assert "Expected --device" in done.stderr

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_it_says_what_to_type(self):
        done = gpu_script("--quick")
        assert done.returncode == 2
        assert "--device cpu --quick" in done.stderr
