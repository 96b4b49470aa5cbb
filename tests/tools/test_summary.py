import json
import re
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.metrics import adjusted_rand_score
from torch import nn
from torch.utils.data import DataLoader

from ssync_pl import ValidationSummary
from ssync_pl.errors import SSyncError
from ssync_pl.metrics import SegmentationMetrics
from ssync_pl.metrics.functional import labels_to_masks
from ssync_pl.metrics.partitions import grid_partition, kmeans
from ssync_pl.tools import summary
from ssync_pl.tools.summary import score_baselines


def make_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, (2, 2, 4, 4), generator=generator).repeat_interleave(2, -1).repeat_interleave(2, -2)
    video = torch.rand(2, 2, 3, 8, 8, generator=generator) + ids.unsqueeze(2)
    return {"video": video, "segmentations": labels_to_masks(ids, 3)}


class Host(L.LightningModule):
    def __init__(self, num_slots=4):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Conv2d(3, num_slots, 1)
        self.scores = SegmentationMetrics(prefix="val/")

    def labels(self, batch):
        return self.layer(batch["video"].flatten(0, 1)).unflatten(0, batch["video"].shape[:2]).argmax(2)

    def training_step(self, batch, batch_idx):
        return self.layer(batch["video"].flatten(0, 1)).square().mean()

    def validation_step(self, batch, batch_idx):
        self.scores.update(self.labels(batch), batch["segmentations"])

    def on_validation_epoch_end(self):
        self.log_dict(self.scores.compute())
        self.log_dict({"val/used_slots": 3.0, "val/encoder_video_mbo": 0.5, "val/merged_encoder_video_mbo": 0.625})
        self.scores.reset()

    def test_step(self, batch, batch_idx):
        self.log("test/video_mbo", 0.25)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def loader(*seeds):
    return DataLoader([make_batch(seed) for seed in seeds], batch_size=None)


def make_trainer(path, callback, **options):
    off = {"enable_progress_bar": False, "enable_model_summary": False}
    settings = {"max_epochs": 2, "accelerator": "cpu", "logger": CSVLogger(str(path), version=0), **off, **options}
    return L.Trainer(callbacks=[callback], **settings)


def numbers(metrics):
    return {name: float(value) for name, value in metrics.compute().items()}


def written(trainer):
    return json.loads((Path(trainer.log_dir) / "summary.json").read_text())


def test_fit_prints_one_table_and_writes_json(tmp_path, capsys):
    trainer, host = make_trainer(tmp_path, ValidationSummary()), Host()
    trainer.fit(host, loader(0, 1), loader(5, 6))
    text = capsys.readouterr().out
    assert text.count("video FG-ARI") == 1
    assert all(text.count(f"| {row} ") == 1 for row in ("this run", "grid", "k-means RGB"))
    assert "used slots" in text
    for row, value in {"slot attention's map": "0.500", "slot attention's, merged": "0.625"}.items():
        assert re.search(rf"^\| {row} +\|.* {value} ", text, re.MULTILINE)
    assert trainer.checkpoint_callback.best_model_path in text
    assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1
    content, expected = written(trainer), SegmentationMetrics()
    assert content["step"] == 4
    for batch in loader(5, 6):
        expected.update(host.labels(batch), batch["segmentations"])
    for name, value in numbers(expected).items():
        assert content["rows"]["this run"][name] == pytest.approx(value, abs=1e-6)
    for row, metric in score_baselines([make_batch(5), make_batch(6)], 4).items():
        assert content["rows"][row] == pytest.approx(numbers(metric))


def test_validate_and_test_report_and_nan_becomes_null(tmp_path, capsys):
    class Nan(Host):
        def on_validation_epoch_end(self):
            self.log_dict({"val/video_mbo": float("nan"), "val/video_ari": 0.5})

    callback = ValidationSummary(baselines=False)
    trainer = make_trainer(tmp_path, callback)
    trainer.validate(Nan(), loader(5), verbose=False)
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [cell.strip() for cell in lines[2]] == ["this run", "0.500", "nan"]
    assert written(trainer)["rows"] == {"this run": {"video_mbo": None, "video_ari": 0.5}}
    trainer.test(Host(), loader(5), verbose=False)
    assert callback.rows == {"this run": {"video_mbo": 0.25}}
    assert "0.250" in capsys.readouterr().out


def test_no_validation_prints_nothing(tmp_path, capsys):
    trainer = make_trainer(tmp_path, ValidationSummary(), max_epochs=1)
    trainer.fit(Host(), loader(0))
    assert "this run" not in capsys.readouterr().out
    assert not (Path(trainer.log_dir) / "summary.json").exists()


def test_baselines_that_fail_and_a_file_of_others_cost_themselves_only(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "grid_partition", lambda *args: 1 / 0)
    trainer = make_trainer(tmp_path, callback := ValidationSummary())
    path = Path(trainer.log_dir) / "summary.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"rows": {}}')
    with pytest.warns(match="No baselines in the summary: div"), pytest.warns(match=r"summary\.json.*Move it away"):
        trainer.validate(Host(), loader(5), verbose=False)
    assert list(callback.rows) == ["this run", "slot attention's map", "slot attention's, merged"]
    assert path.read_text() == '{"rows": {}}'
    path.unlink()
    for _ in range(2):  # one of ours is replaced
        trainer.validate(Host(), loader(5), verbose=False)
    assert "this run" in written(trainer)["rows"]


