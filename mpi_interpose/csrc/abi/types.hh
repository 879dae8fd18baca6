// Records of committed datatypes: plan, counters and a dense twin; their lifetime is the datatype's own.
//
// MPI recycles handles, so a table keyed by handle needs to know when a type dies. A datatype attribute tells: its
// delete callback runs at the real destruction, also when that is implicit. Operations in flight hold a reference.
// Only types whose MPI_Type_commit we saw (or duplicates of those) are used: a type that was never committed must keep
// failing the way the library makes it fail.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "glue.hh"
#include "online.hh"
#include "peers.hh"
#include "plan.hh"

namespace undertow {

struct Tally {
  std::atomic<int64_t> taken{0}, passed{0}, bytes{0}, ours_ns{0}, library_ns{0}, saved_ns{0};
};

// What is decided and reported per type: the local calls apart from the messages.
enum Use : int { kPack, kUnpack, kSendUse, kRecvUse, kUses };

constexpr int kSizeBuckets = 40;  // half octaves of a message from 256 bytes on

// What the model answers apart: pack, unpack, and sends and receives for each link to the peer.
constexpr int kQuestions = 2 + 2 * kLinks;
constexpr int question(Use use, int link) { return use < kSendUse ? use : 2 + (use - kSendUse) * kLinks + link; }

constexpr int kOnlineSizes = 10;  // by factors of eight

struct Record {
  Plan plan;
  uintptr_t key = 0;
  uint32_t combiners = 0;         // bit k: MPI combiner number k of our own list occurs
  MPI_Datatype leaf;              // the one predefined type inside, else MPI_BYTE
  int64_t leaf_size = 1;
  bool mixed = false;             // of several predefined types
  std::atomic<int> refs{1};
  std::atomic<bool> dead{false};  // the handle is gone, only operations in flight still hold the record
  std::atomic<bool> wrong{false}; // check mode found a difference: never used again
  std::atomic<int> proof{0};      // 0 not compared yet, 1 as the library, 2 the library packs other bytes
  std::atomic<int> twin_state{0}; // 0 none yet, 1 made, 2 impossible
  MPI_Datatype twin;              // contiguous, same size and signature: what a slab is sent as
  Tally tally[kUses];
  std::atomic<float> gain[kQuestions][kSizeBuckets]{};      // the table's answer, asked once: 0 not yet, negative: unknown
  std::atomic<float> saving_ns[kQuestions][kSizeBuckets]{}; // per call, by the table
  std::atomic<float> gain_one[kQuestions]{}, saving_one_ns[kQuestions]{};  // the same for calls of a single element
  Online online[kQuestions][kOnlineSizes];                  // what the running program measures of single calls
  Samples rounds[2 * kLinks][kOnlineSizes];                  // and of rounds of nonblocking messages (round.hh)
  std::atomic<uint64_t> passing{0};                    // groups of slots that may hold a call with it (passing.hh)
  std::atomic<uint32_t> proof_wishes{0};               // calls that wanted a large type, before its proof
};

constexpr int kCombiners = 19;
extern const char* const combiner_names[kCombiners];

void types_init();
void types_finalize();

Record* record_of(MPI_Datatype type);   // NULL: not ours to touch
void type_committed(MPI_Datatype type);
void hold(Record* record);
void release(Record* record);
MPI_Datatype handle_of(const Record& record);  // valid while the record is not dead
// MPI_DATATYPE_NULL when it cannot be made, or (but for device memory, which only we can send) not be received everywhere.
MPI_Datatype twin_of(Record* record, bool device);
void each_live(void (*visit)(Record&));

// decode.cc: the IR of a type, throws Unsupported. `leaf` becomes the only predefined type inside, or MPI_BYTE.
struct Decoded {
  Ref ir;
  int64_t lb = 0, extent = 0;
  uint32_t combiners = 0;
  MPI_Datatype leaf;
  int64_t leaf_size = 0;
  bool mixed = false;
};
Decoded decode(MPI_Datatype type);
// prove.cc: whether the library packs a type's bytes as the plan says; asked before a type's first use (of types over
// 256 KiB the third), once per structure. Open MPI 5.0.11 packs wrong bytes for some types of 16-byte elements with gaps:
// a program must see the same with and without the preload, so such types are passed through.
bool prove(Record& record);
inline bool proved(Record& record) {
  const int p = record.proof.load(std::memory_order_acquire);
  return p ? p == 1 : prove(record);
}
void proofs_end();  // after a round whose types were proved together: their memory is given back
void drop(MPI_Datatype type);  // contents.cc: frees a handle that Type_get_contents returned

}  // namespace undertow
