# Sourced by script/demo, script/test: makes this checkout ready to run on Debian 12+ or Ubuntu 24.04+ with only git and
# python3. What is missing is installed with apt-get when we are root, and named otherwise. A second run does nothing.
# shellcheck shell=bash

say() { printf '%s\n' "heapledger: $*" >&2; }
die() { say "$*"; exit 1; }

# have_header FILE: does the C compiler find it?
have_header() { printf '#include <%s>\n' "$1" | cc -E -x c - >/dev/null 2>&1; }

# python_ok: is there a Python 3.11 or newer?
python_ok() { "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# python_headers: the Python that runs us can build extension modules.
python_headers() {
    "$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
}

# missing_packages KIND: prints the Debian packages to install for `run` or `test`.
missing_packages() {
    command -v cc >/dev/null || echo gcc
    command -v make >/dev/null || echo make
    { command -v cc >/dev/null && have_header stdlib.h; } || echo libc6-dev
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    python_headers || echo python3-dev
    [ "$1" = test ] || return 0
    command -v g++ >/dev/null || echo g++
    command -v addr2line >/dev/null || echo binutils
    command -v strace >/dev/null || echo strace
    command -v sqlite3 >/dev/null || echo sqlite3
    command -v perl >/dev/null || echo perl
    command -v mtrace >/dev/null || echo libc-devtools
    command -v ps >/dev/null || echo procps
    command -v setcap >/dev/null || echo libcap2-bin
    [ -d /usr/lib/debug/.build-id ] || echo libc6-dbg
    chromium_path >/dev/null || chromium_package
}

chromium_path() { command -v chromium || command -v chromium-browser || command -v google-chrome; }

# On Ubuntu the package is only a pointer to a snap: there Playwright brings its own Chromium (see install_browser).
chromium_package() {
    # shellcheck disable=SC1091
    [ "$(. /etc/os-release && echo "$ID")" = ubuntu ] || echo chromium
}

# install_packages KIND: installs what is missing, or names it and stops.
install_packages() {
    local wanted
    wanted=$(missing_packages "$1" | sort -u | tr '\n' ' ')
    [ -n "${wanted// /}" ] || return 0
    command -v apt-get >/dev/null || die "please install what these Debian packages hold, then try again: $wanted"
    if [ "$(id -u)" != 0 ]; then
        say "these packages are missing; install them, then try again:"
        die "  sudo apt-get install $wanted"
    fi
    say "installing $wanted"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >/dev/null || die "apt-get update failed"
    # shellcheck disable=SC2086
    apt-get install -y -qq --no-install-recommends $wanted >"$LOG" 2>&1 || { tail -20 "$LOG" >&2; die "apt-get install failed"; }
}

# install_python KIND: the virtual environment with heapledger in it, rebuilt when its sources changed.
install_python() {
    local stamp="$ROOT/.venv/.heapledger-$1" digest
    digest=$(cd "$ROOT" && git ls-files -z pyproject.toml setup.py preload analyzer/glibc tracer/symbols |
        xargs -0 cat 2>/dev/null | cat - <("$PYTHON" --version) | sha256sum | cut -d' ' -f1)
    [ -x "$ROOT/.venv/bin/heapledger" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$digest" ] && return 0
    say "building (one to three minutes the first time)"
    [ -x "$ROOT/.venv/bin/python" ] || "$PYTHON" -m venv "$ROOT/.venv" >"$LOG" 2>&1 || { cat "$LOG" >&2; die "venv failed"; }
    local target="$ROOT"
    [ "$1" = test ] && target="$ROOT[test,dev]"
    "$ROOT/.venv/bin/python" -m pip install -q --disable-pip-version-check -e "$target" >"$LOG" 2>&1 ||
        { tail -30 "$LOG" >&2; die "pip install failed"; }
    printf '%s\n' "$digest" >"$stamp"
}

# install_browser: where no Chromium is packaged, the one that Playwright downloads.
install_browser() {
    chromium_path >/dev/null && return 0
    "$ROOT/.venv/bin/python" -m playwright install --with-deps chromium >"$LOG" 2>&1 ||
        say "no Chromium could be installed: the browser tests will be skipped, and say so"
}

# set_up KIND: `run` for using heapledger, `test` for testing it.
set_up() {
    ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    PYTHON=${PYTHON:-python3}
    LOG=$(mktemp)
    trap 'rm -f "$LOG"' EXIT
    [ "$(uname -sm)" = "Linux x86_64" ] || die "this needs Linux on x86-64; here is $(uname -sm)"
    python_ok || die "Python 3.11 or newer is needed; $("$PYTHON" --version 2>&1 || echo none) is here (set PYTHON=...)"
    install_packages "$1"
    install_python "$1"
    [ "$1" = test ] && install_browser
    return 0
}
