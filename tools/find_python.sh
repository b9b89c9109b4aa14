#!/usr/bin/env bash
# Prints the path of a Python 3.12, or says what to do and fails. PYTHON=/path/to/python names one explicitly.
set -u
candidates=("${PYTHON:-}" python3.12 python3 python)
command -v pyenv >/dev/null 2>&1 && candidates+=("$(pyenv root)"/versions/3.12*/bin/python3.12)
command -v uv >/dev/null 2>&1 && candidates+=("$(uv python find --offline 3.12 2>/dev/null)")
for candidate in "${candidates[@]}"; do
  [ -n "$candidate" ] || continue
  # A pyenv shim exists for versions that are not selected and fails when it runs: so run it.
  path=$("$candidate" -c 'import sys, venv; print(sys.executable if sys.version_info[:2] == (3, 12) else "")' 2>/dev/null)
  if [ -n "$path" ]; then echo "$path"; exit 0; fi
done
echo >&2 'Python 3.12 with its venv module is needed and was not found. Install it, for example with one of
    apt-get install python3.12 python3.12-venv     pyenv install 3.12     uv python install 3.12
or name it: make PYTHON=/path/to/python3.12'
exit 1
