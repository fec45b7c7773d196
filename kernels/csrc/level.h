// The instruction set in use, chosen in operators.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "formats.h"

namespace ddb_fast {

// 0 what the compiler assumes, 1 AVX2, 2 AVX-512 with bf16.
int64_t current_level();

Format format_of(const torch::stable::Tensor& x);

}  // namespace ddb_fast
