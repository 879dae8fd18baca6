/* The halo exchange of halo3d.py in C: six subarray faces, checked, then timed. It packs nothing itself.

       mpicc -O2 halo3d.c -o halo3d && mpirun -n 4 ./halo3d 64            cells per side and rank, then exchanges (200)
       undertow mpi run --report halo.json -- mpirun -n 4 ./halo3d 64 */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

#ifndef CELL /* -DCELL=float -DMPI_CELL=MPI_FLOAT for another element */
#define CELL double
#define MPI_CELL MPI_DOUBLE
#endif

static int compare(const void* a, const void* b) {
  const double x = *(const double*)a, y = *(const double*)b;
  return (x > y) - (x < y);
}

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  const int n = argc > 1 ? atoi(argv[1]) : 32, side = n + 2;
  const int steps = argc > 2 ? atoi(argv[2]) : 200;
  int rank, size, dims[3] = {0, 0, 0}, wrap[3] = {1, 1, 1}, at[3];
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  MPI_Dims_create(size, 3, dims);
  MPI_Comm grid;
  MPI_Cart_create(MPI_COMM_WORLD, 3, dims, wrap, 0, &grid);
  MPI_Comm_rank(grid, &rank);
  MPI_Cart_coords(grid, rank, 3, at);
  CELL* field = malloc(sizeof *field * side * side * side);
  for (int i = 0; i < side; ++i)
    for (int j = 0; j < side; ++j)
      for (int k = 0; k < side; ++k) {
        const int x[3] = {i, j, k};
        double number = 0;
        int ghost = 0;
        for (int d = 0; d < 3; ++d) {
          number = number * dims[d] * n + (at[d] * n + x[d] - 1 + dims[d] * n) % (dims[d] * n);
          ghost |= x[d] == 0 || x[d] == n + 1;
        }
        field[(i * side + j) * side + k] = ghost ? -1 : number;
      }
  const int whole[3] = {side, side, side};
  MPI_Datatype inner[6], ghost[6];
  int peer[6];
  for (int f = 0; f < 6; ++f) {
    int part[3] = {n, n, n}, from[3] = {1, 1, 1}, to[3] = {1, 1, 1}, source;
    const int axis = f / 2, up = f % 2;
    part[axis] = 1;
    from[axis] = up ? n : 1;
    to[axis] = up ? n + 1 : 0;
    MPI_Type_create_subarray(3, whole, part, from, MPI_ORDER_C, MPI_CELL, &inner[f]);
    MPI_Type_create_subarray(3, whole, part, to, MPI_ORDER_C, MPI_CELL, &ghost[f]);
    MPI_Type_commit(&inner[f]);
    MPI_Type_commit(&ghost[f]);
    MPI_Cart_shift(grid, axis, up ? 1 : -1, &source, &peer[f]);
  }
  double* times = malloc(sizeof *times * steps);
  for (int s = 0; s < steps; ++s) {
    MPI_Request r[12];
    MPI_Status status[12]; /* MPICH 4 declares an array, for which gcc does not take MPI_STATUSES_IGNORE */
    MPI_Barrier(grid);
    const double start = MPI_Wtime();
    for (int f = 0; f < 6; ++f) MPI_Irecv(field, 1, ghost[f], peer[f], f ^ 1, grid, &r[f]);
    for (int f = 0; f < 6; ++f) MPI_Isend(field, 1, inner[f], peer[f], f, grid, &r[6 + f]);
    MPI_Waitall(12, r, status);
    const double mine = MPI_Wtime() - start;
    MPI_Allreduce(&mine, &times[s], 1, MPI_DOUBLE, MPI_MAX, grid);
  }
  long wrong = 0, all = 0;
  for (int f = 0; f < 6; ++f)
    for (int u = 1; u <= n; ++u)
      for (int v = 1; v <= n; ++v) {
        int x[3] = {u, v, v};
        const int axis = f / 2;
        x[axis] = f % 2 ? n + 1 : 0;
        x[(axis + 1) % 3] = u;
        x[(axis + 2) % 3] = v;
        double number = 0;
        for (int d = 0; d < 3; ++d)
          number = number * dims[d] * n + (at[d] * n + x[d] - 1 + dims[d] * n) % (dims[d] * n);
        wrong += field[(x[0] * side + x[1]) * side + x[2]] != number;
      }
  MPI_Allreduce(&wrong, &all, 1, MPI_LONG, MPI_SUM, grid);
  double sum = 0;
  for (int s = 0; s < steps; ++s) sum += times[s];
  qsort(times, steps, sizeof *times, compare);
  if (rank == 0)
    printf("%d ranks, %d^3 cells: exchange %.2f us (mean %.2f), %ld wrong ghosts\n", size, n, times[steps / 2] * 1e6,
           sum / steps * 1e6, all);
  for (int f = 0; f < 6; ++f) MPI_Type_free(&inner[f]), MPI_Type_free(&ghost[f]);
  MPI_Comm_free(&grid);
  free(field);
  free(times);
  MPI_Finalize();
  return all != 0;
}
