// See model.hh.
#include "model.hh"

#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "resolve.hh"

extern "C" const char undertow_builtin_model[];

namespace undertow {
namespace {

constexpr int kBlocks = 18, kSizes = 28, kClasses = 6;
constexpr int64_t kMinSamples = 3;
constexpr uint32_t kSampleEvery = 64;

float g_ratio[kUses][kClasses][kBlocks][kSizes];

struct Row {
  int use, cls, block, size;
  double ratio;
};

int log2_of(int64_t v) { return v <= 1 ? 0 : 63 - __builtin_clzll(static_cast<uint64_t>(v)); }

int index_of(const char* word, const char* const* names, int n) {
  for (int i = 0; i < n; ++i)
    if (std::strcmp(word, names[i]) == 0) return i;
  return -1;
}

// The nearest measured cell of the same use and class; half a step of block counts as much as a step of size.
// Cells further than two steps of block or four of size from any measurement stay unknown.
void fill(const std::vector<Row>& rows) {
  std::memset(g_ratio, 0, sizeof g_ratio);
  for (int u = 0; u < kUses; ++u)
    for (int c = 0; c < kClasses; ++c)
      for (int b = 0; b < kBlocks; ++b)
        for (int s = 0; s < kSizes; ++s) {
          int best = 1 << 30;
          for (const Row& r : rows) {
            if (r.use != u || r.cls != c || std::abs(r.block - b) > 2 || std::abs(r.size - s) > 4) continue;
            const int distance = 2 * std::abs(r.block - b) + std::abs(r.size - s);
            if (distance < best) {
              best = distance;
              g_ratio[u][c][b][s] = static_cast<float>(r.ratio);
            }
          }
        }
}

std::string read_file(const std::string& path) {
  std::string text;
  if (FILE* f = std::fopen(path.c_str(), "r")) {
    char chunk[4096];
    for (size_t n; (n = std::fread(chunk, 1, sizeof chunk, f)) > 0;) text.append(chunk, n);
    std::fclose(f);
  }
  return text;
}

int bucket(int64_t bytes) { return std::min(7, log2_of(bytes) / 3); }

}  // namespace

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ll + t.tv_nsec;
}

int model_load(const char* text) {
  static const char* const uses[] = {"pack", "unpack", "send", "recv"};
  static const char* const classes[] = {"contiguous", "strided", "crossed", "table", "mixed", "records"};
  std::vector<Row> rows;
  for (const char* line = text; line && *line; line = std::strchr(line, '\n') ? std::strchr(line, '\n') + 1 : nullptr) {
    char use[16], cls[16];
    int block, size;
    double library, ours;
    if (std::sscanf(line, "%15s %15s %d %d %lf %lf", use, cls, &block, &size, &library, &ours) != 6) continue;
    const int u = index_of(use, uses, kUses), c = index_of(cls, classes, kClasses);
    if (u < 0 || c < 0 || !(ours > 0) || !(library > 0)) continue;
    rows.push_back({u, c, block, size, library / ours});
  }
  fill(rows);
  return static_cast<int>(rows.size());
}

void model_init() {
  if (const char* named = std::getenv("UNDERTOW_MPI_MODEL"); named && *named) {
    if (model_load(read_file(named).c_str()) == 0) say("the model %s has no usable row; nothing is taken", named);
    return;
  }
  std::string beside = own_path();
  beside = beside.substr(0, beside.find_last_of('/') + 1) + "model.txt";
  const std::string text = read_file(beside);
  model_load(text.empty() ? undertow_builtin_model : text.c_str());
}

double model_ratio(Use use, const Plan& plan, int64_t bytes) {
  const int b = std::min(kBlocks - 1, log2_of(plan.block)), s = std::min(kSizes - 1, log2_of(bytes));
  return g_ratio[use][static_cast<int>(plan.cls)][b][s];
}

Choice choose_local(Record& r, Use use, int64_t bytes) {
  if (mode != Mode::Auto) return {proved(r), false};
  if (r.plan.cls == Class::Contiguous) return {false, false};
  const uint32_t call = r.calls[use].fetch_add(1, std::memory_order_relaxed);
  const int k = bucket(bytes);
  const int64_t library = r.estimate[use][0][k].load(std::memory_order_relaxed);
  const int64_t ours = r.estimate[use][1][k].load(std::memory_order_relaxed);
  bool take = model_ratio(use, r.plan, bytes) >= kGain;
  if (library > 0 && ours > 0) take = static_cast<double>(library) >= kGain * static_cast<double>(ours);
  const uint32_t phase = call % kSampleEvery;
  if ((take || phase == 8) && !proved(r)) return {false, false};
  if (phase == 8) return {true, true};
  if (phase == 40) return {false, true};
  return {take, false};
}

void observe(Record& r, Use use, bool ours, int64_t bytes, int64_t ns) {
  if (bytes <= 0) return;
  std::atomic<int64_t>& slot = r.estimate[use][ours][bucket(bytes)];
  const int64_t sample = std::max<int64_t>(1, ns * 1000 / bytes), old = slot.load(std::memory_order_relaxed);
  // A first sample is trusted half; later ones move the estimate by a quarter, and at most to twice its value.
  slot.store(old ? old + (std::min(sample, 2 * old) - old) / 4 : sample, std::memory_order_relaxed);
  (ours ? r.tally[use].ours_ns : r.tally[use].library_ns).fetch_add(ns, std::memory_order_relaxed);
}

bool wanted(Record* r, Use use, int64_t count, double gain) {
  if (!r || count <= 0 || r->plan.size == 0 || r->wrong.load(std::memory_order_relaxed)) return false;
  int64_t bytes;
  if (__builtin_mul_overflow(count, r->plan.size, &bytes)) return false;
  bool take = mode != Mode::Auto || (r->plan.cls != Class::Contiguous && model_ratio(use, r->plan, bytes) >= gain);
  take = take && proved(*r);
  Tally& t = r->tally[use];
  (take ? t.taken : t.passed).fetch_add(1, std::memory_order_relaxed);
  if (take) t.bytes.fetch_add(bytes, std::memory_order_relaxed);
  return take;
}

}  // namespace undertow
