// A libcuda.so.1 without a GPU, for tests. "Device" memory is a file mapped twice: the address that the program gets
// has no access rights, so that any touch by the host is a fault; the driver's functions work on the other mapping. A
// launch runs the arithmetic that the kernel shares with the host, and ends the program when a word is unaligned or
// lies in memory that a kernel could not reach. What is queued on a stream runs when something waits for it, and streams
// run in an order that is drawn anew each time, so that a missing wait between two of them is a wrong answer.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "shapes.hh"

using undertow::gpu::Batch;
using undertow::gpu::One;
using undertow::gpu::Piece;

namespace {

constexpr size_t kBytes = 256u << 20;
constexpr int kInvalid = 1, kNotInitialised = 3, kNoMemory = 2, kInvalidContext = 201;

std::mutex g_lock;
char *g_device = nullptr, *g_alias = nullptr;
size_t g_top = 0;
std::map<uintptr_t, size_t> g_live, g_pinned, g_managed;
std::multimap<size_t, uintptr_t> g_free;
bool g_ready = false;
thread_local void* g_current = nullptr;
thread_local void* g_stack[64];
thread_local int g_depth = 0;
constexpr int kMostCards = 8;
int g_contexts[kMostCards];         // a primary context for each card; FAKE_CUDA_CARDS says how many there are
std::map<uintptr_t, int> g_card;    // of each allocation

int cards() {
  const char* wish = std::getenv("FAKE_CUDA_CARDS");
  const int n = wish ? std::atoi(wish) : 1;
  return n < 1 ? 1 : n > kMostCards ? kMostCards : n;
}
int current_card() { return g_current ? static_cast<int>(static_cast<int*>(g_current) - g_contexts) : 0; }
int card_of(uintptr_t a) {
  auto it = g_card.upper_bound(a);
  return it == g_card.begin() ? 0 : (--it)->second;
}
long g_launches = 0;
std::map<void*, std::pair<int, int>> g_ones;

bool failing(const char* name) {
  const char* wish = std::getenv("FAKE_CUDA_FAIL");
  return wish && std::strstr(wish, name);
}

bool in(const std::map<uintptr_t, size_t>& ranges, uintptr_t a, size_t n) {
  auto it = ranges.upper_bound(a);
  return it != ranges.begin() && (--it, a + n <= it->first + it->second);
}

[[noreturn]] void die(const char* why, uintptr_t a) {
  std::fprintf(stderr, "fake cuda: %s at %lx\n", why, static_cast<unsigned long>(a));
  std::_Exit(77);
}

// Another process's memory: the same two mappings, of its file.
struct Foreign {
  size_t bytes;
  char* alias;
};
std::map<uintptr_t, Foreign> g_foreign;
int g_file = -1;

Foreign* foreign(uintptr_t a, uintptr_t* base) {
  auto it = g_foreign.upper_bound(a);
  if (it == g_foreign.begin() || a >= (--it)->first + it->second.bytes) return nullptr;
  *base = it->first;
  return &it->second;
}

struct Handle {  // what a CUipcMemHandle holds here
  int pid, file;
  size_t offset, bytes;
};

bool is_device(uintptr_t a) {
  uintptr_t base;
  if (foreign(a, &base)) return true;
  return g_device && a >= reinterpret_cast<uintptr_t>(g_device) && a < reinterpret_cast<uintptr_t>(g_device) + kBytes;
}
char* real(uintptr_t a) {
  uintptr_t base;
  if (Foreign* f = foreign(a, &base)) return f->alias + (a - base);
  return is_device(a) ? g_alias + (a - reinterpret_cast<uintptr_t>(g_device)) : reinterpret_cast<char*>(a);
}

char* reach(uintptr_t a, size_t n) {
  if (a % n) die("unaligned word", a);
  if (!in(g_live, a, n) && !in(g_pinned, a, n)) die("a kernel touches memory that is neither device nor pinned", a);
  if (in(g_live, a, n) && card_of(a) != current_card()) die("a kernel touches memory of another card", a);
  return real(a);
}

void run(const Piece& given, bool packing) {
  Piece p = given;
  for (uint64_t* table : {&p.offs, &p.starts, &p.hints})
    if (*table) *table = reinterpret_cast<uint64_t>(real(*table));
  const size_t word = size_t(1) << p.word_log2;
  for (uint32_t t = 0; t < p.words; ++t) {
    int64_t user, packed;
    undertow::gpu::place(p, t, user, packed);
    if (p.unroll > 1) {
      int64_t again[2];
      undertow::gpu::places<2>(p, t, 0, again);
      if (again[0] != user || again[1] != user || packed != int64_t(t) << p.word_log2) die("the two forms of place differ", t);
    }
    char* u = reach(p.user + static_cast<uint64_t>(user), word);
    char* k = reach(p.packed + static_cast<uint64_t>(packed), word);
    packing ? std::memcpy(k, u, word) : std::memcpy(u, k, word);
  }
}

// The kernels for a number of loops: by name what they are, by their own arithmetic what they move.
struct Shaped {
  std::string form;
  int log, loops, most;  // words per thread, or the side of a tile
};
std::map<std::string, Shaped> g_shaped;

const Shaped* shaped_of(const void* f) {
  for (const auto& each : g_shaped)
    if (&each.second == f) return &each.second;
  return nullptr;
}

void move_word(uint64_t user, uint64_t packed, int log, bool packing) {
  const size_t word = size_t(1) << log;
  char *u = reach(user, word), *k = reach(packed, word);
  packing ? std::memcpy(k, u, word) : std::memcpy(u, k, word);
}

template <int D>
void run(const Shaped& f, const undertow::gpu::Loops<D>& s, unsigned grid, unsigned threads) {
  const unsigned per = f.form == "nest" ? f.most : undertow::gpu::stream_words(f.log);
  if (f.form == "pour" && (!s.packing || s.packed % 16 || s.words % per)) die("no whole stores to pour into", s.packed);
  if (uint64_t(grid) * threads * per < s.words || uint64_t(grid - 1) * threads * per >= s.words) die("a grid of another size", grid);
  for (uint32_t t = 0; t < s.words; ++t) {
    move_word(s.user + undertow::gpu::spot(s, t, f.log), s.packed + (uint64_t(t) << f.log), f.log, s.packing);
  }
}

void run(const Shaped& f, const undertow::gpu::Crossing& c, unsigned grid) {
  const unsigned side = f.most;
  if (grid != c.across * c.down * c.outer_n) die("a grid of another size", grid);
  for (unsigned tile = 0; tile < grid; ++tile) {
    const undertow::gpu::Corner at = undertow::gpu::corner(c, tile, side);
    for (unsigned o = 0; o < side && o < at.o_left; ++o)
      for (unsigned i = 0; i < side && i < at.i_left; ++i)
        move_word(c.user + at.user + int64_t(o) * c.o_user + int64_t(i) * c.i_user,
                  c.packed + at.packed + int64_t(o) * c.o_packed + (int64_t(i) << f.log), f.log, c.packing);
  }
}

struct Event {
  long asked = 0, reached = 0;  // records queued, and run
};
struct Work {
  std::function<void()> run;       // empty: a wait until `event` has reached `number`
  Event* event = nullptr;
  long number = 0;
};
struct Stream {
  void* context;
  bool blocking;  // waits for what was queued on the legacy default stream before
  std::deque<Work> queue;
};
std::deque<std::function<void()>> g_legacy;  // the default stream: runs when somebody waits for it, not before
std::vector<std::unique_ptr<Stream>> g_streams;
std::vector<std::unique_ptr<Event>> g_events;

Stream* stream_of(void* handle) {
  for (auto& s : g_streams)
    if (s.get() == handle) return handle ? s.get() : nullptr;
  return nullptr;
}

// Runs queued work of all streams, the next one by chance, until `s` is empty; all of them without `s`.
void drain(Stream* s) {
  static uint64_t chance = 88172645463325252ull;
  for (;;) {
    std::vector<Stream*> ready;
    bool busy = false;
    for (auto& each : g_streams) {
      if (each->queue.empty()) continue;
      busy = busy || !s || each.get() == s;
      const Work& next = each->queue.front();
      if (next.run || next.event->reached >= next.number) ready.push_back(each.get());
    }
    if (!busy) return;
    if (ready.empty()) die("streams wait for each other", 0);
    chance ^= chance << 13, chance ^= chance >> 7, chance ^= chance << 17;
    Stream* chosen = ready[chance % ready.size()];
    const Work work = chosen->queue.front();
    chosen->queue.pop_front();
    if (!work.run) continue;
    void* const before = g_current;
    g_current = chosen->context;
    work.run();
    g_current = before;
  }
}
void run_legacy() {
  while (!g_legacy.empty()) {
    const std::function<void()> run = g_legacy.front();
    g_legacy.pop_front();
    run();
  }
}
// On the null stream: after all that blocking streams were given before, and before what they are given next.
void enqueue(void* handle, std::function<void()> run) {
  Stream* s = stream_of(handle);
  if (!s) {
    drain(nullptr);
    return g_legacy.push_back(std::move(run));
  }
  if (s->blocking && !g_legacy.empty()) s->queue.push_back({run_legacy});
  s->queue.push_back({std::move(run)});
}

size_t pinned_bytes() {
  size_t sum = 0;
  for (const auto& block : g_pinned) sum += block.second;
  return sum;
}

}  // namespace

