"""A slow, plain decoder of event blocks, written from docs/trace-file.md: the oracle of the codec's tests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

U64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
ALLOCATIONS, REALLOC, FREE = {1, 2, 3, 5, 6, 7}, 3, 4
WIDTHS = {"site": 2, "size": 2, "word": 2, "ref": 2, "time": 2, "far": 4, "wide": 8, "leap": 8}
FIELDS = ("addr", "size", "arg", "arg2", "word")


def unzigzag(value: int) -> int:
    return (value >> 1) ^ -(value & 1)


class Reader:
    """Numbers of a stream, from its planes."""

    def __init__(self, name: str, data: bytes) -> None:
        width = WIDTHS.get(name, 1)
        planes = [data[i * len(data) // width : (i + 1) * len(data) // width] for i in range(width)]
        self._numbers = iter([int.from_bytes(bytes(parts), "little") for parts in zip(*planes, strict=True)])

    def take(self) -> int:
        return next(self._numbers)

    def varint(self) -> int:
        value, shift = 0, 0
        while (byte := self.take()) >= 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
        return value | byte << shift

    def signed(self) -> int:
        return unzigzag(self.varint() & U64)

    def gaps(self) -> Iterator[int]:
        """The events that the values of another stream are for; its values are to be taken between two of them."""
        at = 0
        for byte in self._numbers:
            at += byte
            if byte != 0xFF:
                yield at

    def is_empty(self) -> bool:
        return next(self._numbers, None) is None


@dataclass
class Site:
    kind: int = 0
    stack: int = 0
    next: list[int] = field(default_factory=lambda: [0, 0, 0])
    live: int = 0
    source: int = 0
    distance: int = 0
    last: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FIELDS, 0))


@dataclass
class Memory:
    addr: int = 0
    word: int = 0
    site: int = 0
    older: int = 0
    pushed: int = 0


class Lane:
    """What is kept of each thread, by its number modulo 16."""

    def __init__(self) -> None:
        self.history = [0, 0, 0, 0]  # latest first
        self.time = self.split = self.behind = self.away = self.neighbour = self.flags = self.freed = 0
        self.count: dict[int, int] = defaultdict(int)
        self.ring: dict[int, list[int]] = defaultdict(lambda: [0] * 8)


def class_of(chunk: int) -> int:
    units = chunk >> 4
    return units if units < 64 else 64 + ((units * GOLDEN & U64) >> 58)


class Block:
    """The columns of a block: `Block(streams, count).columns`."""

    def __init__(self, streams: dict[str, bytes], count: int) -> None:
        self.readers = {
            name: Reader(name, streams.get(name, b""))
            for name in (*WIDTHS, "code", "new", "depth", "old", "odd", "gap", "seq", "thread")
        }
        self.sites: list[Site] = []
        self.memory: dict[int, Memory] = defaultdict(Memory)
        self.made = self.far = self.stack = 0
        self.context: dict[int, tuple[int, int]] = {}
        self.lanes = [Lane() for _ in range(16)]
        threads = self._threads(count)
        self.columns: dict[str, list[int]] = {"thread": threads, "time": self._times(threads)}
        self.columns["seq"], self.columns["seq_exit"] = self._seqs(count)
        for name in ("kind", "stack", *FIELDS):
            self.columns[name] = []
        for thread in threads:
            self._event(self.lanes[thread % 16])
        assert all(reader.is_empty() for reader in self.readers.values())

    # ---- clock

    def _threads(self, count: int) -> list[int]:
        reader, thread, found = self.readers["thread"], 0, []
        changes = reader.gaps()
        change = next(changes, None)
        for i in range(count):
            if i == change:
                thread = reader.varint()
                change = next(changes, None)
            found.append(thread)
        return found

    def _times(self, threads: list[int]) -> list[int]:
        changes, time, found = set(self.readers["gap"].gaps()), 0, []
        for i, thread in enumerate(threads):
            lane = self.lanes[thread % 16]
            if i in changes:
                time = lane.time = (time + unzigzag(self._number("time", "leap"))) & U64
            found.append(lane.time)
        return found

    def _seqs(self, count: int) -> tuple[list[int], list[int]]:
        reader, seq, seqs, exits = self.readers["seq"], 0, [], []
        changes = reader.gaps()
        change = next(changes, None)
        for i in range(count):
            end = seq + 1
            if i == change:
                seq = (seq + reader.signed()) & U64
                end = seq + 1 + reader.signed()
                change = next(changes, None)
            seqs.append(seq)
            exits.append(end & U64)
            seq = (max(seq, end & U64) + 1) & U64
        return seqs, exits

    # ---- sites

    def _event(self, lane: Lane) -> None:
        code = self.readers["code"].take()
        number = self._site(lane, code & 3)
        site = self.sites[number]
        if site.kind in ALLOCATIONS:
            values = self._allocation(code, number, site, lane)
        elif site.kind == FREE:
            values = self._free(code, site, lane)
        else:
            if code & 0x80:
                self._odd(site)
            values = dict(site.last)
        for name, value in {"kind": site.kind, "stack": site.stack, **values}.items():
            self.columns[name].append(value)

    def _site(self, lane: Lane, rank: int) -> int:
        history = sum(site << 16 * i for i, site in enumerate(lane.history))
        mixed = history * GOLDEN & U64
        slot, tag = mixed >> 50, (mixed >> 32) & 0xFFFF | 1
        following = self.sites[lane.history[0]].next if self.sites else [0, 0, 0]
        seen, site = self.context.get(slot, (0, 0))
        first = site if seen == tag else following[0]
        guesses = [first, *(following if first not in following[:2] else [s for s in following if s != first])]
        if first == following[0]:
            guesses = [first, following[1], following[2]]
        elif first == following[1]:
            guesses = [first, following[0], following[2]]
        number = guesses[rank] if rank < 3 else self.readers["site"].take()
        if rank == 3 and number == 0xFFFF:
            self.stack += self.readers["new"].signed()
            number = len(self.sites)
            self.sites.append(Site(self.readers["new"].take(), self.stack))
            following = self.sites[lane.history[0]].next
        self.context[slot] = (tag, number)
        if number == following[0]:
            pass
        elif number == following[1]:
            following[:2] = [number, following[0]]
        else:
            following[:] = [number, following[0], following[1]]
        lane.history = [number, *lane.history[:3]]
        return number

    # ---- values

    def _number(self, name: str, wide: str) -> int:
        value = self.readers[name].take()
        return value if value != 0xFFFF else self.readers[wide].take()

    def _address(self, base: int) -> int:
        value = self.readers["far"].take()
        return self.readers["wide"].take() if value == 0xFFFFFFFF else (base + 16 * unzigzag(value)) & U64

    def _odd(self, site: Site) -> int:
        mask = self.readers["odd"].take()
        for bit, name in enumerate(FIELDS):
            if mask >> bit & 1:
                site.last[name] = (site.last[name] + self.readers["odd"].signed()) & U64
        return mask

    def _make(self, addr: int, word: int, site: int, older: int) -> int:
        self.made += 1
        if self.made % 65536 == 0:
            self.made += 1
        self.memory[self.made % 65536] = Memory(addr, word, site, older)
        return self.made % 65536

    def _released(self, place: int, site: Site, lane: Lane, last_word: int) -> int:
        now = self.made % 65536
        if place == 0:
            return self.sites[site.source].live
        if place == 1:
            return (now - site.distance) % 65536
        if place in (2, 3):
            return (lane.freed + (1 if place == 2 else -1)) % 65536
        if place == 4:
            return (now - self.readers["ref"].take()) % 65536
        if place == 5:
            return 0
        return self._make(self._address(lane.away) if place == 6 else lane.neighbour, last_word, 0, 0)

    def _release(self, place: int, differs: bool, site: Site, lane: Lane, word_of: str) -> tuple[int, int]:
        """(address, word) of the block that is released; it is remembered as free."""
        x = self._released(place, site, lane, site.last[word_of])
        block = self.memory[x] if x else Memory()
        word = self._number("word", "wide") if differs else block.word
        if x:
            site.last[word_of] = word
            owner = self.sites[block.site]
            if owner.live == x:
                owner.live = block.older
            site.source, site.distance = block.site, (self.made - x) % 65536
            lane.freed, lane.away, lane.neighbour = x, block.addr, (block.addr + (word & ~7)) & U64
            size_class = class_of(word & ~7)
            block.word, block.pushed = word, lane.count[size_class] % 256
            lane.ring[size_class][block.pushed % 8] = x
            lane.count[size_class] += 1
        return block.addr, word

    def _free(self, code: int, site: Site, lane: Lane) -> dict[str, int]:
        if code & 0x80:
            self._odd(site)
        addr, word = self._release(code >> 2 & 7, bool(code & 0x40), site, lane, "word")
        return {**site.last, "addr": addr, "word": word}

    def _allocation(self, code: int, number: int, site: Site, lane: Lane) -> dict[str, int]:
        last, arg, arg2 = site.last, 0, 0
        if site.kind == REALLOC:
            old = self.readers["old"].take()
            arg, arg2 = self._release(old & 7, bool(old & 8), site, lane, "arg2")
        size = self._number("size", "wide") if code & 0x20 else last["size"]
        if site.kind != REALLOC:
            arg = last["arg"]
            if size != last["size"] and arg and last["size"] // arg:
                arg = size // (last["size"] // arg)
            mask = self._odd(site) if code & 0x80 else 0
            arg = last["arg"] = last["arg"] if mask & 4 else arg
            arg2 = last["arg2"]
        last["size"] = size
        chunk = max((size + 23 & U64) & ~15, 32)
        addr, word = self._place(code >> 2 & 7, arg, lane, class_of(chunk), (chunk + lane.flags) & U64)
        if code & 0x40:
            word = self._number("word", "wide")
        lane.flags = word & 7
        lane.behind = (addr + (word & ~7)) & U64
        if code >> 2 & 7 in (1, 2, 5):
            lane.split = lane.behind
        if addr:
            site.live = self._make(addr, word, number, site.live)
        return {"addr": addr, "size": size, "arg": arg, "arg2": arg2, "word": word}

    def _place(self, place: int, old: int, lane: Lane, size_class: int, word: int) -> tuple[int, int]:
        """(address, expected word) of a new block."""
        if place in (0, 3):
            depth = self.readers["depth"].take() if place == 3 else 0
            ring = lane.ring[size_class]
            x = ring[(lane.count[size_class] - 1 - depth) % 8]
            block = self.memory[x]
            ring[block.pushed % 8] = 0
            if (block.pushed + 1) % 256 == lane.count[size_class] % 256:
                lane.count[size_class] -= 1
                for _ in range(7):
                    if ring[(lane.count[size_class] - 1) % 8]:
                        break
                    lane.count[size_class] -= 1
            return block.addr, block.word
        if place == 4:
            return self.memory[(self.made - self.readers["ref"].take()) % 65536].addr, word
        if place == 5:
            self.far = self._address(self.far)
            return self.far, word
        return {1: lane.split, 2: lane.behind, 6: old}[place], word
