// Chooses the instruction set once per process.
#pragma once

#include "cpu/kernels.h"

namespace idcore {
namespace cpu {

constexpr int kMaxIsas = 8;

// Instruction sets that were compiled in and that this machine can run, weakest first. Returns how many.
int usable_isas(const Kernels* out[kMaxIsas]);
// Names of all that were compiled in, weakest first. Returns how many.
int compiled_isas(const char* out[kMaxIsas]);

// The best usable one, or the one named by IDCORE_CPU_ISA (read at the first call). Null with `error` set to
// a static text when the variable names something unusable.
const Kernels* chosen(const char** error);
// Choose by name; null or "" goes back to the default. False when the name is not usable here.
bool choose(const char* name);

}  // namespace cpu
}  // namespace idcore
