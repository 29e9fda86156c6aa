#!/bin/sh
# Stands in for the C compiler that Triton calls (CC): hands out the module that build_triton_driver.sh compiled.
out= name=
while [ $# -gt 0 ]; do
  case "$1" in
    -o) out="$2"; shift ;;
    *.c) name="$(basename "$1" .c)" ;;
  esac
  shift
done
ready="$(dirname "$0")/../lib/triton/$name.so"
[ -f "$ready" ] || { echo "no compiler in this image, and no $ready" >&2; exit 1; }
cp "$ready" "$out"
