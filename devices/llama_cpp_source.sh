#!/bin/sh
# Unpack the sources of the installed llama-cpp-python, with llama.cpp in vendor/, into FOLDER unless it has them.
# Usage: llama_cpp_source.sh PYTHON FOLDER. Prints the version.
set -eu
python=$1
folder=$2

version=$("$python" -c 'import importlib.metadata as m; print(m.version("llama-cpp-python"))') || {
  echo "error: llama-cpp-python is not installed; run: pip install 'efficientllm[gguf]'" >&2
  exit 2
}
if ! [ -f "$folder/version-$version" ]; then
  rm -rf "$folder"
  mkdir -p "$folder"
  "$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$folder" "llama-cpp-python==$version" >&2
  tar -xzf "$folder/llama_cpp_python-$version.tar.gz" -C "$folder" --strip-components=1
  rm "$folder/llama_cpp_python-$version.tar.gz"
  touch "$folder/version-$version"
fi
echo "$version"
