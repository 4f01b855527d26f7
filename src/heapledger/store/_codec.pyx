# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The codecs of event blocks and node blocks (codec.h, node_codec.h) for Python, without the interpreter lock."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "codec.h":
    enum:
        CODEC_BLOCK_EVENTS
        CODEC_STREAMS_MAX
    struct codec_event:
        uint64_t time, seq, seq_exit, addr, size, arg, arg2, word
        uint32_t stack, thread
        uint8_t kind
    struct codec_stream:
        const char *name
        const uint8_t *data
        size_t bytes
    struct codec_encoder:
        pass
    struct codec_columns:
        uint64_t *time
        uint64_t *seq
        uint64_t *seq_exit
        uint64_t *addr
        uint64_t *size
        uint64_t *arg
        uint64_t *arg2
        uint64_t *word
        uint32_t *stack
        uint32_t *thread
        uint8_t *kind
    struct codec_decoder:
        pass
    codec_encoder *codec_encoder_new()
    void codec_encoder_free(codec_encoder *)
    size_t codec_push(codec_encoder *, const codec_event *, size_t) nogil
    size_t codec_count(const codec_encoder *)
    size_t codec_finish(codec_encoder *, codec_stream *) nogil
    codec_decoder *codec_decoder_new()
    void codec_decoder_free(codec_decoder *)
    int codec_decode(codec_decoder *, const codec_stream *, size_t, size_t, const codec_columns *) nogil
    size_t codec_stream_limit(const char *, size_t)

cdef extern from "node_codec.h":
    enum:
        NODE_BLOCK_NODES
    struct node_encoder:
        pass
    node_encoder *node_encoder_new()
    void node_encoder_free(node_encoder *)
    size_t node_encode(
        node_encoder *, const int64_t *, const int64_t *, const int64_t *, const int64_t *, size_t, codec_stream *
    ) nogil
    int node_decode(
        const codec_stream *, size_t, size_t, int64_t *, int64_t *, int64_t *, int64_t *
    ) nogil
    size_t node_stream_limit(const char *, size_t)

BLOCK_EVENTS = CODEC_BLOCK_EVENTS
BLOCK_NODES = NODE_BLOCK_NODES
cdef enum:
    BATCH = 256


def stream_limit(str name, size_t count):
    """Most bytes that a stream of an event block can have; 0: there is no stream of this name."""
    return codec_stream_limit(name.encode(), count)


def node_limit(str name, size_t count):
    """The same for a node block."""
    return node_stream_limit(name.encode(), count)


cdef list copied(const codec_stream *streams, size_t n):
    """(name, bytes) of the streams that hold anything."""
    cdef list found = []
    cdef size_t i
    for i in range(n):
        if streams[i].bytes:
            content = PyBytes_FromStringAndSize(<const char *>streams[i].data, streams[i].bytes)
            found.append(((<bytes>streams[i].name).decode(), content))
    return found


cdef int listed(list streams, codec_stream *out) except -1:
    """Fills `out`; the names' and contents' objects have to live on."""
    cdef int n = 0
    if len(streams) > CODEC_STREAMS_MAX:
        raise ValueError("too many streams")
    for name, data in streams:
        out[n].name = PyBytes_AS_STRING(name)
        out[n].data = <const uint8_t *>PyBytes_AS_STRING(data)
        out[n].bytes = PyBytes_GET_SIZE(data)
        n += 1
    return n


cdef class Encoder:
    """Event columns → streams."""

    cdef codec_encoder *encoder

    def __cinit__(self):
        self.encoder = codec_encoder_new()
        if self.encoder == NULL:
            raise MemoryError

    def __dealloc__(self):
        codec_encoder_free(self.encoder)

    def encode(
        self, const uint8_t[::1] kind not None, const uint32_t[::1] thread not None, const uint64_t[::1] time not None,
        const uint64_t[::1] seq not None, const uint64_t[::1] seq_exit not None, const uint64_t[::1] addr not None,
        const uint64_t[::1] size not None, const uint64_t[::1] arg not None, const uint64_t[::1] arg2 not None,
        const uint64_t[::1] word not None, const uint32_t[::1] stack not None,
    ):
        """[(name, bytes)] of one block with these columns, which have the same length."""
        cdef size_t count = kind.shape[0], i = 0, n
        cdef codec_event batch[BATCH]
        cdef codec_stream streams[CODEC_STREAMS_MAX]
        if count > CODEC_BLOCK_EVENTS or not (
            count == <size_t>thread.shape[0] == <size_t>time.shape[0] == <size_t>seq.shape[0]
            == <size_t>seq_exit.shape[0] == <size_t>addr.shape[0] == <size_t>size.shape[0] == <size_t>arg.shape[0]
            == <size_t>arg2.shape[0] == <size_t>word.shape[0] == <size_t>stack.shape[0]
        ):
            raise ValueError("columns of different lengths, or too long ones")
        with nogil:
            while i < count:
                n = 0
                while n < BATCH and i < count:
                    batch[n].kind, batch[n].thread, batch[n].stack = kind[i], thread[i], stack[i]
                    batch[n].time, batch[n].seq, batch[n].seq_exit = time[i], seq[i], seq_exit[i]
                    batch[n].addr, batch[n].size, batch[n].word = addr[i], size[i], word[i]
                    batch[n].arg, batch[n].arg2 = arg[i], arg2[i]
                    n += 1
                    i += 1
                codec_push(self.encoder, batch, n)
            n = codec_finish(self.encoder, streams)
        return copied(streams, n)


