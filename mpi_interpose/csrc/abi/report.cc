// See report.hh. The JSON has one object per kind of datatype (same plan, same combiners), so that programs which
// build their types anew in each step get one line and not thousands.
#include "report.hh"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "device.hh"
#include "kernels.hh"
#include "passing.hh"
#include "patience.hh"
#include "script.hh"

namespace undertow {

SiteTally sites[kSites];

namespace {

// What timed calls said of one use, link and size (bytes of a message: 8^k and more).
struct Checked {
  uint32_t samples[2] = {};
  int64_t ps_per_byte[2] = {};
  int decision = kOpen;
};

// The questions of single calls, then those of rounds of nonblocking messages.
constexpr int kChecks = kQuestions + 2 * kLinks;
int use_of(int check) { return check < kSendUse ? check : kSendUse + (check - kSendUse) / kLinks % 2; }
int link_of(int check) { return (check - kSendUse) % kLinks; }

struct Line {
  uint32_t combiners = 0;
  int64_t types = 0, size = 0, block = 0;
  const char* cls = "";
  std::string layout;
  int64_t taken[kUses] = {}, passed[kUses] = {}, bytes[kUses] = {}, ours_ns[kUses] = {}, library_ns[kUses] = {},
          saved_ns[kUses] = {};
  Checked checked[kChecks][kOnlineSizes] = {};
};

std::mutex g_lock;
using Kind = std::pair<std::string, uint32_t>;  // the plan's words, and which combiners made it
std::map<Kind, Line> g_lines;
std::map<std::string, int64_t> g_refused;
std::atomic<int64_t> g_mismatches{0};
constexpr size_t kMaxLines = 4096;
constexpr char kTooSoon[] =
    "a datatype that reaches over more than 256 KiB, used before the program had run for long enough to compare it with the "
    "library (UNDERTOW_MPI_PATIENCE_MS)";

void absorb(Record& r) {  // under g_lock
  Kind kind(r.plan.describe(), r.combiners);
  if (g_lines.size() >= kMaxLines && !g_lines.count(kind)) kind = {"(others)", 0};
  Line& line = g_lines[kind];
  line.types++;
  line.combiners |= r.combiners;
  line.size = r.plan.size;
  line.block = r.plan.one.block;
  line.cls = class_name(r.plan.one.cls);
  if (line.layout.empty()) line.layout = text(r.plan.ir, 4);
  for (int u = 0; u < kUses; ++u) {
    line.taken[u] += r.tally[u].taken.exchange(0);
    line.passed[u] += r.tally[u].passed.exchange(0);
    line.bytes[u] += r.tally[u].bytes.exchange(0);
    line.ours_ns[u] += r.tally[u].ours_ns.exchange(0);
    line.library_ns[u] += r.tally[u].library_ns.exchange(0);
    line.saved_ns[u] += r.tally[u].saved_ns.exchange(0);
  }
  for (int q = 0; q < kChecks; ++q)
    for (int k = 0; k < kOnlineSizes; ++k) {
      const Samples& o = q < kQuestions ? r.online[q][k] : r.rounds[q - kQuestions][k];
      Checked& c = line.checked[q][k];
      if (o.samples(false) + o.samples(true) <= c.samples[0] + c.samples[1]) continue;  // of alike types the best known
      c = {{o.samples(false), o.samples(true)}, {o.ps_per_byte(false), o.ps_per_byte(true)}, o.decision()};
    }
}

std::string quoted(const std::string& s) {
  std::string out = "\"";
  for (char c : s) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < 32 ? ' ' : c;
  }
  return out + "\"";
}

void write_checked(FILE* f, const Line& line) {
  static const char* const uses[] = {"pack", "unpack", "send", "recv"};
  static const char* const decisions[] = {"open", "library", "ours"};
  const char* comma = "";
  std::fprintf(f, ", \"checked\": [");
  for (int q = 0; q < kChecks; ++q)
    for (int k = 0; k < kOnlineSizes; ++k) {
      const Checked& c = line.checked[q][k];
      if (c.samples[0] + c.samples[1] == 0) continue;
      const int use = use_of(q);
      std::fprintf(f,
                   "%s{\"use\": \"%s\", \"of\": \"%s\", \"link\": \"%s\", \"least_bytes\": %lld, \"samples\": [%u, %u], "
                   "\"ps_per_byte\": [%lld, %lld], \"decision\": \"%s\"}",
                   comma, uses[use], q < kQuestions ? "calls" : "rounds", use < kSendUse ? "" : link_name(link_of(q)), 1ll << 3 * k,
                   c.samples[0], c.samples[1], static_cast<long long>(c.ps_per_byte[0]),
                   static_cast<long long>(c.ps_per_byte[1]), decisions[c.decision]);
      comma = ", ";
    }
  std::fprintf(f, "]");
}

void write_json(FILE* f, int rank, int size) {
  static const char* const modes[] = {"auto", "force", "check", "off"};
  static const char* const uses[] = {"pack", "unpack", "send", "recv"};
  std::fprintf(f, "{\"format\": 1, \"rank\": %d, \"size\": %d, \"mode\": \"%s\", \"kernels\": \"%s\", ", rank, size,
               modes[static_cast<int>(mode)], kernels().name);
  std::fprintf(f, "\"library\": %s, \"mismatches\": %lld, \"scripted_rounds\": %lld,\n \"functions\": {",
               quoted(mapped_library()).c_str(), static_cast<long long>(g_mismatches.load()),
               static_cast<long long>(scripted_rounds()));
  const char* comma = "";
  for (int k = 0; k < kSites; ++k) {
    const long long calls = sites[k].calls.load(), taken = sites[k].taken.load();
    if (!calls) continue;
    std::fprintf(f, "%s\"%s\": {\"calls\": %lld, \"taken\": %lld}", comma, undertow_symbol_names[k], calls, taken);
    comma = ", ";
  }
  const gpu::Counters& c = gpu::counters;
  std::fprintf(f, "},\n \"gpu\": {\"launches\": %lld, \"copies\": %lld, \"bytes\": %lld, \"code_loads\": %lld, "
                  "\"ptx_loads\": %lld, \"load_us\": %lld",
               static_cast<long long>(c.launches), static_cast<long long>(c.copies), static_cast<long long>(c.bytes),
               static_cast<long long>(c.code_loads), static_cast<long long>(c.ptx_loads),
               static_cast<long long>(c.load_us));
  std::fprintf(f, "},\n \"refused\": {");
  comma = "";
  for (const auto& [why, n] : g_refused) {
    std::fprintf(f, "%s%s: %lld", comma, quoted(why).c_str(), static_cast<long long>(n));
    comma = ", ";
  }
  std::fprintf(f, "},\n \"types\": [");
  comma = "";
  for (const auto& [kind, line] : g_lines) {
    std::fprintf(f, "%s\n  {\"plan\": %s, \"layout\": %s, \"class\": \"%s\", \"size\": %lld, \"block\": %lld, ", comma,
                 quoted(kind.first).c_str(), quoted(line.layout).c_str(), line.cls, static_cast<long long>(line.size),
                 static_cast<long long>(line.block));
    std::fprintf(f, "\"types\": %lld, \"combiners\": [", static_cast<long long>(line.types));
    const char* inner = "";
    for (int c = 0; c < kCombiners; ++c)
      if (line.combiners >> c & 1) std::fprintf(f, "%s\"%s\"", inner, combiner_names[c]), inner = ", ";
    std::fprintf(f, "]");
    for (int u = 0; u < kUses; ++u)
      if (line.taken[u] || line.passed[u])
        std::fprintf(f,
                     ", \"%s\": {\"taken\": %lld, \"passed\": %lld, \"bytes\": %lld, \"ours_ns\": %lld, "
                     "\"library_ns\": %lld, \"saved_ns\": %lld}",
                     uses[u], static_cast<long long>(line.taken[u]), static_cast<long long>(line.passed[u]),
                     static_cast<long long>(line.bytes[u]), static_cast<long long>(line.ours_ns[u]),
                     static_cast<long long>(line.library_ns[u]), static_cast<long long>(line.saved_ns[u]));
    write_checked(f, line);
    std::fprintf(f, "}");
    comma = ",";
  }
  std::fprintf(f, "\n ]}\n");
}

void write_text(FILE* f, int rank) {
  std::fprintf(f, "undertow: rank %d, datatypes under the preload (taken/passed)\n", rank);
  int64_t saved = 0;
  for (const auto& [kind, line] : g_lines) {
    int64_t any = 0;
    for (int u = 0; u < kUses; ++u) saved += line.saved_ns[u];
    for (int u = 0; u < kUses; ++u) any += line.taken[u] + line.passed[u];
    if (!any) continue;
    std::fprintf(f, "undertow:   pack %lld/%lld unpack %lld/%lld send %lld/%lld recv %lld/%lld  %s\n",
                 static_cast<long long>(line.taken[0]), static_cast<long long>(line.passed[0]),
                 static_cast<long long>(line.taken[1]), static_cast<long long>(line.passed[1]),
                 static_cast<long long>(line.taken[2]), static_cast<long long>(line.passed[2]),
                 static_cast<long long>(line.taken[3]), static_cast<long long>(line.passed[3]), kind.first.c_str());
    for (int q = kSendUse; q < kChecks; ++q)
      for (int k = 0; k < kOnlineSizes; ++k)
        if (line.checked[q][k].decision == kLibrary)
          std::fprintf(f, "undertow:     %s (peers: %s), %lld B and more: left to the library, timed %s\n",
                       use_of(q) == kSendUse ? "sends" : "receives", link_name(link_of(q)), 1ll << 3 * k,
                       q < kQuestions ? "calls were slower" : "rounds were not clearly faster");
  }
  if (const auto early = g_refused.find(kTooSoon); early != g_refused.end())
    std::fprintf(f, "undertow:   passed through %lldx: %s\n", static_cast<long long>(early->second), kTooSoon);
  const gpu::Counters& c = gpu::counters;
  if (c.code_loads + c.ptx_loads > 0)
    std::fprintf(f, "undertow:   device: %lld launches, %lld copies, %.1f MiB; kernels loaded as %s in %.1f ms\n",
                 static_cast<long long>(c.launches), static_cast<long long>(c.copies),
                 static_cast<double>(c.bytes) / 1048576.0, c.ptx_loads > 0 ? "PTX" : "machine code",
                 static_cast<double>(c.load_us) / 1000.0);
  std::fprintf(f, "undertow:   time saved on this rank: %.3f ms, modelled: calls taken times what the table says of each\n",
               static_cast<double>(saved) / 1e6);
}

}  // namespace

