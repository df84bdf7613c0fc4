#!/usr/bin/env bash
# make_release.sh [PYTHON]: builds sdist and wheel of the committed tree into dist/, checks and installs them, and lists what
# comes with them. See docs/releasing.md. TORCH_INDEX: where the trial installation has PyTorch from.
set -euo pipefail
python=${1:-python3.11}
cd "$(dirname "$0")/.."
tree=$PWD
work=$tree/build/release
tools=$work/tools/bin
fresh=$work/fresh/bin
constraints=$tree/constraints.txt

if [ -n "$(git status --porcelain)" ]; then
    echo "make_release.sh: the tree has changes that are not committed; commit or stash them" >&2
    exit 1
fi
rm -rf "$work" dist
mkdir -p "$work/source" dist
"$python" -m venv "$work/tools"
"$tools/pip" install --quiet --constraint "$constraints" build twine cyclonedx-bom

# What is committed and nothing else: no stale build folder, no file that git ignores.
git archive HEAD | tar -x -C "$work/source"
PIP_CONSTRAINT=$constraints "$tools/python" -m build --outdir dist "$work/source"
"$tools/twine" check --strict dist/*

"$python" -m venv "$work/fresh"
torch=$(grep '^torch==' "$constraints")
"$fresh/pip" install --quiet --constraint "$constraints" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"
"$fresh/pip" install --quiet --constraint "$constraints" dist/*.whl
cd "$work"
"$fresh/sidecast" --help >/dev/null
version=$("$fresh/python" -c 'from importlib.metadata import version; print(version("sidecast"))')
cd "$tree"
"$tools/cyclonedx-py" environment --pyproject pyproject.toml --output-reproducible \
    --output-file "dist/sidecast-$version.cdx.json" "$fresh/python"
cd dist
ls -l -- * | awk '{print $5, $NF}'
sha256sum -- *
