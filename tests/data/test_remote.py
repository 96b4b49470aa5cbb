import io

import pytest
from flaky_server import FlakyServer

from ssync_pl.data import remote
from ssync_pl.data.remote import RemoteFile, fetch_index, stream_shard
from ssync_pl.errors import ShardError

CONTENT = bytes(range(256)) * 600


@pytest.fixture
def flaky(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_SECONDS", 20.0)
    monkeypatch.setattr(remote, "_STALL_SECONDS", 0.4)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    (tmp_path / "a.tar").write_bytes(CONTENT)
    server = FlakyServer(tmp_path)
    yield server
    server.close()


def read(url):
    with RemoteFile(url) as raw:
        return io.BufferedReader(raw, 1 << 16).read()


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("script", [
    [], [("cut", 70_000)], [("cut", 0), ("cut", 70_000), ("stall", 1)],
    [("status", 503), ("status", 429), ("hang",)], [("stall", 140_000)],
], ids=str)  # fmt: skip
def test_broken_transfers_go_on_and_give_the_whole_file(flaky, script, ranges):
    flaky.script, flaky.ranges = list(script), ranges
    assert read(f"{flaky.url}/a.tar") == CONTENT
    assert len(script) < len(flaky.requests) <= 2 * len(script) + 1  # after a break a piece, then the rest
    if script == [("stall", 140_000)]:
        assert flaky.requests[1][1].startswith("bytes=")


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_lasting_failures_are_not_tried_again(flaky, code):
    flaky.script = [("status", code)]
    with pytest.raises(ShardError, match=r"a\.tar"):
        read(f"{flaky.url}/a.tar")
    assert len(flaky.requests) == 1


@pytest.mark.parametrize(
    ("script", "said"),
    [([("length", 5)], ""), ([("cut", 100), *[("status", 503)] * 99], "503"), ([("cut", 1)], "for good")],
    ids=["too short", "refused", "one byte per connection"],
)
def test_a_transfer_without_progress_ends_at_its_deadline(flaky, monkeypatch, script, said):
    monkeypatch.setattr(remote, "RETRY_SECONDS", 4.0)
    flaky.script = script * 20
    with pytest.raises(ShardError, match=rf"a\.tar.*{said}"):
        read(f"{flaky.url}/a.tar")
    assert len(flaky.requests) < 20


def test_a_file_that_was_replaced_meanwhile_is_refused(flaky, tmp_path):
    flaky.script = [("cut", 70_000)]
    with RemoteFile(f"{flaky.url}/a.tar") as raw:
        assert len(io.BufferedReader(raw, 1 << 16).read(60_000)) == 60_000
        (tmp_path / "a.tar").write_bytes(CONTENT[:-100])
        with pytest.raises(ShardError, match="replaced"):
            raw.read()


def test_secrets_are_neither_printed_nor_logged(flaky, caplog):
    address = flaky.url.replace("http://", "http://me:password@")
    flaky.script = [("status", 503), ("status", 403)]
    with pytest.raises(ShardError) as caught:
        list(stream_shard(f"{address}/a.tar?token=secret&x=1"))
    for text in (str(caught.value), caplog.text):
        assert "a.tar" in text
        assert "secret" not in text
        assert "password" not in text
    assert flaky.authorizations[0] is not None


def test_an_index_is_missing_or_its_server_is(flaky, make_shards, monkeypatch):
    make_shards("train", count=4, per_shard=4)
    url = f"{flaky.url}/shards/train-000000.tar"
    (entry,) = fetch_index([url])
    assert [sample.key for sample in entry.samples] == ["0", "1", "2", "3"]
    assert fetch_index([f"{flaky.url}/a.tar"]) is None
    assert fetch_index([url, f"{flaky.url}/shards/train-000077.tar"]) is None
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.1)
    flaky.script = [("status", 500)] * 5
    with pytest.raises(ShardError, match="500"):
        fetch_index([url])
