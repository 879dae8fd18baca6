// See patience.hh.
#include "patience.hh"

#include <cstdlib>
#include <iterator>

#include "model.hh"
#include "passing.hh"

namespace undertow {
namespace {

constexpr int64_t kMs = 1000000;

struct Step {
  int64_t reach, wait_ns;  // bytes from a type's first to its last; what the program must have run for
};
// A comparison is some per cent of that time at most: on two cores of an AMD EPYC 30 µs, 0.2 ms and 5 to 16 ms for a type.
constexpr Step kSteps[] = {{kNear, 100 * kMs}, {1 << 22, 1000 * kMs}, {INT64_MAX, 10000 * kMs}};

int64_t g_start_ns = 0;
int64_t g_fixed_ns = -1;
std::atomic<int64_t> g_wait_ns{0};
std::atomic<int64_t> g_too_soon{0};

int64_t reach_of(const Record& r) { return r.plan.ir->hi - r.plan.ir->lo; }

int64_t wait_of(const Step& step) { return g_fixed_ns >= 0 ? g_fixed_ns : step.wait_ns; }

}  // namespace

void patience_init() {
  g_start_ns = now_ns();
  if (const char* wish = std::getenv("UNDERTOW_MPI_PATIENCE_MS"); wish && *wish) {
    char* end;
    const long ms = std::strtol(wish, &end, 10);
    if (*end || ms < 0) say("UNDERTOW_MPI_PATIENCE_MS=%s is not a number of milliseconds; left to the types", wish);
    else g_fixed_ns = ms * kMs;
  }
  g_wait_ns = wait_of(kSteps[0]);
  if (g_fixed_ns == 0) return;
  patience::rounds_wait = true;
  patience::served_reach = kSteps[0].reach;
}

void patience_end() {
  patience::rounds_wait = false;
  patience::served_reach = INT64_MAX;
}

void wait_for(const Record& wanted) {
  if (g_fixed_ns >= 0 || wanted.proof.load(std::memory_order_relaxed)) return;
  const int64_t reach = reach_of(wanted);
  const Step* step = kSteps;
  while (reach > step->reach) ++step;
  int64_t before = g_wait_ns.load(std::memory_order_relaxed);
  while (before < step->wait_ns && !g_wait_ns.compare_exchange_weak(before, step->wait_ns, std::memory_order_relaxed)) {
  }
}

bool waits_on() {
  if (now_ns() - g_start_ns < g_wait_ns.load(std::memory_order_relaxed)) return true;
  if (patience::rounds_wait.exchange(false)) passing_changed();  // what was known to pass may be wanted now
  return false;
}

bool still_too_soon(const Record& wanted, bool taken) {
  if (wanted.proof.load(std::memory_order_relaxed)) return false;
  const int64_t run_ns = now_ns() - g_start_ns;
  int64_t served = kSteps[0].reach;
  for (const Step* step = kSteps + 1; step != std::end(kSteps) && run_ns >= wait_of(*step); ++step) served = step->reach;
  patience::served_reach.store(served, std::memory_order_relaxed);
  if (reach_of(wanted) <= served) return false;
  if (taken) count_loosely(g_too_soon);
  return true;
}

int64_t too_soon_calls() { return g_too_soon.load(std::memory_order_relaxed); }

}  // namespace undertow