@pytest.mark.slow
def test_processes_score_the_baselines_together(tmp_path):
    def rows(name, **options):
        trainer = make_trainer(tmp_path / name, ValidationSummary(), **options)
        two_videos = [{name: value[index] for name, value in make_batch(5).items()} for index in range(2)]
        trainer.validate(Host(), DataLoader(two_videos, batch_size=1), verbose=False)
        (file,) = (tmp_path / name).rglob("summary.json")
        return json.loads(file.read_text())["rows"]

    alone, together = rows("one"), rows("two", devices=2, strategy="ddp_fork")
    assert set(together) == {"this run", "grid", "k-means RGB"}
    for row in ("grid", "k-means RGB"):
        assert together[row] == pytest.approx(alone[row])


LAYOUTS = [(1, (5, 7), [1]), (6, (60, 40), [2] * 3), (11, (64, 64), [4, 4, 3]), (24, (336, 336), [6] * 4)]


@pytest.mark.parametrize(("cells", "size", "rows"), LAYOUTS)
def test_grid_has_the_layout_closest_to_squares(cells, size, rows):
    labels = grid_partition(cells, size)
    assert labels.unique().tolist() == list(range(cells))
    tops = [int(labels[y, 0]) for y in range(size[0]) if not y or labels[y, 0] != labels[y - 1, 0]]
    assert tops == [sum(rows[:row]) for row in range(len(rows))]
    for cell in range(cells):
        places = (labels == cell).nonzero()
        extent = places.amax(dim=0) - places.amin(dim=0) + 1
        assert int(extent.prod()) == len(places)
        assert abs(len(places) / (size[0] * size[1] / cells) - 1) < 0.15


def real(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def coloured_video(seed, colours=4):
    """Video (2, 10, 12, 3) of well separated colours with noise, and its labels."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])[:colours]
    labels = torch.randint(0, colours, (2, 10, 12), generator=generator)
    return corners[labels] + 0.03 * torch.randn(2, 10, 12, 3, generator=generator), labels


def test_kmeans_finds_colours_whatever_the_padding_and_the_other_videos():
    video, labels = coloured_video(0)
    points = video.flatten(1, 2)[None]
    found = kmeans(points, (10, 12), 4, real(1, 2))
    assert (found.shape, found.dtype) == ((1, 2, 10, 12), torch.int64)
    assert adjusted_rand_score(labels.flatten(), found.flatten()) == 1.0
    padded = torch.cat([points, torch.full((1, 2, 120, 3), 50.0)], dim=1)
    assert torch.equal(kmeans(padded, (10, 12), 4, torch.tensor([[True, True, False, False]]))[:, :2], found)
    assert not kmeans(padded, (10, 12), 4, ~real(1, 4)).any()
    videos = torch.rand(3, 2, 50, 3, generator=torch.Generator().manual_seed(0))
    together = kmeans(videos, (5, 10), 6, real(3, 2), seed=1)
    assert torch.equal(together, torch.cat([kmeans(video[None], (5, 10), 6, real(1, 2), seed=1) for video in videos]))
    assert not torch.equal(together, kmeans(videos, (5, 10), 6, real(3, 2), seed=2))
    features = torch.zeros(1, 1, 12, 4)
    features[:, :, ::2, 0] = 1.0  # stripes, of columns 0 and 2
    assert kmeans(features, (3, 4), 2, real(1, 1))[0, 0].diff(dim=1).abs().sum() == 9
    halves = kmeans(features, (3, 4), 2, real(1, 1), 50.0)[0, 0]  # where places weigh more
    assert torch.equal(halves[:, :2], halves[:1, :1].expand(3, 2))
    assert torch.equal(halves[:, 2:], 1 - halves[:, :2])


REFUSED = [
    (lambda: kmeans(torch.zeros(1, 1, 1, 3), (1, 1), 2, real(1, 1)), "2 points"),
    (lambda: grid_partition(9, (2, 2)), "room for 9 cells"),
    (lambda: score_baselines([{"video": torch.zeros(1, 1, 3, 4, 4)}], 2), r"got \['video'\]"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(SSyncError, match=message):
        call()


def test_scores_of_separable_colours_and_features_whatever_the_padding():
    def scores(batch):
        return {row: numbers(metric) for row, metric in score_baselines([batch], num_slots=3).items()}

    video, labels = coloured_video(0, 3)
    batch = {"video": video[None].movedim(-1, 2), "segmentations": labels_to_masks(labels[None], 3)}
    expected = scores(batch)
    assert list(expected) == ["grid", "k-means RGB"]
    for name in ("video_fg_ari", "video_ari", "video_mbo", "video_miou", "image_fg_ari", "image_mbo"):
        assert expected["k-means RGB"][name] == pytest.approx(1.0)
        assert expected["grid"][name] < 0.5
    junk = {"video": torch.rand(1, 2, 3, 10, 12), "segmentations": batch["segmentations"].roll(1, 2)}
    doubled = {name: torch.cat([batch[name], junk[name]]) for name in batch}
    padded = {name: torch.cat([value, junk[name].expand_as(value)], dim=1) for name, value in doubled.items()}
    padded["batch_padding_mask"] = torch.tensor([True, False])
    padded["frame_mask"] = torch.tensor([[True, True, False, False]] * 2)
    for row, found in scores(padded).items():
        assert found == pytest.approx(expected[row])
    masks = batch["segmentations"][..., :5, ::2]
    batch["segmentations"] = masks.repeat_interleave(2, -2).repeat_interleave(2, -1)
    batch["features"] = 100 * nn.functional.one_hot(masks.int().argmax(2), 8).flatten(2, 3).float()
    assert scores(batch)["k-means features"]["video_ari"] == pytest.approx(1.0)
