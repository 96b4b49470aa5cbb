import io

import numpy as np
import pytest

from ssync_pl.data import video
from ssync_pl.errors import ShapeError
from ssync_pl.tools.viz import compose_frames, encode_mp4


def clip(frames: int, value: int) -> np.ndarray:
    return np.full((frames, 8, 8, 3), value, dtype=np.uint8)


def test_compose_holds_the_last_frame_of_short_clips() -> None:
    long, short = clip(3, 10), clip(1, 90)
    short[..., 1] = 10
    frames = compose_frames([[long], [short]], columns=["video"], rows=["a", "b"], cell=16)
    assert frames.shape[0] == 3
    for frame in frames:
        assert (frame == [90, 10, 90]).all(axis=-1).sum() == 16 * 16


def test_compose_refuses_captions_that_do_not_fit() -> None:
    with pytest.raises(ShapeError, match="row caption a video"):
        compose_frames([[clip(1, 0)]], columns=["a", "b"], rows=["x"])


@pytest.mark.parametrize("size", [(32, 48), (31, 47)])
def test_mp4_round_trip(size: tuple[int, int]) -> None:
    av = pytest.importorskip("av")
    values = [0, 80, 160, 240]
    frames = np.stack([np.full((*size, 3), value, dtype=np.uint8) for value in values])
    with av.open(io.BytesIO(encode_mp4(frames, fps=5))) as container:
        assert container.streams.video[0].average_rate == 5
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == 4
    assert decoded[0].shape == (32, 48, 3)
    for frame, value in zip(decoded, values, strict=True):
        assert abs(float(frame[:30, :46].mean()) - value) < 6


def test_mp4_needs_frames_and_av(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ShapeError, match="T >= 1"):
        encode_mp4(clip(0, 0))
    monkeypatch.setattr(video, "mp4_available", lambda: False)
    with pytest.raises(ModuleNotFoundError, match="pip install av"):
        encode_mp4(clip(1, 0))
