// See model.hh.
#include "model.hh"

#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "passing.hh"
#include "patience.hh"
#include "policy.hh"
#include "report.hh"
#include "resolve.hh"
#include "round.hh"

extern "C" const char undertow_builtin_model[], undertow_built_for[];

namespace undertow {
namespace {

Policy g_policy;
bool g_messages = false;  // the table has rows of messages

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

Policy::Answer ask(const Form& form, int64_t leaf, Use use, int link, int64_t bytes) {
  if (form.cls == Class::Contiguous && use >= kSendUse) return {};
  static constexpr int questions[kQuestions] = {kPolicyPack,       kPolicyUnpack,     kPolicySendSocket, kPolicySendLocal,
                                                kPolicySendRemote, kPolicyRecvSocket, kPolicyRecvLocal,  kPolicyRecvRemote};
  return g_policy.ask(questions[question(use, link)], static_cast<int>(form.cls), static_cast<double>(form.block),
                      static_cast<double>(form.step), static_cast<double>(bytes), static_cast<double>(leaf));
}

Online& online_of(Record& r, Use use, int link, int64_t bytes) {
  return r.online[question(use, link)][std::min(kOnlineSizes - 1, log2_of(bytes) / 3)];
}

struct Slot {  // where a record keeps the table's answer
  std::atomic<float>&gain, &saving_ns;
};
Slot slot_of(Record& r, Use use, int link, int64_t bytes) {
  const int q = question(use, link);
  if (bytes <= r.plan.size) return {r.gain_one[q], r.saving_one_ns[q]};
  const int k = size_bucket(bytes);
  return {r.gain[q][k], r.saving_ns[q][k]};
}

void credit(Record& r, Use use, int link, int64_t bytes) {
  const float saved = slot_of(r, use, link, bytes).saving_ns.load(std::memory_order_relaxed);
  if (saved > 0) add(r.tally[use].saved_ns, static_cast<int64_t>(saved));
}

}  // namespace

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ll + t.tv_nsec;
}

namespace {

void load_policy() {
  if (const char* named = std::getenv("UNDERTOW_MPI_MODEL"); named && *named) {
    if (g_policy.load(read_file(named).c_str(), undertow_built_for) == 0) say("the model %s has no usable row; nothing is taken", named);
    return;
  }
  std::string beside = own_path();
  beside = beside.substr(0, beside.find_last_of('/') + 1) + "model.txt";
  if (g_policy.load(read_file(beside).c_str(), undertow_built_for) == 0)
    g_policy.load(undertow_builtin_model, undertow_built_for);
}

}  // namespace

void model_init() {
  peers_init();
  load_policy();
  g_messages = g_policy.knows_messages();
  patience_init();
}

double model_ratio(Record& r, Use use, int link, int64_t bytes) {
  const Slot slot = slot_of(r, use, link, bytes);
  const float known = slot.gain.load(std::memory_order_relaxed);
  if (known != 0) return known;
  const Policy::Answer answer = ask(r.plan.form(bytes > r.plan.size ? 2 : 1), r.leaf_size, use, link, bytes);
  const float ratio = answer.ratio > 0 ? static_cast<float>(answer.ratio) : -1;
  slot.saving_ns.store(static_cast<float>(answer.saved_ns), std::memory_order_relaxed);
  slot.gain.store(ratio, std::memory_order_relaxed);
  return ratio;
}

double link_slower(int link, int base) {
  static constexpr int sends[kLinks] = {kPolicySendSocket, kPolicySendLocal, kPolicySendRemote};
  return g_policy.slower(sends[link], sends[base]);
}

