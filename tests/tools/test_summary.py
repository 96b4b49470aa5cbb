import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ssync_pl import ValidationSummary
from ssync_pl.metrics import SegmentationMetrics
from ssync_pl.tools import summary
from ssync_pl.tools.summary import score_baselines


def summary_batch(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, (2, 2, 4, 4), generator=generator).repeat_interleave(2, -1).repeat_interleave(2, -2)
    return {
        "video": torch.rand(2, 2, 3, 8, 8, generator=generator) + ids.unsqueeze(2),
        "segmentations": nn.functional.one_hot(ids, 3).movedim(-1, 2).bool(),
    }


class SummaryHost(L.LightningModule):
    def __init__(self, num_slots: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Conv2d(3, num_slots, 1)
        self.dropout = nn.Dropout(0.2)
        self.scores = SegmentationMetrics(prefix="val/")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(self.dropout(batch["video"].flatten(0, 1))).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        masks = self.layer(batch["video"].flatten(0, 1)).unflatten(0, batch["video"].shape[:2])
        self.scores.update(masks.argmax(2), batch["segmentations"])

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.scores.compute())
        self.log("val/used_slots", 3.0)
        self.scores.reset()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/video_mbo", 0.25)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def summary_loader(seeds: list[int]) -> DataLoader[Any]:
    return DataLoader([summary_batch(seed) for seed in seeds], batch_size=None)


def summary_trainer(path: Path, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    off = {"enable_progress_bar": False, "enable_model_summary": False}
    settings = {"max_epochs": 2, "accelerator": "cpu", "logger": CSVLogger(str(path), version=0), **off, **options}
    return L.Trainer(callbacks=callbacks, **settings)


def fit(path: Path, callbacks: list[L.Callback], **options: Any) -> tuple[L.Trainer, SummaryHost]:
    torch.manual_seed(1)
    host = SummaryHost()
    trainer = summary_trainer(path, callbacks, **options)
    trainer.fit(host, summary_loader([0, 1]), summary_loader([5, 6]))
    return trainer, host


def expected_scores(host: SummaryHost) -> dict[str, float]:
    metrics = SegmentationMetrics()
    for seed in (5, 6):
        batch = summary_batch(seed)
        with torch.no_grad():
            masks = host.layer(batch["video"].flatten(0, 1)).unflatten(0, (2, 2))
        metrics.update(masks.argmax(2), batch["segmentations"])
    return {name: float(value) for name, value in metrics.compute().items()}


def test_fit_prints_one_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, host = fit(tmp_path, [ValidationSummary()])
    text = capsys.readouterr().out
    assert text.count("video FG-ARI") == 1
    for row in ("this run", "grid", "k-means RGB"):
        assert text.count(f"| {row} ") == 1
    assert "used slots" in text
    assert trainer.checkpoint_callback.best_model_path in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    written = json.loads((Path(trainer.log_dir) / "summary.json").read_text())
    assert written["step"] == 4
    for name, value in expected_scores(host).items():
        assert written["rows"]["this run"][name] == pytest.approx(value, abs=1e-6)
    for row, metric in score_baselines([summary_batch(5), summary_batch(6)], 4).items():
        assert written["rows"][row] == pytest.approx({name: float(value) for name, value in metric.compute().items()})


def test_validate_and_test_report_and_nan_becomes_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Nan(SummaryHost):
        def on_validation_epoch_end(self) -> None:
            self.log_dict({"val/video_mbo": float("nan"), "val/video_ari": 0.5})

    callback = ValidationSummary(baselines=False)
    trainer = summary_trainer(tmp_path, [callback])
    trainer.validate(Nan(), summary_loader([5]), verbose=False)
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [cell.strip() for cell in lines[2]] == ["this run", "0.500", "nan"]
    rows = json.loads((Path(trainer.log_dir) / "summary.json").read_text())["rows"]
    assert rows == {"this run": {"video_mbo": None, "video_ari": 0.5}}
    trainer.test(SummaryHost(), summary_loader([5]), verbose=False)
    assert callback.rows == {"this run": {"video_mbo": 0.25}}
    assert "0.250" in capsys.readouterr().out


def test_no_validation_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = summary_trainer(tmp_path, [ValidationSummary()], max_epochs=1)
    trainer.fit(SummaryHost(), summary_loader([0]))
    assert "this run" not in capsys.readouterr().out
    assert not (Path(trainer.log_dir) / "summary.json").exists()


def test_a_baseline_that_fails_costs_its_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no masks")

    monkeypatch.setattr(summary, "score_baselines", refuse)
    callback = ValidationSummary()
    with pytest.warns(UserWarning, match="No baselines in the summary: no masks"):
        fit(tmp_path, [callback])
    assert list(callback.rows) == ["this run"]


@pytest.mark.slow
def test_processes_score_the_baselines_together(tmp_path: Path) -> None:
    def rows(name: str, **options: Any) -> dict[str, Any]:
        trainer = summary_trainer(tmp_path / name, [ValidationSummary()], **options)
        two_videos = [{name: value[index] for name, value in summary_batch(5).items()} for index in range(2)]
        trainer.validate(SummaryHost(), DataLoader(two_videos, batch_size=1), verbose=False)
        (file,) = (tmp_path / name).rglob("summary.json")
        return json.loads(file.read_text())["rows"]

    alone, together = rows("one"), rows("two", devices=2, strategy="ddp_fork")
    assert set(together) == {"this run", "grid", "k-means RGB"}
    for row in ("grid", "k-means RGB"):
        assert together[row] == pytest.approx(alone[row])


def test_a_summary_that_is_not_ours_is_left_alone_and_named(tmp_path: Path) -> None:
    trainer = summary_trainer(tmp_path, [ValidationSummary(baselines=False)])
    path = Path(trainer.log_dir) / "summary.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"rows": {}}')
    with pytest.warns(UserWarning, match=r"summary\.json.*Move it away"):
        trainer.validate(SummaryHost(), summary_loader([5]), verbose=False)
    assert path.read_text() == '{"rows": {}}'
    path.unlink()
    for _ in range(2):  # one of ours is replaced
        trainer.validate(SummaryHost(), summary_loader([5]), verbose=False)
    assert "this run" in json.loads(path.read_text())["rows"]
