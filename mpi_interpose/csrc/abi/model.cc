// See model.hh.
#include "model.hh"

#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "policy.hh"
#include "report.hh"
#include "resolve.hh"

extern "C" const char undertow_builtin_model[], undertow_built_for[];

namespace undertow {
namespace {

constexpr uint32_t kMinSamples = 3, kRarest = 4095;

Policy g_policy;
bool g_one_host = false;

int log2_of(int64_t v) { return v <= 1 ? 0 : 63 - __builtin_clzll(static_cast<uint64_t>(v)); }

int size_bucket(int64_t bytes) {
  const int l = log2_of(bytes), half = l > 0 ? static_cast<int>(bytes >> (l - 1)) & 1 : 0;
  return std::max(0, std::min(kSizeBuckets - 1, 2 * l + half - 16));
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

long number(const char* name) {
  const char* v = std::getenv(name);
  return v && *v ? std::strtol(v, nullptr, 10) : -1;
}

// Told by the launchers' variables, because asking MPI would be a collective call that other ranks may not join.
bool one_host() {
  int size = 0;
  own.Comm_size(MPI_COMM_WORLD, &size);
  for (const char* local : {"OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"})
    if (number(local) >= 0) return number(local) == size;
  return size == 1 || number("SLURM_JOB_NUM_NODES") == 1 || number("SLURM_NNODES") == 1;
}

Policy::Answer ask(const Form& form, Use use, int64_t bytes) {
  if (form.cls == Class::Contiguous && use != kPack && use != kUnpack) return {};
  const auto at = [&](int u) {
    return g_policy.ask(u, static_cast<int>(form.cls), static_cast<double>(form.block), static_cast<double>(form.step),
                        static_cast<double>(bytes));
  };
  if (use == kPack) return at(kPolicyPack);
  if (use == kUnpack) return at(kPolicyUnpack);
  const bool send = use == kSendUse;
  const Policy::Answer local = at(send ? kPolicySendLocal : kPolicyRecvLocal);
  if (g_one_host) return local;
  const Policy::Answer remote = at(send ? kPolicySendRemote : kPolicyRecvRemote);
  return remote.ratio < local.ratio ? remote : local;
}

Online& online_of(Record& r, Use use, int64_t bytes) { return r.online[use == kUnpack][std::min(7, log2_of(bytes) / 3)]; }

// What the samples say, with hysteresis: 0 too few, 1 the library, 2 ours.
int by_samples(const Online& o, bool taking) {
  for (const auto& n : o.samples)
    if (n.load(std::memory_order_relaxed) < kMinSamples) return 0;
  const double library = static_cast<double>(o.ps_per_byte[0].load(std::memory_order_relaxed));
  const double ours = static_cast<double>(o.ps_per_byte[1].load(std::memory_order_relaxed));
  return library >= (taking ? kStay : kSampledGain) * ours ? 2 : 1;
}

struct Slot {  // where a record keeps the table's answer
  std::atomic<float>&gain, &saving_ns;
};
Slot slot_of(Record& r, Use use, int64_t bytes) {
  if (bytes <= r.plan.size) return {r.gain_one[use], r.saving_one_ns[use]};
  const int k = size_bucket(bytes);
  return {r.gain[use][k], r.saving_ns[use][k]};
}

void credit(Record& r, Use use, int64_t bytes) {
  const float saved = slot_of(r, use, bytes).saving_ns.load(std::memory_order_relaxed);
  if (saved > 0) r.tally[use].saved_ns.fetch_add(static_cast<int64_t>(saved), std::memory_order_relaxed);
}

}  // namespace

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ll + t.tv_nsec;
}

void model_init() {
  g_one_host = one_host();
  if (const char* named = std::getenv("UNDERTOW_MPI_MODEL"); named && *named) {
    if (g_policy.load(read_file(named).c_str(), undertow_built_for) == 0) say("the model %s has no usable row; nothing is taken", named);
    return;
  }
  std::string beside = own_path();
  beside = beside.substr(0, beside.find_last_of('/') + 1) + "model.txt";
  if (g_policy.load(read_file(beside).c_str(), undertow_built_for) == 0)
    g_policy.load(undertow_builtin_model, undertow_built_for);
}

double model_ratio(Record& r, Use use, int64_t bytes) {
  const Slot slot = slot_of(r, use, bytes);
  const float known = slot.gain.load(std::memory_order_relaxed);
  if (known != 0) return known;
  const Policy::Answer answer = ask(r.plan.form(bytes > r.plan.size ? 2 : 1), use, bytes);
  const float ratio = answer.ratio > 0 ? static_cast<float>(answer.ratio) : -1;
  slot.saving_ns.store(static_cast<float>(answer.saved_ns), std::memory_order_relaxed);
  slot.gain.store(ratio, std::memory_order_relaxed);
  return ratio;
}

Choice choose_local(Record& r, Use use, int64_t bytes) {
  if (mode != Mode::Auto) return {proved(r), false};
  // Nothing to learn from one dense block: the table alone decides, and a call that passes stays as cheap as it can be.
  if (r.plan.form(bytes > r.plan.size ? 2 : 1).cls == Class::Contiguous) {
    const bool take = model_ratio(r, use, bytes) >= kGain && proved(r);
    if (take) credit(r, use, bytes);
    return {take, false};
  }
  Online& o = online_of(r, use, bytes);
  const uint32_t call = o.calls.fetch_add(1, std::memory_order_relaxed), mask = o.mask.load(std::memory_order_relaxed);
  const int decided = o.taking.load(std::memory_order_relaxed);
  const bool take = decided ? decided == 2 : model_ratio(r, use, bytes) >= kGain;
  const uint32_t phase = call & mask;
  // Where nothing near was ever measured, samples still find out; where the table knows a heavy loss, they stay away.
  const bool try_ours = phase == 8 && (take || decided || model_ratio(r, use, bytes) > 0.5 || model_ratio(r, use, bytes) < 0);
  if ((take || try_ours) && !proved(r)) return {false, false};
  if (try_ours) return {true, true};
  if (phase == 40) return {false, true};
  if (take) credit(r, use, bytes);
  return {take, false};
}

void observe(Record& r, Use use, bool ours, int64_t bytes, int64_t ns) {
  if (bytes <= 0) return;
  (ours ? r.tally[use].ours_ns : r.tally[use].library_ns).fetch_add(ns, std::memory_order_relaxed);
  Online& o = online_of(r, use, bytes);
  std::atomic<int64_t>& slot = o.ps_per_byte[ours];
  const int64_t sample = std::max<int64_t>(1, ns * 1000 / bytes), old = slot.load(std::memory_order_relaxed);
  // Near the least, which an interrupted call cannot spoil; rises slowly when the program's buffers have moved.
  slot.store(old == 0 || sample < old ? sample : old + std::min(old / 16, (sample - old) / 4), std::memory_order_relaxed);
  o.samples[ours].fetch_add(1, std::memory_order_relaxed);
  if (ours) return;  // a pair is complete
  const int before = o.taking.load(std::memory_order_relaxed);
  const bool taking = before ? before == 2 : model_ratio(r, use, bytes) >= kGain;
  const int now = by_samples(o, taking);
  if (now == 0) return;
  o.taking.store(now, std::memory_order_relaxed);
  const uint32_t mask = o.mask.load(std::memory_order_relaxed);
  o.mask.store((now == 2) == taking ? std::min(kRarest, 2 * mask + 1) : 63, std::memory_order_relaxed);
}

// A count that threads may lose now and then, for calls that pass through: a locked addition costs as much as the rest.
void count_passed(Tally& t) { t.passed.store(t.passed.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed); }

bool small_enough(int64_t bytes) {
  if (bytes <= kLargestCopy) return true;
  report_refused("a message of more than 1 GiB: packing it would take as much memory again");
  return false;
}

bool wanted(Record* r, Use use, int64_t count, double gain) {
  if (!r || count <= 0 || r->plan.size == 0 || r->wrong.load(std::memory_order_relaxed)) return false;
  Tally& t = r->tally[use];
  int64_t bytes;
  if (mode == Mode::Auto && r->plan.form(count).cls == Class::Contiguous) return count_passed(t), false;
  if (__builtin_mul_overflow(count, r->plan.size, &bytes)) return false;
  if (!small_enough(bytes)) return count_passed(t), false;
  if ((mode == Mode::Auto && model_ratio(*r, use, bytes) < gain) || !proved(*r)) return count_passed(t), false;
  t.taken.fetch_add(1, std::memory_order_relaxed);
  t.bytes.fetch_add(bytes, std::memory_order_relaxed);
  if (mode == Mode::Auto) credit(*r, use, bytes);
  return true;
}

}  // namespace undertow

// For the measuring program: what the model sees of a type (0 when the type is not ours), and the mode of later calls.
extern "C" __attribute__((visibility("default"))) int undertow_measure_type(MPI_Datatype type, long count,
                                                                             const char** cls, long* block, long* step,
                                                                             long* size) {
  const undertow::Record* r = undertow::record_of(type);
  if (!r) return 0;
  const undertow::Form& form = r->plan.form(count);
  *cls = undertow::class_name(form.cls);
  *block = form.block;
  *step = form.step;
  *size = r->plan.size;
  return 1;
}
extern "C" __attribute__((visibility("default"))) void undertow_measure_mode(int mode) {
  undertow::mode = mode ? undertow::Mode::Force : undertow::Mode::Auto;
}
