#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(IDCORE_HAVE_amx)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace idcore {
namespace cpu {
namespace {

struct Entry {
  const char* name;
  const Kernels* (*get)();
  bool (*runs_here)();
  bool by_default;  // else only by name
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
#if defined(IDCORE_HAVE_amx)
// The processor's word, and Linux's leave to use the tile registers, which holds for all threads from then
// on.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return (d & kBf16) && (d & kTiles) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

const Entry kEntries[] = {
    {"base", kernels_base, always, true},
#if defined(IDCORE_HAVE_avx2)
    {"avx2", kernels_avx2, has_avx2, true},
#endif
#if defined(IDCORE_HAVE_avx512)
    {"avx512", kernels_avx512, has_avx512, true},
#endif
#if defined(IDCORE_HAVE_avx512bf16)
    {"avx512bf16", kernels_avx512bf16, has_avx512bf16, true},
#endif
#if defined(IDCORE_HAVE_amx)
    {"amx", kernels_amx, has_amx, false},  // not timed on a machine that has it yet
#endif
#if defined(IDCORE_HAVE_amx_emulated)
    {"amx_emulated", kernels_amx_emulated, has_avx512bf16, false},
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
  const Kernels* found = nullptr;
  for (const Entry& e : kEntries) {
    if (e.by_default && e.runs_here()) found = e.get();
  }
  return found;
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
