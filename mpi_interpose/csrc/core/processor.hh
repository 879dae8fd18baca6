// What kind of processor this is, as measured tables name it: the maker, the family, and how wide its vectors are.
#pragma once

#include <cstdio>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace undertow {

// The family that cpuid tells (25 are AMD's Zen 3 and 4, 26 is Zen 5; all of Intel's Xeons are 6).
inline unsigned family_of(unsigned eax) {
  const unsigned base = eax >> 8 & 15;
  return base == 15 ? base + (eax >> 20 & 255) : base;
}

// "intel-6-avx512", "amd-26-avx512", …; "other" for what nothing has been measured on. Generations differ by more than
// makers: what gains with one may lose with the next.
inline const char* processor() {
  static const struct Name {
    char text[24] = "other";
    Name() {
#if defined(__x86_64__)
      __builtin_cpu_init();
      const char* maker = __builtin_cpu_is("intel") ? "intel" : __builtin_cpu_is("amd") ? "amd" : nullptr;
      unsigned eax = 0, ebx, ecx, edx;
      if (!maker || !__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return;
      const bool avx512 = __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
      const char* vectors = avx512 ? "avx512" : __builtin_cpu_supports("avx2") ? "avx2" : "sse";
      std::snprintf(text, sizeof text, "%s-%u-%s", maker, family_of(eax), vectors);
#endif
    }
  } name;
  return name.text;
}

}  // namespace undertow
