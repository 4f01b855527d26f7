"""The hazards of a preloaded shim, each as the real situation: programs that do what a preloaded library disturbs.

Each runs alone and under heapledger; what is printed and how it ends must be the same. Then what the trace has to say:
nothing lost, or what was not seen and why.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from compared import HEAPLEDGER, Both
from preload_spool import Shim, plain, shim, shim_library  # noqa: F401

from heapledger.store.events import Events, Kind
from heapledger.store.reader import Trace
from heapledger.store.schema import Process

Native = Callable[..., Path]
Compare = Callable[..., Both]
NOT_ALLOWED = 77

WITHOUT = "child was started without the shim"
UNSEEN = "children that could not be recorded (no access to the spool)"
NO_SPOOL = "the spool was out of reach"
CONFINED = "forbade itself (seccomp)"


@pytest.fixture
def life(native: Native) -> str:
    return str(native("hazard_life.c", "-pthread"))


@pytest.fixture
def place(native: Native) -> str:
    return str(native("hazard_place.c", "-pthread", "-ldl", "-rdynamic", "-Wl,-z,now"))


def same(ran: Both) -> Both:
    """Checks that the program did the same; skips what this user may not do."""
    if ran.plain.returncode == NOT_ALLOWED:
        pytest.skip("this user or kernel does not allow it")
    ran.check_same()
    return ran


def events_of(trace: Trace, process: Process) -> Events:
    return Events.concat(list(trace.events(process.id)))


def check_order(trace: Path, *, notes: bool = False) -> list[Process]:
    """Nothing lost, every event once and in order, in each process; no remarks unless they are expected."""
    with Trace(trace) as opened:
        processes = opened.processes()
        for process in processes:
            assert process.lost == 0, process.notes
            assert notes or process.notes == [], process.exe
            seq = events_of(opened, process).seq
            assert len(seq) == process.events
            assert np.all(seq[1:] > seq[:-1])
    return processes


def reasons_of(trace: Path) -> set[str]:
    """Why children were started without the shim, without their names."""
    return {note.rpartition(": ")[0] for note in notes_of(trace) if note.startswith(WITHOUT)}


def notes_of(trace: Path) -> list[str]:
    with Trace(trace) as opened:
        return [note for process in opened.processes() for note in process.notes]


# ---- children

#: What hazard_life.c does → images in the trace, at least.
CHILDREN = {
    "raw_forks": 6,
    "clones_that_share_memory": 2,
    "raw_fork_while_threads_allocate": 16,
    "forks_while_threads_allocate": 13,
    "forks_without_wait": 21,
    "handlers_of_fork_allocate": 6,
    "forks_in_threads": 5,
    "reaps_in_a_handler": 31,
    "becomes_a_daemon": 3,
    "lives_in_new_namespaces": 3,
}


@pytest.mark.parametrize("what", CHILDREN)
def test_children_however_they_are_made_are_images_of_their_own(both: Compare, life: str, what: str) -> None:
    ran = same(both([life, what]))
    assert len(check_order(ran.trace)) >= CHILDREN[what]


def test_a_fork_that_is_a_system_call_is_an_event_of_the_parent(both: Compare, life: str) -> None:
    ran = same(both([life, "raw_forks"]))
    with Trace(ran.trace) as opened:
        first, *children = sorted(opened.processes(), key=lambda p: p.start_ns)
        events = events_of(opened, first)
        forked = events.arg[events.kind == Kind.FORK].tolist()
        assert forked == [child.pid for child in children]
        assert {child.parent_id for child in children} == {first.id}
        assert {child.start for child in children} == {"fork"}
        assert [child.exit_status for child in children] == [21, 22, 23, 24, 25]


# ---- programs that are started without the shim


def test_children_with_an_environment_of_their_own_are_named(both: Compare, life: str) -> None:
    ran = same(both([life, "spawns"]))
    assert ran.plain.stdout.count(b"spawned") == 3
    assert notes_of(ran.trace) == ["child was started without the shim: /bin/echo"]
    assert len(check_order(ran.trace, notes=True)) == 3


def test_a_program_that_scrubs_its_environment_is_said_to_lose_its_children(both: Compare, life: str) -> None:
    ran = same(both([life, "scrubs_its_environment"]))
    said = [note.partition(": ")[2] for note in notes_of(ran.trace)]
    assert said[:2] == ["echo by system", "echo by popen"]
    assert said[2].endswith("/echo")


def test_env_i_and_what_it_starts_drop_out_and_that_is_said(both: Compare) -> None:
    ran = same(both(["env", "-i", "/bin/echo", "alone"]))
    assert "child was started without the shim: /bin/echo" in notes_of(ran.trace)


MAIN = """
#include <stdio.h>
#include <stdlib.h>
int main(void) { char *p = malloc(100); p[0] = 1; printf("alive %d\\n", p[0]); free(p); return 7; }
"""
TRACED = ""

#: What a program is built like → why its starter's log says that it is not seen.
PROGRAMS = {
    "plain": (["gcc"], TRACED),
    "no pie, bound at start": (["gcc", "-no-pie", "-Wl,-z,now"], TRACED),
    "stripped": (["gcc", "-s"], TRACED),
    "UndefinedBehaviorSanitizer": (["gcc", "-fsanitize=undefined"], TRACED),
    "AddressSanitizer": (["gcc", "-fsanitize=address"], "its sanitizer must be the first library"),
    "ThreadSanitizer": (["gcc", "-fsanitize=thread"], "its sanitizer must be the first library"),
    "LeakSanitizer": (["gcc", "-fsanitize=leak"], "its sanitizer must be the first library"),
    "static": (["gcc", "-static"], "statically linked"),
    "static, position independent": (["gcc", "-static-pie"], "statically linked"),
    "musl": (["musl-gcc"], "it uses musl"),
}


def build(folder: Path, command: list[str]) -> Path:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    (folder / "main.c").write_text(MAIN)
    built = subprocess.run([*command, "-o", folder / "main", folder / "main.c"], capture_output=True, check=False)
    if built.returncode:
        pytest.skip(f"{' '.join(command)} does not work here")
    return folder / "main"


@pytest.mark.parametrize("kind", PROGRAMS)
def test_programs_of_every_make_start_under_a_traced_one(both: Compare, life: str, kind: str, tmp_path: Path) -> None:
    """By exec in all its forms, by vfork and by spawn: those that cannot bear a preloaded shim are started without."""
    command, reason = PROGRAMS[kind]
    ran = same(both([life, "starts_in_every_way", str(build(tmp_path, command))]))
    assert ran.plain.stdout == b"alive 1\n1792\n" * 8
    assert reasons_of(ran.trace) == ({f"{WITHOUT} ({reason})"} if reason else set())
    assert len(check_order(ran.trace, notes=True)) == (6 if reason else 14)


def test_scripts_are_what_their_interpreter_is(both: Compare, life: str, tmp_path: Path) -> None:
    program = build(tmp_path, ["gcc", "-fsanitize=address"])
    script = tmp_path / "script"
    script.write_text(f"#! {program} -x\n")
    script.chmod(0o755)
    ran = same(both([life, "starts_in_every_way", str(script)]))
    assert ran.plain.stdout.count(b"alive") == 7  # a script cannot be run by a descriptor that closes on exec
    assert reasons_of(ran.trace) == {f"{WITHOUT} ({PROGRAMS['ThreadSanitizer'][1]})"}


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to give a file to somebody else")
def test_a_setuid_program_is_said_to_drop_out(both: Compare, life: str, tmp_path: Path) -> None:
    program = build(tmp_path, ["gcc"])
    os.chown(program, 65534, 65534)
    program.chmod(0o4755)
    tmp_path.chmod(0o755)
    ran = same(both([life, "starts_in_every_way", str(program)]))
    assert any(f"{WITHOUT} (it changes its user)" in note for note in notes_of(ran.trace))


def test_a_32_bit_program_starts_without_a_word_of_the_loaders(both: Compare, life: str, tmp_path: Path) -> None:
    """Its loader would write to stderr that it cannot preload a 64-bit library."""
    source = tmp_path / "exit.s"
    source.write_text(".globl _start\n_start:\n movl $1, %eax\n movl $7, %ebx\n int $0x80\n")
    program = tmp_path / "exit"
    for command in (
        ["as", "--32", source, "-o", f"{program}.o"],
        ["ld", "-m", "elf_i386", f"{program}.o", "-o", program],
    ):
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no 32-bit programs can be linked here")
    ran = same(both([life, "starts_in_every_way", str(program)]))
    assert b"1792\n" in ran.plain.stdout
    assert reasons_of(ran.trace) == {f"{WITHOUT} (not an x86-64 program)"}


def test_the_programs_own_preload_reaches_those_that_are_started_without_ours(both: Compare, tmp_path: Path) -> None:
    (tmp_path / "own.c").write_text("int nothing;")
    own = tmp_path / "own.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", own, tmp_path / "own.c"], check=True)
    program = tmp_path / "main"
    (tmp_path / "main.c").write_text(
        '#include <stdio.h>\n#include <stdlib.h>\nint main(void) { puts(getenv("LD_PRELOAD")); return 0; }'
    )
    built = subprocess.run(
        ["gcc", "-fsanitize=thread", "-o", program, tmp_path / "main.c"], capture_output=True, check=False
    )
    if built.returncode:
        pytest.skip("gcc has no ThreadSanitizer here")
    ran = same(both(["sh", "-c", f"{program}; {program}"], env={**os.environ, "LD_PRELOAD": str(own)}))
    assert ran.plain.stdout == f"{own}\n{own}\n".encode()


# ---- threads


@pytest.mark.parametrize(
    ("what", "threads"),
    [
        ("threads_of_every_kind", 241),
        ("thousand_threads_at_once", 1001),
        pytest.param("ten_thousand_short_threads", 10001, marks=pytest.mark.slow),
        ("runs_coroutines", 1),
        ("closes_every_file", 5),
    ],
)
def test_threads_of_every_kind_are_recorded_from_start_to_end(
    both: Compare, life: str, what: str, threads: int
) -> None:
    ran = same(both([life, what]))
    (process,) = check_order(ran.trace)
    with Trace(ran.trace) as opened:
        events = events_of(opened, process)
        assert int((events.kind == Kind.THREAD_START).sum()) == threads
        assert int((events.kind == Kind.THREAD_END).sum()) == threads - 1
        allocated = np.isin(events.kind, (Kind.MALLOC, Kind.CALLOC))
        assert int((events.kind == Kind.FREE).sum()) >= int(allocated.sum()) // 2


def test_thread_local_memory_of_megabytes_leaves_room_for_the_shim(both: Compare, native: Native) -> None:
    program = native("hazard_place.c", "-pthread", "-ldl", "-rdynamic", "-DHUGE")
    check_order(same(both([str(program), "huge_thread_local"])).trace)


def test_the_last_name_of_a_thread_is_its_name(both: Compare, life: str) -> None:
    ran = same(both([life, "names_threads"]))
    with Trace(ran.trace) as opened:
        process = opened.process()
        names = {thread.number: thread.name for thread in opened.threads(process.id)}
    assert names == {0: "main-itself", 1: "late-by-prctl", 2: "late-by-pthread", 3: "named-by-other"}


ENDS = {"exits_while_threads_allocate": 5, "dies_while_threads_allocate": -15, "execs_from_a_thread": 0}


@pytest.mark.parametrize("what", ENDS)
def test_an_end_while_threads_allocate_is_an_end(both: Compare, life: str, what: str) -> None:
    """They are cut off in mid-call, and go on allocating while the process is held: all that is known stays known."""
    ran = same(both([life, what]))
    assert ran.plain.returncode == ENDS[what]
    first, *_ = check_order(ran.trace, notes=True)
    assert first.events > 1000
    assert not [note for note in first.notes if "damaged" in note]
    if what == "exits_while_threads_allocate":  # it was looked at while it was held, however busy its threads were
        with Trace(ran.trace) as opened:
            assert "exit" in {snapshot.reason for snapshot in opened.snapshots(first.id)}


# ---- signals


@pytest.mark.parametrize(
    ("what", "status"),
    [
        ("timer_at_10_khz", 0),
        ("survives_stack_overflow", 0),
        ("dies_of_stack_overflow", -11),
        ("keeps_signal_masks", 0),
    ],
)
def test_signals_find_the_program_as_if_alone(both: Compare, life: str, what: str, status: int) -> None:
    ran = same(both([life, what]))
    assert ran.plain.returncode == status
    check_order(ran.trace, notes=status != 0)


# ---- another user, another root, no files


@pytest.mark.parametrize(
    "what",
    [
        "becomes_another_user",
        "changes_its_root",
        "pivots_its_root",
        "forbids_itself_files",
        "forbids_itself_files_on_pain_of_death",
    ],
)
def test_who_puts_the_spool_out_of_reach_is_recorded_for_a_while(both: Compare, life: str, what: str) -> None:
    """Four new threads have rings that were made before; forty do not, and that is said. The program lives on."""
    ran = same(both([life, what]))
    assert ran.plain.stdout == b"4\n40\n1280\n"
    (process,) = check_order(ran.trace, notes=True)
    assert any(NO_SPOOL in note for note in process.notes)
    with Trace(ran.trace) as opened:
        events = events_of(opened, process)
    assert int((events.kind == Kind.THREAD_START).sum()) >= 5
    assert len(events) > 6000


def test_a_user_who_comes_back_is_recorded_throughout(both: Compare, life: str) -> None:
    ran = same(both([life, "becomes_another_user_and_back"]))
    first, child = check_order(ran.trace, notes=True)
    assert not any(NO_SPOOL in note for note in first.notes)
    assert (first.exit_status, child.exit_status) == (0, 5)


def test_a_program_in_a_jail_starts_without_a_word_of_the_loaders(both: Compare, life: str, tmp_path: Path) -> None:
    """The shim's file does not exist there: the loader would write to stderr that it cannot preload it."""
    jail = tmp_path / "jail"
    jail.mkdir()
    shutil.copy(shutil.which("echo") or "", jail / "echo")
    listed = subprocess.run(["ldd", jail / "echo"], capture_output=True, text=True, check=True).stdout
    for word in listed.split():
        if word.startswith("/"):
            (jail / word[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(word, jail / word[1:])
    ran = same(both([life, "starts_a_program_in_a_jail", str(jail)]))
    assert ran.plain.stdout == b"jailed\n0\njailed too\n0\njailed for good\n"
    assert any(UNSEEN in note for note in notes_of(ran.trace))


@pytest.mark.parametrize("readable", [True, False])
def test_a_program_of_another_user_says_the_same(shim: Shim, life: str, readable: bool) -> None:  # noqa: F811
    """Whether that user may read the shim or not. Its own processes cannot write into the spool: said once."""
    shim.library = Path(shutil.copy(shim.library, shim.folder))
    for folder in (shim.folder, *shim.folder.parents[:-2]):
        folder.chmod(0o755 if readable else 0o700)
    alone = plain(life, "starts_a_program_as_another_user")
    if alone.returncode == NOT_ALLOWED:
        pytest.skip("this user or kernel does not allow it")
    run = shim.run(life, "starts_a_program_as_another_user", options="quiet=1")
    assert (run.code, run.stdout, run.stderr) == (alone.returncode, alone.stdout, alone.stderr)
    assert run.first.get("unseen") >= 1


def test_what_another_user_execs_is_said_not_to_be_followed(both: Compare, life: str) -> None:
    """As after su: the spool is its owner's."""
    ran = same(both([life, "starts_a_program_as_another_user"]))
    assert "it became a program that the shim is not part of, which is not followed" in notes_of(ran.trace)


def test_what_has_become_of_stderr_is_not_written_into(shim: Shim, life: str, tmp_path: Path) -> None:  # noqa: F811
    """A message of the shim's would be data in the program's file."""
    run = shim.run("env", "-C", tmp_path, life, "uses_stderr_for_data")
    if run.code == NOT_ALLOWED:
        pytest.skip("this user or kernel does not allow it")
    assert (run.code, run.stdout, run.stderr) == (0, b"5\n", b"")
    assert any(image.get("stop_reason") for image in run.images)


def test_a_sanitizer_in_the_programs_own_preload_keeps_its_place(both: Compare, life: str, tmp_path: Path) -> None:
    asked = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    if "/" not in asked.stdout:
        pytest.skip("gcc has no AddressSanitizer here")
    program = build(tmp_path, ["gcc"])
    library = Path(asked.stdout.strip()).resolve()
    script = f"env LD_PRELOAD=$LD_PRELOAD:{library} ASAN_OPTIONS=detect_leaks=0 {program}"
    ran = same(both(["sh", "-c", script]))
    assert (ran.plain.returncode, ran.plain.stdout) == (7, b"alive 1\n")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_children_of_another_user_are_counted_as_not_recorded(both: Compare, native: Native) -> None:
    ran = same(both([str(native("odd_program.c", "-pthread")), "gives_up_root"]))
    assert f"{UNSEEN}: 1" in notes_of(ran.trace)


def test_a_filter_that_leaves_nothing_stops_the_recording(both: Compare, life: str) -> None:
    ran = same(both([life, "forbids_itself_nearly_all"]))
    (process,) = check_order(ran.trace, notes=True)
    assert any(CONFINED in note for note in process.notes)
    assert process.events > 200


# ---- limits

LIMITS = ["address_space", "data", "files", "file_size", "processes", "locked", "stack", "cpu"]


@pytest.mark.parametrize("limit", LIMITS)
def test_under_a_tight_limit_the_program_does_as_if_alone(both: Compare, life: str, limit: str) -> None:
    ran = same(both([life, "under_a_limit", limit]))
    assert ran.plain.stdout == b"2\n2\n1536\n" or limit == "processes", "root is not limited in these"
    check_order(ran.trace, notes=True)


@pytest.mark.parametrize("limit", ["-d 4096", "-v 24000"])
def test_where_next_to_no_memory_is_allowed_none_is_taken(both: Compare, life: str, limit: str) -> None:
    """What the shim took would be missing to the program, which still finds room for its threads."""
    ran = same(both(["sh", "-c", f"ulimit {limit}; exec {life} under_it"]))
    assert ran.plain.stdout == b"2\n1536\n"
    assert "it became a program that the shim is not part of, which is not followed" in notes_of(ran.trace)


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup of 128 MB; rings and stacks of a process count for its own."""
    for root, name in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        folder = Path(root) / "heapledger-test"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / name).write_text(str(128 << 20))
        except OSError:
            folder.rmdir()
            continue
        yield folder
        folder.rmdir()
        return
    pytest.skip("no memory cgroup can be made here")


def test_in_a_small_memory_cgroup_the_program_is_not_killed(both: Compare, life: str, small_cgroup: Path) -> None:
    enter = f'echo $$ > {small_cgroup}/cgroup.procs; exec "$@"'
    ran = same(both(["sh", "-c", enter, "sh", life, "threads_of_every_kind"]))
    assert ran.plain.returncode == 0
    check_order(ran.trace, notes=True)


# ---- loading code


@pytest.fixture
def plugins(native: Native) -> list[str]:
    return [str(native("hazard_plugin.c", "-shared", "-fPIC", f'-DNAME="plugin{n}"')) for n in (1, 2)]


LOADS = ["plugin_loaded", "plugin_loaded_lazily", "plugin_in_its_own_namespace", "plugins_in_threads"]


@pytest.mark.parametrize("what", LOADS)
def test_plugins_are_loaded_as_if_alone(both: Compare, place: str, plugins: list[str], what: str) -> None:
    check_order(same(both([place, what, plugins[0]])).trace)


def test_plugins_that_take_each_others_place_keep_their_names(both: Compare, place: str, plugins: list[str]) -> None:
    """The same addresses hold other code after a dlclose: each stack names the plugin that was there then."""
    ran = same(both([place, "plugins_take_each_others_place", ",".join(plugins)]))
    assert ran.plain.stdout == b"1\n"
    (process,) = check_order(ran.trace)
    with Trace(ran.trace) as opened:
        events = events_of(opened, process)
        for size, path in ((100, plugins[0]), (101, plugins[1])):
            stacks = events.stack[(events.kind == Kind.MALLOC) & (events.size == size)].tolist()
            assert len(stacks) == 400
            found = {opened.stack(process.id, stack)[0].module for stack in set(stacks)}
            assert found == {path}


def _blocks_of_plugin(trace: Path) -> int:
    (process,) = check_order(trace, notes=True)
    with Trace(trace) as opened:
        events = events_of(opened, process)
    blocks = events.take((events.kind == Kind.MALLOC) & (events.size == 0x1357))
    freed = events.addr[events.kind == Kind.FREE]
    assert np.isin(blocks.addr, freed).all()
    return len(blocks)


def test_a_plugin_that_is_bound_deeply_is_seen(both: Compare, place: str, plugins: list[str]) -> None:
    """libc's malloc would answer it before ours: the flag is dropped where nothing else depends on it."""
    ran = same(both([place, "plugin_bound_deeply", plugins[0]]))
    assert _blocks_of_plugin(ran.trace) == 100
    assert notes_of(ran.trace) == [f"loaded without RTLD_DEEPBIND, so that its calls are seen: {plugins[0]}"]


def test_a_plugin_with_names_of_its_hosts_stays_bound_deeply(both: Compare, native: Native, plugins: list[str]) -> None:
    """It would find its host's function instead of its own, and the program would do something else."""
    host = native("hazard_place.c", "-pthread", "-ldl", "-rdynamic", "-DCOMMON")
    ran = same(both([str(host), "plugin_bound_deeply", plugins[0]]))
    assert b"plugin1" in ran.plain.stdout
    assert any("not seen of what must be bound deeply" in note for note in notes_of(ran.trace))


@pytest.mark.parametrize("bind", ["", "1"])
def test_libcs_own_calls_are_recorded(both: Compare, place: str, bind: str) -> None:
    ran = same(both([place, "calls_of_libc"], env={**os.environ, "LD_BIND_NOW": bind} if bind else None))
    ran.check_exact()
    (process,) = check_order(ran.trace)
    assert process.events > 500


# ---- memory


@pytest.mark.parametrize("what", ["maps_at_fixed_addresses", "maps_where_the_kernel_likes"])
def test_mappings_lie_where_they_lie_alone(both: Compare, place: str, what: str) -> None:
    check_order(same(both([place, what])).trace)


def test_memory_kept_from_children_is_kept_from_them(both: Compare, place: str) -> None:
    assert len(check_order(same(both([place, "keeps_memory_from_children"])).trace)) == 2


def test_the_allocator_answers_as_if_alone(both: Compare, place: str) -> None:
    """How much the loader keeps differs by one library; what it says of arenas and blocks does not."""
    ran = same(both([place, "allocator_speaks"]))
    assert b"</malloc>" in ran.plain.stdout
    check_order(ran.trace)


# ---- other allocators, other preloaded libraries, other tools

ALLOCATORS = ["libjemalloc.so.2", "libtcmalloc_minimal.so.4", "libtcmalloc.so.4", "libmimalloc.so.2"]


@pytest.mark.parametrize("library", ALLOCATORS)
@pytest.mark.parametrize("what", ["threads_of_every_kind", "forks_while_threads_allocate"])
def test_another_allocator_behind_the_shim_works(both: Compare, life: str, library: str, what: str) -> None:
    path = Path("/usr/lib/x86_64-linux-gnu") / library
    if not path.exists():
        pytest.skip(f"{library} is not installed")
    ran = same(both([life, what], env={**os.environ, "LD_PRELOAD": str(path)}))
    (first, *_) = check_order(ran.trace)
    assert first.events > 2000


INTERPOSER = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
static void *(*next_malloc)(size_t);
static void *(*next_calloc)(size_t, size_t);
static unsigned long calls;
void *malloc(size_t n) { if (!next_malloc) next_malloc = dlsym(RTLD_NEXT, "malloc"); calls++; return next_malloc(n); }
void *calloc(size_t n, size_t m)
{
    static char early[4096];
    static int asking;
    if (!next_calloc) {
        if (asking)
            return early; /* dlsym itself callocs */
        asking = 1;
        next_calloc = dlsym(RTLD_NEXT, "calloc");
        dlerror();
        asking = 0;
    }
    return next_calloc(n, m);
}
__attribute__((destructor)) static void tell(void) { printf("%d\\n", calls > 100); }
"""


def test_a_preloaded_interposer_of_the_programs_own_still_works(both: Compare, life: str, tmp_path: Path) -> None:
    (tmp_path / "own.c").write_text(INTERPOSER)
    own = tmp_path / "own.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-fno-builtin", "-o", own, tmp_path / "own.c", "-ldl"], check=True)
    ran = same(both([life, "under_it"], env={**os.environ, "LD_PRELOAD": str(own)}))
    assert ran.plain.stdout.endswith(b"1\n")
    check_order(ran.trace)


def test_a_program_runs_under_valgrind_and_the_shim(tmp_path: Path, native: Native) -> None:
    """valgrind replaces malloc in what it runs: its verdict is the same, whatever of it the trace holds."""
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")
    program = native("shim_orphan.c")
    check = ["valgrind", "-q", "--error-exitcode=33", str(program)]
    plain = subprocess.run(check, capture_output=True, timeout=60, check=False)
    ours = [*HEAPLEDGER, "run", "-q", "--no-symbols", "-o", tmp_path / "trace.heapledger", "--", *check]
    traced = subprocess.run(ours, capture_output=True, timeout=60, check=False)
    assert (traced.returncode, traced.stdout) == (plain.returncode, plain.stdout) == (4, b"orphan\n")


def test_a_program_confined_by_libseccomp_is_recorded_to_its_end(both: Compare) -> None:
    """The library first asks for what no kernel grants, strict mode among it: that is not the real thing."""
    if shutil.which("man") is None:
        pytest.skip("man is not installed")
    with_filter = subprocess.run(["man", "-P", "cat", "man"], capture_output=True, timeout=60, check=False)
    if with_filter.returncode:
        pytest.skip("there is no manual page to show")
    ran = same(both(["man", "-P", "cat", "man"]))
    assert not any("stopped" in note for note in notes_of(ran.trace))


def test_strace_and_the_shim_are_compatible(both: Compare, life: str) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    ran = same(both(["strace", "-f", "-o", "/dev/null", life, "raw_forks"]))
    assert ran.plain.stdout.count(b"\n") == 5
