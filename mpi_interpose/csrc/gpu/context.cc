// See context.hh.
#include "context.hh"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <string>

#include "device.hh"

extern "C" const char undertow_gpu_kernels[];       // PTX; see gpu_kernels.py
extern "C" const char* const undertow_gpu_binary;   // a fatbin of the same, or null; see gpu_build.py

namespace undertow::gpu {

namespace {

constexpr int64_t kKeepScratch = 256ll << 20, kKeepTables = 256ll << 20;
constexpr uint32_t kBlocksPerProcessor = 4;

std::mutex g_lock;
std::vector<std::unique_ptr<Context>>* g_contexts = new std::vector<std::unique_ptr<Context>>;

void* allocate(int64_t bytes) {
  Address a = 0;
  return cuda.cuMemAlloc_v2(&a, static_cast<size_t>(bytes)) == 0 ? reinterpret_cast<void*>(a) : nullptr;
}

uint32_t tiles_of(const Piece& p) {
  if (p.kind != kCrossed) {
    const uint32_t per_tile = kThreads * p.unroll;
    return (p.words + per_tile - 1) / per_tile;
  }
  const PieceDim &o = p.dims[p.ndims - 2], &i = p.dims[p.ndims - 1];
  uint32_t tiles = ((o.n + kTile - 1) / kTile) * ((i.n + kTile - 1) / kTile);
  for (int d = 0; d < p.ndims - 2; ++d) tiles *= p.dims[d].n;
  return tiles;
}

}  // namespace

Context::Context(Handle context, int ordinal)
    : handle(context),
      device(ordinal),
      scratch(allocate, [](void* p) { cuda.cuMemFree_v2(reinterpret_cast<Address>(p)); }, kKeepScratch) {
  constexpr int kProcessors = 16;
  int id = 0;
  must(cuda.cuDeviceGet(&id, ordinal), "cuDeviceGet");
  must(cuda.cuDeviceGetAttribute(&processors, kProcessors, id), "cuDeviceGetAttribute");
  Use use(*this);
  ask_for_reads();
  load_kernels();
  must(cuda.cuStreamCreate(&stream, 0), "cuStreamCreate");
}

// How many bytes the second-level cache reads at a time. It holds for all kernels of the context, the program's too, so it
// is left alone unless the user asks for it.
void Context::ask_for_reads() {
  constexpr int kMostFetched = 5;
  const char* wish = std::getenv("UNDERTOW_MPI_GPU_FETCH");
  if (!wish || !*wish) return;
  const long bytes = std::strtol(wish, nullptr, 10);
  if (bytes != 32 && bytes != 64 && bytes != 128)
    throw Failure(std::string("UNDERTOW_MPI_GPU_FETCH is '") + wish + "'; expected 32, 64 or 128");
  must(cuda.cuCtxSetLimit(kMostFetched, static_cast<size_t>(bytes)), "UNDERTOW_MPI_GPU_FETCH: cuCtxSetLimit");
}

// The driver takes machine code as it is and translates PTX, unless it has done so before and kept it. An older driver
// or another card refuses the code, and gets the PTX. Functions belong to it: a driver may load them only when asked.
void Context::load_kernels() {
  const char* wish = std::getenv("UNDERTOW_MPI_GPU_BINARY");
  const bool allowed = !wish || std::strcmp(wish, "0") != 0;
  const auto start = std::chrono::steady_clock::now();
  const bool code = allowed && undertow_gpu_binary && find_kernels(undertow_gpu_binary) == 0;
  if (!code) must(find_kernels(undertow_gpu_kernels), "loading the pack kernels");
  counters.load_us +=
      std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - start).count();
  ++(code ? counters.code_loads : counters.ptx_loads);
}

Result Context::find_kernels(const void* image) {
  if (const Result failed = cuda.cuModuleLoadData(&module_, image)) return failed;
  if (const Result failed = cuda.cuModuleGetFunction(&kernel_, module_, "undertow_copy")) return failed;
  for (int log = 0; log < 5; ++log)
    for (int many = 0; many < 2; ++many) {
      const std::string name = "undertow_one_" + std::to_string(log) + (many ? "_4" : "_1");
      if (const Result failed = cuda.cuModuleGetFunction(&ones_[log][many], module_, name.c_str())) return failed;
    }
  return 0;
}

// Found when first asked for: most programs use few of them.
Handle Context::kernel(const Choice& choice, const Piece& piece) {
  std::atomic<Handle>& slot = shaped_[kernel_code(choice, piece)];
  Handle found = slot.load(std::memory_order_acquire);
  if (!found) {
    const std::string name = kernel_name(choice, piece);
    must(cuda.cuModuleGetFunction(&found, module_, name.c_str()), ("finding the kernel " + name).c_str());
    slot.store(found, std::memory_order_release);
  }
  return found;
}