Choice choose_local(Record& r, Use use, int64_t bytes) {
  if (mode != Mode::Auto) return {proved(r), false};
  const double gain = model_ratio(r, use, 0, bytes);
  const bool takes = gain >= kGain;
  // Nothing to learn from one dense block: the table alone decides, and a call that passes stays as cheap as it can be.
  const bool dense = r.plan.form(bytes > r.plan.size ? 2 : 1).cls == Class::Contiguous;
  if ((dense && !takes) || too_soon(r, takes)) return {false, false};
  const Choice choice = dense ? Choice{true, false} : online_of(r, use, 0, bytes).choose(kLocalRule, gain, takes);
  if (choice.ours && !proved(r)) return {false, false};
  if (choice.ours && !choice.timed) credit(r, use, 0, bytes);
  return choice;
}

Samples& round_of(Record& r, Use use, int link, int64_t bytes) {
  return r.rounds[(use - kSendUse) * kLinks + link][std::min(kOnlineSizes - 1, log2_of(bytes) / 3)];
}

void observe(Record& r, Use use, int link, bool ours, int64_t bytes, int64_t ns) {
  (ours ? r.tally[use].ours_ns : r.tally[use].library_ns).fetch_add(ns, std::memory_order_relaxed);
  online_of(r, use, link, bytes)
      .observe(use < kSendUse ? kLocalRule : kMessageRule, ours, bytes, ns, model_ratio(r, use, link, bytes) >= kGain);
}

void Stopwatch::start(Record* record, Use use, int link, int64_t bytes, bool ours) {
  hold(record);
  record_ = record, use_ = use, link_ = link, bytes_ = bytes, ours_ = ours;
  start_ns_ = now_ns();
}

void Stopwatch::stop() {
  observe(*record_, use_, link_, ours_, bytes_, now_ns() - start_ns_);
  release(record_);
}

namespace {

// A message in auto mode: the table must see `gain` for every link the peer may have, and no samples may speak against.
Verdict wins(Record& r, Use use, int64_t bytes, const Peer& peer, double gain, Timed timed, Stopwatch* watch) {
  const auto verdict = [](bool ours) { return ours ? Verdict::Take : Verdict::Pass; };
  if (!g_messages) return Verdict::PassAlways;
  const LinkSet links = links_of(peer);
  if (!links || links & kNobody) return Verdict::PassAlways;
  if (timed == Timed::Round && waiting() && !reaches_far(r)) {  // to ask takes longer than a small program's round
    if (this_round.habit) return Verdict::PassAlways;
    if (this_round.strangers < kUnasked) return ++this_round.strangers, Verdict::Pass;
  }
  int last = 0;
  double ratio = 1e9;  // the least of all links that it may be
  for (int link = 0; link < kLinks; ++link) {
    if (!(links >> link & 1)) continue;
    ratio = std::min(ratio, model_ratio(r, use, link, bytes));
    last = link;
  }
  if (timed == Timed::Round && waiting()) {
    if (ratio >= kTry) wait_for(r);
    if (ratio < gain || this_round.habit) return Verdict::PassAlways;
    if (++this_round.strangers % 16 || waits_on()) return Verdict::Pass;
  }
  if (timed == Timed::Round && links == 1u << last) {
    const Samples& rounds = round_of(r, use, last, bytes);
    const auto settled = rounds.decision();
    if (this_round.timed()) {
      if (!round_takes(r, use, last, bytes, ratio)) return Verdict::Pass;
    } else if (settled == kLibrary || (settled == kOpen && ratio < gain)) {
      return Verdict::PassAlways;
    } else if (settled == kOpen && (too_soon(r) || !online_of(r, use, last, bytes).takes(true))) {
      return Verdict::Pass;
    }
    credit(r, use, last, bytes);
    return Verdict::Take;
  }
  if (ratio < gain) return Verdict::PassAlways;
  if (timed != Timed::Lasting && too_soon(r)) return Verdict::Pass;
  if (timed == Timed::Call && links == 1u << last) {
    const Choice choice =
        online_of(r, use, last, bytes).choose(kMessageRule, model_ratio(r, use, last, bytes), true);
    if (choice.timed && (!choice.ours || proved(r))) watch->start(&r, use, last, bytes, choice.ours);
    if (choice.ours) credit(r, use, last, bytes);
    return verdict(choice.ours);
  }
  for (int link = 0; link < kLinks; ++link)
    if (links >> link & 1 && !online_of(r, use, link, bytes).takes(true)) return Verdict::Pass;
  credit(r, use, last, bytes);
  return Verdict::Take;
}

}  // namespace

