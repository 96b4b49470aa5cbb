"""What SSync adds to a training step of a host, beside the same step without it.

``python benchmarks/step.py`` trains the reference hosts on random features of the published sizes (SAVi on random
frames), without their frozen backbone, which would hide the overhead. It times one step of each kind in turns, in a new
random order each round:

* ``without``: the host alone, no hook on it;
* ``warm-up``: the plug-in is attached and SSync is off, as in the first part of a training;
* ``with``: SSync is on, at the published settings;
* ``auto``: SSync is on, with ``mode="auto"``, which measures gradients in the backward pass; without its look at the
  agreement of the maps, which those of random features do not reach (0.4 ms on one thread at the published sizes);
* ``dense``: in its place SRL's dense alignment of all frames of a clip (hosts that rebuild features of whole clips);
* ``validation`` and ``validation attached``: segmenting the batch, alone and with the plug-in attached and on.

All kinds share one model whose learning rate is 0, so that nothing else differs. Before each step a short clip is
run outside the clock; it takes the check that the plug-in makes once a training.

Two numbers are given. The *overhead* is the median over rounds of the paired difference to the step without, in % of
its median, with a 95 % interval by bootstrap over rounds: it holds everything, and the machine's noise as well. The
*own time* is what the plug-in takes by clocks inside the step: its hooks, collecting the maps, the losses, and (right
after the step, on the same maps) the backward pass of the losses down to the maps; it is a far sharper number.

Every step is a row of ``step_<device>.csv``; the overheads are drawn in ``step_<device>.png``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _step_report import draw, table
from _timing import device_facts, write_rows
from torch import Tensor, nn
from tqdm import tqdm

from ssync_pl import AttachedSSync, SSyncConfig, SSyncMaps, attach
from ssync_pl.hosts import SOLV, SAVi, SlotContrast, VideoSAUR
from ssync_pl.plugin.engine import SSyncEngine
from ssync_pl.rivals.dense_alignment import DenseAlignment

RESULTS = Path(__file__).resolve().parent / "results"
HOSTS = ("videosaur", "slotcontrast", "solv", "savi")
TRAINING = ("without", "warm-up", "with", "auto", "dense")
AUTO: dict[str, Any] = {"mode": "auto", "least_agreement": 0.0}
VALIDATION = ("validation", "validation attached")
# Of MOVi-C with ViT-S: the sizes at which the method was published.
SLOTS, GRID, FEATURES, HIDDEN = 11, (24, 24), 384, (1024, 1024, 1024)
PATCH = 14


def build_host(name: str, options: argparse.Namespace) -> nn.Module:
    """A reference host at the published sizes, or a tiny one with ``--quick``."""
    grid, slots, hidden = ((6, 6), 4, (32, 32)) if options.quick else (GRID, SLOTS, HIDDEN)
    if name == "savi":
        layers = {"encoder_channels": (8,) * 4, "decoder_channels": (8,) * 4, "decoder_broadcast": (2, 2)}
        return SAVi(num_slots=slots, **layers) if options.quick else SAVi(num_slots=slots)
    sizes: dict[str, Any] = {"num_slots": slots, "grid": grid, "decoder_hidden": hidden, "backbone": options.backbone}
    if options.backbone is None:
        sizes["feature_dim"] = 32 if options.quick else FEATURES
    else:
        sizes["backbone_weights"] = "none"
    if name == "solv":
        return SOLV(**sizes, slot_dim=32 if options.quick else 128, clip_length=_frames(name, options))
    sizes["slot_dim"] = 16 if options.quick else 64
    if name == "slotcontrast":
        return SlotContrast(**sizes)
    return VideoSAUR(**sizes, decoder="mlp", similarity_weight=0.0)


def build_batch(name: str, options: argparse.Namespace) -> dict[str, Tensor]:
    """Random input of the host's shape."""
    generator = torch.Generator().manual_seed(0)
    clips = (options.batch_size, _frames(name, options))
    if name == "savi":
        side = 16 if options.quick else 64
        return {"video": torch.rand(*clips, 3, side, side, generator=generator)}
    height, width = (6, 6) if options.quick else GRID
    if options.backbone is not None:
        return {"video": torch.rand(*clips, 3, height * PATCH, width * PATCH, generator=generator)}
    return {"features": torch.randn(*clips, height * width, 32 if options.quick else FEATURES, generator=generator)}


