"""Projected features: the map against scikit-learn's, and one map a folder."""

import json
import os
import threading

import numpy as np
import pytest
import torch

from ssync_pl.data.features import FeatureStore, cache_features, decode_features, read_projection, verify_backbone
from ssync_pl.data.features.projection import Moments, Projection, fit_projection, pack_projection
from ssync_pl.data.shards import ShardWriter
from ssync_pl.errors import ConfigError, ShardError

SIZE = (8, 12)


def run(shards, backbone, out, **options):
    return cache_features(shards, backbone, out, **{"image_size": SIZE, "progress": False, **options})


def values(sources, out, key="000", shard=None):
    store = FeatureStore(out, sources, image_size=SIZE, resize_mode="bicubic", crop="none", flips=False)
    return decode_features(store.read(shard or sources[0][0], key, slice(None), False))


def noise(count=4000, layers=(3, 5), seed=0):
    """Correlated channels of very different scale and offset."""
    generator = np.random.default_rng(seed)
    dim = sum(layers)
    mixed = generator.normal(size=(count, dim)) @ generator.normal(size=(dim, dim))
    return (mixed * 10.0 ** generator.uniform(-3, 3, dim) + generator.normal(size=dim) * 50).astype(np.float32)


def fitted(data, layers, components, pieces=7):
    moments = Moments(data.shape[1])
    for piece in np.array_split(data, pieces):
        moments.update(torch.from_numpy(piece))
    return fit_projection(moments, layers, components)


def weighted(data, layers):
    standard = (data.astype(np.float64) - data.mean(0, dtype=np.float64)) / data.std(0, dtype=np.float64)
    return standard / np.repeat(np.sqrt(layers), layers)


@pytest.mark.parametrize("components", [1, 4, 8])
def test_the_map_is_that_of_sklearn(components):
    decomposition = pytest.importorskip("sklearn.decomposition")
    data, layers = noise(), (3, 5)
    projection = fitted(data, layers, components)
    pca = decomposition.PCA(components, svd_solver="full").fit(weighted(data, layers))
    wanted = pca.transform(weighted(data, layers))
    wanted /= np.sqrt((wanted**2).mean())
    ours = projection(torch.from_numpy(data)).numpy()
    signs = np.sign((ours * wanted).sum(0))
    np.testing.assert_allclose(ours * signs, wanted, atol=2e-3)
    assert (ours**2).mean() == pytest.approx(1.0, abs=1e-4)
    assert projection.info["explained"] == pytest.approx(pca.explained_variance_ratio_.sum(), abs=1e-6)
    assert projection.components == components


def test_batches_do_not_matter_and_large_offsets_do_no_harm():
    data = noise() + 1e4
    one, many = fitted(data, (8,), 4, pieces=1), fitted(data, (8,), 4, pieces=400)
    torch.testing.assert_close(one.matrix, many.matrix, rtol=1e-4, atol=1e-6)
    moments = Moments(8)
    moments.update(torch.from_numpy(data))
    np.testing.assert_allclose(moments.covariance().numpy(), np.cov(data.astype(np.float64).T, bias=True), rtol=1e-6)


def test_constant_channels_are_dropped():
    data = noise(layers=(8,))
    data[:, 2] = 7.25
    projection = fitted(data, (8,), 7)
    assert not projection.matrix[2].any()
    assert bool(projection.matrix.isfinite().all())
    with pytest.raises(ConfigError, match=r"`components` to be at most 7, .* but got 8"):
        fitted(data, (8,), 8)
    with pytest.raises(ConfigError, match="Expected features that vary"):
        fitted(np.full((10, 3), 5.0, np.float32), (3,), 1)
    with pytest.raises(ConfigError, match="from 1 to the 8 channels, but got 9"):
        fitted(data, (8,), 9)


