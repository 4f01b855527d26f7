# C types of the inner-loop files, for the compiled build: `_amalgamate.py` copies this to `_compiled.pxd`.
# u64 for addresses and what a file declares, Py_ssize_t for positions in data that is at hand.
cimport cython

ctypedef unsigned long long u64
ctypedef long long i64

cdef unsigned int OP_LEB, OP_STRING, OP_BLOCK1, OP_BLOCK2, OP_BLOCK4, OP_BLOCK, OP_INDIRECT, OP_UNKNOWN
cdef Py_ssize_t MAX_ATTRIBUTES
cdef unsigned int FORM_IMPLICIT_CONST, FORM_GNU_ADDR_INDEX, FORM_GNU_STR_INDEX, FORM_GNU_REF_ALT, FORM_GNU_STRP_ALT
cdef unsigned int AT_SIBLING
cdef Py_ssize_t INFO, TAG, CHILDREN, FIRST, COUNT, SKIP_FIRST, SKIP_COUNT, FIXED, SIBLING_AT, SPEC, ATTR, FORM, OP
cdef unsigned int FORM_ADDR, FORM_SDATA, FORM_INDIRECT, FORM_ADDRX, FORM_ADDRX1, FORM_ADDRX4
cdef unsigned int FORM_RNGLISTX
cdef int TAG_CLASS, TAG_LEXICAL_BLOCK, TAG_COMPILE_UNIT, TAG_STRUCTURE, TAG_UNION, TAG_INLINED, TAG_MODULE, TAG_CATCH
cdef int TAG_SUBPROGRAM, TAG_TRY, TAG_NAMESPACE, TAG_PARTIAL_UNIT
cdef unsigned int ATTR_SIBLING, ATTR_LOW_PC, ATTR_HIGH_PC, ATTR_RANGES, ATTR_CALL_FILE, ATTR_CALL_LINE
cdef unsigned int FORM_BLOCK, FORM_BLOCK1, FORM_BLOCK2, FORM_BLOCK4, FORM_STRING, FORM_UDATA
cdef unsigned int LNCT_PATH, LNCT_DIRECTORY_INDEX
cdef u64 SHN_UNDEF, SHN_LORESERVE
cdef int STT_NOTYPE, STT_FUNC, STT_GNU_IFUNC, STB_GLOBAL


@cython.final
cdef class Cursor:
    cdef public bytes data
    cdef public Py_ssize_t pos, end

    cpdef seek(self, Py_ssize_t pos)
    cpdef skip(self, u64 count)
    cpdef unsigned int u8(self) except? 0xFFFFFFFE
    @cython.locals(data=bytes, at=Py_ssize_t, value=u64)
    cpdef u64 fixed(self, Py_ssize_t size) except? 0xFFFFFFFFFFFFFFFE
    @cython.locals(data=bytes, at=Py_ssize_t, end=Py_ssize_t, result=u64, part=u64, shift=int, byte=cython.uchar)
    cpdef u64 uleb(self) except? 0xFFFFFFFFFFFFFFFE
    @cython.locals(
        data=bytes, at=Py_ssize_t, end=Py_ssize_t, result=u64, part=u64, one=u64, shift=int, byte=cython.uchar
    )
    cpdef i64 sleb(self) except? 987654321
    @cython.locals(data=bytes, at=Py_ssize_t, end=Py_ssize_t, byte=cython.uchar)
    cpdef skip_leb(self)
    @cython.locals(data=bytes, at=Py_ssize_t, end=Py_ssize_t)
    cpdef skip_string(self)


@cython.locals(low=Py_ssize_t, high=Py_ssize_t, middle=Py_ssize_t)
cpdef Py_ssize_t first_at_least(u64[::1] values, u64 wanted) except -1

cdef int symbol_rank(int kind, int bind, u64 size) except -1

