PYTHON ?= python

.PHONY: inplace
inplace:  ## Build the native module into vcr1_fast/, for work in the source tree.
	cmake -S . -B build/dev -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(PYTHON) \
	  -Dpybind11_DIR=$$($(PYTHON) -m pybind11 --cmakedir)
	cmake --build build/dev --parallel
	cmake --install build/dev --prefix .