bool small_enough(int64_t bytes) {
  if (bytes <= kLargestCopy) return true;
  report_refused("a message of more than 1 GiB: packing it would take as much memory again");
  return false;
}

Verdict judge(Record* r, Use use, int64_t count, const Peer& peer, double gain, Timed timed, Stopwatch* watch) {
  if (!r) return Verdict::PassAlways;
  if (count <= 0 || r->plan.size == 0 || r->wrong.load(std::memory_order_relaxed)) return Verdict::Pass;
  Tally& t = r->tally[use];
  const auto pass = [&](Verdict how) {
    count_loosely(t.passed);
    return how;
  };
  int64_t bytes;
  if (mode == Mode::Auto && r->plan.form(count).cls == Class::Contiguous) return pass(Verdict::PassAlways);
  if (__builtin_mul_overflow(count, r->plan.size, &bytes)) return Verdict::Pass;
  if (!small_enough(bytes)) return pass(Verdict::Pass);
  if (mode == Mode::Auto) {
    const Verdict won = wins(*r, use, bytes, peer, gain, timed, watch);
    if (won != Verdict::Take) return pass(won);
  }
  if (!proved(*r)) return pass(Verdict::Pass);
  add(t.taken, 1);
  add(t.bytes, bytes);
  if (timed == Timed::Round) round_packs();
  return Verdict::Take;
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
// The bytes of its basic elements, 1 where these are mixed.
extern "C" __attribute__((visibility("default"))) long undertow_measure_leaf(MPI_Datatype type) {
  const undertow::Record* r = undertow::record_of(type);
  return r ? r->leaf_size : 0;
}
// How many calls of `use` (as in Use: 0 pack to 3 receive) with that type went our way.
extern "C" __attribute__((visibility("default"))) long undertow_measure_taken(MPI_Datatype type, int use) {
  const undertow::Record* r = undertow::record_of(type);
  return r && use >= 0 && use < undertow::kUses ? r->tally[use].taken.load() : 0;
}
extern "C" __attribute__((visibility("default"))) void undertow_measure_mode(int mode) {
  undertow::patience_end();
  undertow::mode = mode ? undertow::Mode::Force : undertow::Mode::Auto;
  undertow::passing_changed();
}
// The link to a rank of MPI_COMM_WORLD as the model names it; "unknown" when it may be one of several.
extern "C" __attribute__((visibility("default"))) const char* undertow_measure_link(int rank) {
  const undertow::LinkSet links = undertow::links_of(undertow::Peer(MPI_COMM_WORLD, rank));
  for (int link = 0; link < undertow::kLinks; ++link)
    if (links == 1u << link) return undertow::link_name(link);
  return "unknown";
}
// A sample as if a blocking call of `use` (2: send, 3: receive) with that rank of MPI_COMM_WORLD had taken `ns`.
extern "C" __attribute__((visibility("default"))) int undertow_measure_sample(MPI_Datatype type, int use, int rank,
                                                                               long bytes, int ours, long ns) {
  undertow::Record* r = undertow::record_of(type);
  const undertow::LinkSet links = undertow::links_of(undertow::Peer(MPI_COMM_WORLD, rank));
  if (!r || use < undertow::kSendUse || use > undertow::kRecvUse) return 0;
  for (int link = 0; link < undertow::kLinks; ++link)
    if (links == 1u << link) return undertow::observe(*r, static_cast<undertow::Use>(use), link, ours, bytes, ns), 1;
  return 0;
}

#include "peers.inc"
