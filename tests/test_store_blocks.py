"""The codecs of blocks: nothing is changed, nothing hostile gets through, nothing large is unfolded."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import codec_oracle
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from heapledger.errors import TraceError
from heapledger.store import _codec, blocks, planes
from heapledger.store.events import COLUMNS, Events

NASTY = st.one_of(
    st.integers(0, 2**64 - 1),
    st.sampled_from([0, 1, 255, 256, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]),
    st.integers(0x5555_0000_0000, 0x5555_0010_0000),
)


@st.composite
def any_events(draw: st.DrawFn) -> Events:
    count = draw(st.integers(0, 60))
    events = Events.empty(count)
    for name, dtype in COLUMNS.items():
        top = np.iinfo(dtype).max
        values = draw(st.lists(NASTY.map(lambda v, top=top: v & int(top)), min_size=count, max_size=count))
        setattr(events, name, np.array(values, dtype))
    return events


def program(count: int, seed: int = 1, threads: int = 1) -> Events:
    """Events as a program makes them: sizes by site, addresses that come back, loops, frees in many orders; and now and
    then what no program does."""
    random = np.random.default_rng(seed)
    rows: list[tuple[int, ...]] = []
    live: list[tuple[int, int]] = []
    free: dict[int, list[int]] = {}
    top, seq, now = 0x5555_5555_0000, 1, 10**9

    def take(size: int) -> tuple[int, int]:
        nonlocal top
        chunk = max((size + 23) & ~15, 32)
        bin_ = free.setdefault(chunk, [])
        if bin_ and random.random() < 0.9:
            return bin_.pop(-1 if random.random() < 0.8 else random.integers(len(bin_))), chunk | 1
        top += chunk + (int(random.integers(1, 1 << 30)) * 8 if random.random() < 0.05 else 0)
        return top - chunk, chunk | int(random.choice([1, 1, 1, 0, 5]))

    while len(rows) < count:
        now += int(random.integers(0, 5000)) * (len(rows) % 8 == 0)
        thread, kind = int(random.integers(threads)), int(random.choice([1, 1, 1, 2, 3, 4, 4, 4, 4, 16]))
        site = int(random.integers(1, 40))
        size, addr, arg, arg2, word = (24, 100, 1000)[site % 3] + (site % 2) * int(random.integers(40)), 0, 0, 0, 0
        if kind in (3, 4) and live and random.random() < 0.95:
            at = int(random.choice([len(live) - 1, max(len(live) - 2, 0), 0, random.integers(len(live))]))
            old, old_word = live.pop(at)
            free.setdefault(old_word & ~7, []).append(old)
            arg, arg2 = (old, old_word) if kind == 3 else (0, 0)
            addr, word = old, old_word
        elif kind == 4:
            addr, word = (int(random.integers(1 << 44)) * 16, 33) if random.random() < 0.5 else (0, 0)
        if kind in (1, 2, 3):
            size = size * 4 if kind == 2 else size
            arg = size // 4 if kind == 2 else arg
            addr, word = take(size)
            live.append((addr, word))
        elif kind == 16:
            addr, size, arg2, word = top + 4096 * site, 4096 * site, 3, site % 2
        else:
            size = 0
        exit_ = 0 if random.random() < 0.01 else seq + 1 + 2 * int(random.random() < 0.05)
        rows.append((kind, thread, now, seq, exit_, addr, size, arg, arg2, word, 100 * kind + site))
        seq += 2 + int(random.random() < 0.02)
    table = np.array(rows, np.uint64).reshape(-1, len(COLUMNS))
    return Events(**{name: table[:, i].astype(dtype) for i, (name, dtype) in enumerate(COLUMNS.items())})


def same(left: Events, right: Events) -> bool:
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in COLUMNS)


def packed(streams: blocks.Streams, what: str, count: int) -> tuple[int, int, bytes]:
    """(count, crc, blob) with a right checksum, whatever the streams hold."""
    blob = blocks.Packer().pack(streams)
    return count, blocks.checksum(what, count, blob), blob


def encoded(events: Events) -> tuple[int, int, bytes]:
    return packed(blocks.encode_events(events).streams, "events", len(events))


# ---- events


@given(any_events())
@settings(max_examples=80, deadline=None)
def test_any_events_come_back_as_they_were(events: Events) -> None:
    decoded = blocks.decode_events(*encoded(events))
    assert same(events, decoded)
    for name, dtype in COLUMNS.items():
        assert getattr(decoded, name).dtype == dtype


@given(any_events(), st.sets(st.sampled_from(sorted(COLUMNS))))
@settings(max_examples=40, deadline=None)
def test_a_wanted_column_is_the_same_alone_and_the_others_are_zero(events: Events, wanted: set[str]) -> None:
    decoded = blocks.decode_events(*encoded(events), wanted)
    for name in COLUMNS:
        expected = getattr(events, name) if name in wanted else np.zeros(len(events))
        assert np.array_equal(getattr(decoded, name), expected), name


@pytest.mark.parametrize("threads", [1, 3, 20])
def test_a_program_comes_back_and_the_plain_decoder_reads_the_same(threads: int) -> None:
    for seed in range(4):
        events = program(3000, seed, threads)
        block = blocks.encode_events(events)
        assert same(blocks.decode_events(*encoded(events)), events)
        oracle = codec_oracle.Block(dict(block.streams), len(events)).columns
        assert {name: getattr(events, name).tolist() for name in COLUMNS} == oracle


@given(any_events())
@settings(max_examples=20, deadline=None)
def test_the_plain_decoder_reads_any_events(events: Events) -> None:
    oracle = codec_oracle.Block(dict(blocks.encode_events(events).streams), len(events)).columns
    assert {name: getattr(events, name).tolist() for name in COLUMNS} == oracle


def test_a_program_uses_every_way_to_say_where_a_block_is() -> None:
    """So that the tests above mean something."""
    events = program(20_000)
    streams = dict(blocks.encode_events(events).streams)
    code = np.frombuffer(streams["code"], np.uint8)
    for kinds, places in (([1, 2, 3], range(6)), ([4], range(7))):
        found = set((code[np.isin(events.kind, kinds)] >> 2 & 7).tolist())
        assert found >= set(places)
    assert set((code & 3).tolist()) == {0, 1, 2, 3}
    assert streams.keys() == {name for names in blocks.STREAMS_OF.values() for name in names} - {"thread"}


def test_blocks_do_not_depend_on_what_was_encoded_before() -> None:
    first, second = program(5000, 1), program(5000, 2)
    alone = blocks.encode_events(second).streams
    blocks.encode_events(first)
    assert blocks.encode_events(second).streams == alone


def test_a_full_block_of_distinct_stacks_and_addresses_comes_back() -> None:
    """Every table of the codec overflows or wraps."""
    events = Events.empty(blocks.BLOCK_EVENTS)
    numbers = np.arange(blocks.BLOCK_EVENTS, dtype=np.uint64)
    events.kind[:] = 3
    events.stack[:] = numbers * np.uint64(7919) % np.uint64(65_537)
    events.addr, events.arg = numbers * np.uint64(4096) + np.uint64(16), numbers * np.uint64(8192) + np.uint64(32)
    events.time = numbers**2 * np.uint64(1 << 33)
    events.word, events.arg2 = numbers * np.uint64(99991), numbers * np.uint64(1 << 40)
    events.thread[:] = numbers % np.uint64(1000)
    assert same(blocks.decode_events(*encoded(events)), events)
    usual = Events.concat([program(8192, 5, 2)] * 8)
    assert same(blocks.decode_events(*encoded(usual)), usual)


def test_the_example_of_the_documentation() -> None:
    """Golden bytes, so that the format cannot drift: malloc(24) twice and the free of the second."""
    events = Events.empty(3)
    events.kind[:] = [1, 1, 4]
    events.seq[:], events.seq_exit[:] = [1, 3, 5], [2, 4, 6]
    events.time[:] = 1000
    events.addr[:] = [0x5000, 0x5020, 0x5020]
    events.size[:], events.word[:], events.stack[:] = [24, 24, 0], 0x21, [7, 7, 9]
    streams = {name: data.hex(" ") for name, data in blocks.encode_events(events).streams}
    assert streams == EXAMPLE


EXAMPLE = {
    "code": "77 08 03",
    "site": "ff ff ff ff",
    "new": "0e 01 04 04",
    "size": "18 00",
    "word": "21 00",
    "far": "00 0a 00 00",
    "gap": "00",
    "time": "d0 07",
    "seq": "00 02 00",
}


def test_what_can_be_predicted_takes_nothing() -> None:
    """The same loop over and over: nothing but a code an event, and zstd makes nothing of that."""
    events = program(60)
    again = Events.concat([events] * 1000)
    again.seq = np.arange(1, 2 * len(again), 2, dtype=np.uint64)
    again.seq_exit = again.seq + np.uint64(1)
    again.time[:] = 5
    count, _, blob = encoded(again)
    assert len(blob) / count < 0.3


# ---- damage and harm


def test_each_flipped_bit_of_a_blob_is_noticed() -> None:
    count, crc, blob = encoded(program(300))
    for at in range(0, 8 * len(blob), 1 + len(blob) // 100):
        flipped = bytearray(blob)
        flipped[at // 8] ^= 1 << at % 8
        with pytest.raises(TraceError, match="checksum"):
            blocks.decode_events(count, crc, bytes(flipped))
    for other in (count - 1, count + 1):
        with pytest.raises(TraceError, match="checksum"):
            blocks.decode_events(other, crc, blob)
    with pytest.raises(TraceError, match="checksum"):
        blocks.decode_nodes(count, crc, blob)


@given(st.integers(0, 2**32), st.data())
@settings(max_examples=150, deadline=None)
def test_hostile_streams_are_refused_or_read_as_some_events(seed: int, data: st.DataObject) -> None:
    """With right checksums: what is wrong is found by the decoder."""
    events = program(200, seed % 8, 1 + seed % 3)
    streams = dict(blocks.encode_events(events).streams)
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from(sorted(streams)))
        content = bytearray(streams[name])
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        streams[name] = bytes(content)
    with contextlib.suppress(TraceError):
        assert len(blocks.decode_events(*packed(list(streams.items()), "events", len(events)))) == len(events)


def test_hostile_streams_do_not_touch_other_memory(native: Callable[..., Path]) -> None:
    """The decoders under the address and undefined behaviour sanitizers, with streams that are changed at random."""
    store = Path(blocks.__file__).parent
    sources = [str(store / name) for name in ("codec.c", "codec_decode.c", "node_codec.c")]
    flags = ("-O1", "-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{store}", *sources)
    try:
        fuzz = native("codec_fuzz.c", *flags)
    except subprocess.CalledProcessError:
        pytest.skip("the compiler has no sanitizers here")
    environment = {**os.environ, "LD_PRELOAD": ""}
    done = subprocess.run([fuzz, "2500"], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    kept, refused = map(int, done.stdout.split())
    assert kept > 100, "some changes are valid streams"
    assert refused > 1000


def blob_of(name: bytes, form: int, raw_bytes: int, content: bytes) -> bytes:
    return b"\1" + bytes((len(name),)) + name + struct.pack("<BII", form, raw_bytes, len(content)) + content


def refused(count: int, blob: bytes, match: str, wanted: list[str] | None = None) -> None:
    with pytest.raises(TraceError, match=match):
        blocks.decode_events(count, blocks.checksum("events", count, blob), blob, wanted)


def test_a_bomb_is_refused_before_it_is_unfolded() -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(b"\0" * (1 << 28))
    assert len(bomb) < 32 << 10
    refused(1000, blob_of(b"code", 1, 1000, bomb), "size it states")
    refused(1000, blob_of(b"code", 1, 1 << 28, bomb), "cannot be")


def test_a_frame_that_hides_its_size_or_is_longer_is_refused() -> None:
    hidden = zstandard.ZstdCompressor(write_content_size=False).compress(b"\1" * 1000)
    trailing = planes.compress(b"\1" * 1000) + b"more"
    for data in (hidden, trailing, b"", b"\x28\xb5\x2f\xfd", b"junk" * 50):
        refused(1000, blob_of(b"code", 1, 1000, data), "compressed block")


def test_a_list_of_streams_that_is_not_right_is_refused() -> None:
    good = blob_of(b"code", 0, 2, b"\0\0")
    double = b"\2" + good[1:-2] * 2 + b"\0\0" * 2
    for blob in (b"", good[:-1], good + b"\0", b"\2" + good[1:], good[:3], double, b"\1\xff" + good[2:]):
        refused(2, blob, "streams")
    refused(2, blob_of(b"x", 0, 2, b"\0\0"), "cannot be")
    refused(2, blob_of(b"c\xe4de", 0, 2, b"\0\0"), "streams")
    refused(2, blob_of(b"code", 7, 2, b"\0\0"), "does not know")
    refused(2, blob_of(b"code", 0, 2, b"\0"), "does not know")
    refused(2, good, "fit together")


def test_a_block_cannot_claim_more_events_than_a_block_has() -> None:
    for count in (10**12, blocks.BLOCK_EVENTS + 1, -1):
        refused(count, b"\0", "claims", [])


def test_what_zstd_makes_no_smaller_is_stored_and_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    noise, packer, tried = os.urandom(5000), blocks.Packer(), []
    compress = planes.compress_quickly
    monkeypatch.setattr(planes, "compress_quickly", lambda data: tried.append(len(data)) or compress(data))
    blobs = {packer.pack([("far", noise)]) for _ in range(20)}
    assert len(tried) == 2
    assert blobs == {blob_of(b"far", 0, len(noise), noise)}


# ---- nodes


def nodes_like(count: int, seed: int) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Stacks as a program makes them: most nodes continue the one before."""
    random = np.random.default_rng(seed)
    node = np.cumsum(np.where(random.random(count) < 0.01, random.integers(2, 1 << 20, count), 1))
    back = np.where(random.random(count) < 0.7, 1, random.integers(1, 40, count))
    parent = np.where(np.arange(count) >= back, node[np.maximum(np.arange(count) - back, 0)], 0)
    address = random.integers(0x40_0000, 0x40_0100, count) * 8
    module = np.where(random.random(count) < 0.9, address % 3, 7)
    return [column.astype(np.int64) for column in (node, parent, address, module)]