@cython.locals(
    count=Py_ssize_t, names=cython.longlong[::1], starts=cython.ulonglong[::1], ranks=cython.longlong[::1], open_names=cython.longlong[::1],
    open_starts=cython.ulonglong[::1], walls=cython.ulonglong[::1], cur=Cursor, number=Py_ssize_t, index=Py_ssize_t, name=u64, info=int,
    section=u64, value=u64, size=u64, kind=int, k=Py_ssize_t, rank=int
)
cpdef covering_symbols(bytes table, Py_ssize_t entry_size, bint wide, u64[::1] targets)


cdef unsigned int form_op(unsigned int[::1] ops, unsigned int form, unsigned int offset_size) except? 77


@cython.final
cdef class AbbrevTable:
    cdef unsigned int[::1] ops
    cdef unsigned int offset_size
    cdef readonly Py_ssize_t codes
    cdef Py_ssize_t spec_count, skip_count, code_room, spec_room
    cdef object info_array, spec_array, skip_array
    cdef int[::1] info
    cdef unsigned int[::1] specs, skips
    cdef dict consts

    cdef bind(self)
    cdef grow_codes(self)
    cdef grow_specs(self)
    @cython.locals(code=u64, tag=u64)
    cdef parse(self, Cursor cur)
    @cython.locals(
        first=Py_ssize_t, at=Py_ssize_t, skip=Py_ssize_t, total=int, run=int, varies=bint, attr=u64, form=u64,
        op=cython.uint
    )
    cdef parse_attributes(self, Cursor cur, Py_ssize_t row)


cpdef bint is_address_form(unsigned int form) except? -1


@cython.final
cdef class Unit:
    cdef readonly bytes data
    cdef readonly u64 offset, abbrev_offset
    cdef readonly int offset_size, version, unit_type, address_size
    cdef readonly Py_ssize_t root
    cdef readonly Cursor cur
    cdef public u64 low_pc, str_offsets_base, addr_base, rnglists_base
    cdef public bytes addresses
    cdef AbbrevTable table

    cpdef use_abbrevs(self, AbbrevTable table)
    @cython.locals(size=int)
    cpdef u64 address(self, u64 index) except? 0xFFFFFFFFFFFFFFFE
    cpdef u64 to_address(self, unsigned int form, u64 value) except? 0xFFFFFFFFFFFFFFFE
    @cython.locals(cur=Cursor)
    cdef skip_op(self, unsigned int op)
    @cython.locals(op=cython.uint)
    cdef unsigned int indirect_op(self, u64 form) except? 77
    @cython.locals(table=AbbrevTable, row=Py_ssize_t, fixed=int, at=Py_ssize_t, end=Py_ssize_t)
    cdef skip_die(self, Py_ssize_t code)
    @cython.locals(cur=Cursor, start=Py_ssize_t)
    cdef u64 value(self, unsigned int form, unsigned int op) except? 0xFFFFFFFFFFFFFFFE
    @cython.locals(code=u64)
    cdef Py_ssize_t checked_code(self) except -1
    @cython.locals(
        cur=Cursor, code=Py_ssize_t, table=AbbrevTable, row=Py_ssize_t, at=Py_ssize_t, end=Py_ssize_t,
        attr=cython.uint, form=cython.uint, op=cython.uint, die=dict
    )
    cpdef read_die(self, Py_ssize_t offset)


@cython.locals(
    count=Py_ssize_t, units=cython.longlong[::1], sizes=cython.ulonglong[::1], start=u64, total=u64, cur=Cursor, length=u64,
    offset_size=int, end=u64, version=int, unit=u64, address_size=int, segment_size=int, pair=u64, at=u64, low=u64,
    size=u64, k=Py_ssize_t
)
cpdef lookup_aranges(bytes data, u64[::1] targets)


