// One vector of pixels: the activation, its gradient, and dropout.
#pragma once

#include "dropout.h"

namespace ddb_fast::DDB_LEVEL {

// bf16 keeps 8 bits, so a logistic function good to 13 is not seen in an output; in the gradients of
// weight and bias, sums that are kept in fp32, it would be.
template <class T>
constexpr bool rough = false;
template <>
constexpr bool rough<BFloat16> = true;

template <class T, bool silu>
inline Vector<T> activation(Vector<T> z) {
  if constexpr (silu) return quotient<rough<T>>(z, one_plus_exp_of_minus<rough<T>>(z));
  return z;
}

template <class T, bool silu>
inline Vector<T> activation_gradient(Vector<T> z, Vector<T> dy) {
  if constexpr (silu) {
    const Vector<T> one = Vector<T>{} + Real<T>(1);
    const Vector<T> y = one / one_plus_exp_of_minus<false>(z);
    return dy * y * (one + z * (one - y));
  }
  return dy;
}

}  // namespace ddb_fast::DDB_LEVEL
