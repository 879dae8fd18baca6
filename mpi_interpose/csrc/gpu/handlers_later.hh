// Nonblocking collectives and MPI_Isendrecv on device memory: the sides of the blocking forms, kept until the request
// completes. Host buffers pass through, after one look at whether the program has a GPU at all.
//
// The library gets pinned slabs, and the program the library's own request; whichever call sees it complete unpacks (see
// requests.hh). What is needed of the arrays of counts and places is copied: MPI forbids to change them before completion,
// but callers in Python let go of them, and libraries that have read them by then do not mind.
#pragma once

#include <memory>

#include "handlers_device.hh"

namespace undertow {

inline void finish_side(RecvSide& side, int) { side.finish_all(); }
template <class N, class D>
void finish_side(Blocks<N, D>& side, int blocks) { side.finish(blocks); }
template <class N, class D>
void finish_side(TypedBlocks<N, D>& side, int) { side.finish(); }
inline void finish_side(DeviceImage& side, int) { side.finish(); }

template <class Side>
void records_of(const Side& side, std::vector<Record*>& out) { out.push_back(side.record); }
template <class N, class D>
void records_of(const TypedBlocks<N, D>& side, std::vector<Record*>& out) {
  out.insert(out.end(), side.records.begin(), side.records.end());
}
inline void records_of(const DeviceImage&, std::vector<Record*>&) {}  // its datatype is the library's affair

template <class S, class R>
struct Sides final : Later {
  std::optional<S> send;
  std::optional<R> recv;
  int blocks = 0;                // of `recv`, where it is a Blocks
  std::vector<Record*> records;  // held: a program may free a datatype that is in use
  std::vector<std::shared_ptr<void>> arrays;

  // A copy of `n` entries that lives as long as this.
  template <class T>
  T* copy(const T* from, int n) {
    if (!from || n <= 0) return const_cast<T*>(from);
    auto made = std::make_shared<std::vector<T>>(from, from + n);
    arrays.push_back(made);
    return made->data();
  }

