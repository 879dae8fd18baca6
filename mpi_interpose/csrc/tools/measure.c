/* Times the library's own path (PMPI_*) against the preload's (MPI_*, mode force) in one process, call by call
   interleaved. One line per cell: use, class, name, block bytes, message bytes, then the medians in ns of: the library,
   the library again (what two equal things differ by), ours; and the number of bytes that came out wrong.
   usage: measure local|messages QUICK */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define REPEATS 15
static int (*type_info)(MPI_Datatype, const char**, long*, long*);
static char *user, *packed, *other;
static const long room = 64L << 20;
static int rank, quick;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e9 + t.tv_nsec;
}
static int by_value(const void* a, const void* b) {
  const double x = *(const double*)a, y = *(const double*)b;
  return (x > y) - (x < y);
}
static double median(double* v, int n) {
  qsort(v, n, sizeof *v, by_value);
  return v[n / 2];
}

/* ---- calls that stay in the process ---- */
static void pack_call(int ours, int count, MPI_Datatype t, long bytes) {
  int p = 0;
  (ours ? MPI_Pack : PMPI_Pack)(user, count, t, ours ? packed : other, (int)bytes, &p, MPI_COMM_SELF);
}
static void unpack_call(int ours, int count, MPI_Datatype t, long bytes) {
  int p = 0;
  (ours ? MPI_Unpack : PMPI_Unpack)(packed, (int)bytes, &p, user, count, t, MPI_COMM_SELF);
}
static void time_local(const char* use, void (*call)(int, int, MPI_Datatype, long), const char* name, int count,
                       MPI_Datatype t, const char* cls, long block, long bytes, long wrong) {
  static const int variant[3] = {0, 0, 1};
  double samples[3][REPEATS];
  call(0, count, t, bytes), call(1, count, t, bytes);
  double start = now();
  call(0, count, t, bytes);
  double once = now() - start;
  int inner = once > 40000 ? 1 : (int)(40000 / (once + 20)) + 1;
  if (inner > 2000) inner = 2000;
  for (int r = 0; r < REPEATS; ++r)
    for (int k = 0; k < 3; ++k) {
      const int v = (k + r) % 3; /* every variant in every place */
      start = now();
      for (int i = 0; i < inner; ++i) call(variant[v], count, t, bytes);
      samples[v][r] = (now() - start) / inner;
    }
  printf("%s %s %s %ld %ld %.1f %.1f %.1f %ld\n", use, cls, name, block, bytes, median(samples[0], REPEATS),
         median(samples[1], REPEATS), median(samples[2], REPEATS), wrong);
}
static void local_cell(const char* name, int count, MPI_Datatype t) {
  const char* cls;
  long block, size;
  if (!type_info(t, &cls, &block, &size)) return;
  const long bytes = size * count;
  long wrong = 0;
  pack_call(0, count, t, bytes), pack_call(1, count, t, bytes);
  for (long i = 0; i < bytes; ++i) wrong += packed[i] != other[i];
  time_local("pack", pack_call, name, count, t, cls, block, bytes, wrong);
  time_local("unpack", unpack_call, name, count, t, cls, block, bytes, wrong);
  fflush(stdout);
}

