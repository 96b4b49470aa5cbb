from __future__ import annotations

import io
import socket
import sys
import tarfile
import time
import traceback

import numpy as np
import pytest
from flaky_server import FlakyServer

from ssync_pl.data.remote import RemoteReader, RetryPolicy, masked_url, open_shard
from ssync_pl.data.stream_shard import fetch_index, stream_shard
from ssync_pl.errors import ShardError

QUICK = RetryPolicy(timeout=0.4, delays=(0.01, 0.01, 0.01, 0.01))
CONTENT = bytes(np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8))


@pytest.fixture
def flaky(tmp_path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    server = FlakyServer(tmp_path)
    yield server
    server.close()


def _read(url: str, policy: RetryPolicy = QUICK) -> bytes:
    with open_shard(url, policy)[0] as stream:
        return stream.read()


def test_a_whole_file_takes_one_request(flaky):
    assert _read(f"{flaky.url}/a.tar") == CONTENT
    assert flaky.requests == [("/a.tar", None)]


@pytest.mark.parametrize("kind", ["cut", "stall"])
@pytest.mark.parametrize("at", [0, 1, 70_000])
def test_a_broken_transfer_goes_on_at_the_byte_it_reached(flaky, kind, at):
    flaky.script = [(kind, at)]
    assert _read(f"{flaky.url}/a.tar") == CONTENT
    assert flaky.requests == [("/a.tar", None), ("/a.tar", f"bytes={at}-" if at else None)]


def test_a_server_without_ranges_starts_anew(flaky):
    flaky.ranges = False
    flaky.script = [("cut", 100_000), ("cut", 50_000), ("cut", 200_000)]
    assert _read(f"{flaky.url}/a.tar") == CONTENT
    assert len(flaky.requests) == 4


def test_new_bytes_start_the_count_of_tries_afresh(flaky):
    flaky.script = [("cut", 10_000)] * 12
    assert _read(f"{flaky.url}/a.tar") == CONTENT
    assert len(flaky.requests) == 13


def test_no_progress_ends_after_all_tries(flaky):
    flaky.ranges = False
    flaky.script = [("cut", 1000)] * 9
    with pytest.raises(ShardError, match=r"at byte 1000 of 300000 it failed \(5 tries\): .*Check the connection"):
        _read(f"{flaky.url}/a.tar")
    assert len(flaky.requests) == 5


@pytest.mark.parametrize("first", [("status", 500), ("status", 503), ("status", 429), ("status", 408), ("hang",)])
def test_passing_failures_are_tried_again(flaky, first):
    flaky.script = [first]
    assert _read(f"{flaky.url}/a.tar") == CONTENT
    assert len(flaky.requests) == 2


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_lasting_failures_are_not_tried_again(flaky, code):
    flaky.script = [("status", code)] * 9
    with pytest.raises(ShardError, match=rf"{flaky.url}/a.tar to its end.* \(1 try\): the server answered {code} .*Ch"):
        _read(f"{flaky.url}/a.tar")
    assert len(flaky.requests) == 1


def test_pauses_grow_and_a_server_may_ask_for_longer_ones(flaky, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr("ssync_pl.data.remote.time.sleep", pauses.append)
    flaky.script = [("status", 500), ("status", 503, {"Retry-After": "7"}), *[("status", 500)] * 7]
    with pytest.raises(ShardError, match=r"\(5 tries\): the server answered 500"):
        _read(f"{flaky.url}/a.tar", RetryPolicy())
    assert pauses == [0.5, 7.0, 2.0, 4.0]


def test_a_wrong_length_is_refused(flaky):
    flaky.script = [("length", 10)] * 9
    with pytest.raises(ShardError, match=r"at byte 300000 of 300010 .*416.*shorter than the server said"):
        _read(f"{flaky.url}/a.tar")
    flaky.ranges = False
    flaky.script = [("length", 10)] * 9
    with pytest.raises(ShardError, match=r"\(5 tries\): "):
        _read(f"{flaky.url}/a.tar")


def test_a_length_that_is_too_short_leaves_a_damaged_tar(flaky, tmp_path):
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        info = tarfile.TarInfo("7.video.npy")
        info.size = 5000
        tar.addfile(info, io.BytesIO(bytes(5000)))
    flaky.script = [("length", -8000)]
    with pytest.raises(ShardError, match=r"b\.tar to be a whole tar, but reading it failed"):
        list(stream_shard(f"{flaky.url}/b.tar", policy=QUICK))
    assert [key for key, _ in stream_shard(f"{flaky.url}/b.tar", policy=QUICK)] == ["7"]


def test_a_file_replaced_in_between_is_refused(flaky):
    flaky.script = [("cut", 1000)]
    stream, _ = open_shard(f"{flaky.url}/a.tar", QUICK)
    assert stream.read(1000) == CONTENT[:1000]
    flaky.tag = '"2"'
    with pytest.raises(ShardError, match="replaced on the server meanwhile"):
        stream.read()


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ShardError, match=rf"127\.0\.0\.1:{port}/a\.tar.*\(5 tries\): .*refused"):
        _read(f"http://127.0.0.1:{port}/a.tar")


def test_secrets_are_not_printed(flaky):
    address = flaky.url.replace("http://", "http://me:hidden@")
    flaky.script = [("status", 404)]
    with pytest.raises(ShardError, match=r"http://me:…@127.*/a\.tar\?token=…&x=…") as caught:
        list(stream_shard(f"{address}/a.tar?token=secret&x=1", policy=QUICK))
    text = "".join(traceback.format_exception(caught.type, caught.value, caught.tb))
    assert "hidden" not in text
    assert "secret" not in str(caught.value)
    assert masked_url("/data/a?b=c.tar") == "/data/a?b=c.tar"
    assert masked_url("https://token@host/a.tar") == "https://…@host/a.tar"


def test_a_password_goes_to_its_own_host_only(flaky):
    flaky.script = [("redirect", f"{flaky.url}/a.tar")]
    assert _read(flaky.url.replace("http://", "http://me:hidden@") + "/elsewhere.tar") == CONTENT
    assert flaky.authorizations == ["Basic bWU6aGlkZGVu", None]


def _program(script: str, *arguments: str):
    from webdataset.gopen import Pipe

    command = [sys.executable, "-S", "-c", script, *arguments]
    return lambda url, mode, bufsize: Pipe(command, mode=mode, bufsize=bufsize)


@pytest.fixture
def scheme(monkeypatch):
    gopen = pytest.importorskip("webdataset.gopen")

    def install(opener):
        monkeypatch.setitem(gopen.gopen_schemes, "sftp", opener)

    return install


def test_other_schemes_are_read_again_from_the_start(scheme, tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    half = "import os, sys; data = open(sys.argv[1], 'rb').read(); seen = sys.argv[1] + '.seen'\n"
    half += "first = not os.path.exists(seen); open(seen, 'w').close()\n"
    half += "sys.stdout.buffer.write(data[:200_000] if first else data); sys.exit(first)"
    scheme(_program(half, str(tmp_path / "a")))
    assert _read("sftp://host/a.tar", RetryPolicy(timeout=10, delays=(0.0,))) == CONTENT


def test_a_program_that_fails_or_stalls_is_named_without_its_command(scheme, monkeypatch, tmp_path):
    scheme(_program("import sys; sys.exit(22)", "secret"))
    with pytest.raises(ShardError, match=r"\(2 tries\): the program that reads sftp ended with status 22\.") as caught:
        _read("sftp://host/a.tar", RetryPolicy(timeout=10, delays=(0.0,)))
    text = "".join(traceback.format_exception(caught.type, caught.value, caught.tb))
    assert "secret" not in text
    scheme(_program("import time; time.sleep(60)"))
    began = time.monotonic()
    with pytest.raises(ShardError, match=r"\(2 tries\): no byte for 0\.4 s"):
        _read("sftp://host/a.tar", RetryPolicy(timeout=0.4, delays=(0.0,)))
    assert time.monotonic() - began < 20
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ShardError, match=r"\(1 try\): .*Install the program that reads this scheme \(gsutil\)"):
        _read("gs://bucket/a.tar", QUICK)


def test_leaving_early_ends_the_program(scheme):
    scheme(_program("import sys\nwhile True: sys.stdout.buffer.write(bytes(100_000))"))
    reader = RemoteReader("sftp://host/a.tar", RetryPolicy(timeout=10))
    assert len(reader.read(10)) == 10
    process = reader._source.proc
    reader.close()
    assert process.poll() is not None


def test_commands_and_unknown_schemes_are_refused():
    with pytest.raises(ShardError, match=r"`pipe:` runs any command and is refused"):
        _read("pipe://cat a.tar")
    with pytest.raises(ShardError, match=r"\(1 try\): .*no gopen handler.*for example https"):
        _read("nothing://host/a.tar")


def test_an_index_is_missing_or_the_server_is(flaky, tmp_path, caplog):
    url = f"{flaky.url}/a.tar"
    assert fetch_index([url], QUICK) is None
    flaky.script = [("status", 403)]
    assert fetch_index([url], QUICK) is None
    flaky.script = [("status", 500)] * 9
    with pytest.raises(ShardError, match=r"index\.json to its end.*\(5 tries\): the server answered 500"):
        fetch_index([url], QUICK)
    flaky.script = []
    (tmp_path / "index.json").write_text("{}")
    assert fetch_index([url], QUICK) is None
    assert "Ignoring" in caplog.text
