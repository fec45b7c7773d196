// The formats in which tensors are stored. Plain data only, see group_norm.h.
#pragma once

#include <cstdint>

namespace ddb_fast {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

enum class Format { float32, bfloat16, float16, float64 };

}  // namespace ddb_fast
