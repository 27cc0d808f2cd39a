#!/usr/bin/env bash
# A stage on a TPU pod slice, by queued resources: create, set up, run on all workers, logs, resume after preemption, delete.
#
#   bash launch/tpu_vm.sh [--dry_run] COMMAND [ARGUMENTS]
#
#   create                 asks for the slice and waits until it is there
#   setup                  copies this checkout to all workers and installs it; what is not committed only with ALLOW_DIRTY=1
#   run MODULE [FLAGS]     starts python -m llama_jax.MODULE FLAGS on all workers, again whenever it fails
#   logs                   follows the log of WORKER (default 0)
#   status                 the state of the request
#   resume MODULE [FLAGS]  stays until the run has finished: whenever the slice was taken away does all of the above again, and
#                          starts the workers that nothing runs on
#   stop                   asks the run to save and end
#   delete                 gives the slice back
#
# --dry_run, before or after COMMAND, prints what would run, and runs nothing. Environment: NAME, ZONE, TYPE (v5p-512, v6e-256,
# ...); optional PROJECT, RUNTIME (the TPU image; default by TYPE), SPOT=1 or RESERVED=1, WORKER, RESTARTS (default 3: after so
# many more attempts that end with an error, code 1, within ten minutes it gives up); of the machines SERVICE_ACCOUNT,
# CREATE_FLAGS (--network=..., --internal-ips), SSH_FLAGS (--internal-ip); of what is installed EXTRAS (eval,data), JAX_VERSION
# (default: the newest); ENV, variables of the workers ("HF_TOKEN XLA_FLAGS='--a --b'"). The workdir is on a file system that
# all hosts share.
set -euo pipefail

checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
dry_run=""
# shellcheck source=launch/pods.sh
source "$checkout/launch/pods.sh"

say() { echo "==> $*" >&2; }

# do_it COMMAND...: runs it, or prints it so that a shell would run the same.
do_it() {
  if [ -n "$dry_run" ]; then
    printf '%q ' "$@"; echo
  else
    "$@"
  fi
}

runtime() {
  case "$TYPE" in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5e-* | v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    tpu7x-*) echo v2-alpha-tpu7-ubuntu2404 ;;
    *) fail "TYPE=$TYPE: expected v4-N, v5e-N, v5p-N, v6e-N or tpu7x-N" ;;
  esac
}

# The product name that gcloud wants: v5e slices are ordered as v5litepod.
accelerator() { echo "${TYPE/#v5e-/v5litepod-}"; }

place() { printf '%s\n' "--zone=$ZONE"; if [ -n "${PROJECT:-}" ]; then printf '%s\n' "--project=$PROJECT"; fi; }

# to_workers FILE THERE: copies it to all of them; THERE without a / is in the home directory.
to_workers() {
  local where
  mapfile -t where < <(place)
  do_it gcloud compute tpus tpu-vm scp "$1" "$NAME:$2" "${where[@]}" "${ssh_flags[@]}" --worker=all
}

on_workers() {
  local worker="$1" command="$2" where
  mapfile -t where < <(place)
  do_it gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" "${ssh_flags[@]}" --worker="$worker" --command="$command"
}

state() {
  local where
  mapfile -t where < <(place)
  do_it gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)'
}

create() {
  local where image options=()
  mapfile -t where < <(place)
  [ -z "${SPOT:-}" ] || options+=(--spot)
  [ -z "${RESERVED:-}" ] || options+=(--reserved)
  [ "${#options[@]}" -lt 2 ] || fail "SPOT and RESERVED are both on; expected one of them"
  [ -z "${SERVICE_ACCOUNT:-}" ] || options+=(--service-account="$SERVICE_ACCOUNT")
  image="${RUNTIME:-$(runtime)}"  # on a line of its own, where an error ends the script
  do_it gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --node-id="$NAME" \
    --accelerator-type="$(accelerator)" --runtime-version="$image" "${options[@]}" "${create_flags[@]}" || return
  [ -n "$dry_run" ] || wait_until_there
}

wait_until_there() {
  local now
  while now="$(state)" || return; [ "$now" != ACTIVE ]; do
    case "$now" in
      FAILED | SUSPENDED) fail "the request for $NAME is $now; delete it and create it again" ;;
    esac
    say "$(date +%H:%M:%S) $NAME is $now"
    sleep 30
  done
  say "$NAME is there"
}

