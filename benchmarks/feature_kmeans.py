"""k-means on the features that the slots see, scored like the slots: what a host must beat to have learned anything.

``python benchmarks/feature_kmeans.py`` clusters each validation video of the main host's data, with several weights of
place and starts, and writes ``benchmarks/results/feature_kmeans.csv``.
"""

from __future__ import annotations

import argparse
import csv
import io
import platform
import statistics
import sys
from datetime import date
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from ssync_pl.cli.trainer import from_configuration
from ssync_pl.data.files import write_bytes
from ssync_pl.hosts.evaluation import frame_validity
from ssync_pl.metrics import SegmentationMetrics, metric_names
from ssync_pl.metrics.partitions import kmeans

ROOT = Path(__file__).resolve().parents[1]
SCORES = metric_names("segmentation")


class _Collect(L.LightningModule):
    """Keeps batches as hosts get them: moved and transformed by the data module."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[dict[str, Any]] = []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.batches.append(batch)


def validation_batches(words: list[str]) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    """All validation batches of a configuration, and the grid of its features."""
    parts = from_configuration(words)
    if parts.datamodule is None:
        raise SystemExit("Expected a configuration with data.")
    found = _Collect()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(accelerator="cpu", enable_checkpointing=False, **quiet).validate(
        found, datamodule=parts.datamodule, verbose=False
    )
    rows, columns = parts.model.hparams["grid"]
    return found.batches, (rows, columns)


def score(
    batches: list[dict[str, Any]], grid: tuple[int, int], clusters: int, weight: float, seed: int
) -> dict[str, float]:
    """Scores of one clustering of all videos."""
    metric = SegmentationMetrics("", True)
    for batch in batches:
        valid = frame_validity(batch)
        labels = kmeans(batch["features"], grid, clusters, valid, weight, seed)
        size = batch["segmentations"].shape[-2:]
        large = torch.nn.functional.interpolate(labels.float(), size=size, mode="nearest").long()
        metric.update(large, batch["segmentations"], valid)
    return {name: float(value) for name, value in metric.compute().items()}


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "slotcontrast_synthetic.yaml")
    parser.add_argument("--data", help="root of the generated data (default: the configuration's)")
    parser.add_argument("--clusters", type=int, nargs="+", default=[7, 11, 15])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.5, 1.0, 2.0], help="of place")
    parser.add_argument("--seeds", type=int, default=3, help="k-means starts")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "feature_kmeans.csv")
    options = parser.parse_args(args)
    words = ["--config", str(options.config), "--data.init_args.data_seed=1", "--data.init_args.num_validation=96"]
    batches, grid = validation_batches([*words, *([f"--data.init_args.root={options.data}"] if options.data else [])])
    rows: list[dict[str, Any]] = []
    for clusters in options.clusters:
        for weight in options.weights:
            for seed in range(options.seeds):
                found = score(batches, grid, clusters, weight, seed)
                sys.stderr.write(f"{clusters} clusters, weight {weight}, seed {seed}: {found[SCORES[0]]:.3f}\n")
                facts = {"clusters": clusters, "position_weight": weight, "seed": seed}
                rows.append(
                    {
                        **facts,
                        **found,
                        "device": f"CPU {platform.machine()}",
                        "torch": torch.__version__,
                        "date": date.today().isoformat(),
                    }
                )
            mine = [row for row in rows if (row["clusters"], row["position_weight"]) == (clusters, weight)]
            means = ", ".join(f"{name} {statistics.mean(row[name] for row in mine):.3f}" for name in SCORES[:3])
            sys.stdout.write(f"{clusters} clusters, weight of place {weight}: {means}\n")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(options.out, text.getvalue().encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
