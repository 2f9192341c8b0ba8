#!/usr/bin/env bash
# Run the GPU run sheet, in the root of the repository. Results go to $OUT (default: the
# current folder).
#   On a GPU machine, with what pack.sh made:
#     bash .gpu/sheet.sh SECONDS [GROUP,...]
#   A dry run, at tiny sizes and without a GPU:
#     SHEET_DEVICE=cpu OUT=$(mktemp -d) bash tests/bench/gpu/sheet.sh 300
# $PYTHON is the interpreter (default: python3). $SHEET_SITE is a folder of packages
# that take precedence over the interpreter's.
set -uo pipefail
[ -e pyproject.toml ] || { echo "run it in the root of the repository" >&2; exit 2; }
# Without byte code on disk, every process would compile torch again.
unset PYTHONDONTWRITEBYTECODE
export OUT=${OUT:-.} PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 OPENBLAS_NUM_THREADS=1
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
site=${SHEET_SITE:-}
folder=/tmp
if [ "${SHEET_DEVICE:-}" = cpu ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  # Checks that run side by side would compete for the cores.
  export OMP_NUM_THREADS=1
else
  # Read the libraries from disk into the page cache while the archive is unpacked.
  ("$python" -c 'import torch; torch.zeros(1).cuda(); import torchvision, pyarrow, sklearn.datasets' >/dev/null 2>&1 &)
fi
if [ -z "$site" ] && [ -e "$here/site.tar.xz" ]; then
  site=$folder/site
  if [ ! -e "$site/done" ]; then
    mkdir -p "$site"
    if command -v xz >/dev/null; then
      xz -dc "$here/site.tar.xz" | tar -x -C "$site"
    else
      "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="fully_trusted")' \
        "$here/site.tar.xz" "$site"
    fi || { echo "site.tar.xz could not be unpacked" >&2; exit 2; }
    touch "$site/done"
  fi
  echo "unpacked after $SECONDS s"
fi
export SHEET_TMP=$folder
export PYTHONPATH=${site:+$site:}$PWD:$PWD/tests:$PWD/tests/data:$PWD/tests/bench:$here
"$python" "$here/sheet.py" "$@"