# The variables of ENV go to the workers as a file that its owner alone can read, here and there: a command's words would be in
# the lists of processes of both, and in gcloud's logs. (Standard input is one for all workers: one of them would read it.)
send_variables() {
  [ "${#variables[@]}" -gt 0 ] || return 0
  if [ -n "$dry_run" ]; then
    echo "# $files/env exports ${variables[*]%%=*}"
  else
    (umask 077; printf 'export%s\n' "$(for_shell "${variables[@]}")" >"$files/env") || return
  fi
  to_workers "$files/env" llama_jax.env || return
  rm -f "$files/env"
}

# What a worker's shell does first, which ends without that file; a loop inherits the variables.
read_variables() { [ "${#variables[@]}" -eq 0 ] || echo 'trap "rm -f ~/llama_jax.env" EXIT; . ~/llama_jax.env || exit'; }

# What a worker does with the archive, but for what is to be installed. Some TPU images bring a Python older than 3.11, or one
# without venv; on a machine that has just started, others hold the locks of apt. (The workers expand it, not we.)
# shellcheck disable=SC2016
install='set -e
rm -rf ~/llama_jax ~/llama_jax.shipped
tar -xzf /tmp/llama_jax.tar.gz -C ~
cd ~/llama_jax
python="$(command -v python3.12 || command -v python3.11 || echo python3.11)"
if ! "$python" -c "import ensurepip, venv" 2>/dev/null; then
  python="${python##*/}"
  until sudo apt-get update -qq || [ "$SECONDS" -gt 600 ]; do sleep 5; done  # it does not wait for its lock
  sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq "$python" "$python-venv"
fi
"$python" -m venv .venv
.venv/bin/pip install -q'
packages() { for_shell --editable ".[tpu,gcs,interop${EXTRAS:+,$EXTRAS}]" ${JAX_VERSION:+"jax==$JAX_VERSION"}; }

# What a worker does last: it keeps beside the checkout what it got, and which jax, for one that is repaired and comes later.
# shellcheck disable=SC2016
record() {
  printf '\njax="$(.venv/bin/python -c %q)"\necho %q "$jax" > ~/llama_jax.shipped' \
    'import importlib.metadata; print(importlib.metadata.version("jax"))' "$revision"
}

# What is shipped: HEAD, or with ALLOW_DIRTY=1 a tree of all files that git does not ignore, made in an index of its own.
tree() {
  local changed index
  changed="$(git -C "$checkout" --no-optional-locks status --porcelain)" || fail "$checkout is no git checkout"
  if [ -z "$changed" ]; then
    git -C "$checkout" rev-parse HEAD
  elif [ -n "${ALLOW_DIRTY:-}" ]; then
    index="$(mktemp -d -t llama_jax.XXXXXX)"
    (export GIT_INDEX_FILE="$index/index" && git -C "$checkout" add --all && git -C "$checkout" write-tree) || fail "see above"
    rm -rf "$index"
  else
    changed="$(cut -c 4- <<<"$changed" | paste -s -d ' ')"
    fail "not committed: $changed; commit, or ship the files as they are with ALLOW_DIRTY=1"
  fi
}

# pack [REVISION]: makes the archive, of what `tree` says.
archive="" revision=""
pack() {
  revision="${1:-$(tree)}" || return
  archive="$files/llama_jax.tar.gz"
  do_it git -C "$checkout" archive --output="$archive" --prefix=llama_jax/ "$revision"
}

# pin ANSWERS: from here on what is shipped, and the jax, are those of a worker that has some. All must have the same.
pin() {
  local shipped="${1#*worker: has }" theirs
  [ "$shipped" != "$1" ] || return 0
  read -r theirs JAX_VERSION <<<"${shipped%%$'\n'*}"
  git -C "$checkout" cat-file -e "$theirs^{tree}" 2>/dev/null ||
    fail "a worker has no checkout, and the others have $theirs, which $checkout does not know; fetch it with git, or stop and setup"
  pack "$theirs"
}

# A number alone may belong to another process by now.
alive='pgrep -F ~/llama_jax.pid -f llama_jax >/dev/null 2>&1'
refuse="echo 'a run goes on here; stop it first' >&2; exit 1"

# ship WHERE_A_RUN_GOES_ON: copies and installs, but on workers where one goes on; they do that.
ship() {
  [ -n "$archive" ] || pack || return
  to_workers "$archive" /tmp/llama_jax.tar.gz && send_variables || return
  on_workers all "$(read_variables)
if $alive; then $1; fi
$install$(packages)$(record)"
}

setup() { ship "$refuse"; }