@given(st.lists(st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 4), min_size=1, max_size=50))
@settings(max_examples=60, deadline=None)
def test_any_nodes_come_back_as_they_were(rows: list[tuple[int, ...]]) -> None:
    columns = [np.array(column, np.int64) for column in zip(*rows, strict=True)]
    decoded = blocks.decode_nodes(*packed(blocks.encode_nodes(*columns), "nodes", len(rows)))
    assert all(np.array_equal(*pair) for pair in zip(columns, decoded, strict=True))


@pytest.mark.parametrize("count", [1, 100, 16_384])
def test_nodes_of_a_program_come_back_and_are_small(count: int) -> None:
    columns = nodes_like(count, count)
    count, crc, blob = packed(blocks.encode_nodes(*columns), "nodes", count)
    assert all(np.array_equal(*pair) for pair in zip(columns, blocks.decode_nodes(count, crc, blob), strict=True))
    assert len(blob) < 100 + 4 * count


def test_hostile_node_streams_are_refused() -> None:
    columns = nodes_like(300, 1)
    streams = dict(blocks.encode_nodes(*columns))
    assert streams.keys() == {"code", "known", "new", "parent", "gap"}
    for name, content in streams.items():
        for changed in (content[:-1], content + b"\0\0", b"\xff" * len(content)):
            with pytest.raises(TraceError):
                blocks.decode_nodes(*packed([*(streams | {name: changed}).items()], "nodes", 300))
    for count in (0, -1, blocks.BLOCK_NODES + 1):
        with pytest.raises(TraceError, match="claims"):
            blocks.decode_nodes(count, 0, b"")
    assert _codec.node_limit("code", 50) == 50
