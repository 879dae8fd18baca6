/* Times the library's own path (PMPI_*) against the preload's (MPI_*) in one pair of processes, call by call in turn:
   MPI_Pack and MPI_Unpack on rank 0 (rank 1 sleeps), a ping-pong between the two, and the cost of calls that pass
   through. Every answer is compared, bytes outside the datatype too, before anything is timed.

   usage: mpirun -n 2 measure ROUNDS QUICK ONLY     (ONLY: part of "use name", the whole of it with a $ behind, or "" for all)

   One `cell` line per use and datatype: use, class, name, block, step, bytes, held, wrong bytes, calls per sample, bytes of
   its basic elements, the share of auto's calls that the preload took (of both sides of messages); then one `arm` line for each way: its name and ROUNDS samples in ns per call (per message). Arms: library; again (the
   library once more: what two equal things differ by); forced (our kernels); for messages send, recv and both (which
   side we take), and dense (the packed bytes alone, from one buffer to another: what packing for nothing would give);
   auto (what the preload does by its table). The arms of one round stand beside each other in time. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <mpi.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cells.h"

#define MAX_ROUNDS 201
#define ARMS 7
enum { AUTO = 0, FORCE = 1 };
enum { PACK, UNPACK, SEND, RECV };
static int (*type_of)(MPI_Datatype, long, const char**, long*, long*, long*);
static long (*leaf_of)(MPI_Datatype), (*taken_of)(MPI_Datatype, int);
static void (*set_mode)(int);
static char *source, *target, *packed, *expected, *dense_source, *dense_target;
static const long room = 40L << 20, packed_room = 4L << 20;
static int rank, rounds;
static const char* only;

typedef struct {
  MPI_Datatype type;
  int count;
  const char *name, *cls;
  long block, step, bytes, low, span; /* the touched bytes are [low, low + span) of a buffer */
  int held;
} Cell;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e9 + t.tv_nsec;
}

static long differences(const char* a, const char* b, long n) {
  long wrong = 0;
  if (memcmp(a, b, n))
    for (long i = 0; i < n; ++i) wrong += a[i] != b[i];
  return wrong;
}

static long taken_by_us(const Cell* c, int from, int to) { /* calls of the uses `from` to `to` */
  long n = 0;
  for (int use = from; use <= to; ++use) n += taken_of(c->type, use);
  return n;
}

static void print_cell(const char* use, const Cell* c, long wrong, int inner, double taken, const char* const* names,
                       int arms, double samples[ARMS][MAX_ROUNDS]) {
  printf("cell %s %s %s %ld %ld %ld %d %ld %d %ld %.4g\n", use, c->cls, c->name, c->block, c->step, c->bytes, c->held,
         wrong, inner, leaf_of(c->type), taken);
  for (int k = 0; k < arms; ++k) {
    printf("arm %s", names[k]);
    for (int r = 0; r < rounds; ++r) printf(" %.1f", samples[k][r]);
    printf("\n");
  }
  fflush(stdout);
}

/* Every round has an order of its own, the same on both ranks: no arm always follows the same other. */
static void draw_order(int round, int arms, int* order) {
  unsigned x = (unsigned)round * 2654435761u + 97u;
  for (int k = 0; k < arms; ++k) order[k] = k;
  for (int k = arms - 1; k > 0; --k) {
    x = x * 1664525u + 1013904223u;
    const int j = (int)((x >> 16) % (unsigned)(k + 1)), swap = order[k];
    order[k] = order[j], order[j] = swap;
  }
}

static int chosen(const char* use, const char* name) {
  char both[160];
  snprintf(both, sizeof both, "%s %s", use, name);
  const size_t n = strlen(only);
  if (n && only[n - 1] == '$') return strlen(both) == n - 1 && !strncmp(both, only, n - 1);
  return strstr(both, only) != NULL;
}

/* ---- calls that stay in the process: arms library, again, forced, auto ---- */
typedef void (*local_fn)(const Cell*, int ours, char* at);
static void pack_call(const Cell* c, int ours, char* at) {
  int p = 0;
  (ours ? MPI_Pack : PMPI_Pack)(source, c->count, c->type, at, (int)c->bytes, &p, MPI_COMM_SELF);
}
static void unpack_call(const Cell* c, int ours, char* at) {
  int p = 0;
  (ours ? MPI_Unpack : PMPI_Unpack)(at, (int)c->bytes, &p, target, c->count, c->type, MPI_COMM_SELF);
}

