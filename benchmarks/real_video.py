"""SSync on annotated real video, with and without: from folders of frames to tables, in the package's own commands.

``python benchmarks/real_video.py davis --root FOLDER`` converts every second frame of the videos to shards, caches
features of DINOv2, trains the host of ``examples/real_video.yaml`` through ``ssync-pl compare``, and writes
``real_davis.csv``, ``real_davis_references.csv`` (what needs no learning) and ``real_davis_teachers.csv`` (which map
is right where) into ``benchmarks/results``. ``highway`` does the same; ``figure`` draws both from the tables, and
``sheet`` paints slots over a video without annotations. What is made on the way lies in ``--work``, and a killed call
continues. Other options go to ``ssync-pl compare``: ``--seeds 0,1 --processes 2 -- --trainer.max_steps=20``.

``FOLDER/davis2016`` holds ``frames/NAME/*.jpg``, ``masks/NAME/*.png`` and the names in ``train.txt`` and ``val.txt``,
``FOLDER/highway`` ``frames/*.jpg`` and ``masks/*.png``, of which the first 60 % are trained on. Needs the extras
``bench`` and ``dinov2``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import yaml
from feature_kmeans import validation_batches
from PIL import Image
from tables import REAL_MAPS, real_table

from ssync_pl import SSyncMaps, ssync_loss
from ssync_pl.cli import main as ssync_pl
from ssync_pl.compare.results import read_results
from ssync_pl.compare.tables import paired_difference
from ssync_pl.data import ShardDataModule
from ssync_pl.hosts import SlotContrast
from ssync_pl.metrics.table import METRICS
from ssync_pl.tools import viz
from ssync_pl.tools.summary import score_baselines

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HOST = ROOT / "examples" / "real_video.yaml"
EVERY, CLIP = 2, 12  # frames: every second one, in clips of 12
SSYNC = {"relative_weight": 0.1, "interior_weight": 0.25, "warmup_ratio": 0.5}
VARIANTS = ("auto", "boundary-only", "with", "interior-only", "boundary-no-merging")
SHOWN = {"davis": ("video_mbo", "video_ari"), "highway": ("video_fg_ari", "video_mbo")}  # in the figure
TITLES = {"davis": "DAVIS 2016", "highway": "CDnet highway"}


class Source(NamedTuple):
    """Annotated videos: their folder below ``--root``, size of the frames that the backbone sees, and patches."""

    folder: str
    image_size: tuple[int, int]
    grid: tuple[int, int]

    def splits(self, root: Path) -> dict[str, dict[str, slice]]:
        """Names of the videos of each split, and which of their frames are in it."""
        whole = slice(None, None, EVERY)
        if self.folder == "highway":
            border = 6 * len(list((root / "frames").iterdir())) // 10
            parts = {"train": slice(0, border, EVERY), "val": slice(border, None, EVERY)}
            return {split: {"": part} for split, part in parts.items()}
        return {split: dict.fromkeys((root / f"{split}.txt").read_text().split(), whole) for split in ("train", "val")}


SOURCES = {"davis": Source("davis2016", (224, 392), (16, 28)), "highway": Source("highway", (252, 336), (18, 24))}


def prepare(source: Source, root: Path, work: Path) -> None:
    """Makes shards and features of a source; what is there already stays."""
    for split, videos in source.splits(root).items():
        tree = work / "tree" / split
        if not tree.exists():
            part = tree.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            for name, chosen in videos.items():
                own = name or source.folder
                for kind, target in (("frames", part / own), ("masks", part / "masks" / own)):
                    target.mkdir(parents=True)
                    for path in sorted((root / kind / name).iterdir())[chosen]:
                        shutil.copyfile(path, target / path.name)
            part.rename(tree)
        words = ["--prefix", split, "--short-side", "240", "--clip-frames", str(CLIP), "--samples-per-shard", "8"]
        run("data", "convert", "videos", "--root", tree, "--out", work / "shards" / split, *words)
        cache(source, work, work / "shards" / split)  # the projection is fitted to the first, the training set


def cache(source: Source, work: Path, shards: Path) -> None:
    """Stores the features of all shards in a folder."""
    size = "x".join(map(str, source.image_size))
    words = ["--backbone", "dinov2_small", "--image-size", size, "--components", "96", "--out", work / "features"]
    run("data", "cache-features", shards / "*.tar", *words)


def run(*words: Any) -> None:
    """One command of the package; ends this one where it fails."""
    if status := ssync_pl([str(word) for word in words]):
        raise SystemExit(status)


def configuration(source: Source, work: Path) -> list[str]:
    """Words that lay data, SSync and scoring over the example, and the file of the variant that has no name."""
    callback = {"class_path": "SSyncCallback", "init_args": SSYNC}
    alone = {"class_path": "SSyncCallback", "init_args": {**SSYNC, "interior_weight": 0.0, "merge": False}}
    settings: dict[str, Any] = {
        # Runs are scored at their end, by `ssync-pl compare`; what needs no learning is the same for all of them.
        "trainer": {"check_val_every_n_epoch": 1_000_000, "num_sanity_val_steps": 0, "callbacks": [callback]},
        "model": {"class_path": "SlotContrast", "init_args": {"grid": [*source.grid]}},
        "data": {
            "class_path": "ShardDataModule",
            "init_args": {
                **{
                    name: str(work / f"shards/{split}/*.tar")
                    for name, split in (("train", "train"), ("validation", "val"))
                },
                "features": str(work / "features"),
                "image_size": [*source.image_size],
                "frame_stride": 1,  # the shards hold every second frame
            },
        },
    }
    write(work / "settings.yaml", settings)
    write(work / "boundary-no-merging.yaml", {"trainer": {"callbacks": [alone]}})
    return ["--config", str(HOST), "--config", str(work / "settings.yaml")]


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes YAML, unless it is there: a comparison goes on only with the same words in it."""
    text = yaml.safe_dump(content, sort_keys=False)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def measure(name: str, root: Path, work: Path, results: Path, extra: list[str]) -> None:
    """Everything that is written for one source."""
    source = SOURCES[name]
    prepare(source, root / source.folder, work)
    words = configuration(source, work)
    variants = [str(work / f"{one}.yaml") if one == "boundary-no-merging" else one for one in ("without", *VARIANTS)]
    split = extra.index("--") if "--" in extra else len(extra)
    options = ["--variants", ",".join(variants), "--seeds", "5", "--processes", "1", *extra[:split]]
    out = work / "compare"
    run("compare", *words, *options, "--out", out, *extra[split:])
    if "--dry-run" in extra:
        return
    results.mkdir(parents=True, exist_ok=True)
    table = read_results(out / "results.csv")
    table.to_csv(results / f"real_{name}.csv", index=False)
    batches, _ = validation_batches(words)
    slots = int(table["slots"].iloc[0])
    scores = {row: metric.compute() for row, metric in score_baselines(batches, slots).items()}
    rows = [{"partition": row, "parts": slots, **{k: float(v) for k, v in one.items()}} for row, one in scores.items()]
    pd.DataFrame(rows).to_csv(results / f"real_{name}_references.csv", index=False)
    found = [
        {"variant": variant, "seed": int(seed), **row}
        for variant, seed in table[["variant", "seed"]].itertuples(index=False)
        for row in teachers(load(out / f"runs/slots_{slots}/{variant}/seed_{seed}/checkpoints/last.ckpt"), batches)
    ]
    pd.DataFrame(found).to_csv(results / f"real_{name}_teachers.csv", index=False)
    print(real_table(name, results))