def test_a_file_gives_the_projection_back(tmp_path):
    projection = fitted(noise(), (3, 5), 4)
    path = tmp_path / "projection.npz"
    path.write_bytes(pack_projection(projection))
    found = read_projection(path)
    assert torch.equal(found.mean, projection.mean)
    assert torch.equal(found.matrix, projection.matrix)
    assert found.fingerprint == projection.fingerprint
    assert found.info == projection.info
    assert Projection(found.mean, found.matrix + 1).fingerprint != found.fingerprint


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "projection.npz"
    with pytest.raises(ConfigError, match="no such file"):
        read_projection(path)
    content = pack_projection(fitted(noise(), (3, 5), 4))
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    pickled = np.array([{"a": 1}], object)
    np.savez(tmp_path / "pickled.npz", mean=pickled, matrix=pickled, info=pickled, allow_pickle=True)
    others = [(tmp_path / name).read_bytes() for name in ("other.npz", "pickled.npz")]
    for damaged in (b"", b"text", content[: len(content) // 2], *others):
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match="to be a projection of features"):
            read_projection(path)


def test_stored_features_are_projected(make_videos, sources, backbone, tmp_path):
    shards = make_videos()
    run(shards, backbone, tmp_path / "plain")
    report = run(shards, backbone, tmp_path / "out", components=3)
    assert (report.written, report.videos) == (3, 5)
    projection = read_projection(tmp_path / "out" / "projection.npz")
    homes = {sample.key: path for path, entry in sources(shards) for sample in entry.samples}
    everything = []
    for key, home in homes.items():
        ours = values(sources(shards), tmp_path / "out", key, home)
        everything.append(ours.flatten(0, 1))
        wanted = projection(values(sources(shards), tmp_path / "plain", key, home))
        torch.testing.assert_close(ours, wanted, rtol=0.02, atol=0.03)
    # So few frames are all in the sample: the mean square over them is 1, their covariance diagonal.
    together = torch.cat(everything).double()
    assert together.square().mean().item() == pytest.approx(1.0, abs=0.02)
    covariance = together.T.cov(correction=0)
    assert (covariance - covariance.diagonal().diag()).abs().max() < 0.02
    assert covariance.diagonal().tolist() == sorted(covariance.diagonal().tolist(), reverse=True)


def test_the_recipe_says_so(make_videos, sources, backbone, tmp_path):
    shards = make_videos(2)
    run(shards, backbone, tmp_path / "out", components=3, dtype="int8", flips=True)
    store = FeatureStore(
        tmp_path / "out", sources(shards), image_size=SIZE, resize_mode="bicubic", crop="none", flips=True
    )
    projection = read_projection(tmp_path / "out" / "projection.npz")
    assert (store.dim, store.recipe["dim"], store.recipe["components"]) == (3, 3, 3)
    assert store.recipe["projection"] == projection.fingerprint
    assert decode_features(store.read(shards[0], "000", slice(None), True)).shape == (3, 6, 3)
    assert projection.info["frames"] == 7
    assert [source["name"] for source in projection.info["sources"]] == ["train-000000.tar"]
    with pytest.raises(ConfigError, match=r"projected to 3 components\. Set `backbone: null` and `feature_dim: 3`"):
        verify_backbone(store.recipe, backbone)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["recipe"]["features"]["components"] == 3


def test_validation_takes_the_projection_of_training(make_videos, sources, backbone, tmp_path):
    train, validation = make_videos(), make_videos(2, prefix="validation")
    run(train, backbone, tmp_path / "out", components=3)
    before = (tmp_path / "out" / "projection.npz").read_bytes()
    run(validation, backbone, tmp_path / "out", components=3)
    assert (tmp_path / "out" / "projection.npz").read_bytes() == before
    run(validation, backbone, tmp_path / "alone", components=3)
    assert (tmp_path / "alone" / "projection.npz").read_bytes() != before


def test_another_projection_needs_another_folder(make_videos, make_backbone, backbone, tmp_path):
    train, validation = make_videos(), make_videos(2, prefix="validation")
    out = tmp_path / "out"
    run(train, backbone, out, components=3)
    run(validation, backbone, tmp_path / "other", components=3)
    for options, match in (
        ({"components": 2}, "2 components wanted, 3 there"),
        ({"components": 3, "image_size": 16}, r"image_size: \(16, 16\) here, \(8, 12\) there"),
        ({"components": 3, "dtype": "int8"}, "dtype: int8 here, bf16 there"),
        ({}, r"3 components of 5 channels, .* of the variance, fitted to 25 frames"),
    ):
        with pytest.raises(ConfigError, match=match):
            run(validation, backbone, out, **options)
    with pytest.raises(ConfigError, match="weights: "):
        run(validation, make_backbone(seed=1), out, components=3)
    run(train, backbone, tmp_path / "plain")
    with pytest.raises(ConfigError, match="holds features as the backbone gave them"):
        run(train, backbone, tmp_path / "plain", components=3)
    assert not (tmp_path / "plain" / "projection.npz").exists()


def test_shards_of_different_projections_do_not_open(make_videos, sources, backbone, tmp_path):
    shards = make_videos()
    run(shards, backbone, tmp_path / "out", components=3)
    run(shards[1:], backbone, tmp_path / "other", components=3)
    os.replace(tmp_path / "other" / "train-000002.tar", tmp_path / "out" / "train-000002.tar")
    with pytest.raises(ShardError, match=r"made alike, but train-000002.tar .*projection: "):
        values(sources(shards), tmp_path / "out")


def test_a_lost_projection_is_asked_for(make_videos, backbone, tmp_path):
    shards = make_videos()
    path = tmp_path / "out" / "projection.npz"
    run(shards[:1], backbone, tmp_path / "out", components=3)
    os.replace(path, tmp_path / "kept.npz")
    with pytest.raises(ConfigError, match=r"projection\.npz .* is missing"):
        run(shards, backbone, tmp_path / "out", components=3)
    assert not path.exists()
    os.replace(tmp_path / "kept.npz", path)
    assert run(shards, backbone, tmp_path / "out", components=3).written == 2


@pytest.mark.parametrize("call", [1, 2, 4, 6, 8])
def test_goes_on_after_a_kill(make_videos, make_backbone, tmp_path, call):
    """Killed while it fits, or later: the next call gives the same bytes as one run."""
    shards = make_videos()
    dying = make_backbone()
    extract, calls = dying.extract, []

    def die(frames):
        calls.append(len(frames))
        if len(calls) == call:
            raise KeyboardInterrupt
        return extract(frames)

    dying.extract = die
    with pytest.raises(KeyboardInterrupt):
        run(shards, dying, tmp_path / "out", batch_size=8, components=3)
    # 25 frames in the sample: four batches.
    assert (tmp_path / "out" / "projection.npz").exists() == (call > 4)
    assert not list((tmp_path / "out").glob(".*.tmp"))
    run(shards, make_backbone(), tmp_path / "out", batch_size=8, components=3)
    run(shards, make_backbone(), tmp_path / "whole", batch_size=8, components=3)
    for path in [*(tmp_path / "whole").glob("*.tar"), tmp_path / "whole" / "projection.npz"]:
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_a_full_disk_leaves_nothing(make_videos, backbone, tmp_path, monkeypatch):
    shards = make_videos(2)

    def full(projection):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ssync_pl.data.features.settle.pack_projection", full)
    with pytest.raises(ShardError, match=r"Expected to write features to .* No space left"):
        run(shards, backbone, tmp_path / "out", components=3)
    assert os.listdir(tmp_path / "out") == [".verified.json"]


def test_two_at_once_share_one_projection(make_videos, make_backbone, sources, tmp_path):
    """While one fits, another with other shards waits and then takes the same map."""
    shards = make_videos()
    slow, other = make_backbone(), make_backbone()
    extract, started, release = slow.extract, threading.Event(), threading.Event()

    def wait(frames):
        started.set()
        assert release.wait(60)
        return extract(frames)

    slow.extract = wait
    first = threading.Thread(target=lambda: run(shards[:1], slow, tmp_path / "out", components=3))
    second = threading.Thread(target=lambda: run(shards[1:], other, tmp_path / "out", components=3))
    first.start()
    assert started.wait(60)
    second.start()
    second.join(0.5)
    assert second.is_alive()
    assert os.listdir(tmp_path / "out") == [".projection.npz.lock"]
    release.set()
    first.join(60)
    second.join(60)
    projection = read_projection(tmp_path / "out" / "projection.npz")
    assert [source["name"] for source in projection.info["sources"]] == ["train-000000.tar"]
    values(sources(shards), tmp_path / "out")


@pytest.mark.parametrize("options", [{}, {"on_bad_sample": "skip"}])
def test_bad_videos_are_refused_or_left_out(backbone, tmp_path, options):
    with ShardWriter(tmp_path / "videos", "train") as writer:
        generator = np.random.default_rng(0)
        writer.write("0", {"video.npy": generator.integers(0, 256, (5, 12, 16, 3), dtype=np.uint8)})
        writer.write("1", {"video.npy": np.zeros((4, 16, 16, 3), np.int64)})
    shards = [str(tmp_path / "videos" / "train-000000.tar")]
    if options:
        report = run(shards, backbone, tmp_path / "out", components=2, **options)
        assert (report.videos, len(report.skipped)) == (1, 1)
        assert read_projection(tmp_path / "out" / "projection.npz").info["frames"] == 5
    else:
        with pytest.raises(ShardError, match="key 1 to be uint8 frames"):
            run(shards, backbone, tmp_path / "out", components=2)
        assert not (tmp_path / "out" / "projection.npz").exists()


def test_features_that_are_not_finite_are_refused(make_videos, backbone, tmp_path):
    with torch.no_grad():
        backbone.model.bias[1] = float("nan")
    with pytest.raises(ShardError, match="to give finite features"):
        run(make_videos(1), backbone, tmp_path / "out", components=2)
    assert not (tmp_path / "out" / "projection.npz").exists()