# differs MODULE [FLAGS]: a test, for a worker's shell, that what was started there last is not this.
# shellcheck disable=SC2016
differs() { printf '[ "$(cat ~/llama_jax.command 2>/dev/null)" != %q ]' "$1$(for_shell "${@:2}")"; }
# shellcheck disable=SC2016
name_it='echo "worker: runs another: $(cat ~/llama_jax.command 2>/dev/null || echo unknown)"'

# refuse_another ANSWERS: an error where a worker has named another run.
refuse_another() {
  local other="${1#*worker: runs another: }"
  [ "$other" != "$1" ] || return 0
  other="${other%%$'\n'*}"
  [ "$other" != unknown ] ||
    fail "a run goes on there that an older launch/tpu_vm.sh began, whose flags are not known; end it (bash launch/tpu_vm.sh" \
      "stop, until logs show its end), then give this command again: a workdir goes on from its newest checkpoint"
  fail "another run goes on there: $other; stop it first, and wait for its end"
}

# begin WHERE_IT_GOES_ON MODULE [FLAGS]: starts the loop on all workers but those where it lives; they do the first. An error
# where another run does.
begin() {
  local otherwise="$1" module="$2" flags again start answers code=0 restarts="${RESTARTS:-3}"
  shift 2
  flags="$(for_shell "$@")"
  # Everything but a finished run is tried again from the newest checkpoint: also 75, a run that saved because of SIGTERM.
  # An error (1) that comes back at once, such as a misspelt key, is not, nor is a run that diverged (65), which would again.
  # `stop` leaves a file that ends this.
  again="errors=0; until [ -e ~/llama_jax.stop ]; do SECONDS=0;"
  again+=" cd ~/llama_jax && .venv/bin/python -m llama_jax.$module$flags; code=\$?; echo \$code > ~/llama_jax.code;"
  again+=" [ \$code -ne 0 ] && [ \$code -ne 65 ] && [ ! -e ~/llama_jax.stop ] || exit \$code;"
  again+=" if [ \$code -eq 1 ] && [ \$SECONDS -lt 600 ]; then errors=\$((errors + 1)); else errors=0; fi;"
  again+=" if [ \$errors -gt $restarts ]; then echo '1 again and again' > ~/llama_jax.code; exit 1; fi;"
  again+=" echo \"=== ended with \$code, again in 10 s\"; sleep 10; done"
  start="$(read_variables)
if $alive; then if $(differs "$module" "$@"); then $name_it; exit 1; fi; $otherwise; fi
cd ~/llama_jax || exit; rm -f ~/llama_jax.stop ~/llama_jax.code
echo$(for_shell "$module$flags") > ~/llama_jax.command
nohup bash -c $(printf '%q' "$again") >> ~/llama_jax.log 2>&1 < /dev/null & echo \$! > ~/llama_jax.pid"
  send_variables || return
  if [ -n "$dry_run" ]; then on_workers all "$start"; return; fi
  answers="$(on_workers all "$start")" || code=$?
  refuse_another "$answers"
  return "$code"
}

run() { begin "$refuse" "$@"; }

# Starts what is missing; ends this script when the run has ended.
look_after() {
  local seen ask
  # How another run ended says nothing of this one.
  ask="if $(differs "$@"); then if $alive; then $name_it; exit; fi; [ ! -e ~/llama_jax.command ] || "
  ask+="rm -f ~/llama_jax.command ~/llama_jax.code ~/llama_jax.stop; fi; "
  ask+="[ ! -e ~/llama_jax.shipped ] || echo \"worker: has \$(cat ~/llama_jax.shipped)\"; "
  ask+="if $alive; then echo 'worker: runs'; elif [ -e ~/llama_jax.stop ]; then echo 'worker: stopped'"
  ask+="; elif [ -e ~/llama_jax.code ]; then echo \"worker: ended with \$(cat ~/llama_jax.code)\""
  ask+="; elif [ -e ~/llama_jax/.venv ]; then echo 'worker: has no run'; else echo 'worker: is new'; fi"
  seen="$(on_workers all "$ask")" || true  # those that answer say enough
  refuse_another "$seen"
  case "$seen" in
    *"worker: ended with 0"*) say "the run has finished"; exit 0 ;;
    *"worker: stopped"*) say "the run was stopped"; exit 75 ;;
    *"worker: ended with 65"*)
      stop || true
      fail "the run diverged, and would again from the same checkpoint; see the logs, of each WORKER"
      ;;
    *"again and again"*)
      stop || true  # the others wait for this one
      fail "the run ends with an error whenever it is started; see the logs, of each WORKER"
      ;;
    *"worker: is new"*) # a machine that was repaired comes back with an empty disk
      say "a worker has no checkout: once more"
      pin "$seen"
      if ! ship "exit 0" || ! begin "exit 0" "$@"; then say "not this time; again in a minute"; fi
      ;;
    *"worker: ended with"* | *"worker: has no run"*)
      say "a worker has no run: once more"
      begin "exit 0" "$@" || say "not this time; again in a minute"
      ;;
  esac
}

