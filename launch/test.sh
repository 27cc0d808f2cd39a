#!/usr/bin/env bash
# The tests. Arguments go to pytest:
#   bash launch/test.sh                    the fast ones
#   bash launch/test.sh -m slow            the slow ones
#   bash launch/test.sh tests/test_evals.py -k win_rate
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

ensure_environment test
cd "$checkout"
exec "$venv/bin/python" -m pytest "$@"
