# Shared by tools/demo, tools/test, tools/get-peers and tools/iperf_harness/run; sourced, not run. POSIX sh.
# Brings a machine to the point where the clone's own virtual environment works, and says what it does.

top=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=$top/.venv

say() { printf '%s\n' "$*" >&2; }

# fail CODE TEXT...: the exit codes are those of nebula-mp
fail() {
    code=$1
    shift
    say "$(basename "$0"): $*"
    exit "$code"
}

need_root() {
    [ "$(id -u)" = 0 ] && return
    again="$top/tools/$(basename "$0")${*:+ $*}"
    command -v sudo >/dev/null 2>&1 && fail 4 "needs root, for network namespaces and packages. Next: sudo $again"
    fail 4 "needs root, for network namespaces and packages. Become root (su -), then: $again"
}

# apt_install PACKAGE...: by apt, whose package lists are refreshed before the first
lists_are_fresh=
apt_install() {
    command -v apt-get >/dev/null 2>&1 ||
        fail 1 "missing here: $*. This is not Debian or Ubuntu, so install what they stand for and run it again."
    say "installing: $*"
    log=$(mktemp)
    {
        { [ -n "$lists_are_fresh" ] || apt-get -qq update; } &&
            DEBIAN_FRONTEND=noninteractive apt-get -qq --no-install-recommends install -y "$@"
    } >"$log" 2>&1 </dev/null || {
        tail -n 20 "$log" >&2
        rm -f "$log"
        fail 1 "apt-get could not install: $*. Its last words are above."
    }
    rm -f "$log"
    lists_are_fresh=yes
}

# need COMMAND:PACKAGE...: installs the packages whose command is missing
need() {
    missing=
    for pair in "$@"; do
        command -v "${pair%%:*}" >/dev/null 2>&1 || missing="$missing ${pair#*:}"
    done
    # shellcheck disable=SC2086 # one word for each package
    [ -z "$missing" ] || apt_install $missing
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# sets $python to an interpreter of at least 3.11 that can make virtual environments
find_python() {
    command -v "${PYTHON:-python3}" >/dev/null 2>&1 || [ -n "${PYTHON:-}" ] || apt_install python3 python3-venv
    python=
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if is_new_enough "$candidate"; then
            python=$(command -v "$candidate")
            break
        fi
    done
    [ -n "$python" ] ||
        fail 1 "needs Python 3.11 or newer, found $("${PYTHON:-python3}" --version 2>&1 || echo none)." \
            "Debian 12 and Ubuntu 24.04 have it; with a newer one elsewhere: PYTHON=/path/to/python3 $0"
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 && return
    # Debian names the package after the version when the interpreter is not the default one.
    apt_install "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        fail 1 "$python cannot make virtual environments; set PYTHON to one that can"
}

# python-pytun has wheels for x86-64 only; elsewhere pip compiles it.
need_compiler() {
    [ "$(uname -m)" = x86_64 ] && return
    need gcc:gcc
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        apt_install libc6-dev "$("$python" -c 'import sys; print("python%d.%d-dev" % sys.version_info[:2])')"
}

# make_venv EXTRA: .venv with this clone installed in it, editable, plus the extra (may be empty).
# The stamp holds everything that the result depends on, so a second run starts at once.
make_venv() {
    extra=${1:+[$1]}
    find_python
    stamp=$venv/.stamp${1:+-$1}
    want=$(
        echo "$top $extra"
        "$python" -VV
        cat "$top/setup.cfg" "$top/pyproject.toml" "$top/tools/constraints.txt"
    )
    want=$(printf '%s' "$want" | sha256sum | cut -d' ' -f1)
    [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && [ -x "$venv/bin/python" ] && return
    need_compiler
    say "preparing $venv with $("$python" --version)"
    # a venv of another interpreter or of a clone that was moved is of no use
    if ! "$venv/bin/python" -c "import sys; sys.exit(sys.prefix != '$venv' or sys.version != '''$("$python" -c 'import sys; print(sys.version)')''')" >/dev/null 2>&1; then
        "$python" -m venv --clear "$venv"
    fi
    "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check --root-user-action=ignore \
        --constraint "$top/tools/constraints.txt" --editable "$top$extra" >&2 ||
        fail 1 "pip could not install nebula_mp and what it needs into $venv; the reason is above"
    echo "$want" >"$stamp"
}

# What sudo made belongs to the one who called it, so that git and rm work on it later.
give_back() {
    [ -n "${SUDO_UID:-}" ] && [ -n "${SUDO_GID:-}" ] || return 0
    export PYTHONDONTWRITEBYTECODE=1
    for made in .venv .peers .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache nebula_mp.egg-info; do
        [ ! -e "$top/$made" ] || chown -R "$SUDO_UID:$SUDO_GID" "$top/$made"
    done
    find "$top/nebula_mp" "$top/tests" -name __pycache__ -exec chown -R "$SUDO_UID:$SUDO_GID" {} +
}

need_tun() {
    [ -c /dev/net/tun ] || modprobe tun 2>/dev/null || true
}