resume() {
  local now said begun=""
  if [ -n "$dry_run" ]; then
    state
    delete
    create
    setup
    run "$@"
    return
  fi
  pack  # what is edited meanwhile must not reach a run that goes on
  said="$(mktemp)"
  while true; do
    # A slice that is not there is made anew; a service that gives no answer says nothing of it, and it may be at work.
    if ! now="$(state 2>"$said")"; then
      now="without an answer ($(tail -n 1 "$said"))"
      ! grep -q NOT_FOUND "$said" || now=GONE
    fi
    case "$now" in
      CREATING | PROVISIONING | WAITING_FOR_RESOURCES | ACCEPTED) ;;
      ACTIVE)
        if [ -n "$begun" ]; then look_after "$@"; else begin "exit 0" "$@" || true; fi
        begun=1
        ;;
      GONE | SUSPENDED | SUSPENDING | FAILED)
        say "$NAME is $now: once more from the start"
        # The slice may be taken away in the middle of this too. (Inside `||` no error ends the script, hence the chain.)
        (delete || true; create && setup && run "$@") || say "not this time; again in a minute"
        begun=1
        ;;
      *) say "$NAME is ${now:-in no known state}: again in a minute" ;;
    esac
    sleep 60
  done
}

# Where nothing is alive the number in that file may be another process's by now.
stop() { on_workers all "touch ~/llama_jax.stop; if $alive; then pkill -TERM -P \"\$(cat ~/llama_jax.pid)\" || true; fi"; }

delete() {
  local where
  mapfile -t where < <(place)
  do_it gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

if [ "${1:-}" = "--dry_run" ]; then dry_run=1; shift; fi
command="${1:-}"
# Behind the command too, where many write it: what follows a MODULE is that module's own.
if [ "${2:-}" = "--dry_run" ]; then dry_run=1; set -- "$command" "${@:3}"; fi
case "$command" in
  run | resume)
    shift
    [[ "${1:-}" =~ ^[a-z_.]+$ ]] || fail \
      "$command: expected a module of llama_jax and its flags, as in: run train --config=configs/pretrain.py:70b; got '${1:-}'"
    [[ "${RESTARTS:-3}" =~ ^[0-9]+$ ]] || fail "RESTARTS=$RESTARTS: expected a number"
    ;;
  create | setup | logs | status | stop | delete)
    shift
    [ "$#" -eq 0 ] || fail "$command: expected no arguments, got $*"
    ;;
  *) sed -n '2,/^set -/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; exit 1 ;;
esac
switches SPOT RESERVED ALLOW_DIRTY
needed NAME "what to call the slice"
needed ZONE "where it is, as us-east5-a"
needed TYPE "what it is, as v5p-512"
[[ "${EXTRAS:-a}" =~ ^[a-z]+(,[a-z]+)*$ ]] || fail "EXTRAS=$EXTRAS: expected names of setup.cfg, as eval,data"
[[ "${JAX_VERSION:-0}" =~ ^[0-9][0-9a-z.]*$ ]] || fail "JAX_VERSION=$JAX_VERSION: expected a version, as 0.10.2"
for extra in ${EXTRAS:+${EXTRAS//,/ }}; do
  grep -q "^$extra =$" "$checkout/setup.cfg" || fail "EXTRAS=$EXTRAS: setup.cfg has no $extra"  # pip would only warn
done
split_words CREATE_FLAGS; create_flags=("${words[@]}")
split_words SSH_FLAGS; ssh_flags=("${words[@]}")
variables=()
case "$command" in setup | run | resume) read_env ;; esac  # whoever stops a run need not have its secrets
[ -n "$dry_run" ] || command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
files="$(mktemp -d -t llama_jax.XXXXXX)"  # which nobody else can look into
trap 'rm -rf "$files"' EXIT
case "$command" in
  logs) on_workers "${WORKER:-0}" 'tail -n 100 -F ~/llama_jax.log' ;;
  status) state ;;
  *) "$command" "$@" ;;
esac
