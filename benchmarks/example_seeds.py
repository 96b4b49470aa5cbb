"""Run the shipped example with and without SSync over several seeds, and collect one table.

``python benchmarks/example_seeds.py --seeds 3`` trains ``examples/savi_synthetic.yaml`` for each seed, once as it is
and once with ``examples/without_ssync.yaml`` laid over it. Finished runs are kept, so that a killed call continues.
Results go to ``benchmarks/results/savi_synthetic.csv``, one row a run, with device, versions and date.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import torch

import ssync_pl
from ssync_pl.metrics import METRICS, metric_names

ROOT = Path(__file__).resolve().parents[1]
ARMS = {"with": [], "without": ["--config", str(ROOT / "examples" / "without_ssync.yaml")]}
SCORES = (*metric_names("segmentation"), "used_slots")


def run(arm: str, seed: int, options: argparse.Namespace) -> Path:
    """Train one arm with one seed, unless its summary is there already."""
    folder = options.runs / arm / f"seed_{seed}"
    if is_finished(folder, arm, options):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ssync_pl", "fit", "--config", str(options.config), *ARMS[arm]]
    command += [f"--seed_everything={seed}", f"--data.init_args.seed={seed}", f"--data.init_args.root={options.data}"]
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "", "version": ""}}
    command += [f"--trainer.logger={json.dumps(logger)}", "--trainer.enable_progress_bar=false", *options.extra]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    started = time.perf_counter()
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
    facts = {"wall_seconds": round(time.perf_counter() - started), "device": device, "torch": torch.__version__}
    text = json.dumps({"recipe": recipe_of(arm, options), **facts, "date": date.today().isoformat()})
    (folder / "recipe.json").write_text(text, encoding="utf-8")
    return folder


def is_finished(folder: Path, arm: str, options: argparse.Namespace) -> bool:
    """Whether a run is there already; one of another configuration stops the call."""
    if not (folder / "recipe.json").exists():
        return False
    kept = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    if kept["recipe"] != recipe_of(arm, options):
        raise SystemExit(f"{folder} holds a run of another configuration. Pass another --runs, or remove it.")
    return True


def recipe_of(arm: str, options: argparse.Namespace) -> str:
    """Hash everything that decides a run but its seed, so that one table never mixes two configurations."""
    files = [options.config, *(Path(word) for word in ARMS[arm] if word.endswith(".yaml"))]
    content = [path.read_text(encoding="utf-8") for path in files]
    return hashlib.sha256(json.dumps([ssync_pl.__version__, content, options.extra]).encode()).hexdigest()[:12]


def row(arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """Read one run's summary."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    out: dict[str, Any] = {"arm": arm, "seed": seed, "step": summary["step"]}
    for name, scores in summary["rows"].items():
        prefix = "" if name == "this run" else name.replace(" ", "_") + "_"
        out.update({prefix + score: scores[score] for score in SCORES if scores.get(score) is not None})
    return {**out, **json.loads((folder / "recipe.json").read_text(encoding="utf-8"))}


def table(rows: list[dict[str, Any]]) -> str:
    """Medians with the spread over seeds, one line an arm, then what needs no learning."""
    keys = [*metric_names(None, "headline"), "used_slots"]
    header = [METRICS[key].title for key in keys]
    lines = ["| run | " + " | ".join(header) + " |", "|---" * (len(header) + 1) + "|"]
    for arm in ARMS:
        runs = [entry for entry in rows if entry["arm"] == arm]
        cells = []
        for key in keys:
            values = [entry[key] for entry in runs]
            cells.append(f"{statistics.median(values):.3f} ({min(values):.3f} – {max(values):.3f})")
        lines.append(f"| {arm} SSync, median of {len(runs)} seeds (range) | " + " | ".join(cells) + " |")
    for name in ("grid", "k-means RGB"):
        prefix = name.replace(" ", "_") + "_"
        cells = []
        for key in keys:
            values = [entry[prefix + key] for entry in rows if prefix + key in entry]
            cells.append(f"{statistics.median(values):.3f}" if values else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, … of each arm")
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "savi_synthetic.yaml")
    parser.add_argument("--runs", type=Path, default=Path("runs/example_seeds"), help="folder of the runs")
    parser.add_argument("--data", type=Path, default=Path("data/synthetic"), help="folder of the generated videos")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "savi_synthetic.csv")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads a run")
    options, options.extra = parser.parse_known_args(args)

    jobs = [(arm, seed) for seed in range(options.seeds) for arm in ARMS]
    for arm, seed in jobs:  # refuse before anything is trained
        is_finished(options.runs / arm / f"seed_{seed}", arm, options)
    with ThreadPoolExecutor(options.processes) as pool:
        folders = list(pool.map(lambda job: run(*job, options), jobs))
    rows = [row(arm, seed, folder) for (arm, seed), folder in zip(jobs, folders, strict=True)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for entry in rows for name in entry))
    temporary = options.out.with_suffix(".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(options.out)
    print(table(rows))


if __name__ == "__main__":
    main()
