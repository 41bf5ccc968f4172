# For CMAKE_PROJECT_llama_cpp_INCLUDE when llama-cpp-python is compiled: build only the libraries that it loads (74 of 178
# files). A variable has precedence over the cache entry of its own build.
set(LLAMA_BUILD_COMMON OFF)
