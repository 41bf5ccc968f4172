#!/bin/sh
# Build a wheel of llama-cpp-python for 64-bit ARM, which PyPI does not offer. A board that installs it needs no compiler.
# Usage: build_board_wheel.sh PYTHON OUTPUT_FOLDER. BOARD_CPU overrides the processor (Zig's name), BOARD_NEEDS the required
# features of /proc/cpuinfo. Zig (ziglang on PyPI) compiles against the C library of Debian 10 (glibc 2.28).
set -eu
python=$1
mkdir -p "$2"
output=$(cd "$2" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
# dotprod: most boards since 2020. A Raspberry Pi 5: BOARD_CPU=cortex_a76 BOARD_NEEDS="asimddp asimdhp"; a Raspberry Pi 4:
# BOARD_CPU=cortex_a72 BOARD_NEEDS=
cpu=${BOARD_CPU-generic+v8_2a+dotprod}
needs=${BOARD_NEEDS-asimddp}
zig=${ZIG_VERSION-0.17.1}

version=$("$here/llama_cpp_source.sh" "$python" "$output/source")
summary="$output: llama-cpp-python $version for aarch64 ($cpu), by Zig $zig"
echo "$needs" > "$output/needs"
[ "$(cat "$output/built" 2> /dev/null)" != "$summary" ] || {
  echo "$summary"
  exit
}
rm -f "$output/built" "$output"/*.whl
rm -rf "$output/zig"
"$python" -m pip install --quiet --no-deps --target "$output/zig" "ziglang==$zig"

mkdir -p "$output/bin"
for tool in "cc -target aarch64-linux-gnu.2.28 -mcpu=$cpu" "c++ -target aarch64-linux-gnu.2.28 -mcpu=$cpu" ar ranlib; do
  name=$output/bin/${tool%% *}
  printf '#!/bin/sh\nexec "%s/zig/ziglang/zig" %s "$@"\n' "$output" "$tool" > "$name"
  chmod +x "$name"
done

# Zig does not include OpenMP.
_PYTHON_HOST_PLATFORM=linux-aarch64 \
CMAKE_ARGS="-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_C_COMPILER=$output/bin/cc \
  -DCMAKE_CXX_COMPILER=$output/bin/c++ -DCMAKE_AR=$output/bin/ar -DCMAKE_RANLIB=$output/bin/ranlib -DGGML_NATIVE=OFF \
  -DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama_cpp_INCLUDE=$here/llama_cpp_only.cmake" \
  "$python" -m pip wheel --no-deps --no-cache-dir --wheel-dir "$output" "$output/source" > "$output/build.log" 2>&1 || {
  tail -n 20 "$output/build.log" >&2
  exit 1
}
echo "$summary" | tee "$output/built"
