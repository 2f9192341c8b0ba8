#!/usr/bin/env bash
# Create .gpu in the root of the repository: the files that a GPU machine needs in
# addition to a copy of the working tree. Such a machine has Python 3.12, torch 2.11 for
# CUDA 13 and no package registry, and accepts 64 MiB in total.
#   bash tests/bench/gpu/pack.sh
# The first run takes minutes (xz on one core), later runs a second: $CACHE keeps the
# archive. Then, on the GPU machine, in the root of the copy:
#   bash .gpu/sheet.sh SECONDS [GROUP,...]
#
# The archive holds DALI and nvImageCodec with machine code for sm_90 (H100, H200) only,
# nvJPEG, and the small packages that such a machine lacks. It leaves out Ray, nvCOMP,
# the codecs for JPEG 2000 and TIFF, and headers.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
repo=$(git -C "$here" rev-parse --show-toplevel)
cache=${CACHE:-/tmp/gpu-pack}
python=${PYTHON:-python3}
pins=(nvidia-dali-cuda130==2.4.0 nvidia-nvimgcodec-cu13==0.9.0.20 nvidia-nvjpeg==13.3.2.43
      pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5
      crc32c==2.9.post0 optree==0.20.0 astunparse==1.6.3 gast==0.7.0 nvtx==0.2.17 makefun==1.16.0 libcst==1.9.0
      simplejpeg==1.9.0)

# The name of the archive depends on the pins and on slim.py, so that a change rebuilds
# it.
key=$(printf '%s\n' "${pins[@]}" | cat - "$here/slim.py" | sha256sum | cut -c1-12)
archive=$cache/site-$key.tar.xz
if [ ! -e "$archive" ]; then
  rm -rf "$cache/wheels" "$cache/site"
  mkdir -p "$cache/wheels"
  flags=(--no-deps --only-binary=:all: --python-version 3.12 --implementation cp)
  for glibc in 39 36 35 34 31 28 27 26 24 17; do flags+=(--platform "manylinux_2_${glibc}_x86_64"); done
  flags+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64 --platform any)
  "$python" -m pip download -q --disable-pip-version-check "${flags[@]}" -d "$cache/wheels" "${pins[@]}"
  "$python" "$here/slim.py" "$cache/wheels" "$cache/site"
  tar --sort=name --mtime=2026-01-01 --owner=0 --group=0 -C "$cache/site" -cf - . |
    nice xz --x86 --lzma2=preset=9,dict=192MiB -T1 >"$archive.partial"
  mv "$archive.partial" "$archive"
fi

# Put the scripts, the archive and the commit into .gpu.
rm -rf "$repo/.gpu"
mkdir "$repo/.gpu"
cp "$here"/*.py "$here/sheet.sh" "$repo/.gpu/"
cp "$archive" "$repo/.gpu/site.tar.xz"
git -C "$repo" describe --always --abbrev=40 --exclude='*' --dirty >"$repo/.gpu/commit"

# Fail if .gpu and the working tree together exceed 64 MiB.
part=$(du -sb "$repo/.gpu" | cut -f1)
# git also lists files whose deletion is not committed yet: du fails on them, which is
# not an error.
tree=$(cd "$repo" && { git ls-files -z -co --exclude-standard | xargs -0 du -cb 2>/dev/null || true; } | tail -n 1 | cut -f1)
echo "part $((part >> 10)) KiB + tree $((tree >> 10)) KiB = $(((part + tree) >> 10)) of 65536 KiB"
[ $((part + tree)) -lt $((64 << 20)) ]
