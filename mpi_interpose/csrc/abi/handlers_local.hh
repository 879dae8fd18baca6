// Handlers of calls that stay in the process: commit, pack, unpack. A handler gets the library's function first, the
// call's site for the report, then the caller's arguments.
#pragma once

#include "transfer.hh"

namespace undertow {

template <class F>
int on_type_commit(F next, Site site, MPI_Datatype* type) {
  sites[site].calls.fetch_add(1, std::memory_order_relaxed);
  const int rc = next(type);
  if (rc == MPI_SUCCESS && type) type_committed(*type);
  return rc;
}

// A duplicate of a committed type is committed.
template <class F>
int on_type_dup(F next, Site site, MPI_Datatype type, MPI_Datatype* copy) {
  sites[site].calls.fetch_add(1, std::memory_order_relaxed);
  const int rc = next(type, copy);
  if (rc == MPI_SUCCESS && copy && record_of(type)) type_committed(*copy);
  return rc;
}

// Argument errors stay the library's to report, so every doubtful call goes there unchanged.
template <class N>
Record* local_record(MPI_Datatype type, N count, MPI_Comm comm, int64_t room, int64_t* bytes) {
  if (count <= 0 || handle_key(comm) == handle_key(constants.comm_null)) return nullptr;
  Record* r = record_of(type);
  if (!r || r->plan.size == 0 || r->wrong.load(std::memory_order_relaxed)) return nullptr;
  if (__builtin_mul_overflow(static_cast<int64_t>(count), r->plan.size, bytes) || *bytes > room) return nullptr;
  return r;
}

template <class Library, class Ours>
int local_call(Record* r, Use use, Site site, int64_t bytes, Library library, Ours ours) {
  const Choice choice = choose_local(*r, use, bytes);
  const int64_t start = choice.timed ? now_ns() : 0;
  int rc = MPI_SUCCESS;
  if (choice.ours) {
    ours();
    sites[site].taken.fetch_add(1, std::memory_order_relaxed);
    r->tally[use].taken.fetch_add(1, std::memory_order_relaxed);
    r->tally[use].bytes.fetch_add(bytes, std::memory_order_relaxed);
  } else {
    rc = library();
    r->tally[use].passed.fetch_add(1, std::memory_order_relaxed);
  }
  if (choice.timed) observe(*r, use, 0, choice.ours, bytes, now_ns() - start);
  return rc;
}

// MPI_Pack or MPI_Unpack with a side in device memory: always ours. NULL when it is not, or when the arguments are bad.
template <class N>
Record* device_call(const void* user, MPI_Datatype type, const void* packed, N count, MPI_Comm comm, int64_t room,
                    int64_t* bytes) {
  if (__builtin_expect(!gpu::possible(), 1) || count <= 0 || !(device_side(user, type) || gpu::on_device(packed)))
    return nullptr;
  Record* r = handle_key(comm) == handle_key(constants.comm_null) ? nullptr : device_record(type);
  if (!r || __builtin_mul_overflow(static_cast<int64_t>(count), r->plan.size, bytes) || *bytes > room) return nullptr;
  return r;
}

inline int device_done(Record* r, Use use, Site site, int64_t bytes) {
  sites[site].taken.fetch_add(1, std::memory_order_relaxed);
  r->tally[use].taken.fetch_add(1, std::memory_order_relaxed);
  r->tally[use].bytes.fetch_add(bytes, std::memory_order_relaxed);
  return MPI_SUCCESS;
}

template <class F, class N, class P>
int on_pack(F next, Site site, void* in, N count, MPI_Datatype type, void* out, N outsize, P* position, MPI_Comm comm) {
  sites[site].calls.fetch_add(1, std::memory_order_relaxed);
  const auto library = [&] { return next(in, count, type, out, outsize, position, comm); };
  int64_t bytes = 0;
  if (out && position && *position >= 0)
    if (Record* r = device_call(in, type, out, count, comm, static_cast<int64_t>(outsize) - *position, &bytes)) {
      pack_slab(*r, count, in, static_cast<char*>(out) + *position);
      *position += static_cast<P>(bytes);
      return device_done(r, kPack, site, bytes);
    }
  Record* r = out && position && *position >= 0
                  ? local_record(type, count, comm, static_cast<int64_t>(outsize) - *position, &bytes)
                  : nullptr;
  if (!r) return library();
  return local_call(r, kPack, site, bytes, library, [&] {
    pack_slab(*r, count, in, static_cast<char*>(out) + *position);
    *position += static_cast<P>(bytes);
  });
}

template <class F, class N, class P>
int on_unpack(F next, Site site, void* in, N insize, P* position, void* out, N count, MPI_Datatype type, MPI_Comm comm) {
  sites[site].calls.fetch_add(1, std::memory_order_relaxed);
  const auto library = [&] { return next(in, insize, position, out, count, type, comm); };
  int64_t bytes = 0;
  if (in && position && *position >= 0)
    if (Record* r = device_call(out, type, in, count, comm, static_cast<int64_t>(insize) - *position, &bytes)) {
      unpack_slab(*r, count, static_cast<const char*>(in) + *position, out, bytes);
      *position += static_cast<P>(bytes);
      return device_done(r, kUnpack, site, bytes);
    }
  Record* r = in && position && *position >= 0
                  ? local_record(type, count, comm, static_cast<int64_t>(insize) - *position, &bytes)
                  : nullptr;
  if (!r) return library();
  return local_call(r, kUnpack, site, bytes, library, [&] {
    unpack_slab(*r, count, static_cast<const char*>(in) + *position, out, bytes);
    *position += static_cast<P>(bytes);
  });
}

}  // namespace undertow
