"""The step benchmark runs, its numbers are right, and the plug-in does nothing at all while it is off."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssync_pl import attach
from ssync_pl.hosts import SOLV, SAVi, VideoSAUR

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _load_report():
    spec = importlib.util.spec_from_file_location("_step_report", BENCHMARKS / "_step_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_times_every_kind_of_step_and_draws_it(tmp_path):
    pytest.importorskip("matplotlib")
    words = ["--quick", "--rounds", "2", "--threads", "1", "--hosts", "videosaur", "solv", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "step.py"), *words], capture_output=True, text=True, timeout=300, check=True
    )
    with open(tmp_path / "step_cpu.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = ["without", "warm-up", "with", "dense", "validation", "validation attached"]
    expected = Counter({("videosaur", kind): 2 for kind in kinds})
    expected.update({("solv", kind): 2 for kind in kinds if kind != "dense"})
    assert Counter((row["host"], row["kind"]) for row in rows) == expected
    assert all(row["device"] and row["torch"] == torch.__version__ and row["date"] for row in rows)
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
    assert "videosaur    with" in done.stdout
    assert (tmp_path / "step_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_an_overhead_is_paired_and_its_interval_holds_it():
    report = _load_report()
    base = [100.0, 300.0, 200.0, 150.0, 250.0]  # a machine whose speed drifts, which pairs take out
    exact = report.overhead([value + 4.0 for value in base], base)
    assert exact.percent == pytest.approx(2.0)
    assert exact.low + 1e-9 >= 4 / 3
    assert exact.high <= 4.0 + 1e-9
    noisy = report.overhead([104.0, 306.0, 199.0, 155.0, 253.0], base)
    assert noisy.percent == pytest.approx(2.0)
    assert noisy.low < 2.0 < noisy.high


def test_own_time_is_a_share_of_the_step_without():
    report = _load_report()
    own = {"hooks_ms": 0.5, "losses_ms": 1.0, "losses_backward_ms": 0.5}
    rows = [{"host": "h", "kind": "without", "round": i, "step_ms": 200.0} for i in range(3)]
    rows += [{"host": "h", "kind": "with", "round": i, "step_ms": 999.0, **own} for i in range(3)]
    assert report.own_share(rows, "h", "with") == pytest.approx((1.0, 1.0, 1.0))


class _Operations(TorchDispatchMode):
    """Counts what PyTorch is asked to do."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


def _videosaur():
    sizes = {"backbone": None, "feature_dim": 8, "grid": (3, 3), "decoder_hidden": (16,), "similarity_weight": 0.0}
    return VideoSAUR(3, slot_dim=8, decoder="mlp", **sizes), {"features": torch.randn(1, 2, 9, 8)}


def _solv():
    sizes = {"feature_dim": 8, "grid": (3, 3), "decoder_hidden": (16,), "temporal_heads": 2, "edge_probability": 0.0}
    return SOLV(3, slot_dim=8, backbone=None, clip_length=3, **sizes), {"features": torch.randn(1, 3, 9, 8)}


def _savi():
    layers = {"encoder_channels": (8,), "encoder_strides": (2,), "decoder_channels": (8,), "decoder_strides": (2,)}
    return SAVi(2, slot_dim=8, decoder_broadcast=(4, 4), **layers), {"video": torch.rand(1, 2, 3, 16, 16)}


def _step(host, batch, ssync=None):
    torch.manual_seed(0)
    with _Operations() as operations:
        loss = host.training_step(batch, 0)
        loss = loss if ssync is None else ssync.add(loss, batch)
        loss.backward()
    host.zero_grad()
    return operations.counts


def _validation(host, batch):
    torch.manual_seed(0)
    host.eval()
    with torch.no_grad(), _Operations() as operations:
        host.segment(batch)
    host.train()
    return operations.counts


@pytest.mark.parametrize("build", [_videosaur, _solv, _savi])
def test_no_operation_is_added_while_ssync_is_off(build):
    host, batch = build()
    host.log = host.log_dict = lambda *args, **kwargs: None
    host.train()
    _step(host, batch)  # a host may look at itself once as well
    plain, plain_validation = _step(host, batch), _validation(host, batch)
    with attach(host, warmup_steps=3, guard_window=1) as ssync:
        _step(host, batch, ssync)  # the first step looks at the host once
        assert _step(host, batch, ssync) == plain
        assert _validation(host, batch) == plain_validation
        assert ssync.maps is None
        _step(host, batch, ssync)  # the guard counts the slots in use
        assert _step(host, batch, ssync).total() > plain.total()
        held = ssync.maps
        assert _validation(host, batch) == plain_validation
        assert ssync.maps is held
    assert _step(host, batch) == plain


@pytest.mark.parametrize("build", [_videosaur, _solv, _savi])
def test_nothing_is_kept_of_validation_and_warm_up(build):
    host, batch = build()
    host.log = host.log_dict = lambda *args, **kwargs: None
    host.train()
    with attach(host, warmup_steps=10**6) as ssync:
        _step(host, batch, ssync)
        capture = ssync._session.capture
        assert not capture.is_open
        host.training_step(batch, 0)
        assert not any(capture._records.values())
    with attach(host, warmup_steps=0) as ssync:
        _validation(host, batch)
        assert not any(capture._records.values())
        _step(host, batch, ssync)
        assert not any(capture._records.values())
