# ghl_kernels._cuda: for GPUs, or with GHL_CUDA=HOST from the same sources for a CPU.
# A family is csrc/cuda/<family>*.cu and python/cuda/<family>.cpp, which registers what it defines.
set(GHL_CUDA_FAMILIES compete pair depthwise sparse epilogue CACHE STRING "Families of kernels to build")

option(GHL_DEBUG_WAITS "Hopper's kernels give up a wait after five seconds and say which" OFF)
option(GHL_WARNINGS_AS_ERRORS "Fail where a compiler of the kernels warns" OFF)

set(kernels csrc/cuda/check_device.cu)
set(bindings python/cuda/module.cpp)
foreach(family IN LISTS GHL_CUDA_FAMILIES)
  file(GLOB sources CONFIGURE_DEPENDS csrc/cuda/${family}*.cu)
  list(APPEND kernels ${sources})
  list(APPEND bindings python/cuda/${family}.cpp)
endforeach()

if(GHL_CUDA STREQUAL "HOST")
  set_source_files_properties(${kernels} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS -Wno-unknown-pragmas)
  pybind11_add_module(_cuda MODULE NO_EXTRAS ${bindings} ${kernels} csrc/cuda/host/runtime.cpp)
  target_compile_definitions(_cuda PRIVATE GHL_CUDA_ON_HOST)
  target_link_libraries(_cuda PRIVATE ghl_options)
  # kernels move elements of any type sixteen bytes at a time
  target_compile_options(_cuda PRIVATE -fno-strict-aliasing)
  # the fibers tell ThreadSanitizer of themselves
  set_source_files_properties(csrc/cuda/host/runtime.cpp PROPERTIES COMPILE_OPTIONS -fno-sanitize=thread)
  set(cuda_compiler "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
  set(architectures host)
else()
  # before the language is enabled, which would choose sm_75 by itself
  set(CMAKE_CUDA_ARCHITECTURES 80-real)
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
    set(known_archs 80-real 90a-real 90-virtual)
  else()
    set(known_archs 80-real 90a-real 100-real 100-virtual)
  endif()
  set(GHL_CUDA_ARCHS "${known_archs}" CACHE STRING "The GPUs, as in CMAKE_CUDA_ARCHITECTURES")
  set(CMAKE_CUDA_ARCHITECTURES ${GHL_CUDA_ARCHS})
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  find_package(CUDAToolkit REQUIRED)
  # apart from the bindings, so that pybind11 in another folder does not compile the kernels again
  add_library(cuda_kernels OBJECT ${kernels})
  target_include_directories(cuda_kernels PRIVATE csrc csrc/include)
  target_compile_options(cuda_kernels PRIVATE -Xcompiler=-Wall -Xfatbin=-compress-all)
  if(GHL_WARNINGS_AS_ERRORS)
    target_compile_options(cuda_kernels PRIVATE -Werror=all-warnings)
  endif()
  if(GHL_DEBUG_WAITS)
    target_compile_definitions(cuda_kernels PRIVATE GHL_DEBUG_WAITS)
  endif()
  set_target_properties(cuda_kernels PROPERTIES CUDA_VISIBILITY_PRESET hidden)
  pybind11_add_module(_cuda MODULE NO_EXTRAS ${bindings})
  target_include_directories(_cuda PRIVATE csrc csrc/include python)
  target_compile_options(_cuda PRIVATE -Wall -Wextra -Wshadow)
  set_target_properties(_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
  target_link_libraries(_cuda PRIVATE cuda_kernels CUDA::cudart_static)
  set(cuda_compiler "nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
  list(JOIN CMAKE_CUDA_ARCHITECTURES " " architectures)
endif()

set_target_properties(_cuda PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${GHL_OUTPUT_DIR}")
set_source_files_properties(
  python/cuda/module.cpp PROPERTIES COMPILE_DEFINITIONS
  "GHL_COMPILER=\"${cuda_compiler}\";GHL_ARCHITECTURES=\"${architectures}\";GHL_SANITIZE=$<BOOL:${GHL_SANITIZE}>")
