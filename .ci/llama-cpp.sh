#!/usr/bin/env bash
# llama-cpp-python for the Python given: built once for this machine's instructions, kept in a cache, reused.
#   .ci/llama-cpp.sh PYTHON
# Not the default build: with GCC 12 on a CPU with AMX, its quantised types end in a segmentation fault.
set -euo pipefail
version=0.3.36
python="${1:?usage: $0 PYTHON}"

has() { grep -m1 -E '^flags' /proc/cpuinfo 2>/dev/null | grep -qw -- "$1"; }
flags=""
if [ "$(uname -m)" = x86_64 ]; then
  flags="-DGGML_NATIVE=OFF"
  for each in avx:AVX avx2:AVX2 fma:FMA f16c:F16C bmi2:BMI2; do
    if has "${each%%:*}"; then flags="$flags -DGGML_${each##*:}=ON"; else flags="$flags -DGGML_${each##*:}=OFF"; fi
  done
  # llama.cpp's AVX512 means these five together
  if has avx512f && has avx512cd && has avx512vl && has avx512dq && has avx512bw; then
    flags="$flags -DGGML_AVX512=ON"
    for each in avx512vbmi:VBMI avx512_vnni:VNNI avx512_bf16:BF16; do
      if has "${each%%:*}"; then flags="$flags -DGGML_AVX512_${each##*:}=ON"; fi
    done
  fi
fi

tag="$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')"
key="$(printf '%s %s %s %s' "$version" "$tag" "$(uname -m)" "$flags" | sha256sum | cut -c1-12)"
cache="${FAMC_CACHE:-$HOME/.cache/famc}/wheels"
folder="$cache/llama-cpp-python-$version-$tag-$key"

wheel=("$folder/llama_cpp_python-$version"-*.whl)
if [ ! -f "${wheel[0]}" ]; then
  echo "building llama-cpp-python $version ($flags): about five minutes, once"
  mkdir -p "$cache"
  scratch="$(mktemp -d "$cache/.build-XXXXXX")"
  trap 'rm -rf "$scratch"' EXIT
  # --no-cache-dir: pip's own cache doesn't know the flags, and would give a wheel that was built with others
  CMAKE_ARGS="$flags" CMAKE_BUILD_PARALLEL_LEVEL=2 "$python" -m pip wheel -q --no-cache-dir --no-deps \
    --no-binary llama-cpp-python -w "$scratch" "llama-cpp-python==$version"
  rm -rf "$folder"
  mv -T "$scratch" "$folder"
  trap - EXIT
fi
wheel=("$folder/llama_cpp_python-$version"-*.whl)
"$python" -m pip install -q "${wheel[0]}"                              # its dependencies, where they are missing
"$python" -m pip install -q --force-reinstall --no-deps "${wheel[0]}"  # and this build of it, whatever was there
"$python" -c 'import llama_cpp; print("llama-cpp-python", llama_cpp.__version__)'
