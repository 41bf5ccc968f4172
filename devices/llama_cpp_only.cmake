# For CMAKE_PROJECT_llama_cpp_INCLUDE when llama-cpp-python is compiled: only the libraries that it loads (74 files of 178).
# Its own build sets this in the cache, and a variable goes before that.
set(LLAMA_BUILD_COMMON OFF)
