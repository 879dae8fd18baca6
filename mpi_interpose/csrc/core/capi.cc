// The core without MPI, as a C ABI for the tests (ctypes) and for `explain`: text in, text and bytes out.
#include <cstdlib>
#include <cstring>

#include "graph.hh"
#include "kernels.hh"
#include "online.hh"
#include "plan.hh"
#include "policy.hh"
#include "trial.hh"

using namespace undertow;

namespace {
thread_local std::string g_text;

template <class F>
const char* guarded(F f) {
  try {
    g_text = f();
  } catch (const std::exception& e) {
    g_text = std::string("!") + e.what();
  }
  return g_text.c_str();
}
}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Text results live until the thread's next call; one that begins with '!' is an error.
EXPORT const char* undertow_core_parse(const char* ir) {
  return guarded([&] { return text(parse(ir)); });
}
EXPORT const char* undertow_core_normalise(const char* ir) {
  return guarded([&] { return text(normalise(parse(ir))); });
}
EXPORT const char* undertow_core_describe(const char* ir, int64_t lb, int64_t extent) {
  return guarded([&] { return make_plan(parse(ir), lb, extent).describe(); });
}
EXPORT const char* undertow_core_kernels() { return kernels().name; }

EXPORT void* undertow_core_plan(const char* ir, int64_t extent) {
  void* plan = nullptr;
  guarded([&] {
    plan = new Plan(make_plan(parse(ir), 0, extent));
    return std::string();
  });
  return plan;
}
EXPORT void undertow_core_free(void* plan) { delete static_cast<Plan*>(plan); }
EXPORT int64_t undertow_core_size(void* plan) { return static_cast<Plan*>(plan)->size; }
EXPORT void undertow_core_pack(void* plan, int64_t count, const char* src, char* dst) {
  pack(*static_cast<Plan*>(plan), count, src, dst);
}
EXPORT void undertow_core_unpack(void* plan, int64_t count, const char* src, char* dst) {
  unpack(*static_cast<Plan*>(plan), count, src, dst);
}
// Segments by the reference walk.
EXPORT void undertow_core_walk(void* plan, int unpacking, int64_t count, const char* src, char* dst, int64_t from,
                               int64_t to) {
  const Plan& p = *static_cast<Plan*>(plan);
  if (unpacking)
    walk_unpack(*p.ir, count, p.extent, src, dst, from, to);
  else
    walk_pack(*p.ir, count, p.extent, src, dst, from, to);
}

// Running comparisons and trials for the tests, on a machine that takes `ns` of each way: a row of times for each call or
// round. What was done goes to `seen`: the way, and whether it was timed from the third bit on.
EXPORT void* undertow_core_online() { return new Online; }
EXPORT void undertow_core_online_free(void* online) { delete static_cast<Online*>(online); }
// `message`: by the rule of messages. Ways: 0 library, 1 ours.
EXPORT void undertow_core_online_series(void* online, int message, double gain, int takes, int64_t bytes, int64_t calls,
                                        const int64_t* ns, unsigned char* seen) {
  const OnlineRule rule = message ? kMessageRule : kLocalRule;
  Online& o = *static_cast<Online*>(online);
  for (int64_t k = 0; k < calls; ++k) {
    const Choice choice = o.choose(rule, gain, takes != 0);
    if (choice.timed) o.observe(rule, choice.ours, bytes, ns[2 * k + choice.ours], takes != 0);
    seen[k] = static_cast<unsigned char>(choice.ours | choice.timed << 2);
  }
}
EXPORT int undertow_core_online_takes(void* online, int table) { return static_cast<Online*>(online)->takes(table != 0); }

EXPORT void* undertow_core_trial() { return new Trial; }
EXPORT void undertow_core_trial_free(void* trial) { delete static_cast<Trial*>(trial); }
// `tables`: the table takes some of the messages. Ways as in trial.hh.
EXPORT void undertow_core_trial_series(void* trial, int tables, int64_t rounds, const int64_t* ns, unsigned char* seen) {
  Trial& t = *static_cast<Trial*>(trial);
  for (int64_t k = 0; k < rounds; ++k) {
    const Way way = t.next();
    seen[k] = static_cast<unsigned char>(way | t.timed() << 2);
    t.done(ns[kWays * k + way], tables != 0);
  }
}
EXPORT void undertow_core_trial_forget(void* trial) { static_cast<Trial*>(trial)->forget(); }
EXPORT void undertow_core_trial_put_off(void* trial, int rounds) { static_cast<Trial*>(trial)->put_off(rounds); }

// The table that decides, for `measure` and `explain`: the preload asks the same code.
EXPORT const char* undertow_core_processor() { return processor(); }
EXPORT void* undertow_core_policy(const char* text, const char* version, const char* processor, int* rows) {
  Policy* policy = new Policy;
  *rows = policy->load(text, version, processor);
  return policy;
}
EXPORT void undertow_core_policy_free(void* policy) { delete static_cast<Policy*>(policy); }
EXPORT double undertow_core_policy_ratio(void* policy, int use, int cls, double block, double step, double bytes,
                                         double leaf, double* saved_ns) {
  const Policy::Answer answer = static_cast<Policy*>(policy)->ask(use, cls, block, step, bytes, leaf);
  *saved_ns = answer.saved_ns;
  return answer.ratio;
}

// The assignment of vertices to processes: `place` has `levels` rows of `n`, `cost` one entry more than levels; fills
// `player`. Returns what it costs; with `keep` that of the player given.
EXPORT int64_t undertow_core_assign(int edges, const int* from, const int* to, const int64_t* weight, int n, int levels,
                                    const int* place, const int64_t* cost, int keep, int* player) {
  std::vector<Edge> all;
  for (int k = 0; k < edges; ++k) all.push_back({from[k], to[k], weight[k]});
  Places places;
  for (int k = 0; k < levels; ++k) places.level.emplace_back(place + k * n, place + (k + 1) * n);
  places.cost.assign(cost, cost + levels + 1);
  std::vector<int> found = keep ? std::vector<int>(player, player + n) : assign(all, places);
  std::copy(found.begin(), found.end(), player);
  return total_cost(all, places, found);
}
