// Handlers of blocking collectives. A side's count and type size never change (see transfer.hh), so algorithms that
// choose by them still choose alike on all ranks, and each rank may decide for itself whether to pack.
//
// MPI_IN_PLACE, intercommunicators and arguments that a rank need not give are left to the library, but for device
// memory, which it may not be able to read.
#pragma once

#include <algorithm>
#include <vector>

#include "handlers_p2p.hh"
#include "ipc.hh"

namespace undertow {

inline bool intra(MPI_Comm comm) {
  int inter = 1;
  return handle_key(comm) != handle_key(constants.comm_null) &&
         own.Comm_test_inter(comm, &inter) == MPI_SUCCESS && !inter;
}
inline int size_of(MPI_Comm comm) {
  int n = 0;
  own.Comm_size(comm, &n);
  return n;
}
inline int rank_in(MPI_Comm comm) {
  int r = -1;
  own.Comm_rank(comm, &r);
  return r;
}

// How many ranks a collective exchanges with: those of the communicator, or the other group's of an intercommunicator.
// -1 when the call is the library's: no communicator, or an intercommunicator without device memory.
inline int peers_in(MPI_Comm comm, bool device) {
  if (intra(comm)) return size_of(comm);
  MPI_Group group;
  int n = -1;
  if (!device || handle_key(comm) == handle_key(constants.comm_null) ||
      own.Comm_remote_group(comm, &group) != MPI_SUCCESS)
    return -1;
  if (own.Group_size(group, &n) != MPI_SUCCESS) n = -1;
  own.Group_free(&group);
  return n;
}
// Whether this rank is the root, and whether it has a part as one of the others. On an intercommunicator `root` is a rank
// of the other group there, and MPI_ROOT or MPI_PROC_NULL in the root's own group.
inline bool is_root(MPI_Comm comm, int root) {
  return intra(comm) ? rank_in(comm) == root : root < 0 && root != MPI_PROC_NULL;
}
inline bool is_leaf(MPI_Comm comm, int root) { return root >= 0 || intra(comm); }

struct Degrees {
  int in = 0, out = 0;
  bool known = false;
  bool holes = false;  // some neighbour is MPI_PROC_NULL (a grid's edge): its block of the result must stay as it is
};
Degrees degrees_of(MPI_Comm comm);  // neighbours of a topology communicator

// `n` blocks of counts[i] elements at displs[i] * extent: packed to or from one slab with dense displacements.
template <class N, class D>
struct Blocks {
  void* buf;
  MPI_Datatype type;
  std::vector<D> dense;
  const N* counts;
  D* displs;
  Record* record = nullptr;
  char* slab = nullptr;
  void* user;
  const D* user_displs;

  Blocks(void* b, const N* c, D* d, MPI_Datatype t, int n, Use use, bool allowed)
      : buf(b), type(t), counts(c), displs(d), user(b), user_displs(d) {
    if (!allowed || !c || !d || n <= 0) return;
    int64_t total = 0;
    dense.resize(n);
    for (int i = 0; i < n; ++i) {
      if (c[i] < 0) return;
      dense[i] = static_cast<D>(total);
      if (static_cast<int64_t>(dense[i]) != total) return;
      total += c[i];
    }
    const bool device = device_blocks(n);
    Record* r = device ? device_wanted(t, use, total) : record_of(t);
    if (!r || !(device || wanted(r, use, total, Peer(), kCollectiveGain))) return;
    const MPI_Datatype twin = twin_of(r, device);
    if (handle_key(twin) == handle_key(constants.type_null)) return;
    slab = slab_get(total * r->plan.size, device ? user_bytes(*r, first(n, *r)) : nullptr, use);
    if (!slab) return;
    record = r;
    if (use == kSendUse) each(n, [&](char* at, char* packed, int64_t k) { pack_slab(*r, k, at, packed); });
    buf = slab;
    type = twin;
    displs = dense.data();
  }
  ~Blocks() {
    if (slab) slab_put(slab);
  }
  Blocks(const Blocks&) = delete;
  Blocks& operator=(const Blocks&) = delete;
  // The first block that holds something; a displacement may count from a base that is no memory at all.
  char* first(int n, const Record& r) const {
    for (int i = 0; i < n; ++i)
      if (counts[i] > 0) return static_cast<char*>(user) + user_displs[i] * r.plan.extent;
    return static_cast<char*>(user);
  }
  bool device_blocks(int n) const {
    if (__builtin_expect(!gpu::possible(), 1)) return false;
    const Record* r = device_record(type);
    return r && gpu::on_device(user_bytes(*r, first(n, *r)));
  }
  template <class Body>
  void each(int n, Body body) {
    DeviceGroup group;
    for (int i = 0; i < n; ++i)
      if (counts[i] > 0)
        body(static_cast<char*>(user) + user_displs[i] * record->plan.extent, slab + dense[i] * record->plan.size,
             counts[i]);
    group.finish();
  }
  void keep(int n) {  // what the library will not write comes back as it was
    if (slab) each(n, [&](char* at, char* packed, int64_t k) { pack_slab(*record, k, at, packed); });
  }
  void finish(int n) {
    each(n, [&](char* at, char* packed, int64_t k) { unpack_slab(*record, k, packed, at, k * record->plan.size); });
  }
  bool taken() const { return slab != nullptr; }
};

// The w form: a type per peer, displacements in bytes. All blocks that carry data must be ours, or none is taken.
template <class N, class D>
struct TypedBlocks {
  void* buf;
  MPI_Datatype* types;
  D* displs;
  const N* counts;
  const D* user_displs;
  void* user;
  std::vector<MPI_Datatype> twins;
  std::vector<D> dense;
  std::vector<Record*> records;
  char* slab = nullptr;

