// Handlers of point-to-point calls. Blocking sends pack and call; receives unpack what the status says arrived;
// nonblocking and persistent ones leave an entry in the request table. The library's call is made at once and in the
// program's order, so the non-overtaking rule is the library's own. The commonest ones first ask whether the call is known
// to pass (passing.hh); that part is compiled into the entry, and the rest is a function apart with the same arguments,
// so that such a call costs one look and a jump, and saves no register. `Next` is the library's function, a member of Real.
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

// Whether a message passes without being asked about; counts it. The first slot of its set is looked at in the entry, the
// others apart.
UNDERTOW_IN_ENTRY bool passes_by(Passing& slot, uint64_t print) {
  if (__builtin_expect(doubt(slot, print) != 0, 0)) return false;
  count_loosely(slot.calls);
  return true;
}
// Null when none does.
inline Passing* passing_slot(uint64_t print) {
  for (Passing* slot = set_of(print); slot < set_of(print) + kSlots; ++slot)
    if (doubt(*slot, print) == 0) return slot;
  return nullptr;
}
inline bool passes(uint64_t print) {
  Passing* const slot = passing_slot(print);
  if (slot) count_loosely(slot->calls);
  return slot;
}
// The same of a nonblocking one, which its round counts, too.
inline bool passes_in_round(uint64_t print, const Line& line) {
  if (this_round.attends || !passes(print)) return false;
  this_round.post(print, line);
  return true;
}

// After a call that was not taken: remembers it when the next one like it will not be, either. `counts`: its site.
template <class Side>
void learn(const Side& side, Site counts, Use use, uint64_t print, int peer, uint64_t age) {
  if ((side.verdict == Verdict::PassAlways || !usable_peer(peer)) && mode == Mode::Auto)
    will_pass(print, counts, use, side.record, age);
}
inline uint64_t now_known() { return hot.age.load(std::memory_order_relaxed); }

template <auto Next, Site site, class N>
UNDERTOW_APART int send_asked(void* buf, N count, MPI_Datatype type, int dest, int tag, MPI_Comm comm) {
  poll_orphans();
  const uint64_t age = now_known();
  SendSide side(buf, count, type, Peer(comm, dest), usable_peer(dest), kGain, Timed::Call);
  count_call(site, side.taken());
  learn(side, site, kSendUse, fingerprint(site, kSendUse, count, type, comm, dest), dest, age);
  return (real.*Next)(side.buf, count, side.type, dest, tag, comm);
}

template <auto Next, Site site, class N>
UNDERTOW_APART int send_aside(void* buf, N count, MPI_Datatype type, int dest, int tag, MPI_Comm comm) {
  if (!passes(fingerprint(site, kSendUse, count, type, comm, dest)))
    return send_asked<Next, site>(buf, count, type, dest, tag, comm);
  return (real.*Next)(buf, count, type, dest, tag, comm);
}

template <auto Next, Site site, class N>
UNDERTOW_IN_ENTRY int on_send(void* buf, N count, MPI_Datatype type, int dest, int tag, MPI_Comm comm) {
  const uint64_t print = fingerprint(site, kSendUse, count, type, comm, dest);
  if (!passes_by(*set_of(print), print)) return send_aside<Next, site>(buf, count, type, dest, tag, comm);
  return (real.*Next)(buf, count, type, dest, tag, comm);
}

// Isend and Irecv, by the side that is ours. A message of a script passes in the entry, others that are known to pass apart.
template <class Side, Use use, auto Next, Site site, class N>
UNDERTOW_APART int start_asked(void* buf, N count, MPI_Datatype type, int peer, int tag, MPI_Comm comm, MPI_Request* request) {
  const uint64_t print = fingerprint(site, use, count, type, comm, peer);
  const Line line = line_of(site, count, type, comm, peer);
  if (this_round.looks()) {  // the first message of what may be a known round
    round_opens(this_round, print);
    if (passes_in_round(print, line)) return (real.*Next)(buf, count, type, peer, tag, comm, request);
  }
  poll_orphans();
  round_enter();
  const uint64_t age = now_known();
  Side side(buf, count, type, Peer(comm, peer), usable_peer(peer) && request, kGain, Timed::Round);
  count_call(site, side.taken());
  learn(side, site, use, print, peer, age);
  if (!side.taken()) round_passes();
  const int rc = (real.*Next)(side.buf, count, side.type, peer, tag, comm, request);
  if (rc == MPI_SUCCESS && side.taken()) attach(side, count, buf, use == kRecvUse, false, *request);
  round_leave(print, line, request, rc);
  return rc;
}

