import json

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from tiny_hosts import make_trainer
from tiny_models import tiny
from torch.utils.data import DataLoader

from ssync_pl import SSyncCallback
from ssync_pl.compare.callbacks import RunRecorder
from ssync_pl.errors import ConfigError
from ssync_pl.hosts import DINOSAUR, SOLV, SlotContrast, VideoSAUR
from ssync_pl.metrics import MAPS, METRICS, SegmentationMetrics, metric_names

SCORES = {*metric_names("segmentation"), *metric_names("slots")} - {"slots_per_object"}  # of objects too small here
BOTH_MAPS = SCORES | {f"{of}{name}" for of in MAPS if of for name, info in METRICS.items() if info.both_maps}


def videos(count, seed):
    """Cached features of squares that move over a floor, with their masks."""
    generator, items = torch.Generator().manual_seed(seed), []
    for index in range(count):
        square = torch.zeros(3, 16, 16, dtype=torch.bool)
        for t in range(3):
            square[t, 4 * (index % 3) : 4 * (index % 3) + 8, 4 * (t % 2) : 4 * (t % 2) + 8] = True
        features = square[:, ::4, ::4].reshape(3, 16, 1) * torch.linspace(-2, 2, 6)
        features = features + 0.1 * torch.randn(3, 16, 6, generator=generator)
        items.append({"features": features, "segmentations": torch.stack([~square, square], 1)})
    return items


def make_host(kind=SlotContrast, **changes):
    return tiny(kind, trained=True, grid=(4, 4), **changes)


def fit(path, host, *callbacks, validation=None, **options):
    torch.manual_seed(5)
    trainer = make_trainer(*callbacks, logger=CSVLogger(str(path), "", ""), **options)
    validation = videos(6, 1) if validation is None else validation
    trainer.fit(host, DataLoader(videos(4, 0), batch_size=2), DataLoader(validation, batch_size=2))
    return trainer


def read(folder):
    return json.loads((folder / "evaluation.json").read_text())


def names_in(folder):
    return {name for name in read(folder)["scores"] if "slots_per_object" not in name}


def test_scores_are_those_of_the_trained_host(tmp_path):
    host = make_host(slot_init="learned")
    trainer = fit(tmp_path, host, RunRecorder())
    decoder, encoder = SegmentationMetrics(), SegmentationMetrics()
    host.eval()
    for batch in DataLoader(videos(6, 1), batch_size=2):
        with torch.no_grad():
            decoder.update(host.evaluate(batch)[0], batch["segmentations"])
            attention = host(batch["features"]).attention_logits.softmax(2).unflatten(-1, host.grid)
            encoder.update(attention, batch["segmentations"])
    content = read(tmp_path)
    for prefix, metrics in (("", decoder), ("encoder_", encoder)):
        for name, value in metrics.compute().items():
            if METRICS[name].both_maps or not prefix:
                assert content["scores"][prefix + name] == pytest.approx(value.item(), abs=1e-9), name
    logged = trainer.callback_metrics["val/merged_encoder_video_mbo"]
    assert content["scores"]["merged_encoder_video_mbo"] == pytest.approx(float(logged), abs=1e-6)
    # the training's own last validation, where slots are not drawn at random
    assert content["scores"]["video_mbo"] == pytest.approx(float(trainer.callback_metrics["val/video_mbo"]), abs=1e-6)
    assert (content["first_step"], content["step"], content["device"][:3]) == (0, 4, "CPU")
    assert content["wall_seconds"] >= 0


def test_no_bit_of_the_training_changes(tmp_path):
    results = []
    for extra in ([], [RunRecorder()]):
        host = make_host()
        trainer = fit(tmp_path / str(len(extra)), host, SSyncCallback(warmup_ratio=0.25), *extra)
        results.append({**host.state_dict(), **trainer.callback_metrics, "random": torch.get_rng_state()})
        assert not any(module._forward_hooks for module in host.modules())
    plain, recorded = results
    assert plain.keys() == recorded.keys()
    assert all(torch.equal(value, recorded[name]) for name, value in plain.items())


HOSTS = [(SlotContrast, True), (SOLV, False), (SOLV, True), (VideoSAUR, False), (DINOSAUR, True)]


@pytest.mark.parametrize(("kind", "ssync"), HOSTS)
def test_every_host_on_cached_features(tmp_path, kind, ssync):
    fit(tmp_path, make_host(kind), *[SSyncCallback(warmup_ratio=0.5)] * ssync, RunRecorder())
    assert names_in(tmp_path) == (SCORES if kind is SOLV else BOTH_MAPS)  # SOLV orders its slots anew after decoding


def test_padding_is_not_scored(tmp_path):
    items = [{**item, "batch_padding_mask": torch.tensor(index < 2)} for index, item in enumerate(videos(4, 1))]
    for name, validation in (("padded", items), ("short", items[:2])):
        fit(tmp_path / name, make_host(slot_init="learned"), RunRecorder(), validation=validation)
    assert read(tmp_path / "padded")["scores"] == read(tmp_path / "short")["scores"]


def test_a_validation_that_was_never_due_is_read_at_the_end(tmp_path):
    options = {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 100}
    fit(tmp_path, make_host(), RunRecorder(), **options)
    assert names_in(tmp_path) == BOTH_MAPS
    blind = [{"features": item["features"]} for item in videos(2, 1)]
    with pytest.raises(ConfigError, match="segmentations"):
        fit(tmp_path / "blind", make_host(), RunRecorder(), validation=blind, **options)
    assert not (tmp_path / "blind" / "evaluation.json").exists()


def test_no_validation_set_leaves_no_scores_and_other_models_are_refused(tmp_path):
    with pytest.warns(UserWarning, match="no validation set"):
        fit(tmp_path, make_host(), RunRecorder(), limit_val_batches=0)
    assert read(tmp_path)["scores"] == {}
    with pytest.raises(ConfigError, match="SlotHost"):
        fit(tmp_path, BoringModel(), RunRecorder())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [SlotContrast, SOLV])
def test_on_cuda(tmp_path, kind):
    callbacks = [SSyncCallback(warmup_ratio=0.5), RunRecorder()]
    fit(tmp_path, make_host(kind), *callbacks, accelerator="cuda", steps=30)
    assert names_in(tmp_path) >= (BOTH_MAPS if kind is SlotContrast else SCORES)
