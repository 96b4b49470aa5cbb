"""Clips a second of our loader beside a straightforward webdataset pipeline, and memory a worker.

``python benchmarks/loader.py`` writes MOVi-like shards (24 frames of 128 × 128 by default) to a scratch folder and
reads them in turns with

* ``reference``: webdataset, one random 4-frame chunk a video, shuffle buffer, and the field's CPU transforms in the
  workers: float32, bicubic to 336 × 336, clamp, flip, normalise;
* ``mmap`` and ``webdataset``: our data module with either backend; workers send uint8 clips;
* ``mmap + transform``: the same batches after the transform, here on the CPU in the main process. On CUDA this part
  runs on the device.

The first three rows say what worker processes cost; the last says what a machine without a GPU gets. Results go to
``benchmarks/results/loader_<device>.csv``. With CUDA, ``--device cuda`` also times batches to the device with and
without the side stream (``benchmarks/results/loader_to_device.csv``).
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import webdataset as wds
from torch.utils.data import DataLoader
from tqdm import tqdm

from ssync_pl.data import ShardDataModule, ShardWriter
from ssync_pl.data.decode import decode_member
from ssync_pl.data.loader import copied_ahead

RESULTS = Path(__file__).resolve().parent / "results"
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1)
CLIP = 4


def write_set(folder: Path, videos: int, frames: int, resolution: int, per_shard: int) -> str:
    """Write videos of drifting noise; an uncompressed array reads equally fast whatever it shows."""
    generator = np.random.default_rng(0)
    with ShardWriter(folder, "train", per_shard) as writer:
        for number in tqdm(range(videos), desc="writing shards", unit="video"):
            still = generator.integers(0, 256, (resolution, resolution, 3), np.uint8)
            writer.write(str(number), {"video.npy": np.stack([np.roll(still, t, 1) for t in range(frames)])})
    return str(folder / "train-*.tar")


def reference_loader(pattern: str, options: argparse.Namespace, workers: int) -> DataLoader[Any]:
    """Build the straightforward pipeline, endless."""
    shards = sorted(str(path) for path in Path(pattern).parent.glob(Path(pattern).name))
    dataset = wds.WebDataset(shards, shardshuffle=len(shards), workersplitter=wds.split_by_worker, empty_check=False)
    dataset = dataset.map(_decode).compose(_chunks).shuffle(options.shuffle_buffer)
    dataset = dataset.map(_ReferenceTransform(options.image_size)).repeat()
    return DataLoader(dataset, batch_size=options.batch_size, num_workers=workers)


def _decode(sample: dict[str, Any]) -> dict[str, Any]:
    return {"__key__": sample["__key__"], "video": decode_member("video.npy", sample["video.npy"])}


def _chunks(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for sample in samples:
        start = np.random.randint(len(sample["video"]) // CLIP) * CLIP  # noqa: NPY002 (unseeded, as in the field)
        yield {**sample, "video": sample["video"][start : start + CLIP]}


class _ReferenceTransform:
    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        clip = torch.from_numpy(sample["video"]).float().permute(3, 0, 1, 2) / 255.0
        clip = F.interpolate(clip, size=(self.size, self.size), mode="bicubic").clamp(0.0, 1.0)
        clip = (clip - MEAN) / STD
        if torch.rand(()) < 0.5:
            clip = clip.flip(-1)
        return {**sample, "video": clip.permute(1, 0, 2, 3)}


def our_module(pattern: str, options: argparse.Namespace, workers: int, backend: str) -> ShardDataModule:
    """Build our data module with the same settings."""
    data = ShardDataModule(
        pattern,
        batch_size=options.batch_size,
        clip_length=CLIP,
        image_size=options.image_size,
        num_workers=workers,
        backend=backend,
        shuffle_buffer=options.shuffle_buffer,
    )
    data.setup("fit")
    return data


def endless(loader: Any) -> Iterator[Any]:
    """Iterate over pass after pass."""
    while True:
        yield from loader


def sources(pattern: str, options: argparse.Namespace, workers: int) -> dict[str, Callable[[], Iterator[Any]]]:
    """Name what is compared."""

    def ours(backend: str, transform: bool) -> Iterator[Any]:
        data = our_module(pattern, options, workers, backend)
        for batch in endless(data.train_dataloader()):
            yield data.on_after_batch_transfer(batch, 0) if transform else batch

    return {
        "reference": lambda: iter(reference_loader(pattern, options, workers)),
        "mmap": lambda: ours("mmap", False),
        "webdataset": lambda: ours("webdataset", False),
        "mmap + transform": lambda: ours("mmap", True),
    }


def measure(batches: Iterator[Any], options: argparse.Namespace) -> tuple[float, float]:
    """Return clips a second after a warm-up, and the largest anonymous memory of a worker in MiB."""
    for _ in range(options.warmup):
        next(batches)
    memory, count, started = 0.0, 0, time.perf_counter()
    while time.perf_counter() - started < options.seconds:
        next(batches)
        count += 1
    rate = count * options.batch_size / (time.perf_counter() - started)
    for process in _children():
        memory = max(memory, _anonymous_mib(process))
    return rate, memory


def _children() -> list[str]:
    task = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return task.read_text().split() if task.exists() else []


def _anonymous_mib(process: str) -> float:
    # Memory of its own: mapped shards are the page cache's and are shared by all.
    rollup = Path(f"/proc/{process}/smaps_rollup")
    for line in rollup.read_text().splitlines() if rollup.exists() else ():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) / 1024
    return 0.0


def to_device(pattern: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time batches that are copied to CUDA, transformed and used there, with and without the side stream."""
    device = torch.device("cuda")
    weight = torch.randn(options.work, options.work, device=device)
    rows = []
    for repeat in range(options.repeats):
        for mode in ("plain", "side stream"):
            data = our_module(pattern, options, 4, "mmap")
            batches = endless(data.train_dataloader())
            if mode == "side stream":
                batches = copied_ahead(batches, device)
            for step in range(options.warmup + 200):
                if step == options.warmup:
                    torch.cuda.synchronize()
                    started = time.perf_counter()
                batch = next(batches)
                moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
                data.on_after_batch_transfer(moved, 0)
                for _ in range(8):
                    weight = torch.tanh(weight @ weight)
            torch.cuda.synchronize()
            rows.append(
                {"mode": mode, "repeat": repeat, "batches_per_s": round(200 / (time.perf_counter() - started), 2)}
            )
    return rows