cdef uint64_t *wide(dict columns, str name, size_t count) except? NULL:
    cdef uint64_t[::1] view
    if name not in columns:
        return NULL
    view = columns[name]
    if <size_t>view.shape[0] != count:
        raise ValueError(name)
    return &view[0]


cdef uint32_t *narrow(dict columns, str name, size_t count) except? NULL:
    cdef uint32_t[::1] view
    if name not in columns:
        return NULL
    view = columns[name]
    if <size_t>view.shape[0] != count:
        raise ValueError(name)
    return &view[0]


cdef class Decoder:
    """Streams → event columns. 7 MB; for one thread at a time."""

    cdef codec_decoder *decoder

    def __cinit__(self):
        self.decoder = codec_decoder_new()
        if self.decoder == NULL:
            raise MemoryError

    def __dealloc__(self):
        codec_decoder_free(self.decoder)

    def decode(self, list streams, size_t count, dict columns):
        """Fills the arrays of `columns` (name → array of `count` values, not empty) from [(name as bytes, bytes)]. Returns whether
        the streams are what an encoder makes of so many events."""
        cdef codec_stream given[CODEC_STREAMS_MAX]
        cdef codec_columns out
        cdef uint8_t[::1] kind
        cdef int n = listed(streams, given), failed
        out.time, out.seq = wide(columns, "time", count), wide(columns, "seq", count)
        out.seq_exit, out.addr = wide(columns, "seq_exit", count), wide(columns, "addr", count)
        out.size, out.word = wide(columns, "size", count), wide(columns, "word", count)
        out.arg, out.arg2 = wide(columns, "arg", count), wide(columns, "arg2", count)
        out.stack, out.thread = narrow(columns, "stack", count), narrow(columns, "thread", count)
        out.kind = NULL
        if "kind" in columns:
            kind = columns["kind"]
            if <size_t>kind.shape[0] != count:
                raise ValueError("kind")
            out.kind = &kind[0]
        with nogil:
            failed = codec_decode(self.decoder, given, n, count, &out)
        return not failed


cdef class NodeEncoder:
    """Nodes of a trie of call stacks → streams."""

    cdef node_encoder *encoder

    def __cinit__(self):
        self.encoder = node_encoder_new()
        if self.encoder == NULL:
            raise MemoryError

    def __dealloc__(self):
        node_encoder_free(self.encoder)

    def encode(
        self, const int64_t[::1] node not None, const int64_t[::1] parent not None, const int64_t[::1] address not None,
        const int64_t[::1] module_id not None,
    ):
        """[(name, bytes)] of one block."""
        cdef size_t count = node.shape[0], n
        cdef codec_stream streams[CODEC_STREAMS_MAX]
        if not 0 < count <= NODE_BLOCK_NODES or not (
            count == <size_t>parent.shape[0] == <size_t>address.shape[0] == <size_t>module_id.shape[0]
        ):
            raise ValueError("columns of different lengths, or none, or too long ones")
        with nogil:
            n = node_encode(self.encoder, &node[0], &parent[0], &address[0], &module_id[0], count, streams)
        return copied(streams, n)


def decode_nodes(
    list streams, int64_t[::1] node not None, int64_t[::1] parent not None, int64_t[::1] address not None,
    int64_t[::1] module_id not None,
):
    """Fills the arrays, which have the same length and are not empty; returns whether the streams are sound."""
    cdef codec_stream given[CODEC_STREAMS_MAX]
    cdef size_t count = node.shape[0]
    cdef int n = listed(streams, given), failed
    if not 0 < count <= NODE_BLOCK_NODES or not (
        count == <size_t>parent.shape[0] == <size_t>address.shape[0] == <size_t>module_id.shape[0]
    ):
        raise ValueError("columns of different lengths, or none, or too long ones")
    with nogil:
        failed = node_decode(given, n, count, &node[0], &parent[0], &address[0], &module_id[0])
    return not failed
