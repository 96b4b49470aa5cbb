"""k-means on features of patches."""

import pytest
import torch

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.tools.baselines import kmeans_rgb
from ssync_pl.tools.feature_kmeans import kmeans_features


def test_three_channels_are_clustered_as_colours_are():
    video = torch.rand(2, 3, 3, 4, 5)
    features = video.flatten(3).transpose(2, 3)
    assert torch.equal(kmeans_features(features, (4, 5), 4), kmeans_rgb(video, 4))


def test_position_splits_what_looks_alike():
    features = torch.ones(1, 2, 16, 3)
    labels = kmeans_features(features, (4, 4), 2, position_weight=1.0)
    assert labels.shape == (1, 2, 4, 4)
    assert labels.unique().tolist() == [0, 1]
    assert torch.equal(labels[:, 0], labels[:, 1])
    assert kmeans_features(features, (4, 4), 2).unique().numel() == 1


def test_padded_frames_do_not_shape_the_clusters():
    features = torch.rand(1, 2, 16, 3)
    mask = torch.tensor([[True, False]])
    other = torch.cat([features[:, :1], 100 * features[:, 1:]], dim=1)
    ours, theirs = (kmeans_features(one, (4, 4), 3, frame_mask=mask)[:, 0] for one in (features, other))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("shape", "options", "error", "message"),
    [
        ((2, 16, 3), {}, ShapeError, "to be float"),
        ((1, 2, 15, 3), {}, ShapeError, r"N = 4 \* 4"),
        ((1, 2, 16, 3), {"num_clusters": 0}, ConfigError, "num_clusters >= 1"),
        ((1, 2, 16, 3), {"num_clusters": 33}, ShapeError, "at least 33 points"),
        ((1, 2, 16, 3), {"frame_mask": torch.ones(1, 3, dtype=torch.bool)}, ShapeError, "frame_mask"),
    ],
)
def test_what_does_not_fit_is_refused(shape, options, error, message):
    with pytest.raises(error, match=message):
        kmeans_features(torch.rand(shape), (4, 4), **{"num_clusters": 2, **options})