// False: the general kernels are to do it.
bool Context::launch_one(const Piece& piece, bool packing, Handle on) {
  const bool forced = forced_kernel && serves(*forced_kernel, piece, packing);
  const Choice choice = forced ? *forced_kernel : choose(piece, packing);
  if (choice.form == Form::General) return false;
  Crossing crossing;
  Loops<kNestDims> loops;
  void* argument = &loops;
  if (choice.form == Form::Cross) {
    crossing = crossing_of(piece, choice, packing);
    argument = &crossing;
  } else {
    loops = loops_of(piece, packing);
  }
  must(cuda.cuLaunchKernel(kernel(choice, piece), grid_of(choice, piece), 1, 1, choice.threads, 1, 1, 0, on, &argument, nullptr),
       "launching a pack kernel");
  ++counters.launches;
  ++counters.pieces;
  return true;
}

// Pieces in order, as many per launch as fit its arguments; every launch is one kernel over all its pieces.
void Context::launch(const std::vector<Piece>& pieces, bool packing, Handle on) {
  if (pieces.size() == 1 && launch_one(pieces[0], packing, on)) return;
  if (pieces.size() == 1 && pieces[0].kind != kCrossed) {
    One one{pieces[0], packing, 0};
    void* arguments[] = {&one};
    const Handle kernel = ones_[one.piece.word_log2][one.piece.unroll > 1];
    must(cuda.cuLaunchKernel(kernel, tiles_of(one.piece), 1, 1, kThreads, 1, 1, 0, on, arguments, nullptr),
         "launching a pack kernel");
    ++counters.launches;
    ++counters.pieces;
    return;
  }
  for (size_t at = 0; at < pieces.size(); at += kBatch) {
    Batch batch{};
    batch.n = static_cast<uint32_t>(std::min<size_t>(kBatch, pieces.size() - at));
    batch.packing = packing;
    for (uint32_t i = 0; i < batch.n; ++i) {
      batch.pieces[i] = pieces[at + i];
      batch.pieces[i].tile = batch.tiles;
      batch.tiles += tiles_of(pieces[at + i]);
    }
    const uint32_t grid = std::min(batch.tiles, static_cast<uint32_t>(processors) * kBlocksPerProcessor);
    void* arguments[] = {&batch};
    must(cuda.cuLaunchKernel(kernel_, grid, 1, 1, kThreads, 1, 1, 0, on, arguments, nullptr), "launching the pack kernel");
    ++counters.launches;
    counters.pieces += batch.n;
  }
}

void Context::relay(const std::vector<Chunk>& chunks, char* halves, int64_t half, char* host, bool packing) {
  {
    constexpr unsigned kNonBlocking = 1, kNoTiming = 2;
    std::lock_guard<std::mutex> guard(lock_);
    for (Handle* event : {worked_, worked_ + 1, moved_, moved_ + 1})
      if (!*event) must(cuda.cuEventCreate(event, kNoTiming), "cuEventCreate");
    if (!carrier_) must(cuda.cuStreamCreate(&carrier_, kNonBlocking), "cuStreamCreate");
  }
  // Threads share these: a later record of the same event lies behind ours in its stream, so waiting for it serves too.
  auto after = [](Handle waits, Handle event) { must(cuda.cuStreamWaitEvent(waits, event, 0), "cuStreamWaitEvent"); };
  auto mark = [](Handle event, Handle on) { must(cuda.cuEventRecord(event, on), "cuEventRecord"); };
  for (size_t k = 0; k < chunks.size(); ++k) {
    const int h = k % 2;
    const Chunk& chunk = chunks[k];
    char* const at = halves + h * half;
    std::vector<Piece> pieces = chunk.pieces;
    for (Piece& p : pieces) p.packed += static_cast<uint64_t>(h * half);
    if (packing) {
      if (k >= 2) after(stream, moved_[h]);
      launch(pieces, true, stream);
      mark(worked_[h], stream);
      after(carrier_, worked_[h]);
      copy(host + chunk.from, at, chunk.bytes, carrier_);
      mark(moved_[h], carrier_);
    } else {
      if (k >= 2) after(carrier_, worked_[h]);
      copy(at, host + chunk.from, chunk.bytes, carrier_);
      mark(moved_[h], carrier_);
      after(stream, moved_[h]);
      launch(pieces, false, stream);
      mark(worked_[h], stream);
    }
  }
  for (size_t k = 0; packing && k < std::min<size_t>(chunks.size(), 2); ++k) after(stream, moved_[k]);
}