template <class Side, Use use, auto Next, Site site, class N>
UNDERTOW_APART int start_aside(void* buf, N count, MPI_Datatype type, int peer, int tag, MPI_Comm comm, MPI_Request* request) {
  leave_script();
  if (!passes_in_round(fingerprint(site, use, count, type, comm, peer), line_of(site, count, type, comm, peer)))
    return start_asked<Side, use, Next, site>(buf, count, type, peer, tag, comm, request);
  return (real.*Next)(buf, count, type, peer, tag, comm, request);
}

template <class Side, Use use, auto Next, Site site, class N>
UNDERTOW_IN_ENTRY int start(void* buf, N count, MPI_Datatype type, int peer, int tag, MPI_Comm comm, MPI_Request* request) {
  if (!this_round.reader.reads(line_of(site, count, type, comm, peer)))
    return start_aside<Side, use, Next, site>(buf, count, type, peer, tag, comm, request);
  return (real.*Next)(buf, count, type, peer, tag, comm, request);
}

template <auto Next, Site site, class N>
UNDERTOW_IN_ENTRY int on_isend(void* buf, N count, MPI_Datatype type, int dest, int tag, MPI_Comm comm, MPI_Request* request) {
  return start<SendSide, kSendUse, Next, site>(buf, count, type, dest, tag, comm, request);
}

template <auto Next, Site site, class N>
UNDERTOW_IN_ENTRY int on_irecv(void* buf, N count, MPI_Datatype type, int source, int tag, MPI_Comm comm, MPI_Request* request) {
  return start<RecvSide, kRecvUse, Next, site>(buf, count, type, source, tag, comm, request);
}

template <class F, class N>
int on_send_init(F next, Site site, void* buf, N count, MPI_Datatype type, int dest, int tag, MPI_Comm comm,
                 MPI_Request* request) {
  SendSide side(buf, count, type, Peer(comm, dest), usable_peer(dest) && request, kGain, Timed::Lasting);
  count_call(site, side.taken());
  const int rc = next(side.buf, count, side.type, dest, tag, comm, request);
  if (rc == MPI_SUCCESS && side.taken()) attach(side, count, buf, false, true, *request);
  return rc;
}

// Runs `call(buffer, type, status)` for a receive and unpacks; `status` is the caller's. `print`: to remember it by, or 0.
template <class Call>
int receive(Site site, uint64_t print, void* buf, int64_t count, MPI_Datatype type, const Peer& peer, MPI_Status* status,
            bool allowed, Timed timed, Call call) {
  poll_orphans();
  const uint64_t age = now_known();
  RecvSide side(buf, count, type, peer, allowed, kGain, timed);
  count_call(site, side.taken());
  if (print) learn(side, site, kRecvUse, print, peer.rank, age);
  if (!side.taken()) return call(buf, type, status);
  MPI_Status local;
  MPI_Status* st = ignored(status) ? &local : status;
  const int rc = call(side.buf, side.type, st);
  if (rc == MPI_SUCCESS) side.finish(received_bytes(st));
  return rc;
}

template <auto Next, Site site, class N>
UNDERTOW_APART int recv_asked(void* buf, N count, MPI_Datatype type, int source, int tag, MPI_Comm comm, MPI_Status* status) {
  return receive(site, fingerprint(site, kRecvUse, count, type, comm, source), buf, count, type, Peer(comm, source), status,
                 usable_peer(source), Timed::Call,
                 [&](void* b, MPI_Datatype t, MPI_Status* s) { return (real.*Next)(b, count, t, source, tag, comm, s); });
}

template <auto Next, Site site, class N>
UNDERTOW_APART int recv_aside(void* buf, N count, MPI_Datatype type, int source, int tag, MPI_Comm comm, MPI_Status* status) {
  if (!passes(fingerprint(site, kRecvUse, count, type, comm, source)))
    return recv_asked<Next, site>(buf, count, type, source, tag, comm, status);
  return (real.*Next)(buf, count, type, source, tag, comm, status);
}

template <auto Next, Site site, class N>
UNDERTOW_IN_ENTRY int on_recv(void* buf, N count, MPI_Datatype type, int source, int tag, MPI_Comm comm, MPI_Status* status) {
  const uint64_t print = fingerprint(site, kRecvUse, count, type, comm, source);
  if (!passes_by(*set_of(print), print)) return recv_aside<Next, site>(buf, count, type, source, tag, comm, status);
  return (real.*Next)(buf, count, type, source, tag, comm, status);
}