extern "C" {

int cuInit(unsigned) {
  std::lock_guard<std::mutex> guard(g_lock);
  if (g_ready) return 0;
  const int file = g_file = memfd_create("device", 0);
  if (ftruncate(file, kBytes)) return kNoMemory;
  g_device = static_cast<char*>(mmap(nullptr, kBytes, PROT_NONE, MAP_SHARED, file, 0));
  g_alias = static_cast<char*>(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
  g_ready = true;  // the file stays open: other processes may map it
  return 0;
}
int cuGetErrorName(int, const char** name) {
  *name = "CUDA_ERROR_FAKE";
  return 0;
}
int cuPointerGetAttributes(unsigned n, int* attributes, void** values, unsigned long long address) {
  if (!g_ready) return kNotInitialised;
  std::lock_guard<std::mutex> guard(g_lock);
  const bool device = in(g_live, address, 1), pinned = in(g_pinned, address, 1);
  const bool managed = in(g_managed, address, 1);
  const int card = device ? card_of(address) : 0;
  for (unsigned i = 0; i < n; ++i) {
    if (attributes[i] == 1) *static_cast<void**>(values[i]) = device || pinned ? &g_contexts[card] : nullptr;
    if (attributes[i] == 2) *static_cast<unsigned*>(values[i]) = device || managed ? 2 : pinned ? 1 : 0;
    if (attributes[i] == 8) *static_cast<unsigned*>(values[i]) = managed;
    if (attributes[i] == 9) *static_cast<int*>(values[i]) = device || pinned ? card : -2;
  }
  return 0;
}
int cuCtxGetCurrent(void** c) { return *c = g_current, 0; }
int cuCtxSetCurrent(void* c) { return g_current = c, 0; }
int cuCtxPushCurrent_v2(void* c) {
  g_stack[g_depth++] = g_current;
  g_current = c;
  return 0;
}
int cuCtxPopCurrent_v2(void** c) {
  *c = g_current;
  g_current = g_stack[--g_depth];
  return 0;
}
int cuCtxSynchronize() {
  std::lock_guard<std::mutex> guard(g_lock);
  drain(nullptr);
  run_legacy();
  return g_current ? 0 : kInvalidContext;
}
size_t g_limits[8];
int cuCtxSetLimit(int which, size_t value) {
  if (!g_current || which < 0 || which > 7 || failing("cuCtxSetLimit")) return kInvalid;
  return g_limits[which] = value, 0;
}
unsigned long fake_cuda_limit(int which) { return g_limits[which]; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal < cards() ? 0 : kInvalid; }
int cuDeviceGetCount(int* n) { return *n = cards(), 0; }
int cuDeviceGetName(char* name, int n, int) { return std::snprintf(name, n, "no GPU"), 0; }
int cuDeviceGetAttribute(int* value, int, int) { return *value = 2, 0; }
int cuDevicePrimaryCtxRetain(void** c, int card) { return *c = &g_contexts[card], 0; }
std::string g_image;  // the PTX that was loaded last, or nothing that names its kernels
int cuModuleLoadData(void** module, const void* image) {
  if (!g_current || failing("cuModuleLoadData")) return kInvalidContext;
  if (std::memcmp(image, "\x50\xed\x55\xba", 4) == 0) {  // a fatbin; FAKE_CUDA_FAIL=fatbin is a driver too old for it
    constexpr int kNoBinary = 209;
    return failing("fatbin") ? kNoBinary : (*module = g_current, 0);
  }
  if (!std::strstr(static_cast<const char*>(image), ".entry undertow_copy(")) return kInvalid;
  g_image = static_cast<const char*>(image);
  return *module = g_current, 0;
}
int cuModuleGetFunction(void** f, void* module, const char* name) {
  static char one[5][2];  // undertow_one_LOG_UNROLL
  int log, unroll;
  *f = module;
  if (std::strcmp(name, "undertow_copy") == 0) return 0;
  char form[16];
  Shaped made{"", 0, 0, 1};
  const int parts = std::sscanf(name, "undertow_%15[a-z]_%d_%d_%d", form, &made.log, &made.loops, &made.most);
  if (parts >= 3 && std::strcmp(form, "one") != 0) {
    made.form = form;
    if (made.form == "cross") made.most = made.loops;
    if (!g_image.empty() && !std::strstr(g_image.c_str(), (std::string(".entry ") + name + "(").c_str())) return kInvalid;
    std::lock_guard<std::mutex> guard(g_lock);
    return *f = &g_shaped.emplace(name, made).first->second, 0;
  }
  if (std::sscanf(name, "undertow_one_%d_%d", &log, &unroll) != 2 || log > 4 || (unroll != 1 && unroll != 4)) return kInvalid;
  *f = &one[log][unroll == 4];
  g_ones[*f] = {log, unroll};
  return 0;
}
int cuStreamCreate(void** s, unsigned flags) {
  std::lock_guard<std::mutex> guard(g_lock);
  g_streams.push_back(std::make_unique<Stream>(Stream{g_current, flags == 0, {}}));
  return *s = g_streams.back().get(), g_current ? 0 : kInvalidContext;
}
int cuStreamSynchronize(void* s) {
  std::lock_guard<std::mutex> guard(g_lock);
  drain(stream_of(s));
  if (!s) run_legacy();
  return g_current ? 0 : kInvalidContext;
}
int cuEventCreate(void** e, unsigned) {
  std::lock_guard<std::mutex> guard(g_lock);
  g_events.push_back(std::make_unique<Event>());
  return *e = g_events.back().get(), g_current ? 0 : kInvalidContext;
}
int cuEventRecord(void* e, void* s) {
  if (!stream_of(s)) return kInvalid;
  std::lock_guard<std::mutex> guard(g_lock);
  Event* event = static_cast<Event*>(e);
  const long number = ++event->asked;
  enqueue(s, [event, number] { event->reached = number; });
  return 0;
}
int cuStreamWaitEvent(void* s, void* e, unsigned) {
  std::lock_guard<std::mutex> guard(g_lock);
  Event* event = static_cast<Event*>(e);
  if (Stream* waits = stream_of(s)) waits->queue.push_back({nullptr, event, event->asked});
  return stream_of(s) ? 0 : kInvalid;
}
int cuLaunchKernel(void* f, unsigned grid, unsigned, unsigned, unsigned threads, unsigned, unsigned, unsigned, void* stream,
                   void** arguments, void**) {
  if (!g_current || !grid || failing("cuLaunchKernel")) return kInvalid;
  std::lock_guard<std::mutex> guard(g_lock);
  ++g_launches;
  if (const Shaped* found = shaped_of(f)) {
    const Shaped shaped = *found;
    if (shaped.form == "cross") {
      const auto c = *static_cast<const undertow::gpu::Crossing*>(arguments[0]);
      if (threads != undertow::gpu::kThreads) return kInvalid;
      enqueue(stream, [=] { run(shaped, c, grid); });
    } else if (shaped.loops == 1) {
      const auto s = *static_cast<const undertow::gpu::Loops<1>*>(arguments[0]);
      enqueue(stream, [=] { run(shaped, s, grid, threads); });
    } else if (shaped.loops == 2) {
      const auto s = *static_cast<const undertow::gpu::Loops<2>*>(arguments[0]);
      enqueue(stream, [=] { run(shaped, s, grid, threads); });
    } else {
      const auto s = *static_cast<const undertow::gpu::Loops<3>*>(arguments[0]);
      enqueue(stream, [=] { run(shaped, s, grid, threads); });
    }
    return 0;
  }
  if (threads != undertow::gpu::kThreads) return kInvalid;
  if (const auto found = g_ones.find(f); found != g_ones.end()) {
    const One one = *static_cast<const One*>(arguments[0]);
    const Piece& p = one.piece;
    const uint32_t per_tile = undertow::gpu::kThreads * p.unroll;
    if (found->second != std::make_pair(int(p.word_log2), int(p.unroll))) die("a kernel for other words", p.word_log2);
    if (grid != (p.words + per_tile - 1) / per_tile || p.kind == undertow::gpu::kCrossed) die("a grid of another size", grid);
    enqueue(stream, [one] { run(one.piece, one.packing); });
    return 0;
  }
  const Batch batch = *static_cast<const Batch*>(arguments[0]);
  enqueue(stream, [batch] {
    for (uint32_t i = 0; i < batch.n; ++i) run(batch.pieces[i], batch.packing);
  });
  return 0;
}
int cuMemAlloc_v2(unsigned long long* address, size_t n) {
  if (!g_current) return kInvalidContext;
  std::lock_guard<std::mutex> guard(g_lock);
  n = n ? n : 1;
  const size_t room = (n + 511) / 256 * 256;
  uintptr_t at;
  const auto found = g_free.find(room);
  if (found != g_free.end()) {
    at = found->second;
    g_free.erase(found);
  } else {
    if (g_top + room > kBytes) return kNoMemory;
    at = reinterpret_cast<uintptr_t>(g_device) + g_top;
    g_top += room;
  }
  g_live[at] = n;
  g_card[at] = current_card();
  return *address = at, 0;
}
int cuMemAllocManaged(unsigned long long* address, size_t n, unsigned) {  // the host may touch it
  void* at = nullptr;
  if (!g_current || posix_memalign(&at, 4096, n)) return kNoMemory;
  std::lock_guard<std::mutex> guard(g_lock);
  g_managed[reinterpret_cast<uintptr_t>(at)] = n;
  return *address = reinterpret_cast<uintptr_t>(at), 0;
}
int cuMemFree_v2(unsigned long long address) {
  std::lock_guard<std::mutex> guard(g_lock);
  drain(nullptr);
  run_legacy();
  if (g_managed.erase(address)) return std::free(reinterpret_cast<void*>(address)), 0;
  const auto it = g_live.find(address);
  if (it == g_live.end()) return kInvalid;
  g_free.emplace((it->second + 511) / 256 * 256, it->first);
  g_live.erase(it);
  return 0;
}
int cuIpcGetMemHandle(char* handle, unsigned long long address) {
  std::lock_guard<std::mutex> guard(g_lock);
  const auto it = g_live.find(address);
  if (it == g_live.end() || failing("cuIpcGetMemHandle")) return kInvalid;
  const Handle made{getpid(), g_file, address - reinterpret_cast<uintptr_t>(g_device), it->second};
  std::memset(handle, 0, 64);
  std::memcpy(handle, &made, sizeof made);
  return 0;
}
struct IpcHandle {
  char opaque[64];
};
// A process cannot open its own memory; failing by FAKE_CUDA_FAIL=cuIpcOpenMemHandle.
int cuIpcOpenMemHandle_v2(unsigned long long* address, IpcHandle handle, unsigned flags) {
  Handle given;
  std::memcpy(&given, handle.opaque, sizeof given);
  if (!g_current || flags != 1 || given.pid == getpid() || failing("cuIpcOpenMemHandle")) return kInvalid;
  const std::string path = "/proc/" + std::to_string(given.pid) + "/fd/" + std::to_string(given.file);
  const int file = open(path.c_str(), O_RDWR);
  if (file < 0) return kInvalid;
  std::lock_guard<std::mutex> guard(g_lock);
  const off_t page = static_cast<off_t>(given.offset / 4096 * 4096);
  const size_t inside = given.offset - page, bytes = inside + given.bytes;
  char* at = static_cast<char*>(mmap(nullptr, bytes, PROT_NONE, MAP_SHARED, file, page));
  char* alias = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, page));
  close(file);
  const uintptr_t start = reinterpret_cast<uintptr_t>(at) + inside;
  g_foreign[start] = {given.bytes, alias + inside};
  g_live[start] = given.bytes;
  g_card[start] = current_card();  // reachable from the context that opened it
  return *address = start, 0;
}
int cuIpcCloseMemHandle(unsigned long long address) {
  std::lock_guard<std::mutex> guard(g_lock);
  if (!g_foreign.erase(address)) return kInvalid;
  return g_live.erase(address), 0;
}
int cuMemHostAlloc(void** address, size_t n, unsigned) {
  if (!g_current) return kInvalidContext;
  if (failing("cuMemHostAlloc")) return kNoMemory;
  std::lock_guard<std::mutex> guard(g_lock);
  const char* most = std::getenv("FAKE_CUDA_PINNED");  // bytes that may be pinned
  if (most && pinned_bytes() + n > std::strtoull(most, nullptr, 10)) return kNoMemory;
  if (posix_memalign(address, 4096, n)) return kNoMemory;
  g_pinned[reinterpret_cast<uintptr_t>(*address)] = n;
  return 0;
}
int cuMemFreeHost(void* address) {
  std::lock_guard<std::mutex> guard(g_lock);
  if (!g_current || !g_pinned.erase(reinterpret_cast<uintptr_t>(address))) return kInvalid;
  std::free(address);
  return 0;
}
int cuMemcpyAsync(unsigned long long to, unsigned long long from, size_t n, void* stream) {
  if (!g_current || failing("cuMemcpyAsync")) return kInvalidContext;
  std::lock_guard<std::mutex> guard(g_lock);
  auto move = [to, from, n] {
    for (unsigned long long a : {to, from})
      if (is_device(a) && !in(g_live, a, n)) die("a copy leaves its allocation", a);
    std::memmove(real(to), real(from), n);
  };
  bool later = true;  // a copy from or to plain host memory is done on return
  for (unsigned long long a : {to, from}) later = later && (is_device(a) || in(g_pinned, a, n));
  enqueue(stream, move);
  if (Stream* s = stream_of(stream); s && !later) drain(s);
  if (!stream && !later) run_legacy();
  return 0;
}
int cuMemcpy(unsigned long long to, unsigned long long from, size_t n) {
  cuCtxSynchronize();
  const int done = cuMemcpyAsync(to, from, n, nullptr);
  cuCtxSynchronize();
  return done;
}
long fake_cuda_launches() { return g_launches; }
unsigned long fake_cuda_device_bytes() {  // this process's own, without what it has opened of others
  size_t sum = 0;
  for (const auto& block : g_live)
    if (!g_foreign.count(block.first)) sum += block.second;
  return sum;
}
unsigned long fake_cuda_pinned() { return pinned_bytes(); }
unsigned fake_cuda_divide(unsigned n, unsigned d) {
  uint32_t magic, shift;
  undertow::gpu::divisor(d, magic, shift);
  return undertow::gpu::divide(n, magic, shift);
}
}
