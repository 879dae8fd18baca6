// See slab.hh.
#include "slab.hh"

namespace undertow::gpu {

bool Slab::make(const void* like, int64_t n, uint64_t mark) {
  if (!cuda.cuIpcGetMemHandle || !cuda.cuIpcOpenMemHandle_v2 || !cuda.cuIpcCloseMemHandle) return false;
  context = &context_of(like);
  Context::Use use(*context);
  Address a = 0;
  if (cuda.cuMemAlloc_v2(&a, static_cast<size_t>(n)) != 0) return false;
  at = reinterpret_cast<char*>(a);
  bytes = n;
  if (cuda.cuIpcGetMemHandle(&handle, a) != 0) {
    free();
    return false;
  }
  context->copy(at, &mark, sizeof mark, context->stream);
  context->wait(context->stream);
  return true;
}

void Slab::free() {
  if (!at) return;
  Context::Use use(*context);
  cuda.cuMemFree_v2(reinterpret_cast<Address>(at));
  at = nullptr;
}

char* open_slab(Context& context, const IpcHandle& handle, uint64_t mark) {
  constexpr unsigned kLazyPeerAccess = 1;
  Context::Use use(context);
  Address a = 0;
  if (cuda.cuIpcOpenMemHandle_v2(&a, handle, kLazyPeerAccess) != 0) return nullptr;
  char* at = reinterpret_cast<char*>(a);
  uint64_t found = ~mark;
  try {
    context.copy(&found, at, sizeof found, context.stream);
    context.wait(context.stream);
  } catch (const Failure&) {  // opened, yet not readable from this card
    found = ~mark;
  }
  if (found == mark) return at;
  cuda.cuIpcCloseMemHandle(a);
  return nullptr;
}

void close_slab(Context& context, char* at) {
  Context::Use use(context);
  cuda.cuIpcCloseMemHandle(reinterpret_cast<Address>(at));
}

}  // namespace undertow::gpu
