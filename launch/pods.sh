# Sourced by tpu_vm.sh and gke/jobset.sh: errors of one line, and ENV, the variables that a run gets.
# shellcheck shell=bash

fail() { echo "error: $*" >&2; exit 1; }
needed() { [ -n "${!1:-}" ] || fail "$1 is not set: $2"; }

# for_shell WORD...: prints them as a shell will read them again, a space before each.
for_shell() { [ "$#" -eq 0 ] || printf ' %q' "$@"; }

# split_words NAME: sets `words` to those of the variable NAME: between spaces and ends of lines, but for what is in quotes.
# Nothing in them is expanded, which is why it is not the shell that takes them apart.
split_words() {
  local text word
  words=()
  text="$(xargs -r printf '%s\n' <<<"${!1:-}" 2>/dev/null)" || fail "$1: a quote in it is not closed"
  while IFS= read -r word; do [ -z "$word" ] || words+=("$word"); done <<<"$text"
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