  bool taken() const { return send->taken() || recv->taken(); }
  void keep_records() {
    if (send->taken()) records_of(*send, records);
    if (recv->taken()) records_of(*recv, records);
    for (Record* r : records)
      if (r) hold(r);
  }
  void finish() override {
    if (recv->taken()) finish_side(*recv, blocks);
  }
  ~Sides() override {
    for (Record* r : records)
      if (r) release(r);
  }
};

// After the library's call: the sides go to the request, or are finished where it is complete already.
template <class S, class R>
int later(std::unique_ptr<Sides<S, R>> sides, int rc, MPI_Request* request) {
  if (rc != MPI_SUCCESS || !sides->taken()) return rc;
  MPI_Status status;
  int flag = 0;
  if (own.Request_get_status(*request, &flag, &status) == MPI_SUCCESS && flag) {
    sides->finish();
    return rc;
  }
  sides->keep_records();
  Entry* e = new Entry;
  e->receive = true;
  e->later = sides.release();
  enter(e, *request);
  return rc;
}

// Where the first block that holds something begins, for the v forms.
template <class N, class D>
bool device_blocks(const void* buf, const N* counts, const D* displs, MPI_Datatype type, int n) {
  if (!gpu::possible() || !counts || !displs || buf == MPI_IN_PLACE) return false;
  const Record* r = device_record(type);
  for (int i = 0; r && i < n; ++i)
    if (counts[i] > 0) return device_side(static_cast<const char*>(buf) + displs[i] * r->plan.extent, type);
  return false;
}
template <class N, class D>
bool device_blocks(const void* buf, const N* counts, const D* displs, const MPI_Datatype* types, int n) {
  if (!gpu::possible() || !counts || !displs || !types || buf == MPI_IN_PLACE) return false;
  for (int i = 0; i < n; ++i)
    if (counts[i] > 0 && device_side(static_cast<const char*>(buf) + displs[i], types[i])) return true;
  return false;
}

// Makes a side of `n` blocks; where it is on a device, `counts` becomes a copy. `type` is one, or an array of them.
template <class Both, class Side, class N, class D, class Type>
void blocks_later(Both& both, std::optional<Side>& side, void* buf, N*& counts, D* displs, Type type, int n, Use use,
                  const MPI_Request* request) {
  const bool device = request && device_blocks(buf, counts, displs, type, n);
  if (device) {
    counts = both.copy(counts, n);
    displs = both.copy(displs, n);
  }
  side.emplace(buf, counts, displs, type, n, use, device);
}

// A device buffer that a rank gives; MPI_IN_PLACE is none.
inline bool device_given(const void* buf, MPI_Datatype type) { return buf != MPI_IN_PLACE && device_side(buf, type); }

#define UNDERTOW_UNLESS_GPU(...)                    \
  if (__builtin_expect(!gpu::possible(), 1)) {      \
    count_call(site, false);                        \
    return next(__VA_ARGS__);                       \
  }

template <class F, class N>
int on_ibcast(F next, Site site, void* buf, N count, MPI_Datatype type, int root, MPI_Comm comm, MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(buf, count, type, root, comm, request)
  const bool ours = device_given(buf, type) && request && peers_in(comm, true) >= 0;
  const bool sends = ours && is_root(comm, root), receives = ours && !sends && is_leaf(comm, root);
  auto sides = std::make_unique<Sides<SendSide, RecvSide>>();
  sides->send.emplace(buf, count, type, Peer(), sends, kCollectiveGain);
  sides->recv.emplace(buf, count, type, Peer(), receives, kCollectiveGain);
  count_call(site, sides->taken());
  void* const at = sides->recv->taken() ? sides->recv->buf : sides->send->buf;
  const MPI_Datatype as = sides->recv->taken() ? sides->recv->type : sides->send->type;
  const int rc = next(at, count, as, root, comm, request);
  return later(std::move(sides), rc, request);
}

// One datatype for each side, `sblocks` and `rblocks` blocks; `call` starts the operation with the sides' buffers.
template <class N, class Call>
int exchange_later(Site site, void* sbuf, N scount, int64_t sblocks, MPI_Datatype stype, void* rbuf, N rcount,
                   int64_t rblocks, MPI_Datatype rtype, MPI_Request* request, Call call, bool holes = false) {
  auto sides = std::make_unique<Sides<SendSide, RecvSide>>();
  sides->send.emplace(sbuf, scount * sblocks, stype, Peer(), request && sblocks > 0 && device_given(sbuf, stype), kCollectiveGain);
  sides->recv.emplace(rbuf, rcount * rblocks, rtype, Peer(), request && rblocks > 0 && device_given(rbuf, rtype), kCollectiveGain);
  RecvSide& recv = *sides->recv;
  if ((holes || sbuf == MPI_IN_PLACE) && recv.taken()) pack_slab(*recv.record, recv.count, rbuf, recv.slab);
  count_call(site, sides->taken());
  const int rc = call(sides->send->buf, sides->send->type, recv.buf, recv.type);
  return later(std::move(sides), rc, request);
}

// Of gather and scatter, whose root gives what the others need not.
struct Share {
  int64_t all = 0;     // blocks of the root's buffer on this rank
  bool leaf = false;   // this rank has a block of its own
};
inline Share share_of(MPI_Comm comm, int root) {
  const int n = peers_in(comm, true);
  return n < 0 ? Share{} : Share{is_root(comm, root) ? n : 0, is_leaf(comm, root)};
}

template <class F, class N>
int on_igather(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, void* rbuf, N rcount, MPI_Datatype rtype,
               int root, MPI_Comm comm, MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(sbuf, scount, stype, rbuf, rcount, rtype, root, comm, request)
  const Share part = share_of(comm, root);
  return exchange_later(site, sbuf, scount, part.leaf, stype, rbuf, part.all ? rcount : 0, part.all, rtype, request,
                        [&](void* s, MPI_Datatype st, void* r, MPI_Datatype rt) {
                          return next(s, scount, st, r, rcount, rt, root, comm, request);
                        });
}

template <class F, class N>
int on_iscatter(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, void* rbuf, N rcount, MPI_Datatype rtype,
                int root, MPI_Comm comm, MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(sbuf, scount, stype, rbuf, rcount, rtype, root, comm, request)
  const Share part = share_of(comm, root);
  return exchange_later(site, sbuf, part.all ? scount : 0, part.all, stype, rbuf, rcount, part.leaf, rtype, request,
                        [&](void* s, MPI_Datatype st, void* r, MPI_Datatype rt) {
                          return next(s, scount, st, r, rcount, rt, root, comm, request);
                        });
}

template <class F, class N>
int on_iallgather(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, void* rbuf, N rcount,
                  MPI_Datatype rtype, MPI_Comm comm, MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(sbuf, scount, stype, rbuf, rcount, rtype, comm, request)
  return exchange_later(site, sbuf, scount, 1, stype, rbuf, rcount, std::max(peers_in(comm, true), 0), rtype, request,
                        [&](void* s, MPI_Datatype st, void* r, MPI_Datatype rt) {
                          return next(s, scount, st, r, rcount, rt, comm, request);
                        });
}

template <class F, class N>
int on_ialltoall(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, void* rbuf, N rcount, MPI_Datatype rtype,
                 MPI_Comm comm, MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(sbuf, scount, stype, rbuf, rcount, rtype, comm, request)
  const int n = std::max(peers_in(comm, true), 0);
  return exchange_later(site, sbuf, scount, n, stype, rbuf, rcount, n, rtype, request,
                        [&](void* s, MPI_Datatype st, void* r, MPI_Datatype rt) {
                          return next(s, scount, st, r, rcount, rt, comm, request);
                        });
}

template <class F, class N>
int on_ineighbor_allgather(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, void* rbuf, N rcount,
                           MPI_Datatype rtype, MPI_Comm comm, MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(sbuf, scount, stype, rbuf, rcount, rtype, comm, request)
  const Degrees d = degrees_of(comm);
  return exchange_later(site, sbuf, scount, d.known, stype, rbuf, rcount, d.known ? d.in : 0, rtype, request,
                        [&](void* s, MPI_Datatype st, void* r, MPI_Datatype rt) {
                          return next(s, scount, st, r, rcount, rt, comm, request);
                        }, d.holes);
}

template <class F, class N>
int on_ineighbor_alltoall(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, void* rbuf, N rcount,
                          MPI_Datatype rtype, MPI_Comm comm, MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(sbuf, scount, stype, rbuf, rcount, rtype, comm, request)
  const Degrees d = degrees_of(comm);
  return exchange_later(site, sbuf, scount, d.known ? d.out : 0, stype, rbuf, rcount, d.known ? d.in : 0, rtype, request,
                        [&](void* s, MPI_Datatype st, void* r, MPI_Datatype rt) {
                          return next(s, scount, st, r, rcount, rt, comm, request);
                        }, d.holes);
}

// The v forms. `sends` and `receives` are blocks of this rank; `in_place`: the present contents go into the slab first.
template <class F, class N, class D>
int on_igatherv(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, void* rbuf, N* rcounts, D* rdispls,
                MPI_Datatype rtype, int root, MPI_Comm comm, MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(sbuf, scount, stype, rbuf, rcounts, rdispls, rtype, root, comm, request)
  const Share part = share_of(comm, root);
  const int n = static_cast<int>(part.all);
  auto sides = std::make_unique<Sides<SendSide, Blocks<N, D>>>();
  sides->blocks = n;
  sides->send.emplace(sbuf, scount, stype, Peer(), request && part.leaf && device_given(sbuf, stype), kCollectiveGain);
  blocks_later(*sides, sides->recv, rbuf, rcounts, rdispls, rtype, n, kRecvUse, request);
  if (sbuf == MPI_IN_PLACE) sides->recv->keep(n);
  count_call(site, sides->taken());
  const auto& recv = *sides->recv;
  const int rc = next(sides->send->buf, scount, sides->send->type, recv.buf, rcounts, recv.displs, recv.type, root, comm, request);
  return later(std::move(sides), rc, request);
}

template <class F, class N, class D>
int on_iscatterv(F next, Site site, void* sbuf, N* scounts, D* sdispls, MPI_Datatype stype, void* rbuf, N rcount,
                 MPI_Datatype rtype, int root, MPI_Comm comm, MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(sbuf, scounts, sdispls, stype, rbuf, rcount, rtype, root, comm, request)
  const Share part = share_of(comm, root);
  const int n = static_cast<int>(part.all);
  auto sides = std::make_unique<Sides<Blocks<N, D>, RecvSide>>();
  blocks_later(*sides, sides->send, sbuf, scounts, sdispls, stype, n, kSendUse, request);
  sides->recv.emplace(rbuf, rcount, rtype, Peer(), request && part.leaf && device_given(rbuf, rtype), kCollectiveGain);
  count_call(site, sides->taken());
  const auto& send = *sides->send;
  const int rc = next(send.buf, scounts, send.displs, send.type, sides->recv->buf, rcount, sides->recv->type, root, comm, request);
  return later(std::move(sides), rc, request);
}

template <class F, class N, class D>
int gather_to_all_later(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, void* rbuf, N* rcounts, D* rdispls,
                        MPI_Datatype rtype, MPI_Comm comm, MPI_Request* request, int n, bool holes) {
  auto sides = std::make_unique<Sides<SendSide, Blocks<N, D>>>();
  sides->blocks = n;
  sides->send.emplace(sbuf, scount, stype, Peer(), request && device_given(sbuf, stype), kCollectiveGain);
  blocks_later(*sides, sides->recv, rbuf, rcounts, rdispls, rtype, n, kRecvUse, request);
  if (holes || sbuf == MPI_IN_PLACE) sides->recv->keep(n);
  count_call(site, sides->taken());
  const auto& recv = *sides->recv;
  const int rc = next(sides->send->buf, scount, sides->send->type, recv.buf, rcounts, recv.displs, recv.type, comm, request);
  return later(std::move(sides), rc, request);
}

template <class F, class N, class D>
int on_iallgatherv(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, void* rbuf, N* rcounts, D* rdispls,
                   MPI_Datatype rtype, MPI_Comm comm, MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(sbuf, scount, stype, rbuf, rcounts, rdispls, rtype, comm, request)
  return gather_to_all_later(next, site, sbuf, scount, stype, rbuf, rcounts, rdispls, rtype, comm, request,
                             std::max(peers_in(comm, true), 0), false);
}

template <class F, class N, class D>
int on_ineighbor_allgatherv(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, void* rbuf, N* rcounts,
                            D* rdispls, MPI_Datatype rtype, MPI_Comm comm, MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(sbuf, scount, stype, rbuf, rcounts, rdispls, rtype, comm, request)
  const Degrees d = degrees_of(comm);
  return gather_to_all_later(next, site, sbuf, scount, stype, rbuf, rcounts, rdispls, rtype, comm, request,
                             d.known ? d.in : 0, d.holes);
}

template <class F, class N, class D>
int all_to_all_v_later(F next, Site site, void* sbuf, N* scounts, D* sdispls, MPI_Datatype stype, void* rbuf,
                       N* rcounts, D* rdispls, MPI_Datatype rtype, MPI_Comm comm, MPI_Request* request, int out, int in,
                       bool holes) {
  auto sides = std::make_unique<Sides<Blocks<N, D>, Blocks<N, D>>>();
  sides->blocks = in;
  blocks_later(*sides, sides->send, sbuf, scounts, sdispls, stype, out, kSendUse, request);
  blocks_later(*sides, sides->recv, rbuf, rcounts, rdispls, rtype, in, kRecvUse, request);
  if (holes || sbuf == MPI_IN_PLACE) sides->recv->keep(in);
  count_call(site, sides->taken());
  const auto &send = *sides->send, &recv = *sides->recv;
  const int rc = next(send.buf, scounts, send.displs, send.type, recv.buf, rcounts, recv.displs, recv.type, comm, request);
  return later(std::move(sides), rc, request);
}

template <class F, class N, class D>
int on_ialltoallv(F next, Site site, void* sbuf, N* scounts, D* sdispls, MPI_Datatype stype, void* rbuf, N* rcounts,
                  D* rdispls, MPI_Datatype rtype, MPI_Comm comm, MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(sbuf, scounts, sdispls, stype, rbuf, rcounts, rdispls, rtype, comm, request)
  const int n = std::max(peers_in(comm, true), 0);
  return all_to_all_v_later(next, site, sbuf, scounts, sdispls, stype, rbuf, rcounts, rdispls, rtype, comm, request, n, n, false);
}

template <class F, class N, class D>
int on_ineighbor_alltoallv(F next, Site site, void* sbuf, N* scounts, D* sdispls, MPI_Datatype stype, void* rbuf,
                           N* rcounts, D* rdispls, MPI_Datatype rtype, MPI_Comm comm, MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(sbuf, scounts, sdispls, stype, rbuf, rcounts, rdispls, rtype, comm, request)
  const Degrees d = degrees_of(comm);
  return all_to_all_v_later(next, site, sbuf, scounts, sdispls, stype, rbuf, rcounts, rdispls, rtype, comm, request,
                            d.known ? d.out : 0, d.known ? d.in : 0, d.holes);
}

template <class F, class N, class D>
int all_to_all_w_later(F next, Site site, void* sbuf, N* scounts, D* sdispls, MPI_Datatype* stypes, void* rbuf,
                       N* rcounts, D* rdispls, MPI_Datatype* rtypes, MPI_Comm comm, MPI_Request* request, int out, int in,
                       bool holes) {
  auto sides = std::make_unique<Sides<TypedBlocks<N, D>, TypedBlocks<N, D>>>();
  blocks_later(*sides, sides->send, sbuf, scounts, sdispls, stypes, out, kSendUse, request);
  blocks_later(*sides, sides->recv, rbuf, rcounts, rdispls, rtypes, in, kRecvUse, request);
  if (holes || sbuf == MPI_IN_PLACE) sides->recv->keep();
  count_call(site, sides->taken());
  const auto &send = *sides->send, &recv = *sides->recv;
  const int rc = next(send.buf, scounts, send.displs, send.types, recv.buf, rcounts, recv.displs, recv.types, comm, request);
  return later(std::move(sides), rc, request);
}

template <class F, class N, class D>
int on_ialltoallw(F next, Site site, void* sbuf, N* scounts, D* sdispls, MPI_Datatype* stypes, void* rbuf, N* rcounts,
                  D* rdispls, MPI_Datatype* rtypes, MPI_Comm comm, MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(sbuf, scounts, sdispls, stypes, rbuf, rcounts, rdispls, rtypes, comm, request)
  const int n = std::max(peers_in(comm, true), 0);
  return all_to_all_w_later(next, site, sbuf, scounts, sdispls, stypes, rbuf, rcounts, rdispls, rtypes, comm, request, n, n, false);
}

template <class F, class N>
int on_ineighbor_alltoallw(F next, Site site, void* sbuf, N* scounts, MPI_Aint* sdispls, MPI_Datatype* stypes,
                           void* rbuf, N* rcounts, MPI_Aint* rdispls, MPI_Datatype* rtypes, MPI_Comm comm,
                           MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(sbuf, scounts, sdispls, stypes, rbuf, rcounts, rdispls, rtypes, comm, request)
  const Degrees d = degrees_of(comm);
  return all_to_all_w_later(next, site, sbuf, scounts, sdispls, stypes, rbuf, rcounts, rdispls, rtypes, comm, request,
                            d.known ? d.out : 0, d.known ? d.in : 0, d.holes);
}

// Reductions: whole images of both buffers, as in handlers_device.hh.
struct Images {
  int64_t in, out;                      // elements
  bool in_matters, out_matters, keep;   // `keep`: the call may leave the result unwritten
};
template <class Call>
int reduced_later(Site site, void* in, void* out, MPI_Datatype type, const Images& n, MPI_Request* request, Call call) {
  const bool place = in == MPI_IN_PLACE;
  auto sides = std::make_unique<Sides<DeviceImage, DeviceImage>>();
  sides->send.emplace(in, n.in, type, DeviceImage::kIn, request && n.in_matters && !place);
  sides->recv.emplace(out, n.out, type, place || n.keep ? DeviceImage::kBoth : DeviceImage::kOut,
                      request && n.out_matters && out != MPI_IN_PLACE);
  count_call(site, sides->taken());
  const int rc = call(sides->send->origin(), sides->recv->origin());
  return later(std::move(sides), rc, request);
}

template <class F, class N>
int on_iallreduce(F next, Site site, void* in, void* out, N count, MPI_Datatype type, MPI_Op op, MPI_Comm comm,
                  MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(in, out, count, type, op, comm, request)
  return reduced_later(site, in, out, type, {count, count, true, true, false}, request,
                       [&](void* i, void* o) { return next(i, o, count, type, op, comm, request); });
}

// Scan has the arguments of Allreduce. On the first rank of Exscan the result is not written.
template <class F, class N>
int on_iexscan(F next, Site site, void* in, void* out, N count, MPI_Datatype type, MPI_Op op, MPI_Comm comm,
               MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(in, out, count, type, op, comm, request)
  return reduced_later(site, in, out, type, {count, count, true, true, rank_in(comm) == 0}, request,
                       [&](void* i, void* o) { return next(i, o, count, type, op, comm, request); });
}

template <class F, class N>
int on_ireduce(F next, Site site, void* in, void* out, N count, MPI_Datatype type, MPI_Op op, int root, MPI_Comm comm,
               MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(in, out, count, type, op, root, comm, request)
  return reduced_later(site, in, out, type, {count, count, is_leaf(comm, root), is_root(comm, root), false}, request,
                       [&](void* i, void* o) { return next(i, o, count, type, op, root, comm, request); });
}

template <class F, class N>
int on_ireduce_scatter_block(F next, Site site, void* in, void* out, N count, MPI_Datatype type, MPI_Op op,
                             MPI_Comm comm, MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(in, out, count, type, op, comm, request)
  const int64_t all = static_cast<int64_t>(count) * size_of(comm);
  return reduced_later(site, in, out, type, {all, in == MPI_IN_PLACE ? all : count, true, true, false}, request,
                       [&](void* i, void* o) { return next(i, o, count, type, op, comm, request); });
}

template <class F, class N>
int on_ireduce_scatter(F next, Site site, void* in, void* out, N* counts, MPI_Datatype type, MPI_Op op, MPI_Comm comm,
                       MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(in, out, counts, type, op, comm, request)
  int64_t all = 0;
  for (int i = 0, n = counts ? size_of(comm) : 0; i < n; ++i) all += counts[i];
  const int rank = rank_in(comm);
  const int64_t mine = counts && rank >= 0 ? static_cast<int64_t>(counts[rank]) : 0;
  return reduced_later(site, in, out, type, {all, in == MPI_IN_PLACE ? all : mine, true, true, false}, request,
                       [&](void* i, void* o) { return next(i, o, counts, type, op, comm, request); });
}

// MPICH's request of these has no status that says how much arrived. So the present contents go into the slab first, and
// all of it is unpacked: what did not arrive stays as it was.
template <class F, class N>
int on_isendrecv(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, int dest, int stag, void* rbuf, N rcount,
                 MPI_Datatype rtype, int source, int rtag, MPI_Comm comm, MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(sbuf, scount, stype, dest, stag, rbuf, rcount, rtype, source, rtag, comm, request)
  auto sides = std::make_unique<Sides<SendSide, RecvSide>>();
  sides->send.emplace(sbuf, scount, stype, Peer(), request && usable_peer(dest) && device_given(sbuf, stype));
  sides->recv.emplace(rbuf, rcount, rtype, Peer(), request && usable_peer(source) && device_given(rbuf, rtype));
  count_call(site, sides->taken());
  const SendSide& send = *sides->send;
  const RecvSide& recv = *sides->recv;
  if (recv.taken()) pack_slab(*recv.record, rcount, rbuf, recv.slab);
  const int rc = next(send.buf, scount, send.type, dest, stag, recv.buf, rcount, recv.type, source, rtag, comm, request);
  return later(std::move(sides), rc, request);
}

template <class F, class N>
int on_isendrecv_replace(F next, Site site, void* buf, N count, MPI_Datatype type, int dest, int stag, int source,
                         int rtag, MPI_Comm comm, MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(buf, count, type, dest, stag, source, rtag, comm, request)
  auto sides = std::make_unique<Sides<SendSide, RecvSide>>();
  const bool both = usable_peer(source) && usable_peer(dest);
  sides->send.emplace(buf, count, type, Peer(), false);
  sides->recv.emplace(buf, count, type, Peer(), request && both && device_given(buf, type));
  RecvSide& recv = *sides->recv;
  if (recv.taken()) pack_slab(*recv.record, count, buf, recv.slab);
  count_call(site, sides->taken());
  const int rc = next(recv.buf, count, recv.type, dest, stag, source, rtag, comm, request);
  return later(std::move(sides), rc, request);
}

#undef UNDERTOW_UNLESS_GPU

}  // namespace undertow
