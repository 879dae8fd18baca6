// See script.hh.
#include "script.hh"

#include <algorithm>
#include <mutex>
#include <vector>

#include "report.hh"

namespace undertow {

const Line no_line;

namespace {

std::mutex g_lock;  // for all scripts; of a reader another thread reads `left` only
int64_t g_rounds = 0;
std::vector<Script*>* g_scripts = new std::vector<Script*>;  // never destroyed: threads may outlive main

}  // namespace

Script::Script(Reader& reader) : reader_(reader) {
  std::lock_guard<std::mutex> guard(g_lock);
  g_scripts->push_back(this);
}

Script::~Script() {
  int posts;
  const uint64_t* prints;
  if (reader_.end) end(&posts, &prints);
  std::lock_guard<std::mutex> guard(g_lock);
  g_scripts->erase(std::find(g_scripts->begin(), g_scripts->end(), this));
}

bool Script::begin(int n, int rounds) {
  if (n > kMost || gpu::news()) return false;
  std::lock_guard<std::mutex> guard(g_lock);
  reader_.age = hot.age.load(std::memory_order_relaxed);
  for (int k = 0; k < n; ++k)
    if (!passing_owner(print_[k], reader_.age, &owner_[k])) return false;
  line_[n] = Line();
  rounds_ = rounds;
  counted_ = 0;
  reader_.left.store(rounds, std::memory_order_relaxed);
  reader_.at = reader_.begin = line_;
  reader_.end = line_ + n;
  return true;
}

int Script::end(int* posts, const uint64_t** prints) {
  std::lock_guard<std::mutex> guard(g_lock);
  settle();
  *posts = static_cast<int>(reader_.at - reader_.begin);
  *prints = print_;
  for (int k = 0; k < *posts; ++k) owner_[k].count(1);
  const int served = rounds_ - reader_.left.load(std::memory_order_relaxed);
  reader_.at = &no_line;
  reader_.begin = reader_.end = nullptr;
  reader_.left.store(0, std::memory_order_relaxed);
  return served;
}

void Script::settle() {
  const int served = rounds_ - reader_.left.load(std::memory_order_relaxed);
  for (const Line* line = reader_.begin; line < reader_.end; ++line) owner_[line - reader_.begin].count(served - counted_);
  g_rounds += served - counted_;
  counted_ = served;
}

int64_t scripted_rounds() {
  std::lock_guard<std::mutex> guard(g_lock);
  return g_rounds;
}

void scripts_settle(const Record* dying) {
  std::lock_guard<std::mutex> guard(g_lock);
  for (Script* script : *g_scripts) {
    if (!script->reader_.end) continue;
    script->settle();
    for (Owner& owner : script->owner_)
      if (dying && owner.record == dying) owner.tally = nullptr, owner.record = nullptr;
  }
}

}  // namespace undertow
