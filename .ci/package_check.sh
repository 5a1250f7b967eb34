#!/usr/bin/env bash
# Builds the wheel, installs it outside the checkout, and checks what a user would get.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=$root/${PYTHON:-.venv/bin/python}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

rm -rf build  # setuptools would put files of an earlier build into the wheel
"$python" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$scratch" .
wheel=$(echo "$scratch"/*.whl)

# A new environment that borrows the dependencies: the path file makes them importable, but not the
# checkout, because the path files inside the borrowed folder are not read.
"$python" -m venv "$scratch/venv"
borrowed=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own=$("$scratch/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$wheel"
echo "$borrowed" > "$own/borrowed.pth"

cd "$scratch"
"$scratch/venv/bin/python" "$root/.ci/check_installed.py"
libraries=("$own"/talos_fast/*.so)
if [ -e "${libraries[0]}" ]; then
  "$python" "$root/tests/abi.py" "${libraries[@]}"
else
  echo "no compiled library in this wheel: no compiler here"
fi
"$scratch/venv/bin/talos-fast" --help > /dev/null

# The same wheel with the oldest version of every package that its users need, and the tests of what differs between
# versions; and the sources must compile with that torch's headers.
"$python" -m venv "$scratch/old"
oldest() { (cd "$root" && "$scratch/old/bin/python" -P "$@"); }  # -P: what is installed, not the checkout
install() { "$python" -m uv --quiet pip install --python "$scratch/old/bin/python" "$@"; }
"$python" "$root/.ci/oldest.py" > oldest.txt
install -r oldest.txt "setuptools>=77" wheel ninja pytest pytest-timeout hypothesis expecttest
install --no-deps "$wheel"
tests() { oldest -m pytest -q -p no:cacheprovider "$@"; }
of_training() {
  tests tests/test_{methods_checkpointed,whole_step}.py -k "clip and (gradients or compile and True)"
  tests tests/test_finetune.py -k "test_compiled and l-lora"
}
of_training > training.txt 2>&1 &  # two processes at a time, as in `make test`
training=$!
tests tests/test_{abi,adamw_contract,ops,masked_adam,compact_operator}.py
tests tests/test_{cli,demo_assets,models_load,presets,suite_shared}.py
wait "$training" || { cat training.txt; exit 1; }
tail -n 1 training.txt
rm -rf "$root/build"
oldest -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$scratch/oldest" .
compiled() { "$python" -m zipfile -l "$1" | grep -o 'talos_fast/_C[^ ]*'; }  # a library that fails is left out
diff <(compiled "$wheel") <(compiled "$scratch"/oldest/*.whl)
echo "package check passed: $(basename "$wheel")"