def load(checkpoint: Path) -> SlotContrast:
    """A trained host."""
    return SlotContrast.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True).eval()


@torch.no_grad()
def teachers(host: SlotContrast, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How often each map is right where SSync lets it teach, by the truth.

    A patch is right in a map whose slot holds, over the clip, mostly patches of that patch's object (or of the
    background). `share` is that of the region's patches among all.
    """
    counts: dict[str, torch.Tensor] = {}
    for batch in batches:
        found, truth = host.evaluate(batch), batch["segmentations"]
        shares = F.interpolate(truth.flatten(0, 1).float(), size=host.grid, mode="area").unflatten(0, truth.shape[:2])
        maps = SSyncMaps(attention_logits=found.attention.flatten(3), mask_probs=found.masks.flatten(3), grid=host.grid)
        output = ssync_loss(maps)
        encoder, decoder = (
            right(labels, shares.argmax(2)) for labels in (output.raw_encoder_labels, output.raw_decoder_labels)
        )
        regions = {"boundary": (output.boundary, encoder, decoder), "interior": (output.interior, decoder, encoder)}
        for region, (where, teacher, pupil) in regions.items():
            cases = [torch.ones_like(where), where, where & teacher, where & pupil]
            cases += [where & teacher & ~pupil, where & pupil & ~teacher]
            counts[region] = counts.get(region, 0) + torch.stack([case.sum() for case in cases])
    rows = []
    for region, (patches, where, *cases) in ((region, count.tolist()) for region, count in counts.items()):
        names = ("teacher_right", "pupil_right", "teacher_better", "pupil_better")
        shares = {name: round(case / max(where, 1), 4) for name, case in zip(names, cases, strict=True)}
        rows.append({"region": region, "share": round(where / patches, 4), **shares})
    return rows


def right(labels: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Whether a patch's slot `(B, T, h, w)` stands for the patch's object: the one that most of its patches show."""
    slots, objects = (F.one_hot(x).flatten(1, 3).float() for x in (labels, truth))
    stands_for = (slots.mT @ objects).argmax(2)
    return stands_for.gather(1, labels.flatten(1)).view_as(truth) == truth


