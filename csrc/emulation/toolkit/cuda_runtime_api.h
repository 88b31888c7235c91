// Stands in for the CUDA toolkit's header of this name.
#include "cuda_runtime.h"
