#!/bin/sh
# build_triton_driver.sh SITE_PACKAGES DIR: compiles the one C module that Triton would compile at its first use,
# where Triton is there (torch for CUDA brings it). The image that serves has no compiler: see triton_cc.sh.
set -eu
backend="$1/triton/backends/nvidia"
mkdir -p "$2"
[ -d "$backend" ] || exit 0
stub="$(mktemp -d)"
# The driver's library comes with the machine; its name is all that is needed here.
echo | gcc -x c -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$stub/libcuda.so.1" -
headers="$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')"
# As triton/runtime/build.py does.
gcc "$backend/driver.c" -O3 -shared -fPIC -Wno-psabi -o "$2/cuda_utils.so" \
  -Wl,--no-as-needed "-L$stub" -l:libcuda.so.1 "-I$backend/include" "-I$headers"
rm -r "$stub"
