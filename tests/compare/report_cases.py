"""Folders of comparisons with made-up numbers and flat pictures."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ssync_pl.metrics.table import METRICS

ODD = "a<b>&\"c'|_x$y$ é"
LEVELS = {"video_fg_ari": 0.72, "video_ari": 0.26, "video_mbo": 0.5, "slots_per_object": 1.4, "used_slots": 6.8}


@dataclass(frozen=True)
class Case:
    """What the made-up comparison has; `effect` is what a variant adds to the scores of the first one."""

    variants: Sequence[str] = ("without", "with", "published")
    seeds: Sequence[int] = (0, 1, 2)
    slots: Sequence[int] = (7,)
    sets: Sequence[str] = ("default",)
    effect: Mapping[str, float] = field(default_factory=lambda: {"with": 0.05})
    absent: Sequence[tuple[str, int]] = ()
    nan: Sequence[str] = ("identity",)


def make_folder(out: Path, case: Case) -> Path:
    """Write the folder as `ssync-pl compare` does, and return it."""
    out.mkdir(parents=True)
    content = {
        "config": ["trainer:\n  max_epochs: 36  # <b>87</b> steps each\n"],
        "variants": [{"name": name, "description": f"{name} as <i>described</i>"} for name in case.variants],
        "seeds": list(case.seeds),
        "slots": list(case.slots),
        "sets": list(case.sets),
        "baseline": case.variants[0],
        "command": ["ssync-pl", "compare", "--variants", ",".join(case.variants)],
        "version": "0.1.0",
    }
    (out / "matrix.json").write_text(json.dumps(content), encoding="utf-8")
    for of in case.sets:
        for slots in case.slots:
            for variant in case.variants:
                for seed in case.seeds:
                    place = out / "runs" / of / f"slots_{slots}" / variant / f"seed_{seed}"
                    place.mkdir(parents=True)
                    if (variant, seed) in case.absent:
                        (place / "log.txt").write_text("step 10\nRuntimeError: loss is <NaN>\n", encoding="utf-8")
                    else:
                        _run(place, case, slots, variant, seed)
    return out


def _run(place: Path, case: Case, slots: int, variant: str, seed: int) -> None:
    common = np.random.default_rng([seed, slots])
    own = np.random.default_rng([seed, slots, list(case.variants).index(variant) + 1])
    scores: dict[str, float] = {}
    for name in METRICS:
        value = LEVELS.get(name, 0.5) + 0.03 * common.standard_normal() + 0.006 * own.standard_normal()
        scores |= {} if name in case.nan else {name: value + case.effect.get(variant, 0.0)}
    rows = {
        name: {"video_fg_ari": 0.01 * k, "video_ari": 0.2}
        for k, name in enumerate(("untrained", "grid", "k-means RGB"))
    }
    evaluation = {"scores": scores, "first_step": 0, "step": 3000, "wall_seconds": 263.2, "cpu_seconds": 250.1}
    evaluation |= {"device": "CPU x86_64", "torch": "2.9.0", "date": "2026-11-27"}
    job = {"recipe": "a1b2c3", "source": None, "command": ["ssync-pl", "fit", f"--seed_everything={seed}"]}
    for name, content in {"summary": {"step": 3000, "rows": rows}, "evaluation": evaluation, "job": job}.items():
        (place / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    (place / "pictures").mkdir()
    for step in (1000, 3000):
        Image.new("RGB", (112, 227), (step // 20, 120, 150)).save(place / "pictures" / f"step-{step:06d}.png")
    names = ["step", "val/video_fg_ari", "val/video_ari", "ssync/boundary_loss", "ssync/merged_slots", "ssync/weight"]
    with open(place / "metrics.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        for step in range(49, 3000, 150):
            row: dict[str, float] = {"step": step}
            if variant != case.variants[0]:
                row |= {"ssync/boundary_loss": math.exp(-step / 3000), "ssync/merged_slots": step / 1000}
                row |= {"ssync/weight": 0.0 if step < 1500 else 0.1}
            writer.writerow(row)
        for step in (1000, 2000, 3000):
            writer.writerow({"step": step, "val/video_fg_ari": 0.7 - 300 / step, "val/video_ari": 0.1})
