// The row kernels for any processor.
#define LANES 4
#define NAME "baseline"
#define KERNELS kernels_baseline
#include "row_kernels_impl.h"
