#!/usr/bin/env bash
# The whole recipe at size `tiny`, from raw text to an aligned chat model with a report, on a laptop's CPU.
#   bash launch/demo.sh [WORKDIR]      the same command goes on where a stopped run was
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

mkdir -p "${1:-$checkout/runs/demo}"
workdir="$(cd "${1:-$checkout/runs/demo}" && pwd)" # macOS has no `realpath -m`
ensure_environment eval
cd "$checkout"
say "running the recipe in $workdir"
exec "$venv/bin/python" -m llama_jax.recipe --config=configs/recipe.py:tiny --workdir="$workdir" "${@:2}"
