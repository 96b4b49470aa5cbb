import os

import numpy as np
import pytest
import torch

from ssync_pl.data.features.cache import cache_features
from ssync_pl.data.features.projection import Projection, fit_projection, read_projection
from ssync_pl.data.features.store import FeatureStore
from ssync_pl.errors import ConfigError, ShardError

SIZE = (8, 12)


def noise(layers=(3, 5)):
    """Correlated channels of very different scale and offset."""
    generator = np.random.default_rng(0)
    dim = sum(layers)
    mixed = generator.normal(size=(4000, dim)) @ generator.normal(size=(dim, dim))
    return (mixed * 10.0 ** generator.uniform(-3, 3, dim) + generator.normal(size=dim) * 50).astype(np.float32)


def fitted(data, layers, components, pieces=7):
    batches = (torch.from_numpy(piece)[:, None] for piece in np.array_split(data, pieces))
    return fit_projection(batches, layers, components)


@pytest.mark.parametrize("components", [1, 4, 8])
def test_the_map_is_that_of_sklearn(components):
    decomposition = pytest.importorskip("sklearn.decomposition")
    data, layers = noise(), (3, 5)
    projection = fitted(data, layers, components)
    standard = (data.astype(np.float64) - data.mean(0, dtype=np.float64)) / data.std(0, dtype=np.float64)
    standard /= np.repeat(np.sqrt(layers), layers)
    pca = decomposition.PCA(components, svd_solver="full").fit(standard)
    wanted = pca.transform(standard)
    wanted /= np.sqrt((wanted**2).mean())
    ours = projection(torch.from_numpy(data)).numpy()
    np.testing.assert_allclose(ours * np.sign((ours * wanted).sum(0)), wanted, atol=2e-3)
    assert (ours**2).mean() == pytest.approx(1.0, abs=1e-4)
    assert projection.info["explained"] == pytest.approx(pca.explained_variance_ratio_.sum(), abs=1e-6)
    assert (projection.info["components"], projection.info["frames"]) == (components, 4000)


def test_a_file_gives_the_projection_back_or_is_refused(tmp_path, monkeypatch):
    projection, path = fitted(noise(), (3, 5), 4), tmp_path / "projection.npz"
    with pytest.raises(ShardError, match="No such file"):
        read_projection(path)
    content = projection.pack()
    path.write_bytes(content)
    found = read_projection(path)
    assert torch.equal(found.mean, projection.mean)
    assert torch.equal(found.matrix, projection.matrix)
    assert (found.fingerprint, found.info) == (projection.fingerprint, projection.info)
    assert Projection(found.mean, found.matrix + 1, {}).fingerprint != found.fingerprint
    flat = Projection(found.mean, found.mean, found.info).pack()
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    pickled = np.array([{"a": 1}], object)
    np.savez(tmp_path / "pickled.npz", mean=pickled, matrix=pickled, info=pickled, allow_pickle=True)
    monkeypatch.setattr("ssync_pl.data.features.projection.MAX_MEMBER_BYTES", 10_000)
    np.savez_compressed(tmp_path / "bomb.npz", info=np.frombuffer(b"{}", np.uint8), mean=np.zeros(9000), matrix=1)
    others = [(tmp_path / name).read_bytes() for name in ("other.npz", "pickled.npz", "bomb.npz")]
    for damaged in (b"", b"text", content[: len(content) // 2], flat, *others):
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match=r"projection\.npz to (be a projection|take at most)"):
            read_projection(path)


def test_stored_features_are_projected(make_videos, sources, backbone, tmp_path):
    shards, stores = make_videos(), {}
    settings = {"image_size": SIZE, "resize_mode": "bicubic", "crop": "none"}
    for name, options in (("plain", {}), ("out", {"components": 3, "flips": True})):
        cache_features(shards, backbone, tmp_path / name, image_size=SIZE, **options)
        stores[name] = FeatureStore(tmp_path / name, sources(shards), flips=bool(options), **settings)
    projection, recipe = read_projection(tmp_path / "out" / "projection.npz"), stores["out"].recipe
    assert (recipe.dim, recipe.components, recipe.projection) == (3, 3, projection.fingerprint)
    assert projection.info["frames"] == 25
    assert [source["name"] for source in projection.info["sources"]] == [os.path.basename(path) for path in shards]
    everything = []
    for path, entry in sources(shards):
        for sample in entry.samples:
            plain, ours = (stores[name].read(path, sample.key, slice(None), False)["features"] for name in stores)
            torch.testing.assert_close(ours.float(), projection(plain), rtol=0.02, atol=0.03)
            everything.append(ours.flatten(0, 1).float())
    # So few frames are all in the sample, so the mean square over them is 1.
    assert torch.cat(everything).square().mean().item() == pytest.approx(1.0, abs=0.02)
    assert stores["out"].read(shards[0], "000", slice(None), True)["features"].shape == (3, 6, 3)
    cache_features(shards[1:], backbone, tmp_path / "b", image_size=SIZE, components=3, flips=True)
    os.replace(tmp_path / "b" / "train-000002.tar", tmp_path / "out" / "train-000002.tar")
    with pytest.raises(ConfigError, match=r"train-000002.tar .*projection: "):
        FeatureStore(tmp_path / "out", sources(shards), flips=False, **settings)
