# What is compiled of llama.cpp where no wheel is in reach: libllama and ggml, which convert/ calls. CMake includes this
# at each project() of llama-cpp-python's source; what stands in the cache can be set otherwise by CMAKE_ARGS.

# Only llama.cpp's own programs use it. llama-cpp-python forces the cached variable on; this one hides it.
set(LLAMA_BUILD_COMMON OFF)
set(LLAVA_BUILD OFF CACHE BOOL "no images")
set(LLAMA_ALL_WARNINGS OFF CACHE BOOL "they are for llama.cpp's authors")
# The wheel that pip keeps must run on every machine that shares this home; AVX2, FMA and F16C are on without it.
set(GGML_NATIVE OFF CACHE BOOL "no instructions of this very processor")

# ggml does the arithmetic. The rest loads files and builds graphs: a fifth less to compile, as fast to run.
if(PROJECT_NAME STREQUAL "ggml")
  set(CMAKE_CXX_FLAGS_RELEASE "-O3 -DNDEBUG")
else()
  set(CMAKE_CXX_FLAGS_RELEASE "-O1 -DNDEBUG")
endif()