  TypedBlocks(void* b, const N* c, D* d, MPI_Datatype* t, int n, Use use, bool allowed)
      : buf(b), types(t), displs(d), counts(c), user_displs(d), user(b) {
    if (!allowed || !c || !d || !t || n <= 0) return;
    records.assign(n, nullptr);
    dense.assign(n, 0);
    twins.assign(t, t + n);
    int64_t total = 0;
    bool take = false;
    const void* device = device_block(n);
    for (int i = 0; i < n; ++i) {
      dense[i] = static_cast<D>(total);
      if (static_cast<int64_t>(dense[i]) != total || c[i] < 0) return;
      if (c[i] == 0) continue;
      Record* r = records[i] = device ? device_record(t[i]) : record_of(t[i]);
      int64_t bytes;
      if (!r || r->wrong.load() || !(device || proved(*r)) || __builtin_mul_overflow(static_cast<int64_t>(c[i]), r->plan.size, &bytes)) return;
      twins[i] = twin_of(r, device != nullptr);
      if (handle_key(twins[i]) == handle_key(constants.type_null)) return;
      take = (device ? device_wanted(t[i], use, c[i]) != nullptr : wanted(r, use, c[i], Peer(), kCollectiveGain)) || take;
      total += bytes;
    }
    if (!take || !(device || small_enough(total))) return;
    slab = slab_get(total, device, use);
    if (!slab) return;
    if (use == kSendUse) each([&](Record& r, char* at, char* packed, int64_t k) { pack_slab(r, k, at, packed); });
    buf = slab;
    types = twins.data();
    displs = dense.data();
  }
  ~TypedBlocks() {
    if (slab) slab_put(slab);
  }
  TypedBlocks(const TypedBlocks&) = delete;
  TypedBlocks& operator=(const TypedBlocks&) = delete;
  const void* device_block(int n) const {  // the first block's bytes that lie on a device, if any do
    if (__builtin_expect(!gpu::possible(), 1)) return nullptr;
    for (int i = 0; i < n; ++i) {
      if (counts[i] <= 0) continue;
      const char* at = static_cast<const char*>(user) + user_displs[i];
      const Record* r = record_of(types[i]);
      if (gpu::on_device(r ? user_bytes(*r, at) : at)) return r ? user_bytes(*r, at) : at;
    }
    return nullptr;
  }
  template <class Body>
  void each(Body body) {
    DeviceGroup group;
    for (size_t i = 0; i < records.size(); ++i)
      if (counts[i] > 0) body(*records[i], static_cast<char*>(user) + user_displs[i], slab + dense[i], counts[i]);
    group.finish();
  }
  void keep() {  // what the library will not write comes back as it was
    if (slab) each([](Record& r, char* at, char* packed, int64_t k) { pack_slab(r, k, at, packed); });
  }
  void finish() {
    each([](Record& r, char* at, char* packed, int64_t k) { unpack_slab(r, k, packed, at, k * r.plan.size); });
  }
  bool taken() const { return slab != nullptr; }
};

template <class F, class N>
int on_bcast(F next, Site site, void* buf, N count, MPI_Datatype type, int root, MPI_Comm comm) {
  const bool device = device_side(buf, type);
  const bool ours = (record_of(type) || device) && peers_in(comm, device) >= 0;
  if (!ours || !(is_root(comm, root) || is_leaf(comm, root))) {
    count_call(site, false);
    return next(buf, count, type, root, comm);
  }
  if (is_root(comm, root)) {
    SendSide side(buf, count, type, Peer(), true, kCollectiveGain);
    count_call(site, side.taken());
    return next(side.buf, count, side.type, root, comm);
  }
  RecvSide side(buf, count, type, Peer(), true, kCollectiveGain);
  count_call(site, side.taken());
  const int rc = next(side.buf, count, side.type, root, comm);
  if (rc == MPI_SUCCESS && side.taken()) side.finish_all();
  return rc;
}

// One block out, `n` blocks in (or the reverse): gather, scatter, allgather, alltoall and their neighbour forms.
template <class N, class Call>
int exchange(Site site, void* sbuf, N scount, int64_t sblocks, MPI_Datatype stype, void* rbuf, N rcount,
             int64_t rblocks, MPI_Datatype rtype, bool allowed, Call call, bool holes = false) {
  const bool place = sbuf == MPI_IN_PLACE || rbuf == MPI_IN_PLACE;
  const auto may = [&](const void* buf, MPI_Datatype type) { return allowed && (!place || device_side(buf, type)); };
  SendSide send(sbuf, scount * sblocks, stype, Peer(), sblocks > 0 && may(sbuf, stype), kCollectiveGain);
  RecvSide recv(rbuf, rcount * rblocks, rtype, Peer(), rblocks > 0 && may(rbuf, rtype), kCollectiveGain);
  if ((holes || sbuf == MPI_IN_PLACE) && recv.taken()) pack_slab(*recv.record, recv.count, rbuf, recv.slab);
  count_call(site, send.taken() || recv.taken());
  const int rc = call(send.buf, send.type, recv.buf, recv.type);
  if (rc == MPI_SUCCESS && recv.taken()) recv.finish_all();
  return rc;
}

// Whether one side may be ours: a type with a record, or a buffer on a device.
inline bool involved(const void* sbuf, MPI_Datatype stype, const void* rbuf, MPI_Datatype rtype) {
  return record_of(stype) || record_of(rtype) || device_side(sbuf, stype) || device_side(rbuf, rtype);
}

// peers_in of a call that may be ours; -1 when neither side may be.
inline int partners(const void* sbuf, MPI_Datatype stype, const void* rbuf, MPI_Datatype rtype, MPI_Comm comm) {
  const bool device = device_side(sbuf, stype) || device_side(rbuf, rtype);
  return device || record_of(stype) || record_of(rtype) ? peers_in(comm, device) : -1;
}

template <class F, class N>
int on_gather(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, void* rbuf, N rcount, MPI_Datatype rtype,
              int root, MPI_Comm comm) {
  const int n = partners(sbuf, stype, rbuf, rtype, comm);
  const int64_t blocks = n >= 0 && is_root(comm, root) ? n : 0;
  return exchange(site, sbuf, scount, n >= 0 && is_leaf(comm, root), stype, rbuf, blocks ? rcount : 0, blocks, rtype,
                  n >= 0,
                  [&](void* s, MPI_Datatype st, void* r, MPI_Datatype rt) {
                    return next(s, scount, st, r, rcount, rt, root, comm);
                  });
}

template <class F, class N>
int on_scatter(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, void* rbuf, N rcount, MPI_Datatype rtype,
               int root, MPI_Comm comm) {
  const int n = partners(sbuf, stype, rbuf, rtype, comm);
  const int64_t blocks = n >= 0 && is_root(comm, root) ? n : 0;
  return exchange(site, sbuf, blocks ? scount : 0, blocks, stype, rbuf, rcount, n >= 0 && is_leaf(comm, root), rtype,
                  n >= 0,
                  [&](void* s, MPI_Datatype st, void* r, MPI_Datatype rt) {
                    return next(s, scount, st, r, rcount, rt, root, comm);
                  });
}

template <class F, class N>
int on_allgather(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, void* rbuf, N rcount, MPI_Datatype rtype,
                 MPI_Comm comm) {
  const int n = partners(sbuf, stype, rbuf, rtype, comm);
  return exchange(site, sbuf, scount, 1, stype, rbuf, rcount, std::max(n, 0), rtype, n >= 0,
                  [&](void* s, MPI_Datatype st, void* r, MPI_Datatype rt) {
                    return next(s, scount, st, r, rcount, rt, comm);
                  });
}

template <class F, class N>
int on_alltoall(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, void* rbuf, N rcount, MPI_Datatype rtype,
                MPI_Comm comm) {
  const int n = partners(sbuf, stype, rbuf, rtype, comm);
  return exchange(site, sbuf, scount, std::max(n, 0), stype, rbuf, rcount, std::max(n, 0), rtype, n >= 0,
                  [&](void* s, MPI_Datatype st, void* r, MPI_Datatype rt) {
                    return next(s, scount, st, r, rcount, rt, comm);
                  });
}

template <class F, class N>
int on_neighbor_allgather(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, void* rbuf, N rcount,
                          MPI_Datatype rtype, MPI_Comm comm) {
  const Degrees d = involved(sbuf, stype, rbuf, rtype) ? degrees_of(comm) : Degrees{};
  return exchange(site, sbuf, scount, 1, stype, rbuf, rcount, d.in, rtype, d.known,
                  [&](void* s, MPI_Datatype st, void* r, MPI_Datatype rt) {
                    return next(s, scount, st, r, rcount, rt, comm);
                  }, d.holes);
}

template <class F, class N>
int on_neighbor_alltoall(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, void* rbuf, N rcount,
                         MPI_Datatype rtype, MPI_Comm comm) {
  const Degrees d = involved(sbuf, stype, rbuf, rtype) ? degrees_of(comm) : Degrees{};
  return exchange(site, sbuf, scount, d.out, stype, rbuf, rcount, d.in, rtype, d.known,
                  [&](void* s, MPI_Datatype st, void* r, MPI_Datatype rt) {
                    return next(s, scount, st, r, rcount, rt, comm);
                  }, d.holes);
}

// MPI_IN_PLACE is the library's affair on the host; on a device the result's present contents go into the slab first.
inline bool in_place_on_device(const void* sbuf, const void* rbuf, MPI_Datatype rtype) {
  return sbuf == MPI_IN_PLACE && device_side(rbuf, rtype);
}

template <class F, class N, class D>
int on_gatherv(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, void* rbuf, N* rcounts, D* rdispls,
               MPI_Datatype rtype, int root, MPI_Comm comm) {
  const bool place = in_place_on_device(sbuf, rbuf, rtype);
  const int peers = place || sbuf != MPI_IN_PLACE ? partners(sbuf, stype, rbuf, rtype, comm) : -1;
  const int n = peers >= 0 && is_root(comm, root) ? peers : 0;
  SendSide send(sbuf, scount, stype, Peer(), peers >= 0 && !place && is_leaf(comm, root), kCollectiveGain);
  Blocks<N, D> recv(rbuf, rcounts, rdispls, rtype, n, kRecvUse, n > 0);
  if (place) recv.keep(n);
  count_call(site, send.taken() || recv.taken());
  const int rc = next(send.buf, scount, send.type, recv.buf, rcounts, recv.displs, recv.type, root, comm);
  if (rc == MPI_SUCCESS && recv.taken()) recv.finish(n);
  return rc;
}

template <class F, class N, class D>
int on_scatterv(F next, Site site, void* sbuf, N* scounts, D* sdispls, MPI_Datatype stype, void* rbuf, N rcount,
                MPI_Datatype rtype, int root, MPI_Comm comm) {
  const bool place = in_place_on_device(rbuf, sbuf, stype);
  const int peers = place || rbuf != MPI_IN_PLACE ? partners(sbuf, stype, rbuf, rtype, comm) : -1;
  const int n = peers >= 0 && is_root(comm, root) ? peers : 0;
  Blocks<N, D> send(sbuf, scounts, sdispls, stype, n, kSendUse, n > 0);
  RecvSide recv(rbuf, rcount, rtype, Peer(), peers >= 0 && !place && is_leaf(comm, root), kCollectiveGain);
  count_call(site, send.taken() || recv.taken());
  const int rc = next(send.buf, scounts, send.displs, send.type, recv.buf, rcount, recv.type, root, comm);
  if (rc == MPI_SUCCESS && recv.taken()) recv.finish_all();
  return rc;
}

template <class F, class N, class D>
int gather_to_all(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, void* rbuf, N* rcounts, D* rdispls,
                  MPI_Datatype rtype, MPI_Comm comm, int n, bool holes = false) {
  SendSide send(sbuf, scount, stype, Peer(), n >= 0 && sbuf != MPI_IN_PLACE, kCollectiveGain);
  Blocks<N, D> recv(rbuf, rcounts, rdispls, rtype, n, kRecvUse, n > 0);
  if (holes) recv.keep(n);
  count_call(site, send.taken() || recv.taken());
  const int rc = next(send.buf, scount, send.type, recv.buf, rcounts, recv.displs, recv.type, comm);
  if (rc == MPI_SUCCESS && recv.taken()) recv.finish(n);
  return rc;
}

template <class F, class N, class D>
int on_allgatherv(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, void* rbuf, N* rcounts, D* rdispls,
                  MPI_Datatype rtype, MPI_Comm comm) {
  const bool place = in_place_on_device(sbuf, rbuf, rtype);
  const int n = place || sbuf != MPI_IN_PLACE ? partners(sbuf, stype, rbuf, rtype, comm) : -1;
  return gather_to_all(next, site, sbuf, scount, stype, rbuf, rcounts, rdispls, rtype, comm, n, place);
}

template <class F, class N, class D>
int on_neighbor_allgatherv(F next, Site site, void* sbuf, N scount, MPI_Datatype stype, void* rbuf, N* rcounts,
                           D* rdispls, MPI_Datatype rtype, MPI_Comm comm) {
  const Degrees d = involved(sbuf, stype, rbuf, rtype) ? degrees_of(comm) : Degrees{};
  return gather_to_all(next, site, sbuf, scount, stype, rbuf, rcounts, rdispls, rtype, comm, d.known ? d.in : -1,
                       d.holes);
}

template <class F, class N, class D>
int all_to_all_v(F next, Site site, void* sbuf, N* scounts, D* sdispls, MPI_Datatype stype, void* rbuf, N* rcounts,
                 D* rdispls, MPI_Datatype rtype, MPI_Comm comm, int out, int in, bool holes = false) {
  Blocks<N, D> send(sbuf, scounts, sdispls, stype, out, kSendUse, out > 0);
  Blocks<N, D> recv(rbuf, rcounts, rdispls, rtype, in, kRecvUse, in > 0);
  if (holes) recv.keep(in);
  count_call(site, send.taken() || recv.taken());
  const int rc = next(send.buf, scounts, send.displs, send.type, recv.buf, rcounts, recv.displs, recv.type, comm);
  if (rc == MPI_SUCCESS && recv.taken()) recv.finish(in);
  return rc;
}

template <class F, class N, class D>
int on_alltoallv(F next, Site site, void* sbuf, N* scounts, D* sdispls, MPI_Datatype stype, void* rbuf, N* rcounts,
                 D* rdispls, MPI_Datatype rtype, MPI_Comm comm) {
  const bool place = in_place_on_device(sbuf, rbuf, rtype);
  const int n = place || sbuf != MPI_IN_PLACE ? std::max(partners(sbuf, stype, rbuf, rtype, comm), 0) : 0;
  return all_to_all_v(next, site, sbuf, scounts, sdispls, stype, rbuf, rcounts, rdispls, rtype, comm, place ? 0 : n, n,
                      place);
}

template <class F, class N, class D>
int on_neighbor_alltoallv(F next, Site site, void* sbuf, N* scounts, D* sdispls, MPI_Datatype stype, void* rbuf,
                          N* rcounts, D* rdispls, MPI_Datatype rtype, MPI_Comm comm) {
  const Degrees d = involved(sbuf, stype, rbuf, rtype) ? degrees_of(comm) : Degrees{};
  return all_to_all_v(next, site, sbuf, scounts, sdispls, stype, rbuf, rcounts, rdispls, rtype, comm, d.out, d.in,
                      d.holes);
}

// The blocks of a w call as device memory may carry them without the library (see ipc.hh), and what is left of it.
template <class N, class D>
std::vector<PeerBlock> peer_blocks(void* buf, const N* counts, const D* displs, const MPI_Datatype* types, int n) {
  std::vector<PeerBlock> blocks;
  for (int k = 0; k < n; ++k)
    blocks.push_back({static_cast<char*>(buf) + displs[k], static_cast<int64_t>(counts[k]), types[k]});
  return blocks;
}
template <class N>
N* without_moved(N* counts, const std::vector<PeerBlock>& blocks, std::vector<N>& left) {
  left.assign(counts, counts + blocks.size());
  for (size_t k = 0; k < blocks.size(); ++k)
    if (blocks[k].moved) left[k] = 0;
  return left.data();
}

template <class F, class N, class D>
int all_to_all_w(F next, Site site, void* sbuf, N* scounts, D* sdispls, MPI_Datatype* stypes, void* rbuf, N* rcounts,
                 D* rdispls, MPI_Datatype* rtypes, MPI_Comm comm, int out, int in, bool neighbours, bool holes = false) {
  std::vector<N> sends_left, receives_left;
  bool moved = false;
  // A rank without neighbours may pass no arrays, and must take part all the same.
  if (ipc_wanted() && (neighbours || (out > 0 && out == in && intra(comm))) && (!out || (scounts && stypes)) &&
      (!in || (rcounts && rtypes)) && ipc_due(comm)) {
    std::vector<PeerBlock> sends = peer_blocks(sbuf, scounts, sdispls, stypes, out);
    std::vector<PeerBlock> receives = peer_blocks(rbuf, rcounts, rdispls, rtypes, in);
    const int rc = ipc_exchange(comm, neighbours, sends, receives);
    if (rc != MPI_SUCCESS) return rc;
    scounts = without_moved(scounts, sends, sends_left);
    rcounts = without_moved(rcounts, receives, receives_left);
    for (const auto* side : {&sends, &receives})
      for (const PeerBlock& block : *side) moved = moved || block.moved;
  }
  TypedBlocks<N, D> send(sbuf, scounts, sdispls, stypes, out, kSendUse, out > 0);
  TypedBlocks<N, D> recv(rbuf, rcounts, rdispls, rtypes, in, kRecvUse, in > 0);
  if (holes) recv.keep();
  count_call(site, moved || send.taken() || recv.taken());
  const int rc = next(send.buf, scounts, send.displs, send.types, recv.buf, rcounts, recv.displs, recv.types, comm);
  if (rc == MPI_SUCCESS && recv.taken()) recv.finish();
  return rc;
}

template <class F, class N, class D>
int on_alltoallw(F next, Site site, void* sbuf, N* scounts, D* sdispls, MPI_Datatype* stypes, void* rbuf, N* rcounts,
                 D* rdispls, MPI_Datatype* rtypes, MPI_Comm comm) {
  const bool place = sbuf == MPI_IN_PLACE && gpu::on_device(rbuf);
  const int n = place || sbuf != MPI_IN_PLACE ? std::max(peers_in(comm, gpu::possible()), 0) : 0;
  return all_to_all_w(next, site, sbuf, scounts, sdispls, stypes, rbuf, rcounts, rdispls, rtypes, comm, place ? 0 : n, n,
                      false, place);
}

template <class F, class N>
int on_neighbor_alltoallw(F next, Site site, void* sbuf, N* scounts, MPI_Aint* sdispls, MPI_Datatype* stypes,
                          void* rbuf, N* rcounts, MPI_Aint* rdispls, MPI_Datatype* rtypes, MPI_Comm comm) {
  const Degrees d = degrees_of(comm);
  return all_to_all_w(next, site, sbuf, scounts, sdispls, stypes, rbuf, rcounts, rdispls, rtypes, comm, d.out, d.in,
                      d.known, d.holes);
}

}  // namespace undertow
