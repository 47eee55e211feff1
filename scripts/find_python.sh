#!/bin/sh
# Prints a Python that the demo's tritonserver can run its models with: 3.10 to 3.12, with venv and its shared library.
# $PYTHON is tried first. Where there is none, a 3.12 is fetched into .python by way of uv: no root, nothing outside here.
set -eu

suits() {
    "$1" - <<'END' 2>/dev/null
import ensurepip, pathlib, sys, sysconfig, venv
name = f"libpython{sys.version_info[0]}.{sys.version_info[1]}.so.1.0"
v = sysconfig.get_config_vars()
places = [v["LIBDIR"], pathlib.Path(v["LIBDIR"]) / (v.get("MULTIARCH") or ""), pathlib.Path(sys.base_prefix) / "lib"]
ok = (3, 10) <= sys.version_info[:2] <= (3, 12) and any((pathlib.Path(p) / name).exists() for p in places)
sys.exit(0 if ok else 1)
END
}

for candidate in "${PYTHON:-python3}" python3.12 python3.11 python3.10; do
    if command -v "$candidate" >/dev/null 2>&1 && suits "$candidate"; then
        command -v "$candidate"
        exit 0
    fi
    [ "$candidate" != "${PYTHON:-}" ] || echo "$PYTHON is no Python 3.10 to 3.12 with a shared library; looking for another" >&2
done

echo "no Python 3.10 to 3.12 with a shared library here; fetching one into .python" >&2
python3 -m venv .python/uv >&2
.python/uv/bin/pip install -q uv >&2
if ! UV_PYTHON_INSTALL_DIR=.python .python/uv/bin/uv python install 3.12 >&2; then
    echo "error: no suitable Python; install python3.12 and libpython3.12, or name one: make PYTHON=/path/to/python" >&2
    exit 1
fi
UV_PYTHON_INSTALL_DIR=.python .python/uv/bin/uv python find --no-project 3.12