template <class F, class N>
int on_mrecv(F next, Site site, void* buf, N count, MPI_Datatype type, MPI_Message* message, MPI_Status* status) {
  return receive(site, 0, buf, count, type, Peer(), status, true, Timed::No, [&](void* b, MPI_Datatype t, MPI_Status* s) {
    return next(b, count, t, message, s);
  });
}

template <auto Next, Site site, class N>
UNDERTOW_APART int sendrecv_asked(void* sbuf, N scount, MPI_Datatype stype, int dest, int stag, void* rbuf, N rcount,
                                  MPI_Datatype rtype, int source, int rtag, MPI_Comm comm, MPI_Status* status) {
  const uint64_t age = now_known();
  SendSide send(sbuf, scount, stype, Peer(comm, dest), usable_peer(dest));
  if (send.taken()) add(sites[site].taken, 1);
  learn(send, kSites, kSendUse, fingerprint(site, kSendUse, scount, stype, comm, dest), dest, age);
  return receive(site, fingerprint(site, kRecvUse, rcount, rtype, comm, source), rbuf, rcount, rtype, Peer(comm, source), status,
                 usable_peer(source), Timed::No, [&](void* b, MPI_Datatype t, MPI_Status* s) {
                   return (real.*Next)(send.buf, scount, send.type, dest, stag, b, rcount, t, source, rtag, comm, s);
                 });
}

template <auto Next, Site site, class N>
UNDERTOW_APART int sendrecv_aside(void* sbuf, N scount, MPI_Datatype stype, int dest, int stag, void* rbuf, N rcount,
                                  MPI_Datatype rtype, int source, int rtag, MPI_Comm comm, MPI_Status* status) {
  Passing* const to = passing_slot(fingerprint(site, kSendUse, scount, stype, comm, dest));
  if (!to || !passes(fingerprint(site, kRecvUse, rcount, rtype, comm, source)))
    return sendrecv_asked<Next, site>(sbuf, scount, stype, dest, stag, rbuf, rcount, rtype, source, rtag, comm, status);
  count_loosely(to->calls);
  return (real.*Next)(sbuf, scount, stype, dest, stag, rbuf, rcount, rtype, source, rtag, comm, status);
}

template <auto Next, Site site, class N>
UNDERTOW_IN_ENTRY int on_sendrecv(void* sbuf, N scount, MPI_Datatype stype, int dest, int stag, void* rbuf, N rcount,
                                  MPI_Datatype rtype, int source, int rtag, MPI_Comm comm, MPI_Status* status) {
  const uint64_t send = fingerprint(site, kSendUse, scount, stype, comm, dest);
  const uint64_t recv = fingerprint(site, kRecvUse, rcount, rtype, comm, source);
  Passing &to = *set_of(send), &from = *set_of(recv);
  if (__builtin_expect((doubt(to, send) | doubt(from, recv)) != 0, 0))
    return sendrecv_aside<Next, site>(sbuf, scount, stype, dest, stag, rbuf, rcount, rtype, source, rtag, comm, status);
  count_loosely(to.calls);
  count_loosely(from.calls);
  return (real.*Next)(sbuf, scount, stype, dest, stag, rbuf, rcount, rtype, source, rtag, comm, status);
}

// One buffer is both sides: packed into the slab, exchanged there, unpacked from there.
template <class F, class N>
int on_sendrecv_replace(F next, Site site, void* buf, N count, MPI_Datatype type, int dest, int stag, int source,
                        int rtag, MPI_Comm comm, MPI_Status* status) {
  return receive(site, 0, buf, count, type, Peer(comm, source), status, usable_peer(source) && usable_peer(dest), Timed::No,
                 [&](void* b, MPI_Datatype t, MPI_Status* s) {
                   if (b != buf) pack_slab(*device_record(type), count, buf, static_cast<char*>(b));
                   return next(b, count, t, dest, stag, source, rtag, comm, s);
                 });
}

template <class F, class N>
int on_recv_init(F next, Site site, void* buf, N count, MPI_Datatype type, int source, int tag, MPI_Comm comm,
                 MPI_Request* request) {
  RecvSide side(buf, count, type, Peer(comm, source), usable_peer(source) && request, kGain, Timed::Lasting);
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
