# Fails when an object compiled for one instruction set has a weak symbol: the linker keeps a single
# copy of those, and an AVX-512 copy of, say, std::max<float> would crash every older processor.
#   cmake -DNM=nm -DOBJECTS=a.o,b.o -P no_weak_symbols.cmake
string(REPLACE "," ";" objects "${OBJECTS}")
foreach(object IN LISTS objects)
  execute_process(COMMAND "${NM}" --demangle "${object}" OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  # W, V: weak function and object; u: unique. Lower-case w and v are weak references, defined elsewhere.
  string(REGEX MATCHALL "[0-9a-f]+ [WVu] [^\n]+" weak "${symbols}")
  if(weak)
    list(JOIN weak "\n  " weak)
    message(FATAL_ERROR "${object} defines weak symbols, which all instruction sets would share:\n  ${weak}")
  endif()
endforeach()
