#!/usr/bin/env bash
# A command of llama_jax in several processes on this machine, as on the hosts of a pod: the same entry point, the same
# preflight, checkpoints and failures. One process that ends takes the others with it; all begin again together.
#
#   WORKERS=4 bash launch/local.sh train --config=configs/pretrain.py:tiny --workdir=runs/four [FLAGS]
#
# Environment: WORKERS (default 4); RESTARTS (default 3), after which it gives up; PORT of the coordinator (default: a free
# one); PYTHON (default: .venv of the checkout, else python3); LOGS (default: runs/local), a file for each worker.
set -euo pipefail
checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$checkout"

fail() { echo "error: $*" >&2; exit 1; }

module="${1:-}"
[[ "$module" =~ ^[a-z_.]+$ ]] ||
  fail "expected a module of llama_jax and its flags, as in: train --config=configs/pretrain.py:tiny; got '$module'"
shift
workers="${WORKERS:-4}" restarts="${RESTARTS:-3}" logs="${LOGS:-runs/local}"
for number in "$workers" "$restarts"; do
  [[ "$number" =~ ^[0-9]+$ ]] || fail "WORKERS and RESTARTS: expected numbers, got $number"
done
[ "$workers" -ge 1 ] || fail "WORKERS=$workers: expected at least 1"
python="${PYTHON:-}"
if [ -z "$python" ]; then
  python=python3
  [ ! -x .venv/bin/python ] || python=.venv/bin/python
fi
mkdir -p "$logs"

free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# Runs all workers once; the code of the first that ends badly, or 0.
together() {
  local worker port ended code=0 pids=()
  port="${PORT:-$(free_port)}"
  # shellcheck disable=SC2317  # called by the trap
  forward() { stopping=1; kill -TERM "${pids[@]}" 2>/dev/null || true; }
  trap forward TERM INT
  for ((worker = 0; worker < workers; worker++)); do
    JAX_PLATFORMS=cpu JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES="$workers" JAX_PROCESS_ID="$worker" \
      "$python" -m "llama_jax.$module" "$@" >>"$logs/worker-$worker.log" 2>&1 &
    pids+=("$!")
  done
  for ((worker = 0; worker < workers; worker++)); do
    # A signal ends `wait` before the worker has ended, with a code above 128; then the worker is waited for again.
    while true; do
      ended=0
      wait "${pids[$worker]}" || ended=$?
      kill -0 "${pids[$worker]}" 2>/dev/null || break
    done
    [ "$code" -ne 0 ] || code="$ended"
  done
  trap - TERM INT
  return "$code"
}

stopping=""
for ((attempt = 0; ; attempt++)); do
  code=0
  together "$@" || code=$?
  tail -n 1 -q "$logs/worker-0.log" >&2
  [ "$code" -ne 0 ] || exit 0
  [ -z "$stopping" ] || exit "$code" # whoever stopped this wants no other attempt
  if [ "$code" -eq 65 ]; then echo "error: diverged, and would again; see $logs/worker-*.log" >&2; exit 65; fi
  [ "$attempt" -lt "$restarts" ] || fail "ended with $code, $restarts restarts are used up; see $logs/worker-*.log"
  echo "==> ended with $code, once more" >&2
done