def draw_figure(results: Path) -> None:
    """Paired differences of both sources, a dot per seed, means with 95 % intervals."""
    from matplotlib.figure import Figure

    tables = {name: results / f"real_{name}.csv" for name in SOURCES}
    tables = {name: read_results(path) for name, path in tables.items() if path.exists()}
    columns = 2 * len(REAL_MAPS)
    figure = Figure(figsize=(11.0, 2.6 * len(tables)), layout="constrained")
    axes = figure.subplots(len(tables), columns, squeeze=False)
    for row, (name, table) in zip(axes, tables.items(), strict=True):
        variants = [one for one in VARIANTS if one in set(table["variant"])][::-1]
        keys = [
            (f"{of}{key}", f"{METRICS[key].title}, {said}") for key in SHOWN[name] for of, said in REAL_MAPS.items()
        ]
        for ax, (key, title) in zip(row, keys, strict=True):
            values = table.set_index(["variant", "seed"])[key]
            for place, variant in enumerate(variants):
                found = paired_difference(values[variant].to_dict(), values["without"].to_dict())
                differences = values[variant] - values["without"]
                ax.scatter(differences, [place] * len(differences), s=14, alpha=0.5, color="tab:blue", zorder=3)
                ax.errorbar(found.mean, place, xerr=found.half_width, fmt="D", color="black", capsize=4, markersize=5)
            ax.axvline(0.0, color="grey", linewidth=0.8)
            ax.set_title(f"{title}\n(without: {values['without'].mean():.2f})", fontsize=9)
            ax.set_yticks(range(len(variants)), variants if ax is row[0] else [], fontsize=9)
            ax.tick_params(axis="x", labelsize=8)
        row[0].set_ylabel(TITLES[name])
    figure.suptitle("Score with SSync minus score without, same seed; mean with 95 % interval", fontsize=10)
    figure.savefig(results / "real_video.png", dpi=110)


def frames_of(source: Source, work: Path, clip: Path) -> Iterator[dict[str, Any]]:
    """Batches of a video without annotations, as the host gets them."""
    tree = work / "clip"
    if not tree.exists():
        tree.mkdir(parents=True)
        shutil.copyfile(clip, tree / clip.name)
    words = ["--prefix", "clip", "--short-side", "240", "--clip-frames", str(CLIP * EVERY)]
    run("data", "convert", "videos", "--root", tree, "--out", work / "shards" / "clip", *words)
    cache(source, work, work / "shards" / "clip")
    data = ShardDataModule(
        predict=str(work / "shards/clip/*.tar"),
        features=str(work / "features"),
        image_size=source.image_size,
        batch_size=1,
        num_workers=0,
    )
    data.setup("predict")
    for batch in data.predict_dataloader():
        yield data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)


@torch.no_grad()
def draw_sheet(clip: Path, work: Path, out: Path, seed: int, which: int, variant: str) -> None:
    """Frames of a clip, both maps and their merged forms, of the hosts without and with SSync."""
    source = SOURCES["davis"]
    batch = list(frames_of(source, work, clip))[which]
    times = np.linspace(0, CLIP * EVERY - EVERY, 5).round().astype(int) // EVERY
    batch = {key: batch[key][:, ::EVERY] for key in ("video", "features")}  # as in the training
    frames = viz.to_uint8(batch["video"][0, times].numpy(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    rows: list[tuple[str, Any]] = [("frames", frames)]
    titles = {"encoder_": "slot attention", "": "decoder", "merged_encoder_": "slot attention,\nmerged"}
    for one in ("without", variant):
        (path,) = work.glob(f"compare/runs/slots_*/{one}/seed_{seed}/checkpoints/last.ckpt")
        labels = load(path).evaluate(batch).labels(source.image_size)
        said = "without SSync" if one == "without" else "with SSync"
        rows += [
            (f"{title}\n{said}", viz.overlay_labels(frames, labels[key][0, times].numpy()))
            for key, title in titles.items()
        ]
    Image.fromarray(viz.draw_sheet(rows, cell=200)).save(out, quality=85)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", choices=[*SOURCES, "figure", "sheet"])
    parser.add_argument("--root", type=Path, help="folder of the annotated videos")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/real_video"), help="folder of all that is made on the way"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of tables and figure")
    parser.add_argument("--clip", type=Path, help="video to paint, with `sheet`")
    parser.add_argument("--out", type=Path, help="picture to write, with `sheet`")
    parser.add_argument("--seed", type=int, default=0, help="seed of the painted hosts")
    parser.add_argument("--which", type=int, default=0, help="which clip of the video is painted")
    parser.add_argument("--variant", default="with", help="variant with SSync that is painted")
    words = sys.argv[1:] if args is None else args
    place = words.index("--") if "--" in words else len(words)
    options, extra = parser.parse_known_args(words[:place])
    if options.what == "figure":
        draw_figure(options.results)
    elif options.what == "sheet":
        if options.clip is None or options.out is None:
            parser.error("sheet needs --clip and --out")
        work = options.work / "davis"
        draw_sheet(options.clip, work, options.out, options.seed, options.which, options.variant)
    else:
        if options.root is None:
            parser.error(f"{options.what} needs --root")
        work = options.work / options.what
        work.mkdir(parents=True, exist_ok=True)
        measure(options.what, options.root, work, options.results, [*extra, *words[place:]])
    return 0


if __name__ == "__main__":
    sys.exit(main())
