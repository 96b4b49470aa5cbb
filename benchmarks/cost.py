"""What the block costs: labels, merging, regions, both losses and their gradients, forward and backward.

``python benchmarks/cost.py`` times, in turns and on the same maps,

* ``torch``, ``triton``: the backends of `ssync_loss` (``triton`` on CUDA);
* ``loop``: the method frame by frame in Python; ``vectorised``: the method in batched PyTorch without statistics,
  options and checks. Both are written for this benchmark (``_baselines.py``);
* ``copy`` (CUDA only): no method but the device's own pace, a copy that moves 28 bytes for each slot of a patch, what
  the two passes over both maps, the third over one and both gradients come to in float32;
* ``dense``: dense alignment, both consistency losses on features projected to 64 numbers, with nearest patches by
  frozen features of 384, as published for MOVi-C; all frames in one group at the rival shape and in sweeps, groups of 4
  frames at the main shapes, as published.

Sweeps vary one of B, T, N and S; the exponent of time is fitted over each. Memory is the largest sum that PyTorch's
allocator held beside the maps, operators are those called from Python or autograd, kernels and waits for the device are
counted on CUDA; all by the profiler, in a call of its own. On CUDA ``graph_ms`` is what the device itself needs: the
mean of many replays of a CUDA graph, where one can hold the method. Results: ``benchmarks/results/cost_<device>.csv``,
a figure beside it, tables on the terminal.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _baselines import loop_block, vectorised_block
from _cost_report import draw, fitted, tables
from _counting import count_call
from _timing import device_facts, graph_seconds, interleaved, spread, write_rows
from tqdm import tqdm

from ssync_pl import SSyncMaps
from ssync_pl.method import ssync_loss
from ssync_pl.rivals.dense_alignment import decoder_consistency, encoder_consistency

RESULTS = Path(__file__).resolve().parent / "results"
PROJECTED, FROZEN = 64, 384
BACKENDS = ("torch", "triton")
GRAPHS = (*BACKENDS, "vectorised", "copy")


class Shape(NamedTuple):
    """Of a pair of maps; a frame has ``side * side`` patches."""

    videos: int
    frames: int
    slots: int
    side: int


class Job(NamedTuple):
    """Methods that are timed together on maps of one shape."""

    table: str
    shape: Shape
    methods: tuple[str, ...]
    group_frames: int


MAIN = (Shape(4, 4, 11, 24), Shape(2, 4, 7, 37), Shape(64, 4, 11, 24))
RIVAL = Shape(1, 8, 11, 24)
BASE = Shape(4, 4, 11, 24)
SWEEPS = {
    "videos": (1, 2, 4, 8, 16, 32, 64),
    "frames": (2, 4, 8, 16, 32, 64, 128, 256),
    "side": (8, 12, 16, 24, 32, 48, 64),
    "slots": (2, 4, 8, 16, 32),
}
# The dense losses hold several matrices of (T * N)^2 numbers, of 100 MB each at 5 000 patches.
MOST_DENSE_PATCHES = 5000
MOST_TRACED_FRAMES = 64


def jobs(quick: bool, cuda: bool) -> list[Job]:
    """List what is run.

    Args:
        quick: Tiny shapes, to see that everything runs.
        cuda: Add the Triton kernels.

    Returns:
        Main shapes, rival shape, sweeps.
    """
    ours = BACKENDS if cuda else BACKENDS[:1]
    if quick:
        small = Shape(1, 2, 3, 4)
        sweep = [Job("frames", small._replace(frames=t), (*ours, "vectorised", "dense"), t) for t in (2, 4, 8)]
        return [
            Job("main", small, (*ours, "vectorised", "loop", "dense"), 2),
            Job("rival", small, (*ours, "dense"), 2),
            *sweep,
        ]
    listed = []
    for shape in MAIN:
        # Of a large batch the dense losses would take minutes and gigabytes a call on a CPU.
        others = ("vectorised", "loop", "dense") if shape.videos < 64 else ("vectorised", "loop")
        others = (*others, "copy") if cuda else others
        listed.append(Job("main", shape, (*ours, *others), 4))
    listed.append(Job("rival", RIVAL, (*ours, "vectorised", "dense"), RIVAL.frames))
    for name, sizes in SWEEPS.items():
        for size in sizes:
            shape = BASE._replace(**{name: size})
            if name in ("frames", "side"):
                shape = shape._replace(videos=1)
            methods: tuple[str, ...] = (*ours, "vectorised")
            if shape.frames * shape.side**2 <= MOST_DENSE_PATCHES and name in ("frames", "side"):
                methods += ("dense",)
            listed.append(Job(name, shape, methods, shape.frames))
    return listed


def clip(shape: Shape, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw two maps of drifting blobs with noise, as slots give them."""
    generator = torch.Generator().manual_seed(0)
    side = shape.side
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    centre = torch.rand(shape.videos, 1, shape.slots, 1, 2, generator=generator) * side
    pair = []
    for _ in range(2):
        drift = torch.randn(shape.videos, shape.frames, shape.slots, 1, 2, generator=generator)
        value = 3 - (place - centre - drift).abs().sum(-1) * 12 / side
        value += 0.3 * torch.randn(value.shape, generator=generator)
        pair.append(value.to(device).requires_grad_())
    return pair[0], pair[1]