/* ---- ping-pong; variant bit 0: our send, bit 1: our receive ---- */
static void ping(int v, int count, MPI_Datatype t) {
  int (*send)(const void*, int, MPI_Datatype, int, int, MPI_Comm) = v & 1 ? MPI_Send : PMPI_Send;
  int (*recv)(void*, int, MPI_Datatype, int, int, MPI_Comm, MPI_Status*) = v & 2 ? MPI_Recv : PMPI_Recv;
  if (rank == 0) {
    send(user, count, t, 1, 7, MPI_COMM_WORLD);
    recv(user, count, t, 1, 7, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
  } else {
    recv(user, count, t, 0, 7, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    send(user, count, t, 0, 7, MPI_COMM_WORLD);
  }
}
static void message_cell(const char* name, int count, MPI_Datatype t) {
  const char* cls;
  long block, size;
  if (!type_info(t, &cls, &block, &size)) return;
  static const int variant[5] = {0, 0, 1, 2, 3};
  double samples[5][REPEATS];
  const int repeats = quick ? 7 : REPEATS;
  for (int k = 0; k < 5; ++k) ping(variant[k], count, t);
  PMPI_Barrier(MPI_COMM_WORLD);
  double start = now();
  ping(0, count, t);
  int inner = (int)(200000 / (now() - start + 200)) + 1;
  if (inner > 100) inner = 100;
  PMPI_Bcast(&inner, 1, MPI_INT, 0, MPI_COMM_WORLD);
  for (int r = 0; r < repeats; ++r)
    for (int k = 0; k < 5; ++k) {
      const int v = (k + r) % 5;
      PMPI_Barrier(MPI_COMM_WORLD);
      start = now();
      for (int i = 0; i < inner; ++i) ping(variant[v], count, t);
      samples[v][r] = (now() - start) / inner / 2; /* one way */
    }
  if (rank) return;
  double m[5];
  for (int k = 0; k < 5; ++k) m[k] = median(samples[k], repeats);
  printf("send %s %s %ld %ld %.1f %.1f %.1f 0\n", cls, name, block, size * count, m[0], m[1], m[2]);
  printf("recv %s %s %ld %ld %.1f %.1f %.1f 0\n", cls, name, block, size * count, m[0], m[1], m[3]);
  printf("both %s %s %ld %ld %.1f %.1f %.1f 0\n", cls, name, block, size * count, m[0], m[1], m[4]);
  fflush(stdout);
}

static void (*cell)(const char*, int, MPI_Datatype);
static void done(const char* name, int count, MPI_Datatype t) {
  MPI_Type_commit(&t);
  cell(name, count, t);
  MPI_Type_free(&t);
}

static void table_of_types(void) {
  static const long totals[] = {1L << 10, 1L << 12, 1L << 14, 1L << 16, 1L << 18, 1L << 21};
  static const int blocks[] = {4, 8, 12, 16, 32, 64, 100, 128, 256, 512, 1024, 4096, 16384};
  MPI_Datatype t, u;
  char name[96];
  for (int s = 0; s < 6; ++s) {
    const long total = totals[s];
    if (quick && (s == 0 || s == 2 || s == 4)) continue;
    for (int b = 0; b < 13; ++b) {
      const int block = blocks[b];
      const int n = (int)(total / block);
      if (n < 4) continue;
      snprintf(name, sizeof name, "vector-b%d-s%d", block, block == 12 ? 16 : block == 100 ? 128 : 2 * block);
      MPI_Type_create_hvector(n, block, block == 12 ? 16 : block == 100 ? 128 : 2 * block, MPI_CHAR, &t);
      done(name, 1, t);
    }
    if (total / 4 * 512 < room) {
      MPI_Type_create_hvector((int)(total / 4), 1, 512, MPI_INT, &t);
      done("vector-b4-s512", 1, t);
    }
    int side = 1;
    while ((long)(side + 1) * (side + 1) * 4 <= total) ++side;
    for (int e = 4; e <= 16; e *= 2) {
      MPI_Datatype element = e == 4 ? MPI_FLOAT : e == 8 ? MPI_DOUBLE : MPI_C_DOUBLE_COMPLEX;
      int n = 1;
      while ((long)(n + 1) * (n + 1) * e <= total) ++n;
      snprintf(name, sizeof name, "transpose-b%d", e);
      MPI_Type_vector(n, 1, n, element, &u);
      MPI_Type_create_hvector(n, 1, e, u, &t);
      MPI_Type_free(&u);
      done(name, 1, t);
    }
    for (int e = 4; e <= 64; e *= 2) {
      const int n = (int)(total / e);
      int* d = malloc(n * sizeof *d);
      unsigned x = 12345;
      for (int i = 0; i < n; ++i) x = x * 1664525u + 1013904223u, d[i] = (2 * i + (int)(x >> 31)) * e;
      for (int i = n - 1; i > 0; --i) { /* neighbours swapped: irregular, with the locality of a real index list */
        x = x * 1664525u + 1013904223u;
        const int j = i - (int)((x >> 16) % 16 < (unsigned)i ? (x >> 16) % 16 : 0), k = d[i];
        d[i] = d[j], d[j] = k;
      }
      MPI_Aint* a = malloc(n * sizeof *a);
      for (int i = 0; i < n; ++i) a[i] = d[i];
      snprintf(name, sizeof name, "indexed_block-b%d", e);
      MPI_Type_create_hindexed_block(n, e / 4, a, MPI_FLOAT, &t);
      done(name, 1, t);
      free(a), free(d);
    }
    {
      const int n = (int)(total / 66) + 2;
      int *l = malloc(n * sizeof *l), *d = malloc(n * sizeof *d), at = 0;
      for (int i = 0; i < n; ++i) l[i] = 1 + (i * 7) % 32, d[i] = at, at += l[i] + 1 + i % 3;
      MPI_Type_indexed(n, l, d, MPI_INT, &t);
      done("indexed-4-128", 1, t);
      free(l), free(d);
    }
    {
      const int l[3] = {1, 1, 1};
      const MPI_Aint o[3] = {0, 8, 16};
      const MPI_Datatype m[3] = {MPI_INT, MPI_DOUBLE, MPI_CHAR};
      MPI_Type_create_struct(3, l, o, m, &u);
      MPI_Type_create_resized(u, 0, 24, &t);
      MPI_Type_free(&u);
      done("structs", (int)(total / 13), t);
    }
    {
      int n = 8;
      while ((long)(n + 4) * (n + 4) * 4 <= total) n += 4;
      const int whole[3] = {n, n, n};
      if ((long)n * n * n * 4 < room)
        for (int axis = 0; axis < 3; ++axis) {
          int part[3] = {n, n, n}, start[3] = {0, 0, 0};
          part[axis] = 1, start[axis] = 1;
          snprintf(name, sizeof name, "face-%c", "zyx"[axis]);
          MPI_Type_create_subarray(3, whole, part, start, MPI_ORDER_C, MPI_FLOAT, &t);
          done(name, 1, t);
        }
    }
  }
}

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  const int messages = argc > 1 && !strcmp(argv[1], "messages");
  quick = argc > 2 && atoi(argv[2]);
  type_info = (int (*)(MPI_Datatype, const char**, long*, long*))dlsym(RTLD_DEFAULT, "undertow_type_info");
  if (!type_info) {
    fprintf(stderr, "measure: the preload is not there\n");
    MPI_Abort(MPI_COMM_WORLD, 3);
  }
  user = malloc(room), packed = malloc(16L << 20), other = malloc(16L << 20);
  for (long i = 0; i < room; ++i) user[i] = (char)(i * 7 + (i >> 8));
  memset(packed, 0, 16L << 20), memset(other, 0, 16L << 20);
  cell = messages ? message_cell : local_cell;
  table_of_types();
  MPI_Finalize();
  return 0;
}
