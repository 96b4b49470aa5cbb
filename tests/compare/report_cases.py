"""Folders of comparisons with made-up numbers and label maps of moving blobs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ssync_pl.compare.report.scores import COLUMNS

ODD = "a<b>&\"c'|_x$y$ é"


@dataclass(frozen=True)
class Case:
    """What the made-up comparison has; `effect` is what a variant adds to the scores of `without`."""

    variants: Sequence[str] = ("without", "with", "published")
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    slots: Sequence[int] = (7,)
    sets: Sequence[str] = ("default",)
    effect: Mapping[str, float] = field(default_factory=lambda: {"with": 0.05})
    absent: Sequence[tuple[str, int]] = ()
    videos: int = 2
    frames: int = 3
    size: int = 48
    curves: bool = True
    csv: bool = True
    matrix: bool = True
    nan: Sequence[str] = ("identity",)


def make_folder(out: Path, case: Case) -> Path:
    """Write the folder of the contract and return it."""
    out.mkdir(parents=True, exist_ok=True)
    if case.matrix:
        content = {
            "config": ["trainer:\n  max_epochs: 36  # <b>87</b> steps each\n"],
            "config_files": ["examples/slotcontrast_synthetic.yaml"],
            "variants": [{"name": name, "description": f"{name} as <i>described</i>"} for name in case.variants],
            "seeds": list(case.seeds),
            "slots": list(case.slots),
            "sets": list(case.sets),
            "baseline": case.variants[0],
            "steps": 3000,
            "extra": [],
            "version": "0.1.0",
        }
        (out / "matrix.json").write_text(json.dumps(content), encoding="utf-8")
    rows = []
    for of in case.sets:
        for slots in case.slots:
            for variant in case.variants:
                for seed in case.seeds:
                    place = out / "runs" / of / f"slots_{slots}" / variant.replace("/", "-") / f"seed_{seed}"
                    place.mkdir(parents=True)
                    if (variant, seed) in case.absent:
                        (place / "log.txt").write_text("step 10\nRuntimeError: loss is <NaN>\n", encoding="utf-8")
                        continue
                    rows.append(_run(place, case, of, slots, variant, seed))
    if case.csv:
        with open(out / "results.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(rows)
    return out


def _run(place: Path, case: Case, of: str, slots: int, variant: str, seed: int) -> dict[str, object]:
    number = np.random.default_rng([seed, slots, len(of)])
    own = np.random.default_rng([seed, slots, len(of), list(case.variants).index(variant) + 1])
    base = {"video_fg_ari": 0.72, "video_ari": 0.26, "video_mbo": 0.5, "video_miou": 0.49}
    base |= {"image_fg_ari": 0.78, "image_ari": 0.33, "image_mbo": 0.54, "image_miou": 0.52, "boundary_f": 0.61}
    base |= {"slots_per_object": 1.4, "unused_slots": 0.2, "used_slots": slots - 0.2, "identity": 0.83}
    scores = {
        name: value + 0.03 * number.standard_normal() + 0.006 * own.standard_normal() + case.effect.get(variant, 0.0)
        for name, value in base.items()
    }
    scores = {name: math.nan if name in case.nan else value for name, value in scores.items()}
    probe = {"position_r2": 0.7 + 0.02 * own.standard_normal(), "color_r2": 0.4, "shape_accuracy": 0.55}
    kinds = {"untrained": (0.01, 0.0), "grid": (0.4, 0.1), "k-means RGB": (0.29, 0.28)}
    lines = {
        name: {key: low if "fg" in key else high for key in base if key.split("_")[0] in ("video", "image")}
        for name, (low, high) in kinds.items()
    }
    finite = {name: None if math.isnan(value) else value for name, value in scores.items()}
    summary = {"step": 3000, "rows": {"this run": finite, **lines}}
    facts = {
        "set": of,
        "slots": slots,
        "variant": variant,
        "seed": seed,
        "recipe": "a1b2c3",
        "wall_seconds": 263.2,
        "command": ["ssync-pl", "fit", f"--seed_everything={seed}"],
        "cpu_seconds": 250.1,
        "device": "CPU x86_64",
        "torch": "2.9.0",
        "date": "2026-11-27",
    }
    evaluation = {"scores": finite, "probe": probe, "step_ms": 81.0 + own.standard_normal(), "peak_mib": 812.0}
    evaluation |= {"steps": 3000, "val_keys_hash": "00", "num_videos": 48}
    for name, content in {"summary": summary, "evaluation": evaluation, "run": facts}.items():
        (place / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    if case.curves:
        _curves(place / "metrics.csv", scores, variant != case.variants[0], slots, own)
    if case.videos:
        np.savez_compressed(place / "pictures.npz", **make_pictures(case, slots, seed, own))
    row: dict[str, object] = {key: facts[key] for key in ("set", "slots", "variant", "seed")}
    row |= {"step": 3000, **scores, **{f"probe_{name}": value for name, value in probe.items()}}
    row |= {"merged_slots": 1.5 + 0.1 * own.standard_normal()}
    row |= {name: evaluation[name] for name in ("step_ms", "peak_mib")}
    row |= {key: facts[key] for key in ("wall_seconds", "cpu_seconds", "recipe", "device", "torch", "date")}
    for prefix, title in {"untrained": "untrained", "grid": "grid", "kmeans_rgb": "k-means RGB"}.items():
        row |= {f"{prefix}_{key}": value for key, value in lines[title].items()}
    return row


def _curves(path: Path, scores: Mapping[str, float], ssync: bool, slots: int, rng: np.random.Generator) -> None:
    names = ["step", "epoch", *(f"val/{key}" for key in ("video_fg_ari", "video_ari", "video_mbo"))]
    names += [f"ssync/{key}" for key in ("boundary_loss", "interior_loss", "merged_slots", "used_slots")]
    names += ["ssync/used_encoder_slots", "ssync/agreement", "ssync/weight"]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        for step in range(49, 3000, 150):
            share = step / 3000
            row: dict[str, object] = {"step": step}
            if ssync:
                noise = 1 + 0.05 * rng.standard_normal()
                row |= {"ssync/boundary_loss": 0.5 * noise * math.exp(-2 * share), "ssync/interior_loss": 0.2 * noise}
                row |= {"ssync/merged_slots": 3 * share * noise, "ssync/used_slots": slots - 0.3 * share * noise}
                row |= {"ssync/used_encoder_slots": slots - 0.1 * noise, "ssync/agreement": 0.5 + 0.4 * share}
                row |= {"ssync/weight": 0.0 if share < 0.5 else 0.1}
            writer.writerow(row)
        for step in (1000, 2000, 3000):
            row = {"step": step}
            for key in ("video_fg_ari", "video_ari", "video_mbo"):
                row[f"val/{key}"] = scores[key] * (1 - math.exp(-step / 700))
            writer.writerow(row)


def make_pictures(case: Case, slots: int, seed: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Blobs that move over a textured floor, and maps that follow them about."""
    size, grid = case.size, max(4, case.size // 8)
    videos, frames = case.videos, case.frames
    truth = np.zeros((videos, frames, size, size), dtype=np.uint8)
    fixed = np.random.default_rng(7)
    colors = fixed.integers(40, 255, (6, 3))
    rows, columns = np.mgrid[:size, :size]
    floor = 90 + 30 * np.sin(columns / 5)[..., None] + fixed.normal(0, 8, (size, size, 3))
    pictures = np.broadcast_to(floor, (videos, frames, size, size, 3)).copy()
    for video in range(videos):
        for blob in range(4):
            start, speed = fixed.uniform(0.2, 0.8, 2) * size, fixed.uniform(-0.06, 0.06, 2) * size
            for time in range(frames):
                row, column = start + speed * time
                inside = (rows - row) ** 2 + (columns - column) ** 2 < (size * 0.11) ** 2
                truth[video, time][inside] = blob + 1
                pictures[video, time][inside] = colors[blob]
    order = rng.permutation(slots)
    decoder = order[np.minimum(truth, slots - 1)]
    half = np.broadcast_to(columns > size // 2, truth.shape) & (truth == 0)
    decoder = np.where(half, order[min(5, slots - 1)], decoder)
    patch = size // grid
    encoder = decoder[:, :, patch // 2 :: patch, patch // 2 :: patch][:, :, :grid, :grid].copy()
    wrong = rng.random(encoder.shape) < 0.1
    encoder[wrong] = rng.integers(0, slots, int(wrong.sum()))
    edge = np.zeros(encoder.shape, dtype=bool)
    edge[..., 1:, :] |= encoder[..., 1:, :] != encoder[..., :-1, :]
    edge[..., :, 1:] |= encoder[..., :, 1:] != encoder[..., :, :-1]
    return {
        "keys": np.array([f"video-{number:04d}" for number in range(videos)]),
        "frames": np.clip(pictures, 0, 255).astype(np.uint8),
        "truth": truth,
        "encoder": encoder.astype(np.uint8),
        "decoder": decoder.astype(np.uint8),
        "boundary": edge,
        "interior": ~edge & (rng.random(edge.shape) < 0.8),
    }
