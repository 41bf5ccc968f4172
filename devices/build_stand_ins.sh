#!/bin/sh
# Build ggml's CPU kernels for older instruction sets, so that one x86 machine stands in for several devices.
# Usage: build_stand_ins.sh PYTHON OUTPUT_FOLDER. Creates OUTPUT_FOLDER/{sse42,avx2,avx512}, each with the libraries of the
# installed llama-cpp-python and kernels from its sources. Use: LLAMA_CPP_LIB_PATH=OUTPUT_FOLDER/avx2.
set -eu
python=$1
output=$2

command -v cmake > /dev/null || {
  echo "error: cmake is missing; run: apt install cmake g++" >&2
  exit 2
}
version=$("$(dirname "$0")/llama_cpp_source.sh" "$python" "$output/source")
libraries=$("$python" -c 'import importlib.util as u; print(u.find_spec("llama_cpp").submodule_search_locations[0])')/lib

# build NAME FLAGS...
build() {
  name=$1
  shift
  cmake -S "$output/source/vendor/llama.cpp" -B "$output/cmake-$name" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \
    -DGGML_NATIVE=OFF -DGGML_SSE42=ON -DGGML_AVX=OFF -DGGML_AVX2=OFF -DGGML_BMI2=OFF -DGGML_FMA=OFF -DGGML_F16C=OFF \
    "$@" -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF \
    > "$output/cmake-$name.log"
  cmake --build "$output/cmake-$name" --target ggml-cpu --parallel "$(nproc)" > "$output/build-$name.log" 2>&1 || {
    tail -n 20 "$output/build-$name.log" >&2
    exit 1
  }
  rm -rf "${output:?}/$name"
  cp -R "$libraries" "$output/$name"
  for file in "$output/$name"/libggml-cpu.so*; do
    cp "$output/cmake-$name/bin/libggml-cpu.so" "$file"
  done
  rm -rf "$output/cmake-$name"
  echo "$output/$name: ggml kernels for $name, from llama-cpp-python $version"
}

AVX2="-DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_BMI2=ON -DGGML_FMA=ON -DGGML_F16C=ON"
build sse42
# shellcheck disable=SC2086
build avx2 $AVX2
# shellcheck disable=SC2086
build avx512 $AVX2 -DGGML_AVX512=ON