void report_refused(const char* why) {
  std::lock_guard<std::mutex> guard(g_lock);
  if (g_refused.size() < 64 || g_refused.count(why)) g_refused[why]++;
}

void report_retired(Record& record) {
  std::lock_guard<std::mutex> guard(g_lock);
  absorb(record);
}

void report_mismatch(const Record& record, const char* what, int64_t at) {
  if (g_mismatches.fetch_add(1) < 10)
    say("check: %s differs from the library at byte %lld of %s; the library's result is used", what,
        static_cast<long long>(at), record.plan.describe().c_str());
}

void report_write(int rank, int size) {
  const char* wish = std::getenv("UNDERTOW_MPI_REPORT");
  if (!wish || !*wish) return;
  passing_count();
  each_live([](Record& r) { report_retired(r); });
  if (const int64_t calls = too_soon_calls()) g_refused[kTooSoon] = calls;
  if (std::string(wish) == "stderr") {
    if (rank == 0) write_text(stderr, rank);
    return;
  }
  const std::string path = std::string(wish) + "." + std::to_string(rank) + ".json";
  const std::string scratch = path + ".tmp";
  FILE* f = std::fopen(scratch.c_str(), "w");
  if (!f) {
    say("cannot write the report %s", path.c_str());
    return;
  }
  write_json(f, rank, size);
  std::fclose(f);
  std::rename(scratch.c_str(), path.c_str());
}

}  // namespace undertow
