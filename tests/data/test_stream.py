import gzip
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from ssync_pl.data.dataset import BAD_SAMPLES, ShardDataset, ShardSource
from ssync_pl.data.index import load_shards, scan_shard
from ssync_pl.data.samples import SampleRules
from ssync_pl.data.shards import ShardWriter
from ssync_pl.data.stream import ShardStream
from ssync_pl.errors import ShardError

CLIPS = SampleRules(clip_length=2, flip_probability=0.5, masks=True)


@pytest.fixture
def local(make_shards):
    return sorted(str(path) for path in Path(make_shards(count=7)).parent.glob("*.tar"))


def stream(urls, entries, rules=CLIPS, batch_size=1, **options):
    return ShardStream(ShardSource(urls, entries, False), rules, batch_size=batch_size, **options)


def facts(batches):
    """All that a batch holds, by key."""
    found = {}
    for batch in batches:
        for row, key in enumerate(batch["__key__"]):
            found[key] = {name: value[row].tolist() for name, value in batch.items() if hasattr(value, "shape")}
    return found


@pytest.mark.parametrize("rules", [CLIPS, SampleRules(masks=True)], ids=["training", "evaluation"])
def test_every_way_to_read_gives_the_same_samples(local, served, tmp_path, rules):
    packed = [tmp_path / "packed" / f"{Path(path).name}.gz" for path in local]
    packed[0].parent.mkdir()
    for path, target in zip(local, packed, strict=True):
        target.write_bytes(gzip.compress(Path(path).read_bytes()))
    entries = load_shards(local)
    wanted = facts(ShardDataset(ShardSource(local, entries), rules))
    assert len(wanted) == 7
    far = [f"{served}/shards/{Path(path).name}" for path in local]
    for urls, shards in ((local, entries), (far, entries), (far, None)):
        assert facts(stream(urls, shards, rules)) == wanted
    packed_entries = [scan_shard(path, packed=True) for path in packed]
    assert [entry.samples for entry in packed_entries] == [entry.samples for entry in entries]
    if not rules.training:  # what is drawn hangs on the shard's name
        assert facts(stream([str(path) for path in packed], packed_entries, rules)) == wanted


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_pass_has_the_clips_that_were_left_and_says_what_is_lost(local, caplog, workers):
    data = stream(local, load_shards(local), SampleRules(clip_length=2), shuffle_buffer=0)
    loader = DataLoader(data, None, num_workers=workers, persistent_workers=workers > 0)
    whole = [batch["__key__"][0] for batch in loader]
    assert sorted(whole) == list("0123456")
    data.set_pass(0, start=4)
    assert "middle of pass 0" in caplog.text
    assert [batch["__key__"][0] for batch in loader] == whole[4:]
    data.set_pass(1)
    assert sorted(batch["__key__"][0] for batch in loader) == sorted(whole)


def test_without_an_index_only_one_process_reads(local, served):
    far = [f"{served}/shards/{Path(path).name}" for path in local]
    data = stream(far, None, SampleRules(), 2)
    keys = [key for worker in range(2) for batch in data.emit(worker, 2) for key in batch["__key__"]]
    assert sorted(keys) == list("0123456")
    with pytest.raises(TypeError, match="index"):
        len(data)
    with pytest.raises(ShardError, match="index"):
        stream(far, None, world=2).set_pass(0)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("rules", [SampleRules(), SampleRules(clip_length=2)], ids=["evaluation", "training"])
def test_bad_samples_raise_or_are_replaced_without_being_counted(write_tar, npy_bytes, numbered_video, rules, workers):
    good = [npy_bytes(numbered_video(number)["video.npy"]) for number in range(6)]
    path = str(write_tar({f"{n}.video.npy": data[:50] if n in (0, 3) else data for n, data in enumerate(good)}))
    with pytest.raises(ShardError, match="key 0"):
        list(stream([path], load_shards([path]), rules, shuffle_buffer=0))
    data = stream([path], load_shards([path]), rules, skip_bad=True, shuffle_buffer=0)
    batches = [batch for worker in range(workers) for batch in data.emit(worker, workers)]
    assert len(batches) == 6
    assert sorted(place[-1] for batch in batches for place, _ in batch[BAD_SAMPLES]) == ["0", "3"]
    if not rules.training:
        real = [batch["__key__"][0] for batch in batches if batch["batch_padding_mask"].all()]
        assert sorted(real) == ["1", "2", "4", "5"]
    path = str(write_tar({f"{number}.video.npy": b"x" for number in range(3)}))
    for entries in (load_shards([path]), None):
        with pytest.raises(ShardError, match="at least one readable sample"):
            list(stream([path], entries, rules, skip_bad=True))


def test_members_over_the_limit_are_bad_samples_and_not_read(write_tar, npy_bytes):
    frames, many = (npy_bytes(np.zeros((count, 8, 8, 3), np.uint8)) for count in (4, 40))
    path = str(write_tar({"0.video.npy": many, "1.video.npy.gz": gzip.compress(many), "2.video.npy": frames}))
    for rules in (SampleRules(), SampleRules(clip_length=2)):
        (batch,) = stream([path], load_shards([path]), rules, 3, skip_bad=True, max_bytes=2000)
        assert sorted(place[-1] for place, text in batch[BAD_SAMPLES] if "max_member_bytes" in text) == ["0", "1"]


def test_a_shard_and_an_index_that_do_not_belong_together_are_refused(local, tmp_path, numbered_video):
    with ShardWriter(tmp_path / "other", "train", 3) as writer:
        for key in ("0", "9"):
            writer.write(key, numbered_video(0))
    for urls in ([str(tmp_path / "other/train-000000.tar"), *local[1:]], [local[2], *local[1:]]):
        with pytest.raises(ShardError, match="do not belong together"):
            list(stream(urls, load_shards(local), SampleRules()))