static void time_local(const char* use, const Cell* c, local_fn call, long wrong, double least_ns) {
  static const char* const names[] = {"library", "again", "forced", "auto"};
  static double samples[ARMS][MAX_ROUNDS];
  double once = 1e18;
  for (int i = 0; i < 4; ++i) {
    const double start = now();
    call(c, 0, packed);
    const double took = now() - start;
    if (took < once) once = took;
  }
  int inner = (int)(least_ns / (once + 10)) + 1;
  for (int k = 2; k < 4; ++k) { /* warm: the proof of a type and the slow start of the samples are behind us */
    set_mode(k == 2 ? FORCE : AUTO);
    for (int i = 0; i < (k == 2 ? 2 : 8); ++i) call(c, 1, packed);
  }
  long taken = 0;
  for (int r = 0; r < rounds; ++r) {
    int order[ARMS];
    draw_order(r, 4, order);
    for (int k = 0; k < 4; ++k) {
      const int v = order[k];
      set_mode(v == 2 ? FORCE : AUTO);
      if (v == 3) taken -= taken_by_us(c, PACK, UNPACK);
      const double start = now();
      for (int i = 0; i < inner; ++i) call(c, v >= 2, packed);
      samples[v][r] = (now() - start) / inner;
      if (v == 3) taken += taken_by_us(c, PACK, UNPACK);
    }
  }
  set_mode(AUTO);
  print_cell(use, c, wrong, inner, (double)taken / rounds / inner, names, 4, samples);
}

static void local_cells(const Cell* c) {
  set_mode(FORCE);
  memset(packed, 0, c->bytes), memset(expected, 1, c->bytes);
  pack_call(c, 0, expected), pack_call(c, 1, packed);
  const long wrong = differences(packed, expected, c->bytes);
  if (chosen("pack", c->name)) time_local("pack", c, pack_call, wrong, 60000);
  /* Unpacked into zeros, the touched range must be what the library makes of it; packed again it is the message. */
  set_mode(FORCE);
  memset(target + c->low, 0, c->span);
  unpack_call(c, 1, expected);
  long bad = 0;
  {
    char* ours = malloc(c->span);
    memcpy(ours, target + c->low, c->span);
    memset(target + c->low, 0, c->span);
    unpack_call(c, 0, expected);
    bad = differences(ours, target + c->low, c->span);
    free(ours);
  }
  if (chosen("unpack", c->name)) time_local("unpack", c, unpack_call, bad, 60000);
}

