#!/usr/bin/env bash
# Installing Opacus puts a package named `benchmarks` beside it, which hides a project's own of that name.
#
# The wheel of opacus 1.6.0 has two packages: `opacus`, and the folder of its own benchmarks. A project that is installed
# in editable mode, and keeps its benchmarks in a folder of that name, finds them until Opacus is there: site-packages
# comes before what an editable install adds. Then `import benchmarks` succeeds, and is Opacus'. Only where the project's
# folder stands on the path itself, as with `python -m` in it, is its own found first.
set -euo pipefail
there=$(mktemp -d)
trap 'rm -rf "$there"' EXIT
python3 -m venv "$there/env"
mkdir -p "$there/project/benchmarks"
echo 'OWN = True' > "$there/project/benchmarks/__init__.py"
cat > "$there/project/pyproject.toml" <<'TOML'
[build-system]
requires = ["setuptools==80.9.0"]
build-backend = "setuptools.build_meta"

[project]
name = "a-project"
version = "1"

[tool.setuptools]
packages = ["benchmarks"]
TOML
pip() { "$there/env/bin/pip" install --quiet --disable-pip-version-check "$@" 2> /dev/null; }
own() { (cd "$there" && "$there/env/bin/python" -c 'import benchmarks; print(hasattr(benchmarks, "OWN"))'); }

pip --editable "$there/project" --config-settings editable_mode=compat
said="before: the project's own: $(own)"
pip --no-deps opacus==1.6.0
said="$said
after: the project's own: $(own)
from the project's folder: $(cd "$there/project" && "$there/env/bin/python" -c 'import benchmarks; print(hasattr(benchmarks, "OWN"))')"
echo "$said"
[ "$said" = "before: the project's own: True
after: the project's own: False
from the project's folder: True" ] || { echo "this has changed" >&2; exit 1; }