@cython.final
cdef class RangeReader:
    cdef bytes ranges, rnglists
    cdef Py_ssize_t left

    cdef spend(self)
    cpdef list read(self, Unit unit, unsigned int form, u64 value)
    @cython.locals(size=int)
    cdef u64 indexed(self, Unit unit, u64 index) except? 0xFFFFFFFFFFFFFFFE
    @cython.locals(found=list, size=int, top=u64, base=u64, cur=Cursor, low=u64, high=u64)
    cdef list read_ranges(self, Unit unit, u64 offset)
    @cython.locals(found=list, size=int, base=u64, cur=Cursor, low=u64, high=u64, kind=int)
    cdef list read_rnglist(self, Unit unit, u64 offset)


@cython.final
cdef class FunctionWalker:
    cdef Unit unit
    cdef RangeReader ranges
    cdef u64[::1] targets
    cdef Py_ssize_t number
    cdef i64[::1] best
    cdef u64[::1] best_size
    cdef readonly list dies, parents, call_files, call_lines
    cdef u64 low, high, range_list, sibling, call_file, call_line
    cdef unsigned int low_form, high_form, ranges_form

    cpdef i64 record(self, Py_ssize_t k) except? 987654321
    @cython.locals(k=Py_ssize_t)
    cpdef Py_ssize_t unclaimed(self) except -1
    @cython.locals(
        unit=Unit, cur=Cursor, table=AbbrevTable, depth=Py_ssize_t, skip_depth=Py_ssize_t, owner=Py_ssize_t,
        owner_depth=Py_ssize_t, owners=list, start=Py_ssize_t, code=Py_ssize_t, children=int, tag=int,
        record=Py_ssize_t, at=Py_ssize_t, after=Py_ssize_t, past=Py_ssize_t, sibling=Py_ssize_t
    )
    cpdef walk(self, bint everywhere)
    @cython.locals(
        unit=Unit, table=AbbrevTable, at=Py_ssize_t, end=Py_ssize_t, attr=cython.uint, op=cython.uint,
        form=cython.uint, value=u64
    )
    cdef read_places(self, Py_ssize_t code)
    @cython.locals(record=Py_ssize_t, claimed=bint, pairs=list, at=Py_ssize_t, low=u64, high=u64)
    cdef Py_ssize_t claim(self, Py_ssize_t die, Py_ssize_t parent) except? -2
    @cython.locals(size=u64, k=Py_ssize_t, claimed=bint, best=i64)
    cdef bint claim_range(self, u64 low, u64 high, Py_ssize_t record, Py_ssize_t parent) except? -1


@cython.final
cdef class LineProgram:
    cdef readonly bytes data
    cdef unsigned int[::1] ops
    cdef Cursor cur
    cdef readonly list folders, files
    cdef readonly int version
    cdef int address_size, line_base, line_range, opcode_base, step
    cdef Py_ssize_t program
    cdef bytes operands

    @cython.locals(cur=Cursor, length=u64, offset_size=int, header_length=u64, base=int)
    cdef read_header(self)
    @cython.locals(cur=Cursor, start=Py_ssize_t, folder=u64)
    cdef read_old_names(self)
    @cython.locals(
        cur=Cursor, formats=list, number=int, count=u64, entries=list, path_form=u64, path=u64, folder=u64, kind=u64,
        form=u64, value=u64
    )
    cdef list read_entries(self)
    @cython.locals(cur=Cursor, start=Py_ssize_t, op=cython.uint)
    cdef u64 read_form(self, u64 form) except? 0xFFFFFFFFFFFFFFFE
    @cython.locals(
        cur=Cursor, count=Py_ssize_t, opcode_base=int, line_base=int, line_range=int, step=u64, address=u64, line=i64,
        file=u64, row_address=u64, row_line=i64, row_file=u64, in_sequence=bint, discarded=bint, k=Py_ssize_t,
        const_advance=u64, opcode=int, ends=bint, size=u64, after=Py_ssize_t, after_all=Py_ssize_t, kind=int,
        operands=int
    )
    cpdef run(self, u64[::1] targets, i64[::1] files, i64[::1] lines)
