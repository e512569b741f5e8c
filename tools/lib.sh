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
            DEBIAN_FRONTEND=noninteractive apt-get -qq --no-install-recommends --no-remove install -y "$@"
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

# ---- the native kernel: optional, so nothing of this ends the run but in CI ----

in_ci() { [ -n "${CI:-}" ] && [ "$CI" != 0 ] && [ "$CI" != false ]; }

rust_needed=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$top/rust/Cargo.toml")

# is_rust VERSION: whether it is at least what the native kernel needs; as in 1.85.1 and 1.85.0+dfsg3-1
is_rust() {
    [ -n "$1" ] && [ "$(printf '%s\n' "$rust_needed" "$1" | sort -V | head -n 1)" = "$rust_needed" ]
}

# rust_found: which version is here; nothing if there is none, or no toolchain behind the command
rust_found() {
    if cargo --version >/dev/null 2>&1; then rustc --version 2>/dev/null | cut -d' ' -f2; fi
}

# has_rust: whether the native kernel can be built; looks where nobody's PATH may lead
has_rust() {
    # The latter are those of packages with a number in their name.
    for folder in "${CARGO_HOME:-${HOME:-/root}/.cargo}/bin" /usr/lib/rust-1.*/bin; do
        if [ -x "$folder/cargo" ] && ! is_rust "$(rust_found)"; then PATH=$folder:$PATH; fi
    done
    is_rust "$(rust_found)"
}

# rust_packages: those of the distribution that are new enough, if any, with formatter and linter
rust_packages() {
    numbered=$(apt-cache pkgnames rustc-1. 2>/dev/null | sed -n 's/^rustc\(-1\.[0-9]*\)$/\1/p' | sort -rV)
    for suffix in "" $numbered -web; do
        offered=$(apt-cache policy "rustc$suffix" 2>/dev/null | sed -n 's/^ *Candidate: //p')
        if [ "$offered" != "(none)" ] && is_rust "$offered"; then
            case $suffix in
            "") echo "cargo rustc rustfmt rust-clippy" ;;
            -web) echo "cargo-web rustc-web rustfmt-web rust-web-clippy" ;;
            *) echo "cargo$suffix rustc$suffix rustfmt$suffix rust$suffix-clippy" ;;
            esac
            return
        fi
    done
}

# need_rust: sets $no_rust to why no native kernel can be built, to nothing if one can; installs what that takes
need_rust() {
    no_rust=
    if [ "$(uname -m)" != x86_64 ]; then
        no_rust="there is one for x86-64 only"
    elif ! has_rust; then
        found=$(rust_found)
        no_rust="it needs Rust $rust_needed, and here is ${found:-none}"
        command -v apt-get >/dev/null 2>&1 || return 0
        if [ -z "$lists_are_fresh" ] && apt-get -qq update >/dev/null 2>&1; then lists_are_fresh=yes; fi
        packages=$(rust_packages)
        # shellcheck disable=SC2086 # one word for each package; in a shell of its own, which a failure ends
        if [ -z "$packages" ]; then
            no_rust="$no_rust; the distribution has none that is new enough"
        elif (apt_install $packages) && has_rust; then
            no_rust=
        else
            no_rust="$no_rust; the distribution's could not be installed"
        fi
    fi
    if [ -z "$no_rust" ] && ! command -v cc >/dev/null 2>&1; then
        (apt_install gcc libc6-dev) || no_rust="it needs a C compiler"
    fi
}

# What the native kernel is made of and by: so that an edit makes it anew.
rust_sources() {
    find "$top/rust" -name target -prune -o -type f \( -name '*.rs' -o -name 'Cargo.*' \) -exec sha256sum {} + |
        LC_ALL=C sort
    if has_rust; then rust_found; fi
}

# say_kernel PIP-LOG: whether there is a native kernel now, and if not, why; in CI that is an error if it can be built
say_kernel() {
    if "$venv/bin/python" -c 'import nebula_mp._accel' >/dev/null 2>&1; then
        say "the native kernel was built with Rust $(rust_found)"
        return
    fi
    if [ -z "$no_rust" ]; then
        no_rust="it could not be built. To try again: rm -r .venv"
        say "what cargo said:"
        sed -n '/running build_rust/,/build_rust: optional/p' "$1" | grep -A 4 -E '^ *(error|can.t find)' |
            tail -n 11 | cut -c 1-200 >&2
        ! in_ci || fail 1 "the native kernel could not be built, though Rust $(rust_found) is here"
    fi
    say "going on with the kernel in Python. There is no native one: $no_rust"
}

# ingredients EXTRA: a hash of everything that .venv depends on
ingredients() {
    {
        echo "$top $1"
        "$python" -VV
        cat "$top/setup.cfg" "$top/pyproject.toml" "$top/tools/constraints.txt"
        rust_sources
    } | sha256sum | cut -d' ' -f1
}

# make_venv EXTRA: .venv with this clone installed in it, editable, plus the extra (may be empty).
# The stamp says what it was made of, so a second run starts at once.
make_venv() {
    extra=${1:+[$1]}
    find_python
    stamp=$venv/.stamp${1:+-$1}
    [ "$(cat "$stamp" 2>/dev/null)" = "$(ingredients "$extra")" ] && [ -x "$venv/bin/python" ] && return
    need_compiler
    need_rust
    say "preparing $venv with $("$python" --version)$([ -n "$no_rust" ] || echo ' and the native kernel: a minute or two')"
    # a venv of another interpreter or of a clone that was moved is of no use
    if ! "$venv/bin/python" -c "import sys; sys.exit(sys.prefix != '$venv' or sys.version != '''$("$python" -c 'import sys; print(sys.version)')''')" >/dev/null 2>&1; then
        "$python" -m venv --clear "$venv"
    fi
    # One that was built from other sources must not be taken for the one asked for.
    rm -rf "$top"/nebula_mp/_accel*.so "$top/build"
    log=$(mktemp)
    env ${no_rust:+CARGO=false} "$venv/bin/python" -m pip install --verbose --no-input --disable-pip-version-check \
        --root-user-action=ignore --constraint "$top/tools/constraints.txt" --editable "$top$extra" >"$log" 2>&1 || {
        tail -n 20 "$log" >&2
        rm -f "$log"
        fail 1 "pip could not install nebula_mp and what it needs into $venv; the reason is above"
    }
    say_kernel "$log"
    rm -f "$log"
    ingredients "$extra" >"$stamp"
}

# What sudo made belongs to the one who called it, so that git and rm work on it later.
give_back() {
    [ -n "${SUDO_UID:-}" ] && [ -n "${SUDO_GID:-}" ] || return 0
    export PYTHONDONTWRITEBYTECODE=1
    for made in .venv .peers .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache nebula_mp.egg-info \
        rust/target rust/fuzz/target; do
        [ ! -e "$top/$made" ] || chown -R "$SUDO_UID:$SUDO_GID" "$top/$made"
    done
    find "$top/nebula_mp" "$top/tests" \( -name __pycache__ -o -name '_accel*.so' \) -exec chown -R "$SUDO_UID:$SUDO_GID" {} +
}

need_tun() {
    [ -c /dev/net/tun ] || modprobe tun 2>/dev/null || true
}
