"""Peak memory and time of a training step with the hosts' ``memory_efficient`` layout and with the plain one.

``python benchmarks/memory.py`` runs forward and backward of

* ``decoder``: the MLP decoder alone at the sizes of MOVi-C (4 frames a clip, 11 slots, 24 × 24 patches, slots of 64,
  three hidden layers of 1024, features of 384);
* ``slotcontrast``: a training step of that host on random cached features of the same sizes;
* ``solv``: the same of SOLV (windows of 5 frames, 8 slots, four hidden layers).

On CPU the peak is that of PyTorch's allocator, from the events of its profiler: bytes that the step holds at a time
beside weights and input. It is measured for each of ``--batches``, and grows by the same amount with each clip, from
which the largest batch that fits in a memory follows. On CUDA that batch is tried out: the process is given that much
memory, and batches grow until one runs out of it.

Times are of both layouts in turns, and of ``--timed`` subjects only. Results: ``memory_<device>.csv`` (a row for each
subject, layout and batch), ``memory_batches_<device>.csv`` (largest batches) and ``memory_<device>.png``.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _timing import device_facts, interleaved, spread, write_rows
from torch import Tensor, nn
from tqdm import tqdm

from ssync_pl.hosts import SOLV, SlotContrast
from ssync_pl.hosts.nn.decoders import MLPDecoder

RESULTS = Path(__file__).resolve().parent / "results"
SUBJECTS = ("decoder", "slotcontrast", "solv")
LAYOUTS = {"plain": False, "memory_efficient": True}
GIB = 1 << 30


class Sizes(NamedTuple):
    """What is trained."""

    frames: int = 4
    slots: int = 11
    grid: tuple[int, int] = (24, 24)
    slot_dim: int = 64
    hidden: int = 1024
    features: int = 384


QUICK = Sizes(frames=2, slots=3, grid=(4, 4), slot_dim=16, hidden=32, features=24)


def build(subject: str, memory_efficient: bool, sizes: Sizes) -> nn.Module:
    """A decoder or host at these sizes."""
    torch.manual_seed(0)
    patches = sizes.grid[0] * sizes.grid[1]
    hidden = (sizes.hidden,) * (4 if subject == "solv" else 3)
    if subject == "decoder":
        return MLPDecoder(sizes.slot_dim, sizes.features, hidden, patches, memory_efficient)
    options: dict[str, Any] = {
        "slot_dim": sizes.slot_dim,
        "backbone": None,
        "feature_dim": sizes.features,
        "grid": sizes.grid,
        "decoder_hidden": hidden,
        "memory_efficient": memory_efficient,
    }
    if subject == "solv":
        host: nn.Module = SOLV(min(8, sizes.slots), clip_length=5, **options)
    else:
        host = SlotContrast(num_slots=sizes.slots, **options)
    host.log = host.log_dict = lambda *args, **kwargs: None  # type: ignore[assignment]
    return host


def step_of(subject: str, model: nn.Module, batch: int, sizes: Sizes, device: torch.device) -> Callable[[], None]:
    """Forward and backward on one random batch, whose gradients are thrown away before the next."""
    generator = torch.Generator().manual_seed(1)
    patches = sizes.grid[0] * sizes.grid[1]
    frames = 5 if subject == "solv" else sizes.frames
    features = torch.randn(batch, frames, patches, sizes.features, generator=generator).to(device)
    slots = torch.randn(batch * frames, sizes.slots, sizes.slot_dim, generator=generator).to(device).requires_grad_()

    def loss() -> Tensor:
        if subject != "decoder":
            return model.training_step({"features": features}, 0)  # type: ignore[operator, no-any-return]
        decoded = model(slots)
        error = (decoded["reconstruction"] - features.flatten(0, 1)).square().mean()
        return error + decoded["masks"].square().mean()  # SSync trains the masks too

    def step() -> None:
        model.zero_grad(set_to_none=True)
        slots.grad = None
        loss().backward()

    return step


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Most bytes that a step holds at a time beside what was there before."""
    step()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def measure(subject: str, options: argparse.Namespace, tick: Callable[[], Any]) -> list[dict[str, Any]]:
    """Peak and times of both layouts for each batch size."""
    device = torch.device(options.device)
    sizes = QUICK if options.quick else Sizes()
    models = {layout: build(subject, value, sizes).to(device) for layout, value in LAYOUTS.items()}
    rows = []
    for batch in options.batches:
        steps = {layout: step_of(subject, model, batch, sizes, device) for layout, model in models.items()}
        peaks = {}
        for layout, step in steps.items():
            peaks[layout] = peak_bytes(step, device)
            models[layout].zero_grad(set_to_none=True)
            tick()
        times = interleaved(steps, options.rounds, tick=tick, device=device) if subject in options.timed else {}
        for layout in steps:
            row: dict[str, Any] = {"subject": subject, "layout": layout, "batch": batch}
            row |= {"peak_mib": round(peaks[layout] / 2**20, 2)}
            row |= spread(times[layout]) if times else {}
            rows.append(row)
    return rows


def fitted_batch(rows: list[dict[str, Any]], gib: float) -> int:
    """Largest batch for which a line through the smallest and the largest measured one stays below a memory."""
    first, last = rows[0], rows[-1]
    clip = (last["peak_mib"] - first["peak_mib"]) / (last["batch"] - first["batch"])
    rest = first["peak_mib"] - first["batch"] * clip
    return max(0, int((1024 * gib - rest) // clip))


def tried_batch(subject: str, layout: str, gib: float, options: argparse.Namespace) -> int:
    """Largest batch with which a step runs on a CUDA device that lends this much memory."""
    device, sizes = torch.device(options.device), QUICK if options.quick else Sizes()
    whole = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / whole), device)
    model = build(subject, LAYOUTS[layout], sizes).to(device)

    def fits(batch: int) -> bool:
        try:
            step_of(subject, model, batch, sizes, device)()
            torch.cuda.synchronize(device)
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            model.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
        return True

    good, bad = 0, 1
    while fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    return good


