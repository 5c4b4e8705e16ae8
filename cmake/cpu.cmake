# ghl_kernels._cpu.
include(CheckCXXSourceCompiles)
set(CMAKE_REQUIRED_FLAGS -fopenmp)
check_cxx_source_compiles("#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }" GHL_OPENMP)
unset(CMAKE_REQUIRED_FLAGS)
if(GHL_OPENMP)
  # Plain -fopenmp: the runtime is torch's own libgomp, already loaded, so that both share one pool.
  target_compile_options(ghl_options INTERFACE -fopenmp)
  target_link_options(ghl_options INTERFACE -fopenmp)
endif()

# The kernels, once per instruction set.
set(isas baseline)
set(flags_baseline "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND isas avx2 avx512)
  set(flags_avx2 -mavx2 -mfma)
  # GCC 12 finds its own AVX-512 header using uninitialized registers (GCC bug 105593).
  set(flags_avx512 -Wno-uninitialized -Wno-maybe-uninitialized)
  list(APPEND flags_avx512 -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
  target_compile_definitions(ghl_options INTERFACE GHL_BUILD_X86)
endif()

pybind11_add_module(_cpu MODULE NO_EXTRAS python/bindings_cpu.cpp csrc/cpu/launch.cpp csrc/cpu/isa.cpp)
target_link_libraries(_cpu PRIVATE ghl_options)
set_target_properties(_cpu PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${GHL_OUTPUT_DIR}")

foreach(isa IN LISTS isas)
  add_library(kernels_${isa} OBJECT csrc/cpu/compete.cpp csrc/cpu/correlate.cpp csrc/cpu/epilogue.cpp
                                     csrc/cpu/outer.cpp csrc/cpu/winograd.cpp)
  target_link_libraries(kernels_${isa} PRIVATE ghl_options)
  target_compile_definitions(kernels_${isa} PRIVATE GHL_ISA=${isa})
  # Without exceptions OpenMP regions need no handler, whose table would be a weak symbol.
  target_compile_options(kernels_${isa} PRIVATE ${flags_${isa}} -fno-exceptions -fno-rtti)
  target_link_libraries(_cpu PRIVATE kernels_${isa})
  if(CMAKE_NM AND NOT GHL_SANITIZE)
    # Sanitizers emit weak symbols of their own.
    add_custom_command(
      TARGET _cpu PRE_LINK VERBATIM
      COMMAND "${CMAKE_COMMAND}" "-DNM=${CMAKE_NM}" "-DOBJECTS=$<JOIN:$<TARGET_OBJECTS:kernels_${isa}>,,>" -P
              "${CMAKE_SOURCE_DIR}/cmake/no_weak_symbols.cmake")
  endif()
endforeach()

# What was built and how, for _cpu.build_info().
set(compiler "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
get_target_property(flags ghl_options INTERFACE_COMPILE_OPTIONS)
list(JOIN flags " " flags)
string(STRIP "${CMAKE_CXX_FLAGS} ${CMAKE_CXX_FLAGS_RELEASE} ${flags}" flags)
set_source_files_properties(
  python/bindings_cpu.cpp PROPERTIES COMPILE_DEFINITIONS
  "GHL_COMPILER=\"${compiler}\";GHL_FLAGS=\"${flags}\";GHL_SANITIZE=$<BOOL:${GHL_SANITIZE}>")
