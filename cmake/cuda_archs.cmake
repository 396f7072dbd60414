# What an nvcc can be asked for. Also run as a script by the tests:
#   cmake -DVERSION=12.4 -DARCHS="80-real;100-real" -P cmake/cuda_archs.cmake

# 10.0 and newer came with CUDA 12.8, the "a" forms with 12.0. Of the default list an older nvcc leaves out what it
# does not know, and ends with PTX of the newest that it does, for GPUs that are newer than itself.
function(idcore_known_archs version archs out)
  if(version VERSION_GREATER_EQUAL 12.8)
    set(${out} ${archs} PARENT_SCOPE)
    return()
  endif()
  set(known)
  foreach(arch IN LISTS archs)
    string(REGEX MATCH "^[0-9]+" number "${arch}")
    if(version VERSION_LESS 12.0)
      string(REPLACE "90a" "90" arch "${arch}")
    endif()
    if(number LESS 100)
      list(APPEND known ${arch})
    endif()
  endforeach()
  set(${out} ${known} 90-virtual PARENT_SCOPE)
endfunction()

# Options that make the module small, where they are known.
function(idcore_compression version out)
  if(version VERSION_GREATER_EQUAL 12.8)
    set(${out} -Xfatbin=-compress-mode=size PARENT_SCOPE)
  else()
    set(${out} -Xfatbin=-compress-all PARENT_SCOPE)
  endif()
endfunction()

if(CMAKE_SCRIPT_MODE_FILE STREQUAL CMAKE_CURRENT_LIST_FILE)
  idcore_known_archs("${VERSION}" "${ARCHS}" _archs)
  idcore_compression("${VERSION}" _compression)
  message(STATUS "${_archs} ${_compression}")
endif()
