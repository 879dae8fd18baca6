// What kind of processor this is, as measured tables name it: the maker, and how wide its vectors are.
#pragma once

namespace undertow {

// "intel-avx512", "amd-avx2", …; "other" for what nothing has been measured on.
inline const char* processor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  const bool avx2 = __builtin_cpu_supports("avx2");
  if (__builtin_cpu_is("intel")) return avx512 ? "intel-avx512" : avx2 ? "intel-avx2" : "intel";
  if (__builtin_cpu_is("amd")) return avx512 ? "amd-avx512" : avx2 ? "amd-avx2" : "amd";
#endif
  return "other";
}

}  // namespace undertow