/* ---- ping-pong; bit 0 of `sides`: our send, bit 1: our receive ---- */
#define DENSE -1
static void ping_bytes(const char* out, char* in, int bytes) {
  if (rank == 0) PMPI_Send(out, bytes, MPI_BYTE, 1, 7, MPI_COMM_WORLD);
  PMPI_Recv(in, bytes, MPI_BYTE, !rank, 7, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
  if (rank == 1) PMPI_Send(out, bytes, MPI_BYTE, 0, 7, MPI_COMM_WORLD);
}

static void ping(const Cell* c, int sides) {
  if (sides == DENSE) {
    ping_bytes(dense_source, dense_target, (int)c->bytes);
    return;
  }
  int (*send)(const void*, int, MPI_Datatype, int, int, MPI_Comm) = sides & 1 ? MPI_Send : PMPI_Send;
  int (*recv)(void*, int, MPI_Datatype, int, int, MPI_Comm, MPI_Status*) = sides & 2 ? MPI_Recv : PMPI_Recv;
  if (rank == 0) {
    send(source, c->count, c->type, 1, 7, MPI_COMM_WORLD);
    recv(target, c->count, c->type, 1, 7, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
  } else {
    recv(target, c->count, c->type, 0, 7, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    send(source, c->count, c->type, 0, 7, MPI_COMM_WORLD);
  }
}

/* Between two timed messages each rank reads what it got and writes what it will send, as a program does: a source that
   is never written again would stay in the caches of both cores, which favours a library that reads it from the other
   one. By the library's own calls for all arms alike, and not timed. `expected` holds the packed source. */
static void compute(const Cell* c, int sides) {
  if (sides == DENSE) {
    memcpy(packed, dense_target, c->bytes);
    memcpy(dense_source, expected, c->bytes);
  } else {
    int p = 0;
    PMPI_Pack(target, c->count, c->type, packed, (int)c->bytes, &p, MPI_COMM_SELF);
    p = 0;
    PMPI_Unpack(expected, (int)c->bytes, &p, source, c->count, c->type, MPI_COMM_SELF);
  }
  PMPI_Barrier(MPI_COMM_WORLD);
}

static double timed_ping(const Cell* c, int sides) {
  compute(c, sides);
  const double start = now();
  ping(c, sides);
  return now() - start;
}

static long check_ping(const Cell* c, int sides, const char* want) {
  memset(target + c->low, 0, c->span);
  ping(c, sides);
  return differences(target + c->low, want, c->span);
}

static void message_cell(const Cell* c) {
  static const char* const names[] = {"library", "again", "send", "recv", "both", "dense", "auto"};
  static const int sides[] = {0, 0, 1, 2, 3, DENSE, 3};
  static double samples[ARMS][MAX_ROUNDS];
  char* want = calloc(1, c->span);
  memset(target + c->low, 0, c->span);
  int p = 0;
  PMPI_Pack(source, c->count, c->type, expected, (int)c->bytes, &p, MPI_COMM_SELF);
  p = 0;
  PMPI_Unpack(expected, (int)c->bytes, &p, want - c->low, c->count, c->type, MPI_COMM_SELF);
  long wrong = 0, all = 0;
  for (int k = 0; k < ARMS; ++k) {
    if (sides[k] == DENSE) continue;
    set_mode(k == ARMS - 1 ? AUTO : FORCE);
    wrong += check_ping(c, sides[k], want);
  }
  free(want);
  PMPI_Reduce(&wrong, &all, 1, MPI_LONG, MPI_SUM, 0, MPI_COMM_WORLD);
  double once = 1e18;
  for (int i = 0; i < 4; ++i) {
    const double took = timed_ping(c, 0);
    if (took < once) once = took;
  }
  set_mode(AUTO);
  for (int i = 0; i < 4; ++i) ping(c, 3);
  int inner = (int)(150000 / (once + 100)) + 1;
  PMPI_Bcast(&inner, 1, MPI_INT, 0, MPI_COMM_WORLD);
  long taken = 0, of_both = 0;
  for (int r = 0; r < rounds; ++r) {
    int order[ARMS];
    draw_order(r, ARMS, order);
    for (int k = 0; k < ARMS; ++k) {
      const int v = order[k], is_auto = v == ARMS - 1;
      set_mode(is_auto ? AUTO : FORCE);
      if (is_auto) taken -= taken_by_us(c, SEND, RECV);
      double took = 0;
      for (int i = 0; i < inner; ++i) took += timed_ping(c, sides[v]);
      samples[v][r] = took / inner / 2;
      if (is_auto) taken += taken_by_us(c, SEND, RECV);
    }
  }
  set_mode(AUTO);
  PMPI_Reduce(&taken, &of_both, 1, MPI_LONG, MPI_SUM, 0, MPI_COMM_WORLD);
  if (rank == 0) print_cell("message", c, all, inner, of_both / 4.0 / rounds / inner, names, ARMS, samples);
}

/* ---- what a call costs that is passed through: predefined types, one element ---- */
static char one[64];
static void thin_pack(const Cell* c, int ours, char* at) {
  int p = 0;
  (void)c;
  (ours ? MPI_Pack : PMPI_Pack)(one, 1, MPI_INT, at, 64, &p, MPI_COMM_SELF);
}
static void thin_sendrecv(const Cell* c, int ours, char* at) {
  (void)c;
  (ours ? MPI_Sendrecv : PMPI_Sendrecv)(one, 1, MPI_INT, 0, 3, at, 1, MPI_INT, 0, 3, MPI_COMM_SELF, MPI_STATUS_IGNORE);
}
static void thin_nonblocking(const Cell* c, int ours, char* at) {
  MPI_Request r[2];
  (void)c;
  (ours ? MPI_Irecv : PMPI_Irecv)(at, 1, MPI_INT, 0, 3, MPI_COMM_SELF, &r[0]);
  (ours ? MPI_Isend : PMPI_Isend)(one, 1, MPI_INT, 0, 3, MPI_COMM_SELF, &r[1]);
  (ours ? MPI_Waitall : PMPI_Waitall)(2, r, MPI_STATUSES_IGNORE);
}
static void typed_sendrecv(const Cell* c, int ours, char* at) {
  (void)at;
  (ours ? MPI_Sendrecv : PMPI_Sendrecv)(source, 1, c->type, 0, 3, target, 1, c->type, 0, 3, MPI_COMM_SELF,
                                        MPI_STATUS_IGNORE);
}
static void thin_cells(void) {
  Cell c = {MPI_INT, 1, "predefined", "contiguous", 4, 4, 4, 0, 4, 0};
  if (chosen("call-pack", c.name)) time_local("call-pack", &c, thin_pack, 0, 200000);
  if (chosen("call-sendrecv", c.name)) time_local("call-sendrecv", &c, thin_sendrecv, 0, 200000);
  if (chosen("call-isend-irecv-waitall", c.name))
    time_local("call-isend-irecv-waitall", &c, thin_nonblocking, 0, 200000);
  c.name = "contiguous-derived";
  MPI_Type_contiguous(4, MPI_INT, &c.type);
  MPI_Type_commit(&c.type);
  c.bytes = c.block = c.step = c.span = 16;
  if (chosen("call-sendrecv", c.name)) time_local("call-sendrecv", &c, typed_sendrecv, 0, 200000);
  if (chosen("call-pack", c.name)) time_local("call-pack", &c, pack_call, 0, 200000);
  MPI_Type_free(&c.type);
}

/* ---- both ranks walk the same cells; rank 1 sleeps while rank 0 measures alone ---- */
static void sleep_until_told(void) {
  int there = 0;
  if (rank == 0) {
    PMPI_Send(&there, 1, MPI_INT, 1, 9, MPI_COMM_WORLD);
    return;
  }
  for (PMPI_Iprobe(0, 9, MPI_COMM_WORLD, &there, MPI_STATUS_IGNORE); !there;
       PMPI_Iprobe(0, 9, MPI_COMM_WORLD, &there, MPI_STATUS_IGNORE))
    usleep(500);
  PMPI_Recv(&there, 1, MPI_INT, 0, 9, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
}

static void on_cell(const char* name, int count, MPI_Datatype t, int held) {
  Cell c = {t, count, name, "", 0, 0, 0, 0, 0, held};
  MPI_Aint lb, extent, true_lb, true_extent;
  MPI_Type_commit(&t);
  MPI_Type_get_extent(t, &lb, &extent);
  MPI_Type_get_true_extent(t, &true_lb, &true_extent);
  long size = 0;
  const int known = type_of(t, count, &c.cls, &c.block, &c.step, &size);
  c.bytes = size * count, c.low = true_lb, c.span = true_extent + (count - 1) * extent;
  if (!known || c.low < 0 || c.low + c.span > room || c.bytes > packed_room) {
    if (rank == 0) fprintf(stderr, "measure: %s of %ld bytes is left out\n", name, c.bytes);
  } else {
    if (rank == 0 && (chosen("pack", name) || chosen("unpack", name))) local_cells(&c);
    sleep_until_told();
    if (chosen("message", name)) message_cell(&c);
  }
  MPI_Type_free(&t);
}

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  int size;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  rounds = argc > 1 ? atoi(argv[1]) : 31;
  const int quick = argc > 2 && atoi(argv[2]);
  only = argc > 3 ? argv[3] : "";
  type_of = (int (*)(MPI_Datatype, long, const char**, long*, long*, long*))dlsym(RTLD_DEFAULT, "undertow_measure_type");
  set_mode = (void (*)(int))dlsym(RTLD_DEFAULT, "undertow_measure_mode");
  leaf_of = (long (*)(MPI_Datatype))dlsym(RTLD_DEFAULT, "undertow_measure_leaf");
  taken_of = (long (*)(MPI_Datatype, int))dlsym(RTLD_DEFAULT, "undertow_measure_taken");
  if (!type_of || !set_mode || !leaf_of || !taken_of || size != 2 || rounds < 1 || rounds > MAX_ROUNDS) {
    fprintf(stderr, "measure: needs the preload, 2 ranks and 1 to %d rounds (preload %s, %d ranks, %d rounds)\n",
            MAX_ROUNDS, type_of ? "there" : "missing", size, rounds);
    MPI_Abort(MPI_COMM_WORLD, 3);
  }
  const char* (*link_to)(int) = (const char* (*)(int))dlsym(RTLD_DEFAULT, "undertow_measure_link");
  if (rank == 0 && link_to && strcmp(link_to(1), "unknown")) printf("link %s\n", link_to(1));
  source = malloc(room), target = malloc(room), packed = malloc(packed_room), expected = malloc(packed_room);
  dense_source = malloc(packed_room), dense_target = malloc(packed_room);
  for (long i = 0; i < room; ++i) source[i] = (char)(1 + (i * 7 + (i >> 8)) % 255);
  memset(target, 0, room), memset(packed, 0, packed_room), memset(expected, 0, packed_room);
  memset(dense_source, 0, packed_room), memset(dense_target, 0, packed_room);
  if (rank == 0) thin_cells();
  sleep_until_told();
  all_cells(on_cell, room, quick);
  if (rank == 0) printf("complete\n");
  MPI_Finalize();
  return 0;
}
