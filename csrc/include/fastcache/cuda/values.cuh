// V consecutive values of one dtype as raw 32-bit words: how they are loaded, stored and converted.
// Loads are as wide as V values are, up to 16 bytes, and need that alignment.
#pragma once

#include <cstdint>
#include <type_traits>

#include "fastcache/cuda/target.cuh"
#include "fastcache/plan.h"

namespace fastcache::cuda {

template <Type type>
constexpr int kSizeOf = type == Type::kFloat32  ? 4
                        : type == Type::kFloat8 ? 1
                                                : 2;

template <Type type>
using Tag = std::integral_constant<Type, type>;

// Calls f with the dtype as a compile-time value. Uniform in a launch, so the branch is cheap.
template <class F>
FASTCACHE_DEVICE void visit_wide(Type type, const F& f) {
  if (type == Type::kBFloat16) {
    f(Tag<Type::kBFloat16>());
  } else if (type == Type::kFloat16) {
    f(Tag<Type::kFloat16>());
  } else {
    f(Tag<Type::kFloat32>());
  }
}

template <class F>
FASTCACHE_DEVICE void visit(Type type, const F& f) {
  if (type == Type::kFloat8) {
    f(Tag<Type::kFloat8>());
  } else {
    visit_wide(type, f);
  }
}

FASTCACHE_DEVICE float bits_as_float(uint32_t bits) { return __uint_as_float(bits); }

FASTCACHE_DEVICE float half_as_float(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// float8_e4m3fn, by bits so that all architectures agree: shifted into fp16, whose exponent bias is 8 higher.
FASTCACHE_DEVICE float float8_as_float(uint32_t bits) {
  const float value = half_as_float((bits & 0x80) << 8 | (bits & 0x7f) << 7) * 256.0f;
  return (bits & 0x7f) == 0x7f ? bits_as_float(0x7fc00000 | (bits & 0x80) << 24) : value;
}

// Nearest even; 480 and above, infinities and NaN become NaN, as in PyTorch.
FASTCACHE_DEVICE uint32_t float_as_float8(float value) {
  const uint32_t bits = __float_as_uint(value), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x43f00000) return sign | 0x7f;
  // below 2^-6: adding 2^14 rounds to units of 2^-9 in the low bits
  if (magnitude < 0x3c800000)
    return sign | (__float_as_uint(bits_as_float(magnitude) + 16384.0f) - 0x46800000);
  return sign | (((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3));
}

template <Type type, int V>
struct Raw {
  static constexpr int kBytes = kSizeOf<type> * V;
  static constexpr int kWords = (kBytes + 3) / 4;
  uint32_t words[kWords] = {};

  FASTCACHE_DEVICE float operator[](int i) const {
    if constexpr (type == Type::kFloat32) return bits_as_float(words[i]);
    if constexpr (type == Type::kFloat16) return half_as_float(words[i / 2] >> i % 2 * 16 & 0xffff);
    if constexpr (type == Type::kBFloat16)
      return bits_as_float(i % 2 ? words[i / 2] & 0xffff0000 : words[i / 2] << 16);
    return float8_as_float(words[i / 4] >> i % 4 * 8 & 0xff);
  }
};

enum class Use {
  kShared,
  kOnce,
  kOwn
};  // read by many threads; read once, evict first; written in this launch

template <Use use, class T>
FASTCACHE_DEVICE T load_word(const T* address) {
  if constexpr (use == Use::kShared) return __ldg(address);
  if constexpr (use == Use::kOnce) return __ldcs(address);
  return *address;
}

// V values from element `offset` of an array.
template <Type type, int V, Use use>
FASTCACHE_DEVICE Raw<type, V> load(const void* data, int64_t offset) {
  using Values = Raw<type, V>;
  Values out;
  const char* address = static_cast<const char*>(data) + offset * kSizeOf<type>;
  if constexpr (Values::kBytes % 16 == 0) {
    for (int i = 0; i < Values::kBytes / 16; ++i) {
      const uint4 four = load_word<use>(reinterpret_cast<const uint4*>(address) + i);
      out.words[4 * i] = four.x, out.words[4 * i + 1] = four.y, out.words[4 * i + 2] = four.z,
                    out.words[4 * i + 3] = four.w;
    }
  } else if constexpr (Values::kBytes == 8) {
    const uint2 two = load_word<use>(reinterpret_cast<const uint2*>(address));
    out.words[0] = two.x, out.words[1] = two.y;
  } else if constexpr (Values::kBytes == 4) {
    out.words[0] = load_word<use>(reinterpret_cast<const unsigned*>(address));
  } else if constexpr (Values::kBytes == 2) {
    out.words[0] = load_word<use>(reinterpret_cast<const unsigned short*>(address));
  } else {
    out.words[0] = load_word<use>(reinterpret_cast<const unsigned char*>(address));
  }
  return out;
}

template <Type type, int V>
FASTCACHE_DEVICE void store(void* data, int64_t offset, const Raw<type, V>& values) {
  using Values = Raw<type, V>;
  char* address = static_cast<char*>(data) + offset * kSizeOf<type>;
  if constexpr (Values::kBytes % 16 == 0) {
    for (int i = 0; i < Values::kBytes / 16; ++i) {
      reinterpret_cast<uint4*>(address)[i] = make_uint4(values.words[4 * i], values.words[4 * i + 1],
                                                        values.words[4 * i + 2], values.words[4 * i + 3]);
    }
  } else if constexpr (Values::kBytes == 8) {
    *reinterpret_cast<uint2*>(address) = make_uint2(values.words[0], values.words[1]);
  } else if constexpr (Values::kBytes == 4) {
    *reinterpret_cast<unsigned*>(address) = values.words[0];
  } else if constexpr (Values::kBytes == 2) {
    *reinterpret_cast<unsigned short*>(address) = static_cast<unsigned short>(values.words[0]);
  } else {
    *reinterpret_cast<unsigned char*>(address) = static_cast<unsigned char>(values.words[0]);
  }
}

template <Type type>
FASTCACHE_DEVICE uint32_t narrow(float value) {
  if constexpr (type == Type::kFloat32) return __float_as_uint(value);
  if constexpr (type == Type::kFloat16) return __half_as_ushort(__float2half_rn(value));
  if constexpr (type == Type::kBFloat16) return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  return float_as_float8(value);
}

template <Type type, int V>
FASTCACHE_DEVICE Raw<type, V> narrowed(const float (&values)[V]) {
  constexpr int per_word = 4 / kSizeOf<type>;
  Raw<type, V> out;
  for (int i = 0; i < V; ++i)
    out.words[i / per_word] |= narrow<type>(values[i]) << i % per_word * 8 * kSizeOf<type>;
  return out;
}

}  // namespace fastcache::cuda