def save(rows: list[dict[str, Any]], path: Path, facts: dict[str, Any]) -> None:
    """Write rows with the facts of the machine behind each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts])
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)


def report(rows: list[dict[str, Any]]) -> None:
    """Print medians with their range, and ratios to the reference within each repeat."""
    print(f"{'workers':>7}  {'loader':<17} {'clips/s':>9}  {'range':<19} {'x reference':>11} {'MiB a worker':>13}")
    for workers in sorted({row["workers"] for row in rows}):
        mine = [row for row in rows if row["workers"] == workers]
        base = {row["repeat"]: row["clips_per_s"] for row in mine if row["loader"] == "reference"}
        for name in dict.fromkeys(row["loader"] for row in mine):
            part = [row for row in mine if row["loader"] == name]
            rates = [row["clips_per_s"] for row in part]
            ratio = statistics.median(row["clips_per_s"] / base[row["repeat"]] for row in part)
            memory = max(row["worker_mib"] for row in part)
            span = f"({min(rates):.0f} – {max(rates):.0f})"
            print(
                f"{workers:>7}  {name:<17} {statistics.median(rates):>9.0f}  {span:<19} {ratio:>11.1f} {memory:>13.0f}"
            )


def main(words: list[str] | None = None) -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=256)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--per-shard", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=336)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--shuffle-buffer", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=8, help="batches before the clock starts")
    parser.add_argument("--seconds", type=float, default=8.0, help="time of each measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--work", type=int, default=2048, help="side of the matrices that keep CUDA busy a step")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(words)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU {platform.machine()}"
    facts = {
        "frames": options.frames,
        "resolution": options.resolution,
        "image_size": options.image_size,
        "batch_size": options.batch_size,
        "device": name,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "webdataset": wds.__version__,
        "date": date.today().isoformat(),
    }
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="ssync-loader-") as folder:
        pattern = write_set(Path(folder), options.videos, options.frames, options.resolution, options.per_shard)
        jobs = [(repeat, workers) for repeat in range(options.repeats) for workers in options.workers]
        with tqdm(total=4 * len(jobs), desc="measuring", unit="run") as bar:
            for repeat, workers in jobs:
                for loader, start in sources(pattern, options, workers).items():
                    batches = start()
                    rate, memory = measure(batches, options)
                    del batches  # ends its workers before the next starts
                    row = {"loader": loader, "workers": workers, "repeat": repeat}
                    rows.append({**row, "clips_per_s": round(rate, 1), "worker_mib": round(memory, 1)})
                    bar.update()
        save(rows, options.out / f"loader_{options.device}.csv", facts)
        report(rows)
        if options.device == "cuda":
            moved = to_device(pattern, options)
            save(moved, options.out / "loader_to_device.csv", facts)
            for mode in ("plain", "side stream"):
                rates = [row["batches_per_s"] for row in moved if row["mode"] == mode]
                print(f"to the device, {mode}: {statistics.median(rates):.1f} batches/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
