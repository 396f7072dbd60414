#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace idcore {
namespace cpu {
namespace {

struct Entry {
  const char* name;
  const Kernels* (*get)();
  bool (*runs_here)();
};

bool always() { return true; }

#if defined(IDCORE_HAVE_avx2)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif
#if defined(IDCORE_HAVE_avx512)
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif
#if defined(IDCORE_HAVE_avx512bf16)
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

const Entry kEntries[] = {
    {"base", kernels_base, always},
#if defined(IDCORE_HAVE_avx2)
    {"avx2", kernels_avx2, has_avx2},
#endif
#if defined(IDCORE_HAVE_avx512)
    {"avx512", kernels_avx512, has_avx512},
#endif
#if defined(IDCORE_HAVE_avx512bf16)
    {"avx512bf16", kernels_avx512bf16, has_avx512bf16},
#endif
};

std::atomic<const Kernels*> g_chosen{nullptr};

const Kernels* by_name(const char* name) {
  for (const Entry& e : kEntries) {
    if (std::strcmp(e.name, name) == 0) return e.runs_here() ? e.get() : nullptr;
  }
  return nullptr;
}

const Kernels* best() {
  const Kernels* all[kMaxIsas];
  return all[usable_isas(all) - 1];
}

}  // namespace

int usable_isas(const Kernels* out[kMaxIsas]) {
  int n = 0;
  for (const Entry& e : kEntries) {
    if (e.runs_here()) out[n++] = e.get();
  }
  return n;
}

int compiled_isas(const char* out[kMaxIsas]) {
  int n = 0;
  for (const Entry& e : kEntries) out[n++] = e.name;
  return n;
}

const Kernels* chosen(const char** error) {
  const Kernels* k = g_chosen.load(std::memory_order_acquire);
  if (k != nullptr) return k;
  const char* forced = std::getenv("IDCORE_CPU_ISA");
  k = forced != nullptr && forced[0] != '\0' ? by_name(forced) : best();
  if (k == nullptr) {
    *error = "IDCORE_CPU_ISA names an instruction set that was not compiled in or that this machine lacks";
    return nullptr;
  }
  g_chosen.store(k, std::memory_order_release);
  return k;
}

bool choose(const char* name) {
  if (name == nullptr || name[0] == '\0') {
    g_chosen.store(nullptr, std::memory_order_release);
    return true;
  }
  const Kernels* k = by_name(name);
  if (k == nullptr) return false;
  g_chosen.store(k, std::memory_order_release);
  return true;
}

}  // namespace cpu
}  // namespace idcore
