// Handlers of point-to-point calls. Blocking sends pack and call; receives unpack what the status says arrived;
// nonblocking and persistent ones leave an entry in the request table. The library's call is made at once and in the
// program's order, so the non-overtaking rule is the library's own. Each first asks whether the call is known to pass
// (passing.hh); that part is compiled into the entry, so that such a call costs one look and a jump.
#pragma once

#include "passing.hh"
#include "requests.hh"
#include "round.hh"

namespace undertow {

#define UNDERTOW_IN_ENTRY __attribute__((always_inline)) inline
#define UNDERTOW_APART __attribute__((noinline))

inline void count_call(Site site, bool taken) {
  count_loosely(sites[site].calls);
  if (taken) add(sites[site].taken, 1);
}

// Whether a message passes without being asked about; counts it. While freed requests are polled, none does.
UNDERTOW_IN_ENTRY bool passes_at_once(Site site, uint64_t print) {
  if (gpu::possible() || any_orphans()) return false;
  Passing* p = known_to_pass(print);
  if (!p) return false;
  count_loosely(p->calls);
  count_loosely(sites[site].calls);
  return true;
}
UNDERTOW_IN_ENTRY bool passes_at_once(Site site, Use use, int64_t count, MPI_Datatype type, MPI_Comm comm, int peer) {
  return passes_at_once(site, fingerprint(use, count, type, comm, peer));
}

// After a call that was not taken: remembers it when the next one like it will not be, either.
template <class Side>
void learn(const Side& side, Use use, uint64_t print, int peer, uint64_t age) {
  if ((side.verdict == Verdict::PassAlways || !usable_peer(peer)) && mode == Mode::Auto) will_pass(print, use, side.record, age);
}
inline uint64_t now_known() { return passing_age.load(std::memory_order_relaxed); }

template <class F, class N>
UNDERTOW_APART int send_asked(F next, Site site, void* buf, N count, MPI_Datatype type, int dest, int tag, MPI_Comm comm) {
  poll_orphans();
  const uint64_t age = now_known();
  SendSide side(buf, count, type, Peer(comm, dest), usable_peer(dest), kGain, Timed::Call);
  count_call(site, side.taken());
  learn(side, kSendUse, fingerprint(kSendUse, count, type, comm, dest), dest, age);
  return next(side.buf, count, side.type, dest, tag, comm);
}

template <class F, class N>
UNDERTOW_IN_ENTRY int on_send(F next, Site site, void* buf, N count, MPI_Datatype type, int dest, int tag, MPI_Comm comm) {
  if (!passes_at_once(site, kSendUse, count, type, comm, dest))
    return send_asked(next, site, buf, count, type, dest, tag, comm);
  return next(buf, count, type, dest, tag, comm);
}

// The first message of what may be a known round opens it. True: it passes, and has been counted.
inline bool opens_and_passes(Site site, uint64_t print) {
  if (!this_round.looks) return false;
  round_opens(this_round, print);
  if (this_round.timed || !passes_at_once(site, print)) return false;
  this_round.post(print);
  return true;
}

// Isend and Irecv, by the side that is ours.
template <class Side, class F, class N>
UNDERTOW_APART int start_asked(Use use, F next, Site site, void* buf, N count, MPI_Datatype type, int peer, int tag, MPI_Comm comm,
                               MPI_Request* request, uint64_t print) {
  if (opens_and_passes(site, print)) return next(buf, count, type, peer, tag, comm, request);
  poll_orphans();
  round_enter();
  const uint64_t age = now_known();
  Side side(buf, count, type, Peer(comm, peer), usable_peer(peer) && request, kGain, Timed::Round);
  count_call(site, side.taken());
  learn(side, use, print, peer, age);
  const int rc = next(side.buf, count, side.type, peer, tag, comm, request);
  if (rc == MPI_SUCCESS && side.taken()) attach(side, count, buf, use == kRecvUse, false, *request);
  round_leave(print, request, rc);
  return rc;
}

template <class F, class N>
UNDERTOW_IN_ENTRY int on_isend(F next, Site site, void* buf, N count, MPI_Datatype type, int dest, int tag, MPI_Comm comm,
                               MPI_Request* request) {
  const uint64_t print = fingerprint(kIsend, count, type, comm, dest);
  if (this_round.attends() || !passes_at_once(site, print))
    return start_asked<SendSide>(kSendUse, next, site, buf, count, type, dest, tag, comm, request, print);
  this_round.post(print);
  return next(buf, count, type, dest, tag, comm, request);
}

template <class F, class N>
int on_send_init(F next, Site site, void* buf, N count, MPI_Datatype type, int dest, int tag, MPI_Comm comm,
                 MPI_Request* request) {
  SendSide side(buf, count, type, Peer(comm, dest), usable_peer(dest) && request);
  count_call(site, side.taken());
  const int rc = next(side.buf, count, side.type, dest, tag, comm, request);
  if (rc == MPI_SUCCESS && side.taken()) attach(side, count, buf, false, true, *request);
  return rc;
}

// Runs `call(buffer, type, status)` for a receive and unpacks; `status` is the caller's.
template <class Call>
int receive(Site site, void* buf, int64_t count, MPI_Datatype type, const Peer& peer, MPI_Status* status, bool allowed,
            Timed timed, Call call) {
  poll_orphans();
  const uint64_t age = now_known();
  RecvSide side(buf, count, type, peer, allowed, kGain, timed);
  count_call(site, side.taken());
  if (peer.known) learn(side, kRecvUse, fingerprint(kRecvUse, count, type, peer.comm, peer.rank), peer.rank, age);
  if (!side.taken()) return call(buf, type, status);
  MPI_Status local;
  MPI_Status* st = ignored(status) ? &local : status;
  const int rc = call(side.buf, side.type, st);
  if (rc == MPI_SUCCESS) side.finish(received_bytes(st));
  return rc;
}

template <class F, class N>
UNDERTOW_APART int recv_asked(F next, Site site, void* buf, N count, MPI_Datatype type, int source, int tag, MPI_Comm comm,
                              MPI_Status* status) {
  return receive(site, buf, count, type, Peer(comm, source), status, usable_peer(source), Timed::Call, [&](void* b, MPI_Datatype t, MPI_Status* s) {
    return next(b, count, t, source, tag, comm, s);
  });
}

template <class F, class N>
UNDERTOW_IN_ENTRY int on_recv(F next, Site site, void* buf, N count, MPI_Datatype type, int source, int tag, MPI_Comm comm,
                              MPI_Status* status) {
  if (!passes_at_once(site, kRecvUse, count, type, comm, source))
    return recv_asked(next, site, buf, count, type, source, tag, comm, status);
  return next(buf, count, type, source, tag, comm, status);
}

template <class F, class N>
int on_mrecv(F next, Site site, void* buf, N count, MPI_Datatype type, MPI_Message* message, MPI_Status* status) {
  return receive(site, buf, count, type, Peer(), status, true, Timed::No, [&](void* b, MPI_Datatype t, MPI_Status* s) {
    return next(b, count, t, message, s);
  });
}

template <class F, class N>
UNDERTOW_APART int sendrecv_asked(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, int dest, int stag, void* rbuf,
                                  N rcount, MPI_Datatype rtype, int source, int rtag, MPI_Comm comm, MPI_Status* status) {
  const uint64_t age = now_known();
  SendSide send(sbuf, scount, stype, Peer(comm, dest), usable_peer(dest));
  if (send.taken()) add(sites[site].taken, 1);
  learn(send, kSendUse, fingerprint(kSendUse, scount, stype, comm, dest), dest, age);
  return receive(site, rbuf, rcount, rtype, Peer(comm, source), status, usable_peer(source), Timed::No, [&](void* b, MPI_Datatype t, MPI_Status* s) {
    return next(send.buf, scount, send.type, dest, stag, b, rcount, t, source, rtag, comm, s);
  });
}

template <class F, class N>
UNDERTOW_IN_ENTRY int on_sendrecv(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, int dest, int stag, void* rbuf,
                                  N rcount, MPI_Datatype rtype, int source, int rtag, MPI_Comm comm, MPI_Status* status) {
  Passing* const send = known_to_pass(fingerprint(kSendUse, scount, stype, comm, dest));
  if (!send || !passes_at_once(site, kRecvUse, rcount, rtype, comm, source))
    return sendrecv_asked(next, site, sbuf, scount, stype, dest, stag, rbuf, rcount, rtype, source, rtag, comm, status);
  count_loosely(send->calls);
  return next(sbuf, scount, stype, dest, stag, rbuf, rcount, rtype, source, rtag, comm, status);
}

// One buffer is both sides: packed into the slab, exchanged there, unpacked from there.
template <class F, class N>
int on_sendrecv_replace(F next, Site site, void* buf, N count, MPI_Datatype type, int dest, int stag, int source,
                        int rtag, MPI_Comm comm, MPI_Status* status) {
  return receive(site, buf, count, type, Peer(comm, source), status, usable_peer(source) && usable_peer(dest), Timed::No,
                 [&](void* b, MPI_Datatype t, MPI_Status* s) {
                   if (b != buf) pack_slab(*device_record(type), count, buf, static_cast<char*>(b));
                   return next(b, count, t, dest, stag, source, rtag, comm, s);
                 });
}

template <class F, class N>
UNDERTOW_IN_ENTRY int on_irecv(F next, Site site, void* buf, N count, MPI_Datatype type, int source, int tag, MPI_Comm comm,
                               MPI_Request* request) {
  const uint64_t print = fingerprint(kIrecv, count, type, comm, source);
  if (this_round.attends() || !passes_at_once(site, print))
    return start_asked<RecvSide>(kRecvUse, next, site, buf, count, type, source, tag, comm, request, print);
  this_round.post(print);
  return next(buf, count, type, source, tag, comm, request);
}

template <class F, class N>
int on_recv_init(F next, Site site, void* buf, N count, MPI_Datatype type, int source, int tag, MPI_Comm comm,
                 MPI_Request* request) {
  RecvSide side(buf, count, type, Peer(comm, source), usable_peer(source) && request);
  count_call(site, side.taken());
  const int rc = next(side.buf, count, side.type, source, tag, comm, request);
  if (rc == MPI_SUCCESS && side.taken()) attach(side, count, buf, true, true, *request);
  return rc;
}

template <class F, class N>
int on_imrecv(F next, Site site, void* buf, N count, MPI_Datatype type, MPI_Message* message, MPI_Request* request) {
  RecvSide side(buf, count, type, Peer(), request != nullptr);
  count_call(site, side.taken());
  const int rc = next(side.buf, count, side.type, message, request);
  if (rc == MPI_SUCCESS && side.taken()) attach(side, count, buf, true, false, *request);
  return rc;
}

}  // namespace undertow
