from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from ssync_pl.data.convert import ConversionReport
from ssync_pl.data.convert.options import add_common, common, encode_video, print_report
from ssync_pl.data.decode import decode_member
from ssync_pl.errors import ConfigError, ShardError


def _parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_common(parser)
    return parser.parse_args(["--out", "out", *words])


def test_common_options_become_arguments() -> None:
    assert common(_parse()) == {
        "samples_per_shard": 32,
        "num_workers": None,
        "on_bad_sample": "raise",
        "progress": True,
    }
    words = ["--workers", "3", "--samples-per-shard", "8", "--on-bad-sample", "skip", "--no-progress"]
    assert common(_parse(*words)) == {
        "samples_per_shard": 8,
        "num_workers": 3,
        "on_bad_sample": "skip",
        "progress": False,
    }
    assert _parse("--video-format", "mp4").video_format == "mp4"


@pytest.mark.parametrize("words", [("--workers", "-1"), ("--samples-per-shard", "0")])
def test_numbers_out_of_range_name_the_option(words: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"Expected {words[0]} to be .*, but got {words[1]}"):
        common(_parse(*words))


def test_mp4_holds_the_frames_and_refuses_odd_sizes() -> None:
    pytest.importorskip("av")
    video = np.full((5, 16, 32, 3), 120, np.uint8)
    members = encode_video(video, "mp4", "clip.avi", fps=25)
    assert list(members) == ["video.mp4"]
    decoded = decode_member("video.mp4", members["video.mp4"])
    assert decoded.shape == video.shape
    assert np.abs(decoded.astype(int) - 120).max() <= 3
    with pytest.raises(ShardError, match=r"clip.avi has 15 x 32, and a padded video would not fit its masks"):
        encode_video(video[:, :15], "mp4", "clip.avi")


def test_mp4_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssync_pl.data.video.mp4_available", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install .ssync-pl\[video\]"):
        encode_video(np.zeros((1, 8, 8, 3), np.uint8), "mp4", "clip.avi")


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="one of npy, mp4, but got webm"):
        encode_video(np.zeros((1, 8, 8, 3), np.uint8), "webm", "clip.avi")


@pytest.mark.parametrize(("numbers", "pattern"), [((0, 1, 2), "{000000..000002}"), ((0, 2), "*"), ((1,), "000001")])
def test_the_report_names_the_shards(
    numbers: tuple[int, ...], pattern: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = tuple(Path("out", f"my-clips-{number:06d}.tar") for number in numbers)
    print_report(ConversionReport(paths, 1, 2, {"000004": "Bad.", "000001": "Worse."}, 24, 2_500_000))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("my-clips: 1 video, 24 frames, 2.5 MB in ")
    assert lines[0].endswith(", of which 2 were there already")
    assert lines[1:] == [
        f"  shards: {Path('out')}/my-clips-{pattern}.tar",
        "  skipped 2 videos:",
        "    000001: Worse.",
        "    000004: Bad.",
    ]
