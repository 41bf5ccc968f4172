#!/bin/sh
# Build llama.cpp's llama-bench as a static aarch64 program for Android phones and 64-bit boards, without an NDK.
# Usage: build_android_runner.sh PYTHON OUTPUT_FOLDER. RUNNER_ARCH overrides the instruction set. The sources are those in
# the installed llama-cpp-python, so that phone and laptop run the same release.
set -eu
python=$1
output=$2
# dotprod: all phones since about 2018 and the Raspberry Pi 5. A Raspberry Pi 4 needs RUNNER_ARCH=armv8-a.
arch=${RUNNER_ARCH:-armv8.2-a+dotprod}

for program in cmake aarch64-linux-gnu-g++; do
  command -v "$program" > /dev/null || {
    echo "error: $program is missing; run: apt install cmake g++-aarch64-linux-gnu" >&2
    exit 2
  }
done
version=$("$(dirname "$0")/llama_cpp_source.sh" "$python" "$output/source")

cmake -S "$output/source/vendor/llama.cpp" -B "$output/cmake" -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  -DBUILD_SHARED_LIBS=OFF -DCMAKE_EXE_LINKER_FLAGS="-static -s" \
  -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DGGML_CPU_ARM_ARCH="$arch" \
  -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF > "$output/cmake.log"
cmake --build "$output/cmake" --target llama-bench --parallel "$(nproc)" > "$output/build.log" 2>&1 || {
  tail -n 20 "$output/build.log" >&2
  exit 1
}
mv "$output/cmake/bin/llama-bench" "$output/llama-bench"
echo "$output/llama-bench: static aarch64 ($arch), from llama-cpp-python $version"
