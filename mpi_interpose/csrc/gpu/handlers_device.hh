// Reductions on device memory, which only the library can compute: whole buffers are copied to pinned memory, reduced
// there by the library with the program's own datatype and operation, and copied back. Host buffers pass through.
#pragma once

#include "handlers_coll.hh"

namespace undertow {

// A buffer of `count` elements as the library may read it: itself, or its image in pinned memory.
class DeviceImage {
 public:
  enum Way { kIn, kOut, kBoth };  // kBoth: the present contents matter, or lie between what is written

  DeviceImage(const void* user, int64_t count, MPI_Datatype type, Way way, bool allowed = true)
      : origin_(const_cast<void*>(user)) {
    if (!allowed || count <= 0 || !device_side(user, type)) return;
    const Record* r = device_record(type);
    if (!r || r->plan.size == 0) return;
    const int64_t last = (count - 1) * r->plan.extent;
    const int64_t low = std::min(r->plan.ir->lo, r->plan.ir->lo + last);
    bytes_ = std::max(r->plan.ir->hi, r->plan.ir->hi + last) - low;
    at_ = static_cast<char*>(origin_) + low;
    slab_ = slab_get(bytes_, at_);
    back_ = way != kIn;
    const bool gaps = bytes_ != count * r->plan.size;
    if (way != kOut || gaps) device_copy(slab_, at_, bytes_);
    origin_ = slab_ - low;
  }
  ~DeviceImage() {
    if (slab_) slab_put(slab_);
  }
  DeviceImage(const DeviceImage&) = delete;
  DeviceImage& operator=(const DeviceImage&) = delete;
  void* origin() const { return origin_; }
  bool taken() const { return slab_ != nullptr; }
  void finish() {
    if (slab_ && back_) device_copy(at_, slab_, bytes_);
  }

 private:
  void* origin_;
  char *slab_ = nullptr, *at_ = nullptr;
  int64_t bytes_ = 0;
  bool back_ = false;
};

// `keep`: the call may leave the result unwritten.
template <class Call>
int reduced(Site site, void* in, int64_t in_count, void* out, int64_t out_count, MPI_Datatype type, bool in_matters,
            bool out_matters, bool keep, Call call) {
  if (__builtin_expect(!gpu::possible(), 1)) {
    count_call(site, false);
    return call(in, out);
  }
  const bool place = in == MPI_IN_PLACE;
  DeviceImage from(in, in_count, type, DeviceImage::kIn, in_matters && !place);
  DeviceImage to(out, out_count, type, place || keep ? DeviceImage::kBoth : DeviceImage::kOut, out_matters);
  count_call(site, from.taken() || to.taken());
  const int rc = call(from.origin(), to.origin());
  if (rc == MPI_SUCCESS) to.finish();
  return rc;
}

template <class F, class N>
int on_allreduce(F next, Site site, void* in, void* out, N count, MPI_Datatype type, MPI_Op op, MPI_Comm comm) {
  return reduced(site, in, count, out, count, type, true, true, false,
                 [&](void* i, void* o) { return next(i, o, count, type, op, comm); });
}

// Scan and Exscan have the arguments of Allreduce.
template <class F, class N>
int on_scan(F next, Site site, void* in, void* out, N count, MPI_Datatype type, MPI_Op op, MPI_Comm comm) {
  return reduced(site, in, count, out, count, type, true, true, false,
                 [&](void* i, void* o) { return next(i, o, count, type, op, comm); });
}

// On the first rank of Exscan the result is not written, so its present contents must come back.
template <class F, class N>
int on_exscan(F next, Site site, void* in, void* out, N count, MPI_Datatype type, MPI_Op op, MPI_Comm comm) {
  const bool first = gpu::possible() && rank_in(comm) == 0;
  return reduced(site, in, count, out, count, type, true, true, first,
                 [&](void* i, void* o) { return next(i, o, count, type, op, comm); });
}

template <class F, class N>
int on_reduce(F next, Site site, void* in, void* out, N count, MPI_Datatype type, MPI_Op op, int root, MPI_Comm comm) {
  const bool here = gpu::possible() && is_root(comm, root), sends = gpu::possible() && is_leaf(comm, root);
  return reduced(site, in, count, out, count, type, sends, here, false,
                 [&](void* i, void* o) { return next(i, o, count, type, op, root, comm); });
}

template <class F, class N>
int on_reduce_scatter_block(F next, Site site, void* in, void* out, N count, MPI_Datatype type, MPI_Op op,
                            MPI_Comm comm) {
  const int64_t all = gpu::possible() ? static_cast<int64_t>(count) * size_of(comm) : 0;
  return reduced(site, in, all, out, in == MPI_IN_PLACE ? all : count, type, true, true, false,
                 [&](void* i, void* o) { return next(i, o, count, type, op, comm); });
}

template <class F, class N>
int on_reduce_scatter(F next, Site site, void* in, void* out, N* counts, MPI_Datatype type, MPI_Op op, MPI_Comm comm) {
  int64_t all = 0, mine = 0;
  if (gpu::possible() && counts) {
    for (int i = 0, n = size_of(comm); i < n; ++i) all += counts[i];
    const int rank = rank_in(comm);
    mine = rank >= 0 ? static_cast<int64_t>(counts[rank]) : 0;
  }
  return reduced(site, in, all, out, in == MPI_IN_PLACE ? all : mine, type, true, true, false,
                 [&](void* i, void* o) { return next(i, o, counts, type, op, comm); });
}

template <class F, class N>
int on_reduce_local(F next, Site site, void* in, void* both, N count, MPI_Datatype type, MPI_Op op) {
  if (__builtin_expect(!gpu::possible(), 1)) return next(in, both, count, type, op);
  DeviceImage from(in, count, type, DeviceImage::kIn), to(both, count, type, DeviceImage::kBoth);
  count_call(site, from.taken() || to.taken());
  const int rc = next(from.origin(), to.origin(), count, type, op);
  if (rc == MPI_SUCCESS) to.finish();
  return rc;
}

}  // namespace undertow