def _frames(name: str, options: argparse.Namespace) -> int:
    return options.frames | 1 if name == "solv" else options.frames  # SOLV's windows are odd


class Clock:
    """Sums up short spans of time inside a step, without waiting for the device there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spans: dict[str, list[tuple[Any, Any]]] = {}

    def wait(self) -> float:
        """The time, once the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the time inside to ``name``."""
        start = self._mark()
        yield
        self.spans.setdefault(name, []).append((start, self._mark()))

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time added to ``name``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.span(name):
                return function(*args, **kwargs)

        return timed

    def milliseconds(self) -> dict[str, float]:
        """Sums by name. Call it after `wait`."""
        cuda = self.device.type == "cuda"
        return {
            name: sum(start.elapsed_time(end) if cuda else 1e3 * (end - start) for start, end in spans)
            for name, spans in self.spans.items()
        }

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Bench:
    """One host, and each kind of step with it."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.device = torch.device(options.device)
        self.clock = Clock(self.device)
        self.host: Any = build_host(name, options).to(self.device)
        self.host.log = self.host.log_dict = lambda *args, **kwargs: None  # there is no Trainer
        self.batch = {key: value.to(self.device) for key, value in build_batch(name, options).items()}
        frames = _frames(name, options) if name == "solv" else 2
        self.clip = {key: value[:1, :frames] for key, value in self.batch.items()}
        self.optimizer = torch.optim.Adam(self.host.parameters(), lr=0.0)
        self.attached: dict[str, AttachedSSync] = {
            "warm-up": attach(self.host, warmup_steps=10**9),
            "with": attach(self.host, warmup_steps=0),
            "auto": attach(self.host, warmup_steps=0, **AUTO),
        }
        self.dense: Dense | None = None
        if name in ("videosaur", "slotcontrast"):
            self.dense = Dense(self.host, options.frames).to(self.device)
            self.dense_optimizer = torch.optim.Adam(self.dense.parameters(), lr=0.0)

    def kinds(self) -> list[str]:
        """What is timed with this host."""
        return [kind for kind in (*TRAINING, *VALIDATION) if kind != "dense" or self.dense is not None]

    def run(self, kind: str) -> dict[str, float]:
        """One step; milliseconds by name."""
        with self._prepared(kind) as add:
            self.host.train()
            loss = self.host.training_step(self.clip, 0)
            if kind == "dense":
                self.dense.seen.clear()  # it has nothing to check
            else:
                add(loss, self.clip)
            del loss
            self.clock.spans.clear()
            gc.collect()
            gc.disable()
            try:
                times = self._validate() if kind in VALIDATION else self._train(kind, add)
            finally:
                gc.enable()
            own = self.clock.milliseconds()
        if kind in self.attached:
            times["hooks_ms"], times["losses_ms"] = own.get("hooks", 0.0), own["losses"]
            times["losses_backward_ms"] = 0.0 if kind == "warm-up" else self._losses_backward(kind)
        return times

    def _train(self, kind: str, add: Callable[[Tensor, Any], Tensor]) -> dict[str, float]:
        start = self.clock.wait()
        loss = add(self.host.training_step(self.batch, 0), self.batch)
        forward = self.clock.wait()
        self.optimizer.zero_grad()
        loss.backward()
        backward = self.clock.wait()
        self.optimizer.step()
        if kind == "dense":
            self.dense_optimizer.step()
            self.dense_optimizer.zero_grad()
        end = self.clock.wait()
        return {
            "step_ms": 1e3 * (end - start),
            "forward_ms": 1e3 * (forward - start),
            "backward_ms": 1e3 * (backward - forward),
            "optimizer_ms": 1e3 * (end - backward),
        }

    def _validate(self) -> dict[str, float]:
        self.host.eval()
        with torch.no_grad():
            start = self.clock.wait()
            self.host.segment(self.batch)
            return {"step_ms": 1e3 * (self.clock.wait() - start)}

    @contextlib.contextmanager
    def _prepared(self, kind: str) -> Iterator[Callable[[Tensor, Any], Tensor]]:
        """Put on the host what the kind needs; yields what makes the loss of the step out of the host's own."""
        if kind == "dense":
            with self.dense.listening():
                yield lambda loss, batch: loss + self.dense()
        elif kind in ("without", "validation"):
            yield lambda loss, batch: loss
        else:
            ssync = self.attached["with" if kind == "validation attached" else kind]
            with ssync:
                if kind in self.attached:
                    time_hooks(self.host, self.clock)
                yield self.clock.around("losses", ssync.add)

    def _losses_backward(self, kind: str) -> float:
        """The backward pass of the losses down to the maps, with gradients that are there already, as in a step."""
        maps = self.attached[kind].maps
        leaves = {
            field.name: getattr(maps, field.name).requires_grad_()
            for field in dataclasses.fields(SSyncMaps)
            if field.name.endswith(("_logits", "_probs")) and getattr(maps, field.name) is not None
        }
        engine = SSyncEngine(SSyncConfig(**(AUTO if kind == "auto" else {}), warmup_steps=0))
        engine.start(math.inf)
        seconds = 0.0
        for _ in range(2):
            term, _verdict = engine.term(None, dataclasses.replace(maps, **leaves), 0)
            start = self.clock.wait()
            term.backward()
            seconds = self.clock.wait() - start
        return 1e3 * seconds