def call_of(method: str, job: Job, device: str) -> Callable[[], Any]:
    """Build one forward and backward pass of a method.

    Args:
        method: Its name.
        job: Of the shape.
        device: Where the maps lie.

    Returns:
        A function without arguments.
    """
    shape = job.shape
    maps = clip(shape, device)
    grid = (shape.side, shape.side)
    if method in BACKENDS:

        def loss() -> torch.Tensor:
            return ssync_loss(SSyncMaps(*maps, grid=grid), backend=method).loss  # type: ignore[arg-type]
    elif method == "dense":
        return _dense(maps, job, device)
    elif method == "copy":
        source = torch.rand(28 * maps[0].numel() // 8, device=device)  # each number is read and written
        target = torch.empty_like(source)
        return lambda: target.copy_(source)
    else:
        block = loop_block if method == "loop" else vectorised_block

        def loss() -> torch.Tensor:
            return block(*maps, grid)

    return lambda: torch.autograd.grad(loss(), maps)


def _dense(maps: tuple[torch.Tensor, ...], job: Job, device: str) -> Callable[[], Any]:
    shape = job.shape
    patches = (shape.videos, shape.frames, shape.side**2)
    rebuilt, encoded = (torch.randn(*patches, PROJECTED, device=device, requires_grad=True) for _ in range(2))
    anchor = torch.randn(*patches, PROJECTED, device=device)
    frozen = torch.randn(*patches, FROZEN, device=device)
    neighbours = min(8, shape.side**2)

    def call() -> Any:
        encoder, decoder = (x.detach().max(2).indices for x in maps)
        loss = decoder_consistency(rebuilt, anchor, encoder, group_frames=job.group_frames)
        loss = loss + encoder_consistency(
            encoded, frozen, decoder, group_frames=job.group_frames, neighbours=neighbours
        )
        return torch.autograd.grad(loss, (rebuilt, encoded))

    return call


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all jobs; one row a method and shape."""
    rows = []
    listed = jobs(options.quick, options.device == "cuda")
    if options.tables:
        listed = [job for job in listed if job.table in options.tables]
    with tqdm(total=len(listed) * options.rounds, unit="round") as bar:
        for job in listed:
            shape = job.shape
            bar.set_description(f"{job.table} B{shape.videos} T{shape.frames} S{shape.slots} {shape.side}²")
            calls = {method: call_of(method, job, options.device) for method in job.methods}
            times = interleaved(calls, options.rounds, options.seconds, bar.update, options.device)
            for method, call in calls.items():
                size = {"videos": shape.videos, "frames": shape.frames, "slots": shape.slots, "side": shape.side}
                # A trace of half a million operators takes a minute to write.
                heavy = method == "loop" and shape.videos * shape.frames > MOST_TRACED_FRAMES
                counts: dict[str, Any] = {} if heavy else dict(count_call(call, options.device))
                if options.device == "cuda" and method in GRAPHS:
                    seconds = graph_seconds(call)
                    counts["graph_ms"] = "" if seconds is None else round(1e3 * seconds, 4)
                rows.append({"table": job.table, "method": method, **size, **spread(times[method]), **counts})
    return rows


def main(words: list[str] | None = None) -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch on the CPU")
    parser.add_argument("--rounds", type=int, default=100, help="calls of each method at each shape")
    parser.add_argument("--seconds", type=float, default=10.0, help="a method that took as long at a shape is left out")
    parser.add_argument("--tables", nargs="+", choices=["main", "rival", *SWEEPS], help="only these; all by default")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(words)
    if options.quick:
        options.rounds = min(options.rounds, 5)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = run(options)
    facts = {**device_facts(options.device), "threads": options.threads}
    name = "cpu" if options.device == "cpu" else facts["device"].lower().replace(" ", "_")
    write_rows(options.out / f"cost_{name}.csv", rows, facts)
    draw(
        rows, options.out / f"cost_{name}.png", f"{facts['device']}, torch {facts['torch']}, {options.threads} threads"
    )
    print(tables(rows))
    print(fitted(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
