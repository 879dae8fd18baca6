/* A C program with derived datatypes: vector, indexed, struct, subarray and their nesting, by the int interfaces, on an
   even number of ranks. Prints "ok" and exits 0 when every byte is where it belongs. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>

#include "check.h"

enum { N = 4096 };

static void exchange(MPI_Datatype t, int count) {
  static char mine[N], theirs[N], got[N], want[N], packed[N];
  for (int i = 0; i < N; ++i) mine[i] = (char)(i * 31 + rank), theirs[i] = (char)(i * 31 + peer);
  int position = 0, n;
  MPI_Pack_size(count, t, MPI_COMM_WORLD, &n);
  CHECK(n <= N);
  PMPI_Pack(theirs, count, t, packed, N, &position, MPI_COMM_SELF); /* the reference is the library itself */
  const int bytes = position;
  memset(want, 9, N);
  position = 0;
  PMPI_Unpack(packed, bytes, &position, want, count, t, MPI_COMM_SELF);

  MPI_Request r[2];
  MPI_Status s[2];
  memset(got, 9, N);
  MPI_Irecv(got, count, t, peer, 1, MPI_COMM_WORLD, &r[0]);
  MPI_Isend(mine, count, t, peer, 1, MPI_COMM_WORLD, &r[1]);
  MPI_Waitall(2, r, s);
  CHECK(!memcmp(got, want, N));
  MPI_Get_count(&s[0], t, &n);
  CHECK(n == count);

  memset(got, 9, N);
  if (rank % 2) {
    MPI_Send(mine, count, t, peer, 2, MPI_COMM_WORLD);
    MPI_Recv(got, count, t, peer, 2, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
  } else {
    MPI_Recv(got, count, t, peer, 2, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    MPI_Send(mine, count, t, peer, 2, MPI_COMM_WORLD);
  }
  CHECK(!memcmp(got, want, N));

  char ours[N];
  position = 0;
  MPI_Pack(theirs, count, t, ours, N, &position, MPI_COMM_SELF);
  CHECK(position == bytes && !memcmp(ours, packed, bytes));
  memset(got, 9, N);
  position = 0;
  MPI_Unpack(packed, bytes, &position, got, count, t, MPI_COMM_SELF);
  CHECK(position == bytes && !memcmp(got, want, N));

  memset(got, 9, N);
  MPI_Request p[2];
  MPI_Recv_init(got, count, t, peer, 3, MPI_COMM_WORLD, &p[0]);
  MPI_Send_init(mine, count, t, peer, 3, MPI_COMM_WORLD, &p[1]);
  for (int turn = 0; turn < 3; ++turn) {
    MPI_Startall(2, p);
    MPI_Wait(&p[0], MPI_STATUS_IGNORE);
    MPI_Wait(&p[1], MPI_STATUS_IGNORE);
    CHECK(!memcmp(got, want, N));
  }
  MPI_Request_free(&p[0]);
  MPI_Request_free(&p[1]);

  memcpy(got, mine, N);
  MPI_Bcast(got, count, t, 0, MPI_COMM_WORLD);
  if (rank == 0) CHECK(!memcmp(got, mine, N));
  if (rank == 1) {
    memcpy(want, mine, N);
    position = 0;
    PMPI_Unpack(packed, bytes, &position, want, count, t, MPI_COMM_SELF);
    CHECK(!memcmp(got, want, N));
  }
}

/* MPI 4.1's ways to learn that requests are complete, by name as mpi4py looks for them: in an MPI that lacks them the
   preload of a fixed ABI has them all the same. What they call complete must have arrived. */
static void seen_complete(MPI_Datatype t) {
  int (*all)(int, const MPI_Request*, int*, MPI_Status*) = dlsym(RTLD_DEFAULT, "MPI_Request_get_status_all");
  int (*any)(int, const MPI_Request*, int*, int*, MPI_Status*) = dlsym(RTLD_DEFAULT, "MPI_Request_get_status_any");
  int (*some)(int, const MPI_Request*, int*, int*, MPI_Status*) = dlsym(RTLD_DEFAULT, "MPI_Request_get_status_some");
  static char mine[N], got[N], want[N];
  int unused = 0;
  if (all && all(0, NULL, &unused, MPI_STATUSES_IGNORE) != MPI_SUCCESS) return; /* a preload of another family */
  for (int how = 0; how < 6 && all && any && some; ++how) {
    memset(mine, 3 + how, N), memset(got, 9, N), memset(want, 9, N);
    MPI_Request r[3] = {MPI_REQUEST_NULL, MPI_REQUEST_NULL, MPI_REQUEST_NULL};
    MPI_Status s[3];
    int flag = 0, index = -1, done = -1, indices[3];
    any(3, r, &index, &flag, s); /* nothing to wait for */
    CHECK(flag && index == MPI_UNDEFINED);
    some(3, r, &done, indices, s);
    CHECK(done == MPI_UNDEFINED);
    all(3, r, &flag, s);
    CHECK(flag);
    MPI_Irecv(got, 1, t, peer, 6, MPI_COMM_WORLD, &r[1]);
    MPI_Barrier(MPI_COMM_WORLD);
    MPI_Send(mine, 1, t, peer, 6, MPI_COMM_WORLD);
    for (flag = 0; !flag;) {
      MPI_Iprobe(peer, 99, MPI_COMM_WORLD, &index, MPI_STATUS_IGNORE); /* some of these make no progress in MPICH */
      if (how % 3 == 0) all(3, r, &flag, how ? s : MPI_STATUSES_IGNORE);
      if (how % 3 == 1) any(3, r, &index, &flag, how < 3 ? s : MPI_STATUS_IGNORE);
      if (how % 3 == 2) some(3, r, &done, indices, how < 3 ? s : MPI_STATUSES_IGNORE), flag = done > 0;
    }
    CHECK(how % 3 != 1 || index == 1);
    CHECK(how % 3 != 2 || (done == 1 && indices[0] == 1));
    char packed[N];
    int position = 0;
    PMPI_Pack(mine, 1, t, packed, N, &position, MPI_COMM_SELF);
    const int bytes = position;
    position = 0;
    PMPI_Unpack(packed, bytes, &position, want, 1, t, MPI_COMM_SELF);
    CHECK(!memcmp(got, want, N));
    memset(got, 1, N); /* it is the program's now */
    MPI_Waitall(3, r, MPI_STATUSES_IGNORE);
    for (int i = 0; i < N; ++i) CHECK(got[i] == 1);
  }
}

/* Long messages of structs with our send, our receive, both and neither: a peer may run without the preload. */
static void long_structs(void) {
  enum { COUNT = 1260 };
  typedef struct { int i; double d; char c; } Item;
  static Item mine[COUNT], got[COUNT];
  const int members[3] = {1, 1, 1};
  const MPI_Aint offsets[3] = {offsetof(Item, i), offsetof(Item, d), offsetof(Item, c)};
  const MPI_Datatype kinds[3] = {MPI_INT, MPI_DOUBLE, MPI_CHAR};
  MPI_Datatype packed, t;
  MPI_Type_create_struct(3, members, offsets, kinds, &packed);
  MPI_Type_create_resized(packed, 0, sizeof(Item), &t);
  MPI_Type_commit(&t);
  for (int sides = 0; sides < 4; ++sides) {
    int (*send)(const void*, int, MPI_Datatype, int, int, MPI_Comm) = sides & 1 ? MPI_Send : PMPI_Send;
    int (*recv)(void*, int, MPI_Datatype, int, int, MPI_Comm, MPI_Status*) = sides & 2 ? MPI_Recv : PMPI_Recv;
    for (int i = 0; i < COUNT; ++i) mine[i] = (Item){i + rank, i * 0.5 + sides, (char)(i + 3 * rank)};
    memset(got, 0, sizeof got);
    if (rank % 2 == 0) send(mine, COUNT, t, peer, 4, MPI_COMM_WORLD);
    recv(got, COUNT, t, peer, 4, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    if (rank % 2) send(mine, COUNT, t, peer, 4, MPI_COMM_WORLD);
    for (int i = 0; i < COUNT; ++i)
      CHECK(got[i].i == i + peer && got[i].d == i * 0.5 + sides && got[i].c == (char)(i + 3 * peer));
  }
  MPI_Type_free(&t);
  MPI_Type_free(&packed);
}

int main(int argc, char** argv) {
  begin(&argc, &argv);
  CHECK(size % 2 == 0);
  MPI_Datatype t[8];
  MPI_Type_vector(20, 3, 5, MPI_INT, &t[0]);
  const int lengths[4] = {1, 0, 3, 2}, places[4] = {40, 3, 7, 20};
  MPI_Type_indexed(4, lengths, places, MPI_DOUBLE, &t[1]);
  const int members[3] = {1, 2, 3};
  const MPI_Aint offsets[3] = {0, 8, 32};
  const MPI_Datatype kinds[3] = {MPI_INT, MPI_DOUBLE, MPI_CHAR};
  MPI_Datatype record;
  MPI_Type_create_struct(3, members, offsets, kinds, &record);
  MPI_Type_create_resized(record, 0, 40, &t[2]);
  const int whole[3] = {6, 7, 8}, part[3] = {2, 3, 4}, from[3] = {1, 2, 3};
  MPI_Type_create_subarray(3, whole, part, from, MPI_ORDER_C, MPI_FLOAT, &t[3]);
  MPI_Type_create_subarray(3, whole, part, from, MPI_ORDER_FORTRAN, MPI_FLOAT, &t[4]);
  MPI_Datatype column;
  MPI_Type_vector(8, 1, 8, MPI_FLOAT, &column);
  MPI_Type_create_hvector(8, 1, 4, column, &t[5]);
  MPI_Type_vector(4, 1, 2, MPI_SHORT_INT, &t[6]);
  MPI_Type_dup(t[0], &t[7]);
  for (int i = 0; i < 8; ++i) {
    MPI_Type_commit(&t[i]);
    exchange(t[i], i == 2 ? 50 : 1);
    exchange(t[i], 2);
  }
  seen_complete(t[0]);
  long_structs();
  for (int i = 0; i < 8; ++i) MPI_Type_free(&t[i]);
  MPI_Type_free(&column);
  MPI_Type_free(&record);
  return end();
}