def largest(rows: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Largest batches for each subject, layout and memory."""
    found = []
    for subject in options.subjects:
        for layout in LAYOUTS:
            own = [row for row in rows if (row["subject"], row["layout"]) == (subject, layout)]
            for gib in options.memory:
                row: dict[str, Any] = {"subject": subject, "layout": layout, "memory_gib": gib}
                if options.device == "cpu":
                    found.append({**row, "largest_batch": fitted_batch(own, gib), "from": "line"})
                else:
                    found.append({**row, "largest_batch": tried_batch(subject, layout, gib, options), "from": "tried"})
    return found


def table(rows: list[dict[str, Any]], batches: list[dict[str, Any]]) -> str:
    """What was found, one line for each subject and batch, and for each memory."""
    lines = [
        "| step | batch | peak, plain | peak, memory efficient | share | times faster |",
        "|---|---|---|---|---|---|",
    ]
    for plain, other in _pairs(rows):
        faster = f"{plain['median_ms'] / other['median_ms']:.2f}" if "median_ms" in plain else ""
        share = other["peak_mib"] / plain["peak_mib"]
        lines.append(
            f"| {plain['subject']} | {plain['batch']} | {plain['peak_mib']:.0f} MiB | {other['peak_mib']:.0f} MiB | "
            f"{share:.2f} | {faster} |"
        )
    lines += ["", "| step | memory | largest batch, plain | memory efficient |", "|---|---|---|---|"]
    for plain, other in _pairs(batches):
        sizes = f"{plain['largest_batch']} | {other['largest_batch']}"
        lines.append(f"| {plain['subject']} | {plain['memory_gib']:g} GiB | {sizes} |")
    return "\n".join(lines)


def _pairs(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return list(
        zip(
            [row for row in rows if row["layout"] == "plain"],
            [row for row in rows if row["layout"] == "memory_efficient"],
            strict=True,
        )
    )


def draw(rows: list[dict[str, Any]], batches: list[dict[str, Any]], path: Path, facts: dict[str, Any]) -> None:
    """Peaks at the largest measured batch, and largest batches over memory."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    colors = {"plain": "tab:gray", "memory_efficient": "tab:blue"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
    batch = max(row["batch"] for row in rows)
    shown = [(plain, other) for plain, other in _pairs(rows) if plain["batch"] == batch]
    for offset, layout in ((-0.2, "plain"), (0.2, "memory_efficient")):
        values = [pair[layout != "plain"]["peak_mib"] for pair in shown]
        places = [index + offset for index in range(len(shown))]
        bars = left.bar(places, values, width=0.38, color=colors[layout], label=layout.replace("_", " "))
        left.bar_label(bars, fmt="%.0f")
    left.set_xticks(range(len(shown)), [plain["subject"] for plain, _ in shown])
    left.set_ylabel("peak of forward and backward [MiB]")
    left.set_title(f"batch of {batch}")
    left.margins(y=0.25)
    left.legend(frameon=False, loc="upper right", ncols=2)
    for subject, style in zip(dict.fromkeys(row["subject"] for row in batches), ("-", "--", ":"), strict=False):
        for layout, color in colors.items():
            own = [row for row in batches if (row["subject"], row["layout"]) == (subject, layout)]
            label = f"{subject}, {layout.replace('_', ' ')}"
            x, y = [row["memory_gib"] for row in own], [row["largest_batch"] for row in own]
            right.plot(x, y, style, color=color, marker="o", markersize=3, label=label)
    right.set_xscale("log", base=2)
    right.set_yscale("log", base=2)
    ticks = sorted({row["memory_gib"] for row in batches})
    right.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    right.minorticks_off()
    right.set_xlabel("memory [GiB]")
    right.set_ylabel("largest batch [clips]")
    tried = all(row["from"] == "tried" for row in batches)
    right.set_title("tried out" if tried else "extrapolated from the batches measured")
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"{facts['device']}, torch {facts['torch']}, {facts['date']}", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=SUBJECTS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2], help="measured batches, in clips")
    parser.add_argument("--memory", nargs="+", type=float, default=[8, 16, 24, 40, 80], help="memories in GiB")
    parser.add_argument("--timed", nargs="*", default=["decoder"], choices=SUBJECTS, help="subjects to time as well")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each layout")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(words)
    options.batches = sorted(set(options.batches))
    if options.device == "cpu" and len(options.batches) < 2:
        parser.error("Expected two sizes or more for --batches, since the largest batch follows from their difference.")
    torch.set_num_threads(options.threads)
    rounds = {subject: options.rounds * (subject in options.timed) for subject in options.subjects}
    total = sum(len(options.batches) * (len(LAYOUTS) + rounds[subject]) for subject in options.subjects)
    with tqdm(total=total, desc="memory", unit="step") as progress:
        rows = [row for subject in options.subjects for row in measure(subject, options, progress.update)]
    batches = largest(rows, options)
    facts = {**device_facts(options.device), "threads": options.threads}
    name = options.device.split(":")[0]
    write_rows(options.out / f"memory_{name}.csv", rows, facts)
    write_rows(options.out / f"memory_batches_{name}.csv", batches, facts)
    draw(rows, batches, options.out / f"memory_{name}.png", facts)
    print(table(rows, batches))


if __name__ == "__main__":
    main()
