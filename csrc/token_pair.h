// bfloat16 entries as dot-product instructions take them: two tokens of one feature in 32 bits.
#pragma once

#include "squared.h"

namespace talos {

// Token 2t in the low half, 2t + 1 in the high half.
struct TokenPair {
  uint32_t bits;
};

// Two tokens of WIDTH features, zeros beyond the `inside` features and `tokens` > 0 tokens that there are.
template <int WIDTH>
TALOS_SHARED void pack_pairs(const uint16_t* from, const Strides& strides, int64_t tokens, int64_t inside,
                             TokenPair* to) {
  const uint16_t* const next = from + strides.token;
  if (inside >= WIDTH && strides.feature == 1 && tokens > 1) {
    for (int c = 0; c < WIDTH; ++c) to[c].bits = from[c] | uint32_t{next[c]} << 16;
    return;
  }
  for (int c = 0; c < WIDTH; ++c) {
    const uint32_t low = c < inside ? from[c * strides.feature] : 0;
    to[c].bits = c < inside && tokens > 1 ? low | uint32_t{next[c * strides.feature]} << 16 : low;
  }
}

}  // namespace talos
