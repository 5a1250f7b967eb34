// The bits of a score, and the digits by which the k-th smallest is found; neither torch nor CUDA in it. Floats without
// a sign are ordered as their bits are, so three histograms, each of one digit of those entries that agree with the
// k-th in all digits before it, find it exactly.
#pragma once

#include "squared.h"

namespace talos {

constexpr int kDigits = 3;
constexpr int kBins = 2048;      // of the widest digit
constexpr int kInvalid = kBins;  // the count of entries that are no scores comes after the bins
constexpr int kCounts = kBins + 1;

// Digit 0, 1, 2: bits 30 to 20, 19 to 10, 9 to 0.
TALOS_SHARED int digit_shift(int digit) { return digit == 0 ? 20 : digit == 1 ? 10 : 0; }
TALOS_SHARED int digit_bits(int digit) { return digit == 0 ? 11 : 10; }

// Whether the bits are a number from 0 (-0 is 0) to infinity, not negative and not NaN.
TALOS_SHARED bool is_score(uint32_t bits) { return bits <= 0x7f800000u || bits == 0x80000000u; }
TALOS_SHARED uint32_t magnitude(uint32_t bits) { return bits & 0x7fffffffu; }

// Maps bits to the bin of one digit, for entries whose digits before it are `prefix`.
struct Digit {
  int shift, bits;
  uint32_t prefix;
  TALOS_SHARED Digit(int digit, uint32_t prefix) : shift(digit_shift(digit)), bits(digit_bits(digit)), prefix(prefix) {}
  TALOS_SHARED bool matches(uint32_t entry) const { return magnitude(entry) >> (shift + bits) == prefix; }
  TALOS_SHARED uint32_t bin(uint32_t entry) const { return magnitude(entry) >> shift & ((1u << bits) - 1); }
};

}  // namespace talos
