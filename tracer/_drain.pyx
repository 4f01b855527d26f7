# cython: language_level=3
"""drain.h and ticker.h for Python: rings of one process image to blocks of encoded events, without the interpreter.

Python calls in once a round; `run` works without the interpreter lock.
"""

from libc.errno cimport errno
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

import os

cdef extern from "drain.h" nogil:
    enum:
        CODEC_STREAMS_MAX
    enum drain_state:
        DRAIN_IDLE
        DRAIN_FULL
    struct hl_control:
        uint64_t heartbeat_ns
    struct codec_stream:
        const char *name
        const uint8_t *data
        size_t bytes
    struct drain_clock:
        uint64_t start_tsc
        unsigned tick_shift
        double ns_per_cycle
        double offset_ns
    struct drain_thread:
        uint32_t number
        uint32_t tid
        uint64_t thread_pointer
        uint64_t stack_low
        uint64_t stack_high
        uint64_t start_ns
        uint64_t end_ns
        char name[16]
        bint described
        bint named
        bint started
        bint ended
    struct drain_block:
        size_t count
        size_t streams
        uint64_t first_seq
        uint64_t last_seq
        uint64_t first_ns
        uint64_t last_ns
        codec_stream stream[32]
    struct drain_totals:
        uint64_t events
        uint64_t returned
        uint64_t damaged
        uint64_t unmade
        uint64_t last_seq
        uint64_t last_ns
        uint64_t slots
        uint64_t spilled_bytes
        uint64_t spilling_bytes
    struct drain:
        pass
    struct drain_token:
        pass
    drain *drain_new(const char *folder, bint trust_tail, uint64_t written)
    void drain_free(drain *)
    drain_state drain_run(drain *, const drain_clock *, uint64_t now_ns, bint final)
    size_t drain_pending(const drain *)
    uint64_t drain_slots(const drain *)
    double drain_used(const drain *)
    void drain_fill(drain *, double *used, double *fresh)
    drain_token *drain_finish(drain *, drain_block *)
    void drain_commit(drain *, drain_token *)
    void drain_token_free(drain_token *)
    bint drain_spill(drain *, double least, uint64_t limit)
    int drain_set_spill(drain *, const char *prefix)
    bint drain_add_segment(drain *, const char *path)
    void drain_reap(drain *, int pid)
    void drain_reap_silent(drain *, uint32_t thread)
    bint drain_next_thread(drain *, drain_thread *)
    bint drain_next_bad_ring(drain *, uint32_t *index, const char **why)
    void drain_get_totals(const drain *, drain_totals *)
    hl_control *drain_control(drain *)

cdef extern from "ticker.h" nogil:
    int ticker_add(hl_control *)
    void ticker_remove(hl_control *)


