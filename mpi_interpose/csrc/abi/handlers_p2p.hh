// Handlers of point-to-point calls. Blocking sends pack and call; receives unpack what the status says arrived;
// nonblocking and persistent ones leave an entry in the request table. The library's call is made at once and in the
// program's order, so the non-overtaking rule is the library's own.
#pragma once

#include "requests.hh"
#include "round.hh"

namespace undertow {

inline void count_call(Site site, bool taken) {
  sites[site].calls.fetch_add(1, std::memory_order_relaxed);
  if (taken) sites[site].taken.fetch_add(1, std::memory_order_relaxed);
}

template <class F, class N>
int on_send(F next, Site site, void* buf, N count, MPI_Datatype type, int dest, int tag, MPI_Comm comm) {
  poll_orphans();
  SendSide side(buf, count, type, Peer(comm, dest), usable_peer(dest), kGain, Timed::Call);
  count_call(site, side.taken());
  return next(side.buf, count, side.type, dest, tag, comm);
}

template <class F, class N>
int on_isend(F next, Site site, void* buf, N count, MPI_Datatype type, int dest, int tag, MPI_Comm comm,
             MPI_Request* request) {
  poll_orphans();
  round_enter();
  SendSide side(buf, count, type, Peer(comm, dest), usable_peer(dest) && request, kGain, Timed::Round);
  count_call(site, side.taken());
  const int rc = next(side.buf, count, side.type, dest, tag, comm, request);
  if (rc == MPI_SUCCESS && side.taken()) attach(side, count, buf, false, false, *request);
  round_leave(request, rc);
  return rc;
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
  RecvSide side(buf, count, type, peer, allowed, kGain, timed);
  count_call(site, side.taken());
  if (!side.taken()) return call(buf, type, status);
  MPI_Status local;
  MPI_Status* st = ignored(status) ? &local : status;
  const int rc = call(side.buf, side.type, st);
  if (rc == MPI_SUCCESS) side.finish(received_bytes(st));
  return rc;
}

template <class F, class N>
int on_recv(F next, Site site, void* buf, N count, MPI_Datatype type, int source, int tag, MPI_Comm comm,
            MPI_Status* status) {
  return receive(site, buf, count, type, Peer(comm, source), status, usable_peer(source), Timed::Call, [&](void* b, MPI_Datatype t, MPI_Status* s) {
    return next(b, count, t, source, tag, comm, s);
  });
}

template <class F, class N>
int on_mrecv(F next, Site site, void* buf, N count, MPI_Datatype type, MPI_Message* message, MPI_Status* status) {
  return receive(site, buf, count, type, Peer(), status, true, Timed::No, [&](void* b, MPI_Datatype t, MPI_Status* s) {
    return next(b, count, t, message, s);
  });
}

template <class F, class N>
int on_sendrecv(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, int dest, int stag, void* rbuf, N rcount,
                MPI_Datatype rtype, int source, int rtag, MPI_Comm comm, MPI_Status* status) {
  SendSide send(sbuf, scount, stype, Peer(comm, dest), usable_peer(dest));
  if (send.taken()) sites[site].taken.fetch_add(1, std::memory_order_relaxed);
  return receive(site, rbuf, rcount, rtype, Peer(comm, source), status, usable_peer(source), Timed::No, [&](void* b, MPI_Datatype t, MPI_Status* s) {
    return next(send.buf, scount, send.type, dest, stag, b, rcount, t, source, rtag, comm, s);
  });
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
int on_irecv(F next, Site site, void* buf, N count, MPI_Datatype type, int source, int tag, MPI_Comm comm,
             MPI_Request* request) {
  poll_orphans();
  round_enter();
  RecvSide side(buf, count, type, Peer(comm, source), usable_peer(source) && request, kGain, Timed::Round);
  count_call(site, side.taken());
  const int rc = next(side.buf, count, side.type, source, tag, comm, request);
  if (rc == MPI_SUCCESS && side.taken()) attach(side, count, buf, true, false, *request);
  round_leave(request, rc);
  return rc;
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