class Dense(nn.Module):
    """Dense alignment of a host of the VideoSAUR family, by hooks as SSync has them."""

    def __init__(self, host: nn.Module, frames: int) -> None:
        super().__init__()
        self.watched = (host, host.encoder)  # a tuple, so that they do not become modules of this one
        self.seen: list[Any] = []
        encoder = host.encoder.module
        self.losses = DenseAlignment(encoder.feature_dim, encoder.output_dim, group_frames=frames, start_step=0)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Keep what the encoder and the host return."""
        handles = [module.register_forward_hook(self._take) for module in self.watched]
        try:
            yield
        finally:
            self.seen.clear()
            for handle in handles:
                handle.remove()

    def _take(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.seen.append(output)

    def forward(self) -> Tensor:
        """The loss of the forward pass that has just run."""
        output, encoded = self.seen.pop(), self.seen.pop()
        rebuilt = output.reconstruction[..., : output.targets.shape[-1]]
        attention, masks = output.attention_logits.softmax(2), output.mask_logits.flatten(3).softmax(2)
        return self.losses(output.targets, rebuilt, encoded["features"], attention, masks, output.slots, step=0).loss


def time_hooks(host: nn.Module, clock: Clock) -> None:
    """Let every hook on the host be timed; they are gone when the plug-in leaves."""
    for module in host.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in hooks.items():
                hooks[key] = clock.around("hooks", hook)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all steps of all hosts."""
    order = random.Random(0)
    rows: list[dict[str, Any]] = []
    for name in options.hosts:
        bench = Bench(name, options)
        gc.freeze()  # what is there already would make each collection between steps slow
        kinds = bench.kinds()
        with tqdm(total=(options.rounds + 1) * len(kinds), desc=name, unit="step") as bar:
            for number in range(-1, options.rounds):  # the first round is not kept
                for kind in order.sample(kinds, len(kinds)):
                    times = bench.run(kind)
                    if number >= 0:
                        times = {key: round(value, 4) for key, value in times.items()}
                        rows.append({"host": name, "kind": kind, "round": number, **times})
                    bar.update()
    return rows


def main(words: list[str] | None = None) -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=list(HOSTS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--frames", type=int, default=4, help="frames of a clip; SOLV takes the next odd number")
    parser.add_argument("--backbone", help="a frozen backbone with patches of 14, random weights: vit_small_patch14_…")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny hosts: whether it runs, not what it costs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(words)
    if options.rounds < 2:
        parser.error("--rounds has to be at least 2 for an interval")
    if options.quick and options.backbone:
        parser.error("--quick takes no --backbone")
    torch.set_num_threads(options.threads)
    facts = {
        "batch_size": options.batch_size,
        "frames": options.frames,
        "backbone": options.backbone or "none",
        "threads": options.threads,
        **device_facts(options.device),
    }
    rows = measure(options)
    write_rows(options.out / f"step_{options.device}.csv", rows, facts)
    print(table(rows))
    draw(rows, options.out / f"step_{options.device}.png", facts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
