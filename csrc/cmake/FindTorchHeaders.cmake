# The interface target fastcache_torch: headers and C shim of the PyTorch that the active Python
# imports. Sets Python_EXECUTABLE, TORCH_VERSION, TORCH_LIBRARIES_FOLDER and
# TORCH_CUDA (empty for a CPU build of PyTorch).
find_package(Python COMPONENTS Interpreter REQUIRED)

execute_process(
  COMMAND "${Python_EXECUTABLE}" -c "import torch; print(torch.__version__, torch.version.cuda or 'none', torch.__path__[0], sep='|')"
  OUTPUT_VARIABLE facts ERROR_VARIABLE error RESULT_VARIABLE failed OUTPUT_STRIP_TRAILING_WHITESPACE)
if(failed)
  message(FATAL_ERROR "FastCache: ${Python_EXECUTABLE} cannot import torch, whose headers are needed.\n"
    "Fix: install torch>=2.10 into that environment and build in it: pip install --no-build-isolation .\n"
    "(with cmake alone: -DPython_EXECUTABLE=/path/to/python)\n${error}")
endif()
string(REGEX MATCH "([^|\n]*)\\|([^|]*)\\|(.*)$" facts "${facts}")
set(TORCH_VERSION "${CMAKE_MATCH_1}")
set(TORCH_CUDA "${CMAKE_MATCH_2}")
set(torch_root "${CMAKE_MATCH_3}")
if(TORCH_CUDA STREQUAL "none")
  set(TORCH_CUDA "")
endif()
if(TORCH_VERSION VERSION_LESS 2.10)
  message(FATAL_ERROR "FastCache: torch ${TORCH_VERSION} is too old, its stable ABI lacks what FastCache uses.\n"
    "Fix: pip install 'torch>=2.10'")
endif()

add_library(fastcache_torch INTERFACE)
target_include_directories(fastcache_torch SYSTEM INTERFACE "${torch_root}/include")
# The oldest PyTorch on which the libraries must load, whatever they are built with.
target_compile_definitions(fastcache_torch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
# Errors of PyTorch's headers name their file; where PyTorch lies on this machine is nobody's business.
target_compile_options(fastcache_torch INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-ffile-prefix-map=${torch_root}/=torch/>
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-ffile-prefix-map=${torch_root}/=torch/>)
set(TORCH_LIBRARIES_FOLDER "${torch_root}/lib")
target_link_libraries(fastcache_torch INTERFACE "${TORCH_LIBRARIES_FOLDER}/libtorch_cpu.so")
