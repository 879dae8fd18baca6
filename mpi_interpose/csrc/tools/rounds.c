/* What the calls of a halo exchange cost that pass: rounds of six receives, six sends and a Waitall of subarray faces (as
   in examples/halo3d.c), by the preload's functions (MPI_) and by the library's own (PMPI_), in one process.

       rounds CELLS BLOCKS ROUNDS      every rank talks to its neighbours on a periodic grid, itself where it is alone

   A block is ROUNDS rounds of one arm; the arms take turns, in an order that changes. Rank 0 prints for each turn the
   mean of the quicker half of each block's rounds in ns (a clock may go in steps of 10 ns, which a single round would
   show): library, library again, preload. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { FACES = 6, ARMS = 3, SKIPPED = 5 };  /* the first rounds of a block run with the other arm's caches */
static MPI_Comm grid;
static MPI_Datatype inner[FACES], ghost[FACES];
static int peer[FACES];
static float* field;

static double now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e9 + t.tv_nsec;
}
static int compare(const void* a, const void* b) {
  const double x = *(const double*)a, y = *(const double*)b;
  return (x > y) - (x < y);
}
static double quicker_half(double* took, int n) {
  double sum = 0;
  qsort(took, n, sizeof *took, compare);
  for (int s = 0; s < (n + 1) / 2; ++s) sum += took[s];
  return sum / ((n + 1) / 2);
}
static void library_round(void) {
  MPI_Request r[2 * FACES];
  MPI_Status status[2 * FACES];  /* MPICH 4 declares an array, for which gcc does not take MPI_STATUSES_IGNORE */
  for (int f = 0; f < FACES; ++f) PMPI_Irecv(field, 1, ghost[f], peer[f], f ^ 1, grid, &r[f]);
  for (int f = 0; f < FACES; ++f) PMPI_Isend(field, 1, inner[f], peer[f], f, grid, &r[FACES + f]);
  PMPI_Waitall(2 * FACES, r, status);
}
static void preload_round(void) {
  MPI_Request r[2 * FACES];
  MPI_Status status[2 * FACES];
  for (int f = 0; f < FACES; ++f) MPI_Irecv(field, 1, ghost[f], peer[f], f ^ 1, grid, &r[f]);
  for (int f = 0; f < FACES; ++f) MPI_Isend(field, 1, inner[f], peer[f], f, grid, &r[FACES + f]);
  MPI_Waitall(2 * FACES, r, status);
}

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  const int n = argc > 1 ? atoi(argv[1]) : 16, blocks = argc > 2 ? atoi(argv[2]) : 100;
  const int rounds = SKIPPED + (argc > 3 ? atoi(argv[3]) : 60), side = n + 2;
  int rank, size, dims[3] = {0, 0, 0}, wrap[3] = {1, 1, 1};
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  MPI_Dims_create(size, 3, dims);
  MPI_Cart_create(MPI_COMM_WORLD, 3, dims, wrap, 0, &grid);
  MPI_Comm_rank(grid, &rank);
  field = calloc((size_t)side * side * side, sizeof *field);
  const int whole[3] = {side, side, side};
  for (int f = 0; f < FACES; ++f) {
    int part[3] = {n, n, n}, from[3] = {1, 1, 1}, to[3] = {1, 1, 1}, source;
    const int axis = f / 2, up = f % 2;
    part[axis] = 1;
    from[axis] = up ? n : 1;
    to[axis] = up ? n + 1 : 0;
    MPI_Type_create_subarray(3, whole, part, from, MPI_ORDER_C, MPI_FLOAT, &inner[f]);
    MPI_Type_create_subarray(3, whole, part, to, MPI_ORDER_C, MPI_FLOAT, &ghost[f]);
    MPI_Type_commit(&inner[f]);
    MPI_Type_commit(&ghost[f]);
    MPI_Cart_shift(grid, axis, up ? 1 : -1, &source, &peer[f]);
  }
  for (int s = 0; s < 1000; ++s) preload_round();
  double* took = malloc(sizeof *took * rounds);
  for (int turn = 0; turn < blocks; ++turn) {
    double mean[ARMS];
    for (int k = 0; k < ARMS; ++k) {
      const int arm = turn % 2 ? (2 * ARMS - 1 - k + turn / 2) % ARMS : (k + turn / 2) % ARMS;
      for (int s = 0; s < rounds; ++s) {
        PMPI_Barrier(grid);
        const double start = now_ns();
        arm == 2 ? preload_round() : library_round();
        took[s] = now_ns() - start;
      }
      mean[arm] = quicker_half(took + SKIPPED, rounds - SKIPPED);
    }
    if (rank == 0) printf("%.1f %.1f %.1f\n", mean[0], mean[1], mean[2]);
  }
  for (int f = 0; f < FACES; ++f) MPI_Type_free(&inner[f]), MPI_Type_free(&ghost[f]);
  MPI_Comm_free(&grid);
  free(field);
  free(took);
  MPI_Finalize();
  return 0;
}
