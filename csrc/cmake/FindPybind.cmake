# pybind11 of the active Python; where it is missing, no_pybind_reason says why.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir
  OUTPUT_VARIABLE pybind11_DIR ERROR_QUIET RESULT_VARIABLE failed OUTPUT_STRIP_TRAILING_WHITESPACE)
find_package(Python COMPONENTS Interpreter Development.Module QUIET)
if(failed)
  set(no_pybind_reason "pybind11 is not installed for ${Python_EXECUTABLE}; pip install pybind11")
elseif(NOT Python_Development.Module_FOUND)
  set(no_pybind_reason "the headers of ${Python_EXECUTABLE} are missing; install python3-dev")
else()
  set(PYBIND11_FINDPYTHON ON)
  find_package(pybind11 CONFIG REQUIRED)
endif()
