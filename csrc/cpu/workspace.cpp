#include "cpu/workspace.h"

namespace idcore {
namespace cpu {

Workspace& thread_workspace() {
  thread_local Workspace workspace;
  return workspace;
}

int64_t release_workspace() { return thread_workspace().release(); }

}  // namespace cpu
}  // namespace idcore
