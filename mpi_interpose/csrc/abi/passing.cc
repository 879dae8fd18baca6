// See passing.hh.
#include "passing.hh"

#include <mutex>

#include "report.hh"
#include "round.hh"

namespace undertow {

Passing passing[kPassing];
Hot hot;
bool threads_may_race = false;

namespace {

std::mutex g_lock;  // for the owners; a slot's mark and count are read and counted without
Owner g_owners[kPassing];

void settle(int slot) { g_owners[slot].count(passing[slot].calls.exchange(0, std::memory_order_relaxed)); }

}  // namespace

void Owner::count(int64_t calls) const {
  if (site != kSites) sites[site].calls.fetch_add(calls, std::memory_order_relaxed);
  if (tally) tally->passed.fetch_add(calls, std::memory_order_relaxed);
}

bool passing_owner(uint64_t print, uint64_t age, Owner* owner) {
  std::lock_guard<std::mutex> guard(g_lock);
  const int first = static_cast<int>(set_of(print) - passing);
  for (int slot = first; slot < first + kSlots; ++slot) {
    if (passing[slot].mark.load(std::memory_order_relaxed) != (print ^ age)) continue;
    *owner = g_owners[slot];
    return true;
  }
  return false;
}

void will_pass(uint64_t print, Site site, Use use, Record* record, uint64_t age) {
  static_assert(kSets == 256, "set_of takes eight bits");
  static unsigned turn = 0;
  const int first = static_cast<int>(set_of(print) - passing);
  std::lock_guard<std::mutex> guard(g_lock);
  int slot = first;  // the same call's, else one with nothing that still holds, else one after the other
  while (slot < first + kSlots && passing[slot].mark.load(std::memory_order_relaxed) != (print ^ g_owners[slot].age)) ++slot;
  if (slot == first + kSlots)
    for (slot = first; slot < first + kSlots && passing[slot].mark.load(std::memory_order_relaxed) && g_owners[slot].age == age;) ++slot;
  if (slot == first + kSlots) slot = first + turn++ % kSlots;
  if (age != hot.age.load(std::memory_order_relaxed) || hot.orphans.load(std::memory_order_relaxed)) return;
  settle(slot);
  g_owners[slot] = {site, record ? &record->tally[use] : nullptr, record, age};
  if (record) record->passing.fetch_or(1ull << slot / (kPassing / 64), std::memory_order_relaxed);
  passing[slot].mark.store(print ^ age, std::memory_order_relaxed);
}

void passing_changed() {
  leave_script();
  std::lock_guard<std::mutex> guard(g_lock);
  hot.age.fetch_add(0x9e3779b97f4a7c15ull, std::memory_order_relaxed);
}

void passing_retired(Record& record) {
  if (!record.passing.load(std::memory_order_relaxed)) return;
  scripts_settle(&record);
  std::lock_guard<std::mutex> guard(g_lock);
  for (uint64_t groups = record.passing.exchange(0, std::memory_order_relaxed); groups; groups &= groups - 1) {
    const int first = __builtin_ctzll(groups) * (kPassing / 64);
    for (int slot = first; slot < first + kPassing / 64; ++slot) {
      if (g_owners[slot].record != &record) continue;
      settle(slot);
      passing[slot].mark.store(0, std::memory_order_relaxed);
      g_owners[slot] = {};
    }
  }
}

void passing_count() {
  scripts_settle(nullptr);
  std::lock_guard<std::mutex> guard(g_lock);
  for (int slot = 0; slot < kPassing; ++slot) settle(slot);
}

}  // namespace undertow
