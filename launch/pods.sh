# Sourced by tpu_vm.sh and gke/jobset.sh: errors of one line, switches, and ENV, the variables that a run gets.
# shellcheck shell=bash

fail() { echo "error: $*" >&2; exit 1; }

# macOS brings 3.2, which has no mapfile and takes an empty array for a variable that is not set.
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
  fail "needs bash 4.4 or newer, this is $BASH_VERSION (macOS: brew install bash)"

needed() { [ -n "${!1:-}" ] || fail "$1 is not set: $2"; }

# switches NAME...: each is on with 1, off with 0 as without a value; off it is made empty, which is what the scripts look at.
switches() {
  local switch
  for switch in "$@"; do
    case "${!switch:-}" in
      1) ;;
      0 | "") printf -v "$switch" "" ;;
      *) fail "$switch=${!switch}: expected 1 or 0" ;;
    esac
  done
}

# at_least_one NAME...: an error for a variable that is set to anything else than a number of at least 1.
at_least_one() {
  local number
  for number in "$@"; do
    [[ "${!number:-1}" =~ ^[1-9][0-9]*$ ]] || fail "$number=${!number}: expected a number, at least 1"
  done
}

# for_shell WORD...: prints them as a shell will read them again, a space before each.
for_shell() { [ "$#" -eq 0 ] || printf ' %q' "$@"; }

# split_words NAME: sets `words` to those of the variable NAME: between spaces and ends of lines, but for what is in quotes.
# Nothing in them is expanded, which is why it is not the shell that takes them apart; nor a program, which lists of processes
# would show with them. Outside of quotes a backslash could mean itself or the next character: it is refused.
split_words() {
  local text="${!1:-}" word="" begun="" quote="" character index
  words=()
  for ((index = 0; index < ${#text}; index++)); do
    character="${text:index:1}"
    case "$quote$character" in
      \' | \") quote="$character"; begun=1 ;;
      "''" | '""') quote="" ;;
      [[:space:]]) [ -z "$begun" ] || words+=("$word"); word=""; begun="" ;;
      \\) fail "$1: word $((${#words[@]} + 1)) has a backslash outside of quotes; expected it in quotes: '\\'" ;;
      *) word+="$character"; begun=1 ;;
    esac
  done
  [ -z "$quote" ] || fail "$1: a quote in it is not closed"
  [ -z "$begun" ] || words+=("$word")
}

# read_env: sets `variables` to the NAME=VALUE of ENV; a NAME alone has here the value that it shall have there. The errors
# show no part of a word, which may be one of a secret.
read_env() {
  local word value number=0
  variables=()
  split_words ENV
  for word in "${words[@]}"; do
    number=$((number + 1))
    [[ "${word%%=*}" =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] ||
      fail "ENV: expected NAME=VALUE, a VALUE with spaces in quotes, or NAME; word $number is neither"
    if [[ "$word" != *=* ]]; then
      value="$(printenv "$word")" || fail "ENV: word $number has no =, and no variable of that name is exported here"
      word="$word=$value"
    fi
    variables+=("$word")
  done
}
