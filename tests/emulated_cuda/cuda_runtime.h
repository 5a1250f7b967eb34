// In the place of the toolkit's.
#include "kernels.h"
