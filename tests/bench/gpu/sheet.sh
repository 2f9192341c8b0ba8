#!/usr/bin/env bash
# Runs the sheet, in the root of the repository; results go to $OUT (default: this folder).
#   bash .gpu/sheet.sh SECONDS [GROUP,...]      on a GPU machine, with what pack.sh made
#   SHEET_DEVICE=cpu OUT=$(mktemp -d) bash tests/bench/gpu/sheet.sh 300      a dry run: tiny sizes, no GPU
# $PYTHON is the interpreter (default: python3), $SHEET_SITE a folder of packages that goes before its own.
set -uo pipefail
[ -e pyproject.toml ] || { echo "run it in the root of the repository" >&2; exit 2; }
unset PYTHONDONTWRITEBYTECODE # or every process would compile torch again
export OUT=${OUT:-.} PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 OPENBLAS_NUM_THREADS=1
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
site=${SHEET_SITE:-}
folder=/tmp
if [ "${SHEET_DEVICE:-}" = cpu ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  export OMP_NUM_THREADS=1 # checks that run side by side would take the cores from each other
else # read the libraries from the disk while the archive is unpacked
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