cdef class Drain:
    """The rings of the image in `folder`; see drain_new. OSError where there is no control page."""

    cdef drain *_drain
    cdef drain_clock _clock
    cdef readonly double used
    cdef readonly double fresh

    def __cinit__(self, folder, *, bint trust_tail=True, uint64_t written=0):
        cdef bytes path = os.fsencode(folder)
        self._drain = drain_new(path, trust_tail, written)
        if self._drain is NULL:
            raise OSError(errno, os.strerror(errno), os.fspath(folder))

    def __dealloc__(self):
        if self._drain is not NULL:
            ticker_remove(drain_control(self._drain))
            drain_free(self._drain)

    def start_ticking(self):
        """Heartbeat and coarse clock, every millisecond, from a thread of its own. OSError where none can be made."""
        cdef int error = ticker_add(drain_control(self._drain))
        if error:
            raise OSError(error, os.strerror(error))

    def stop_ticking(self):
        with nogil:
            ticker_remove(drain_control(self._drain))

    def set_clock(self, uint64_t start_tsc, unsigned tick_shift, double ns_per_cycle, double offset_ns):
        """How ticks become ns since the session began (`offset_ns`: that of start_tsc)."""
        self._clock = drain_clock(start_tsc, tick_shift, ns_per_cycle, offset_ns)

    def run(self, uint64_t now_ns, bint final=False):
        """Encodes what is there. True: the block is full and has to be finished before more is taken."""
        cdef drain_state state
        with nogil:
            state = drain_run(self._drain, &self._clock, now_ns, final)
        return state == DRAIN_FULL

    def measure(self):
        """Fills `used` and `fresh`; see drain_fill."""
        drain_fill(self._drain, &self.used, &self.fresh)

    def most_used(self):
        """The share of its slots that the fullest ring has in use now."""
        return drain_used(self._drain)

    def finish(self):
        """(count, first_seq, last_seq, first_ns, last_ns, streams, token): the block so far, which is over."""
        cdef drain_block block
        cdef size_t i
        token = Token.__new__(Token)
        (<Token>token).owner = self
        (<Token>token)._token = drain_finish(self._drain, &block)
        if (<Token>token)._token is NULL:
            raise MemoryError
        streams = []
        for i in range(block.streams):
            data = (<const char *>block.stream[i].data)[:block.stream[i].bytes] if block.stream[i].bytes else b""
            streams.append((block.stream[i].name.decode(), data))
        return block.count, block.first_seq, block.last_seq, block.first_ns, block.last_ns, streams, token

    def set_spill(self, prefix):
        """Where `spill` puts its files: PREFIX.*"""
        if drain_set_spill(self._drain, os.fsencode(prefix)):
            raise MemoryError

    def spill(self, double least, uint64_t limit):
        """Makes room in rings that are as full as this; see drain_spill."""
        cdef bint done
        with nogil:
            done = drain_spill(self._drain, least, limit)
        return done

    def add_segment(self, path):
        """Before the first `run`: a file of `spill`'s that another collector left. False: it is of no use."""
        return drain_add_segment(self._drain, os.fsencode(path))

    def reap(self, int pid):
        """Rings of threads that said goodbye and are dead go back to the shim."""
        with nogil:
            drain_reap(self._drain, pid)

    def reap_silent(self, uint32_t thread):
        """The ring of a thread that is known to be dead goes back, if all in it was read."""
        drain_reap_silent(self._drain, thread)

    def threads(self):
        """Rows of `thread` of which something new is known: fields that are not known are left out."""
        cdef drain_thread row
        rows = []
        while drain_next_thread(self._drain, &row):
            fields = {"number": row.number}
            if row.described:
                fields["tid"] = row.tid
                fields["thread_pointer"] = row.thread_pointer
                fields["stack_low"] = row.stack_low
                fields["stack_high"] = row.stack_high
            if row.named:
                fields["name"] = (<bytes>row.name[:16]).split(b"\0")[0].decode(errors="replace")
            if row.started:
                fields["start_ns"] = row.start_ns
            if row.ended:
                fields["end_ns"] = row.end_ns
            rows.append(fields)
        return rows

    def bad_rings(self):
        """(number, reason) of each ring that could not be opened, once."""
        cdef uint32_t index
        cdef const char *why
        found = []
        while drain_next_bad_ring(self._drain, &index, &why):
            found.append((index, why.decode()))
        return found

    @property
    def slots(self):
        """Slots read so far."""
        return drain_slots(self._drain)

    @property
    def pending(self):
        """Events in the block so far."""
        return drain_pending(self._drain)

    def totals(self):
        """struct drain_totals."""
        cdef drain_totals totals
        drain_get_totals(self._drain, &totals)
        return totals


cdef class Token:
    """The slots of a finished block, until it is safe."""

    cdef drain_token *_token
    cdef Drain owner

    def __dealloc__(self):
        if self._token is not NULL:
            drain_token_free(self._token)

    def commit(self):
        """The block is in the trace file: its slots go back to their owners. In the order of the blocks."""
        cdef drain_token *token = self._token
        self._token = NULL
        if token is not NULL:
            with nogil:
                drain_commit(self.owner._drain, token)
