"""The codec of event columns: nothing is changed, nothing hostile gets through, nothing large is unfolded."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from heapledger.errors import TraceError
from heapledger.store import blocks, planes
from heapledger.store.events import COLUMNS, Events, Kind

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


def heap_like(count: int, seed: int = 1) -> Events:
    """Events as a program makes them: ascending seq and time, a few sizes, addresses that come back."""
    random = np.random.default_rng(seed)
    events = Events.empty(count)
    events.kind = random.choice([Kind.MALLOC, Kind.FREE, Kind.REALLOC, Kind.CALLOC], count, p=[0.5, 0.4, 0.05, 0.05])
    events.kind = events.kind.astype(np.uint8)
    events.seq = 1 + 2 * np.arange(count, dtype=np.uint64)
    events.seq_exit = events.seq + np.uint64(1)
    events.time = np.cumsum(random.integers(20, 4000, count)).astype(np.uint64)
    events.addr = (0x5555_5555_0000 + 16 * random.integers(0, 1 << 16, count)).astype(np.uint64)
    events.size = np.where(events.kind == Kind.FREE, 0, random.choice([16, 24, 48, 100, 5000], count)).astype(np.uint64)
    events.word = np.maximum((events.size + np.uint64(23)) & ~np.uint64(15), 32).astype(np.uint64) + np.uint64(1)
    events.stack = np.where(events.kind == Kind.FREE, 0, random.integers(1, 4096, count)).astype(np.uint32)
    return events


def same(left: Events, right: Events) -> bool:
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in COLUMNS)


@given(any_events())
@settings(max_examples=80, deadline=None)
def test_any_events_come_back_as_they_were(events: Events) -> None:
    decoded = blocks.decode_block(len(events), blocks.encode_block(events))
    assert same(events, decoded)
    for name, dtype in COLUMNS.items():
        assert getattr(decoded, name).dtype == dtype


@given(any_events(), st.sets(st.sampled_from(sorted(COLUMNS))))
@settings(max_examples=40, deadline=None)
def test_a_wanted_column_is_the_same_alone_and_the_others_are_zero(events: Events, wanted: set[str]) -> None:
    decoded = blocks.decode_block(len(events), blocks.encode_block(events), wanted)
    for name in COLUMNS:
        expected = getattr(events, name) if name in wanted else np.zeros(len(events))
        assert np.array_equal(getattr(decoded, name), expected), name


@pytest.mark.parametrize("transform", ["plain", "delta", "second", "exit", "chunk"])
@pytest.mark.parametrize("order", ["time", "split"])
def test_every_codec_that_has_a_name_works(order: str, transform: str) -> None:
    events = heap_like(1000)
    context = blocks.context_of(events)
    encoded = {name: blocks.encode_column(name, context, "time", "plain") for name in COLUMNS}
    encoded["word"] = blocks.encode_column("word", context, order, transform)
    assert same(blocks.decode_block(1000, encoded), events)


def test_a_block_written_by_the_first_version_is_still_read() -> None:
    """Golden bytes, so that the format cannot drift: three events, hand-checked planes, without and with zstd."""
    kinds = np.array([Kind.MALLOC, Kind.FREE, Kind.MALLOC], np.uint64)
    assert planes.split(np.array([0x1234, 0x5678, 0x9A], np.uint64), 2).hex() == "34789a125600"
    frame = bytes.fromhex("28b52ffd2003190000010401")  # zstd, content size 3, one raw block: 01 04 01
    assert planes.unpack(frame, 1, 3).tolist() == kinds.tolist()
    size = bytes.fromhex("28b52ffd2003190000183000")  # split: both allocations first, then the free
    word = bytes.fromhex(
        "28b52ffd2003190000000042"
    )  # chunk: 24 and 48 bytes have the predicted words, 0x21 is 0x42 in zigzag
    columns = {
        name: blocks.Column(codec, 3, blocks.checksum(name, codec, 3, data), data)
        for name, codec, data in (
            ("kind", "time.plain.1", frame),
            ("size", "split.plain.1", size),
            ("word", "split.chunk.1", word),
        )
    }
    events = blocks.decode_block(3, columns, ["kind", "size", "word"])
    assert events.size.tolist() == [24, 0, 48]
    assert events.word.tolist() == [0x21, 0x21, 0x41]


def test_a_full_block_of_heap_events_takes_less_than_eight_bytes_an_event() -> None:
    events = heap_like(blocks.BLOCK_EVENTS)
    size = sum(len(column.data) for column in blocks.encode_block(events).values())
    assert size / len(events) < 8


def test_a_column_that_is_zero_takes_nothing() -> None:
    column = blocks.encode_block(heap_like(5000))["arg2"]
    assert (column.codec, column.raw_bytes, column.data) == ("split.plain.0", 0, b"")


@pytest.mark.parametrize("name", sorted(COLUMNS))
def test_each_flipped_bit_is_noticed(name: str) -> None:
    events = heap_like(300)
    encoded = blocks.encode_block(events)
    data = encoded[name].data
    for at in range(0, 8 * len(data), 1 + len(data) // 40):
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        damaged = {**encoded, name: dataclasses.replace(encoded[name], data=bytes(flipped))}
        with pytest.raises(TraceError, match="damaged"):
            blocks.decode_block(300, damaged)


def test_a_changed_codec_count_or_name_is_noticed() -> None:
    encoded = blocks.encode_block(heap_like(300))
    other = dataclasses.replace(encoded["time"], codec="time.plain.2")
    for count, columns in (
        (300, {**encoded, "time": other}),
        (299, encoded),
        (300, {**encoded, "arg": encoded["size"]}),
    ):
        with pytest.raises(TraceError):
            blocks.decode_block(count, columns)


def signed_column(name: str, codec: str, raw_bytes: int, data: bytes, count: int) -> blocks.Column:
    """What somebody who means harm can make: all checksums are right."""
    return blocks.Column(codec, raw_bytes, blocks.checksum(name, codec, count, data), data)


def test_a_bomb_is_refused_before_it_is_unfolded() -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(b"\0" * (1 << 28))
    assert len(bomb) < 32 << 10
    for raw_bytes in (8 * 1000, 1 << 28):
        column = signed_column("time", "time.plain.8", raw_bytes, bomb, 1000)
        with pytest.raises(TraceError, match="size it states"):
            blocks.decode_block(1000, {"time": column}, ["time"])


def test_a_frame_that_hides_its_size_or_is_longer_is_refused() -> None:
    hidden = zstandard.ZstdCompressor(write_content_size=False).compress(b"\1" * 1000)
    trailing = planes.compress(b"\1" * 1000) + b"more"
    for data in (hidden, trailing, b"", b"\x28\xb5\x2f\xfd", b"junk" * 50):
        with pytest.raises(TraceError):
            planes.unpack(data, 1, 1000)


@pytest.mark.parametrize(
    "codec",
    ["", "time", "time.plain", "time.plain.9", "time.plain.12", "time.exit.-1", "x.plain.1", "time.x.1", "...."],
)
def test_a_codec_that_does_not_exist_is_refused(codec: str) -> None:
    column = signed_column("time", codec, 10, planes.compress(b"\1" * 10), 10)
    with pytest.raises(TraceError):
        blocks.decode_block(10, {"time": column}, ["time"])


def test_columns_that_need_each_other_are_refused() -> None:
    data = planes.compress(b"\1" * 10)
    columns = {
        "kind": signed_column("kind", "split.plain.1", 10, data, 10),
        "size": signed_column("size", "time.exit.1", 10, data, 10),
        "seq": signed_column("seq", "time.chunk.1", 10, data, 10),
    }
    for name in columns:
        with pytest.raises(TraceError):
            blocks.decode_block(10, columns, [name])


def test_a_block_cannot_claim_more_events_than_a_block_has() -> None:
    column = signed_column("time", "time.plain.0", 0, b"", 10**12)
    with pytest.raises(TraceError, match="claims"):
        blocks.decode_block(10**12, {"time": column}, [])


@pytest.mark.skipif(blocks._kernels is None, reason="the compiled encoder was not built")
@given(
    any_events(),
    st.sampled_from(sorted(COLUMNS)),
    st.sampled_from(["time", "split"]),
    st.sampled_from(blocks._TRANSFORMS),
)
@settings(max_examples=300, deadline=None)
def test_the_compiled_encoder_writes_what_numpy_writes(events: Events, name: str, order: str, transform: str) -> None:
    context = blocks.context_of(events)
    compiled = blocks._encode_compiled(name, context, order, transform)
    assert compiled == blocks._encode_by_numpy(name, context, order, transform)


def test_stacks_keep_the_order_that_was_smaller_for_a_few_blocks() -> None:
    encoder, events = blocks.Encoder(), heap_like(20_000)
    sizes = [len(encoder.encode(events)["stack"].data) for _ in range(3)]
    context = blocks.context_of(events)
    both = [len(blocks.encode_column("stack", context, order, "plain").data) for order in ("split", "time")]
    assert sizes == [min(both)] * 3