void Context::copy(void* to, const void* from, int64_t bytes, Handle on) {
  must(cuda.cuMemcpyAsync(reinterpret_cast<Address>(to), reinterpret_cast<Address>(from), static_cast<size_t>(bytes), on),
       "cuMemcpyAsync");
  ++counters.copies;
}

Context::Kept& Context::kept(const Plan& plan) {
  std::unique_ptr<Kept>& slot = tables_[plan.ir.get()];
  if (!slot) {
    slot = std::make_unique<Kept>();
    slot->ir = plan.ir;
  }
  return *slot;
}

Address Context::upload(Kept& k, const void* data, size_t bytes) {
  Address a = 0;
  must(cuda.cuMemAlloc_v2(&a, std::max<size_t>(bytes, 1)), "memory for a datatype's table");
  k.memory.push_back(a);
  k.bytes += static_cast<int64_t>(bytes);
  table_bytes_ += static_cast<int64_t>(bytes);
  copy(reinterpret_cast<void*>(a), data, static_cast<int64_t>(bytes), stream);
  wait(stream);  // the vector it comes from does not outlive the call
  return a;
}

void Context::drop(Kept& k) {
  for (Address a : k.memory) cuda.cuMemFree_v2(a);  // waits for kernels that still read it
  table_bytes_ -= k.bytes;
}

std::vector<Piece> Context::pieces(const Plan& plan, int64_t count, uint64_t user, uint64_t packed) {
  std::lock_guard<std::mutex> guard(lock_);
  Tables tables;
  tables.of_op = [&](size_t op) {
    Kept& k = kept(plan);
    const auto found = k.of_op.find(op);
    if (found != k.of_op.end()) return found->second;
    const std::vector<int32_t>& offs = plan.ops[op].offs;
    Table t;
    t.offs = upload(k, offs.data(), offs.size() * sizeof(int32_t));
    uint64_t all = static_cast<uint64_t>(plan.ops[op].len);
    for (int32_t o : offs) all |= static_cast<uint64_t>(static_cast<int64_t>(o));
    t.grain = all ? static_cast<int64_t>(std::min<uint64_t>(all & -all, 16)) : 16;
    return k.of_op[op] = t;
  };
  tables.whole = [&](const Blocks& blocks, int64_t word) {
    Kept& k = kept(plan);
    const auto found = k.whole.find(word);
    if (found != k.whole.end()) return found->second;
    std::vector<uint32_t> starts, hints;
    number_words(blocks, word, starts, hints);
    Table t;
    t.runs = static_cast<uint32_t>(blocks.offs.size());
    t.offs = upload(k, blocks.offs.data(), blocks.offs.size() * sizeof(int64_t));
    t.starts = upload(k, starts.data(), starts.size() * sizeof(uint32_t));
    t.hints = upload(k, hints.data(), hints.size() * sizeof(uint32_t));
    return k.whole[word] = t;
  };
  return lower(plan, count, user, packed, tables);
}

void Context::trim() {
  std::lock_guard<std::mutex> guard(lock_);
  if (table_bytes_ <= kKeepTables) return;
  Use use(*this);
  for (auto& entry : tables_) drop(*entry.second);
  tables_.clear();
}

void Context::forget_all() {
  Use use(*this);
  scratch.clear();
  for (auto& entry : tables_) drop(*entry.second);
  tables_.clear();
}

Context& context_of(const void* address, const void* other) {
  Where w = where(address);
  if (w.memory != Memory::Device && other) w = where(other);
  return context_of(w);
}

Context& context_of(const Where& w) {
  if (w.memory != Memory::Device) throw Failure("neither buffer is device memory");
  std::lock_guard<std::mutex> guard(g_lock);
  for (auto& c : *g_contexts)
    if (c->device == w.device && (!w.context || c->handle == w.context)) return *c;
  Handle handle = w.context;
  if (!handle) {  // memory of a pool or a mapping: any context of its device will do
    int id = 0;
    must(cuda.cuDeviceGet(&id, w.device), "cuDeviceGet");
    must(cuda.cuDevicePrimaryCtxRetain(&handle, id), "cuDevicePrimaryCtxRetain");
  }
  g_contexts->push_back(std::make_unique<Context>(handle, w.device));
  return *g_contexts->back();
}

Context* any_context() {
  std::lock_guard<std::mutex> guard(g_lock);
  return g_contexts->empty() ? nullptr : g_contexts->front().get();
}

void trim_contexts() {
  std::lock_guard<std::mutex> guard(g_lock);
  for (auto& c : *g_contexts) c->trim();
}

void forget_contexts() {
  std::lock_guard<std::mutex> guard(g_lock);
  for (auto& c : *g_contexts) c->forget_all();
}

}  // namespace undertow::gpu
