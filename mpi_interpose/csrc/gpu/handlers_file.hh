// MPI-IO from and to device memory, packed and unpacked as messages are; and calls that are not staged at all, which a
// library that cannot read device memory would crash on: they are named once before they go to it.
//
// A file's view has its own datatypes, so that only the memory's side changes, from a datatype to its dense twin of the
// same signature. Host buffers pass through, after one look at whether the program has a GPU at all.
#pragma once

#include "handlers_later.hh"

namespace undertow {

// `call(buffer, type)` for a write, `call(buffer, type, status)` for a read.
template <class Call>
int file_write(Site site, void* buf, int64_t count, MPI_Datatype type, Call call) {
  SendSide side(buf, count, type, Peer(), device_given(buf, type));
  count_call(site, side.taken());
  return call(side.buf, side.type);
}
template <class Call>
int file_read(Site site, void* buf, int64_t count, MPI_Datatype type, MPI_Status* status, Call call) {
  RecvSide side(buf, count, type, Peer(), device_given(buf, type));
  count_call(site, side.taken());
  if (!side.taken()) return call(buf, type, status);
  MPI_Status local;
  MPI_Status* st = ignored(status) ? &local : status;
  const int rc = call(side.buf, side.type, st);
  if (rc == MPI_SUCCESS) side.finish(received_bytes(st));  // fewer at the end of the file
  return rc;
}
template <class Call>
int file_write_later(Site site, void* buf, int64_t count, MPI_Datatype type, MPI_Request* request, Call call) {
  SendSide side(buf, count, type, Peer(), request && device_given(buf, type));
  count_call(site, side.taken());
  const int rc = call(side.buf, side.type);
  if (rc == MPI_SUCCESS && side.taken()) attach(side, count, buf, false, false, *request);
  return rc;
}
// MPICH's requests of collective reads say that all has been read where the file ended before. So the present contents go
// into the slab first, and what was not read stays as it was.
template <class Call>
int file_read_later(Site site, void* buf, int64_t count, MPI_Datatype type, MPI_Request* request, Call call) {
  auto sides = std::make_unique<Sides<SendSide, RecvSide>>();
  sides->send.emplace(buf, count, type, Peer(), false);
  sides->recv.emplace(buf, count, type, Peer(), request && device_given(buf, type));
  RecvSide& recv = *sides->recv;
  if (recv.taken()) pack_slab(*recv.record, count, buf, recv.slab);
  count_call(site, recv.taken());
  const int rc = call(recv.buf, recv.type);
  return later(std::move(sides), rc, request);
}

#define UNDERTOW_UNLESS_GPU(...)                    \
  if (__builtin_expect(!gpu::possible(), 1)) {      \
    count_call(site, false);                        \
    return next(__VA_ARGS__);                       \
  }

template <class F, class N>
int on_file_write(F next, Site site, MPI_File file, void* buf, N count, MPI_Datatype type, MPI_Status* status) {
  UNDERTOW_UNLESS_GPU(file, buf, count, type, status)
  return file_write(site, buf, count, type, [&](void* b, MPI_Datatype t) { return next(file, b, count, t, status); });
}
template <class F, class N>
int on_file_write_at(F next, Site site, MPI_File file, MPI_Offset at, void* buf, N count, MPI_Datatype type,
                     MPI_Status* status) {
  UNDERTOW_UNLESS_GPU(file, at, buf, count, type, status)
  return file_write(site, buf, count, type, [&](void* b, MPI_Datatype t) { return next(file, at, b, count, t, status); });
}
template <class F, class N>
int on_file_read(F next, Site site, MPI_File file, void* buf, N count, MPI_Datatype type, MPI_Status* status) {
  UNDERTOW_UNLESS_GPU(file, buf, count, type, status)
  return file_read(site, buf, count, type, status,
                   [&](void* b, MPI_Datatype t, MPI_Status* s) { return next(file, b, count, t, s); });
}
template <class F, class N>
int on_file_read_at(F next, Site site, MPI_File file, MPI_Offset at, void* buf, N count, MPI_Datatype type,
                    MPI_Status* status) {
  UNDERTOW_UNLESS_GPU(file, at, buf, count, type, status)
  return file_read(site, buf, count, type, status,
                   [&](void* b, MPI_Datatype t, MPI_Status* s) { return next(file, at, b, count, t, s); });
}
template <class F, class N>
int on_file_iwrite(F next, Site site, MPI_File file, void* buf, N count, MPI_Datatype type, MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(file, buf, count, type, request)
  return file_write_later(site, buf, count, type, request,
                          [&](void* b, MPI_Datatype t) { return next(file, b, count, t, request); });
}
template <class F, class N>
int on_file_iwrite_at(F next, Site site, MPI_File file, MPI_Offset at, void* buf, N count, MPI_Datatype type,
                      MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(file, at, buf, count, type, request)
  return file_write_later(site, buf, count, type, request,
                          [&](void* b, MPI_Datatype t) { return next(file, at, b, count, t, request); });
}
template <class F, class N>
int on_file_iread(F next, Site site, MPI_File file, void* buf, N count, MPI_Datatype type, MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(file, buf, count, type, request)
  return file_read_later(site, buf, count, type, request,
                         [&](void* b, MPI_Datatype t) { return next(file, b, count, t, request); });
}
template <class F, class N>
int on_file_iread_at(F next, Site site, MPI_File file, MPI_Offset at, void* buf, N count, MPI_Datatype type,
                     MPI_Request* request) {
  UNDERTOW_UNLESS_GPU(file, at, buf, count, type, request)
  return file_read_later(site, buf, count, type, request,
                         [&](void* b, MPI_Datatype t) { return next(file, at, b, count, t, request); });
}

#undef UNDERTOW_UNLESS_GPU

// Every argument of a call that is not staged; buffers are the only ones of type void*.
template <class T>
void look_at(Site, const T&) {}
inline void look_at(Site site, void* const& buffer) { warn_of_device(site, buffer); }

template <class F, class... A>
int on_not_staged(F next, Site site, A... arguments) {
  if (__builtin_expect(gpu::possible(), 0)) (look_at(site, arguments), ...);
  count_call(site, false);
  return next(arguments...);
}

}  // namespace undertow
