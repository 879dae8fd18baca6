// See round.hh.
#include "round.hh"

#include <algorithm>
#include <memory>

#include "patience.hh"

namespace undertow {
namespace {

constexpr int kIrregular = 64, kNothing = 1 << 20;  // rounds until the next look where rounds change, or nothing can be taken
constexpr int kSeldom = 1 << 13;   // rounds between two looks at the clock at most
constexpr int kPatient = 1 << 20;  // rounds alike that it takes at most before a script begins

Habit& habit_of(Round& r, uint64_t print) {
  if (!r.all) {
    static thread_local struct Keeper {  // ends with the thread, after which calls may still come
      std::unique_ptr<Habits> habits;
      ~Keeper() {
        this_round.all = nullptr;
        this_round.habit = nullptr;
        this_round.attends = 0;
      }
    } keeper;
    keeper.habits = std::make_unique<Habits>(r.reader);
    r.all = keeper.habits.get();
  }
  Habit& h = r.all->known[print % Habits::kKnown];
  if (h.first != print) {
    h = Habit();
    h.first = print;
  }
  return h;
}

Samples& samples_of(const Member& p) { return round_of(*p.record, p.use, p.link, p.bytes); }

// Whether the table takes any message of this round; where there were more than are kept, perhaps.
bool tables(const Round& r) {
  const Member* const part = r.all->part;
  return r.parts == Habits::kMost || std::any_of(part, part + r.parts, [](const Member& p) { return p.table; });
}

// The trial has decided: what its way was for each message holds from now on.
void settle(const Round& r) {
  const Way way = r.habit->trial.chosen();
  for (int k = 0; k < r.parts; ++k) {
    const Member& p = r.all->part[k];
    const bool ours = way == kAllWay || (way == kTableWay && p.table);
    samples_of(p).settle(ours ? kOurs : kLibrary);
  }
  passing_changed();
}

void wait_longer(Round& r) { r.patience = std::min(2 * r.patience, kPatient); }

// After a whole round. Whether a script serves the next ones.
bool begin_script(Round& r) {
  r.alike = r.prints == r.usual ? r.alike + 1 : 0;
  r.usual = r.prints;
  const int rest = r.habit->trial.rest();
  if (r.alike < r.patience || r.timed() || rest <= 1) return false;
  r.alike = 0;
  if (r.all->script.begin(r.posts, rest)) return true;
  wait_longer(r);
  return false;
}

}  // namespace

void round_opens(Round& r, uint64_t print) {
  Habit& h = habit_of(r, print);
  r.habit = &h;
  if (waiting() && h.trial.rest() == 0 && waits_on()) {
    h.trial.put_off(h.wait);
    h.wait = std::min(2 * h.wait, kSeldom);
  }
  r.way = h.trial.next();
  r.attends = h.trial.timed() ? Round::kTimed : 0;
  r.clocked = h.trial.clocked();
}

bool round_takes(Record& record, Use use, int link, int64_t bytes, double ratio) {
  Round& r = this_round;
  const bool table = ratio >= kGain, candidate = ratio >= kTry && proved(record);
  if (!candidate) return false;
  const bool ours = r.way == kAllWay || (r.way == kTableWay && table);
  r.bytes += bytes;
  if (r.parts < Habits::kMost) {
    hold(&record);
    r.all->part[r.parts++] = Member{&record, use, link, bytes, ours, table};
  }
  return ours;
}

void script_ends(Round& r) {
  int posts;
  const uint64_t* prints;
  r.habit->trial.rested(r.all->script.end(&posts, &prints));
  for (int k = 0; k < posts; ++k) r.post(prints[k]);
  r.served = true;
}

void round_closes(Round& r, bool whole, bool valid) {
  const bool timed = r.timed();
  bool scripted = false;
  if (r.served) {
    const bool same = whole && r.prints == r.usual;
    r.habit->trial.rested(same);
    if (!same) wait_longer(r);
    r.served = false;
  } else if (Habit* const h = r.habit) {
    if (!whole || (h->whole && h->whole != r.prints)) {
      h->trial.put_off(kIrregular);
    } else {
      if (h->judged != r.prints) h->trial.forget();
      h->judged = r.prints;
      if (timed && r.parts == 0) h->trial.put_off(kNothing);
      else if (h->trial.done(r.ns, timed && tables(r))) settle(r);
    }
    h->whole = whole ? r.prints : 0;
    scripted = whole && begin_script(r);
  }
  if (timed) {
    const double each = r.bytes > 0 ? static_cast<double>(r.ns) / static_cast<double>(r.bytes) : 0;
    for (int k = 0; k < r.parts; ++k) {
      const Member& p = r.all->part[k];
      const auto ns = static_cast<int64_t>(each * static_cast<double>(p.bytes));
      if (valid) {
        (p.ours ? p.record->tally[p.use].ours_ns : p.record->tally[p.use].library_ns).fetch_add(ns, std::memory_order_relaxed);
        samples_of(p).note(p.ours, p.bytes, ns);
      }
      release(p.record);
    }
    proofs_end();
  }
  if (!scripted) r.habit = nullptr;
  r.parts = 0;
  r.clear();
  r.has_first = r.clocked = false;
  r.bytes = r.ns = 0;
  r.attends = whole && !scripted ? Round::kLooks : 0;
}

}  // namespace undertow
