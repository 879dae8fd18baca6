// One side of a message: from the user's (buffer, count, datatype) to a dense slab and its twin type, and back.
//
// The count stays as it is and the datatype becomes its dense twin (same size, same signature), so every decision that
// the library or the peer makes from count and size (protocol, segmenting of collectives, MPI_Get_count) stays the
// same, whether or not the peer runs under the preload. A side that is not taken keeps the user's arguments.
#pragma once

#include "hook.hh"
#include "model.hh"
#include "report.hh"

namespace undertow {

// Slabs are kept for reuse by powers of two, so that large messages do not pay page faults each time.
// For a message from or to device memory (`device` not null) the slab is pinned. NULL when memory is short: the caller
// then leaves the message to the library, except where the bytes are a device's and the program has to stop.
char* slab_get(int64_t bytes, const void* device = nullptr, Use use = kSendUse);
void slab_put(char* slab);
void slab_release_all();

// pack / unpack with check mode inside; `bytes` may be fewer than count * size (a short receive).
void pack_slab(Record& record, int64_t count, const void* user, char* slab);
void unpack_slab(Record& record, int64_t count, const char* slab, void* user, int64_t bytes);

int64_t received_bytes(MPI_Status* status);  // 0 for a cancelled receive

inline bool usable_peer(int peer) { return peer != MPI_PROC_NULL; }

// A send side for the duration of a call. Not copyable; `give` hands the slab to a request.
struct SendSide {
  void* buf;
  MPI_Datatype type;
  Record* record = nullptr;
  char* slab = nullptr;
  Verdict verdict = Verdict::Pass;
  Stopwatch watch;

  SendSide(void* user, int64_t count, MPI_Datatype datatype, const Peer& peer, bool allowed = true,
           double gain = kGain, Timed timed = Timed::No)
      : buf(user), type(datatype) {
    if (!allowed) return;
    const bool device = device_side(user, datatype);
    Record* r = device ? device_wanted(datatype, kSendUse, count) : record_of(datatype);
    if (!device) {
      verdict = judge(r, kSendUse, count, peer, gain, timed, &watch);
      if (verdict != Verdict::Take) {
        record = r;
        return;
      }
    }
    if (!r) return;
    const MPI_Datatype twin = twin_of(r, device);
    if (handle_key(twin) == handle_key(constants.type_null)) return;
    slab = slab_get(count * r->plan.size, device ? user_bytes(*r, user) : nullptr);
    if (!slab) return;
    record = r;
    pack_slab(*r, count, user, slab);
    buf = slab;
    type = twin;
  }
  ~SendSide() {
    if (slab) slab_put(slab);
  }
  SendSide(const SendSide&) = delete;
  SendSide& operator=(const SendSide&) = delete;
  bool taken() const { return slab != nullptr; }
  char* give() {
    char* s = slab;
    slab = nullptr;
    return s;
  }
};

// A receive side: `finish` unpacks what arrived.
struct RecvSide {
  void* buf;
  MPI_Datatype type;
  void* user;
  int64_t count;
  Record* record = nullptr;
  char* slab = nullptr;
  Verdict verdict = Verdict::Pass;
  Stopwatch watch;

  RecvSide(void* target, int64_t n, MPI_Datatype datatype, const Peer& peer, bool allowed = true,
           double gain = kGain, Timed timed = Timed::No)
      : buf(target), type(datatype), user(target), count(n) {
    if (!allowed) return;
    const bool device = device_side(target, datatype);
    Record* r = device ? device_wanted(datatype, kRecvUse, n) : record_of(datatype);
    if (!device) {
      verdict = judge(r, kRecvUse, n, peer, gain, timed, &watch);
      if (verdict != Verdict::Take) {
        record = r;
        return;
      }
    }
    if (!r) return;
    const MPI_Datatype twin = twin_of(r, device);
    if (handle_key(twin) == handle_key(constants.type_null)) return;
    slab = slab_get(n * r->plan.size, device ? user_bytes(*r, target) : nullptr, kRecvUse);
    if (!slab) return;
    record = r;
    buf = slab;
    type = twin;
  }
  ~RecvSide() {
    if (slab) slab_put(slab);
  }
  RecvSide(const RecvSide&) = delete;
  RecvSide& operator=(const RecvSide&) = delete;
  bool taken() const { return slab != nullptr; }
  void finish(int64_t bytes) { unpack_slab(*record, count, slab, user, bytes); }
  void finish_all() { finish(count * record->plan.size); }
  char* give() {
    char* s = slab;
    slab = nullptr;
    return s;
  }
};

}  // namespace undertow
