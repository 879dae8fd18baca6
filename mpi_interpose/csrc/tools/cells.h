/* The datatypes that are measured: emit(name, count, type, held) for each, largest last. `held` ones are never fitted:
   the table is judged by them. They differ from the fitted ones in block, stride, form or message size. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

typedef void (*emit_fn)(const char* name, int count, MPI_Datatype type, int held);

static unsigned cells_seed;
static unsigned cells_random(void) { return (cells_seed = cells_seed * 1664525u + 1013904223u) >> 16; }

/* Of MPI_CHAR, or of MPI_FLOAT or MPI_DOUBLE, which a library may copy in other loops. */
static void cell_vector(emit_fn emit, long total, int block, int step, long room, int held, int leaf) {
  const long n = total / block;
  if (n < 4 || n * step > room) return;
  MPI_Datatype t;
  char name[64];
  snprintf(name, sizeof name, "vector-%sb%d-s%d", leaf == 4 ? "float-" : leaf == 8 ? "double-" : "", block, step);
  const MPI_Datatype element = leaf == 4 ? MPI_FLOAT : leaf == 8 ? MPI_DOUBLE : MPI_CHAR;
  MPI_Type_create_hvector((int)n, block / leaf, step, element, &t);
  emit(name, 1, t, held);
}

static void cell_transpose(emit_fn emit, long total, int bytes, MPI_Datatype element, int held) {
  int n = 1;
  while ((long)(n + 1) * (n + 1) * bytes <= total) ++n;
  MPI_Datatype column, t;
  char name[64];
  snprintf(name, sizeof name, "transpose-b%d", bytes);
  MPI_Type_vector(n, 1, n, element, &column);
  MPI_Type_create_hvector(n, 1, bytes, column, &t);
  MPI_Type_free(&column);
  emit(name, 1, t, held);
}

/* Irregular offsets with the locality of a real index list: gaps of 0 or 1 block, neighbours swapped. */
static void cell_indexed(emit_fn emit, long total, int bytes, int held) {
  const int n = (int)(total / bytes);
  if (n < 4) return;
  MPI_Aint* a = malloc(n * sizeof *a);
  for (int i = 0; i < n; ++i) a[i] = (2 * i + (int)(cells_random() & 1)) * (MPI_Aint)bytes;
  for (int i = n - 1; i > 0; --i) {
    const int back = (int)(cells_random() % 16), j = back < i ? i - back : i;
    const MPI_Aint k = a[i];
    a[i] = a[j], a[j] = k;
  }
  MPI_Datatype t;
  char name[64];
  snprintf(name, sizeof name, "indexed_block-b%d", bytes);
  MPI_Type_create_hindexed_block(n, bytes / 4, a, MPI_FLOAT, &t);
  emit(name, 1, t, held);
  free(a);
}

static void cell_mixed(emit_fn emit, long total, int longest, int held) {
  const int n = (int)(total / (2 * longest + 2)) + 2;
  int *l = malloc(n * sizeof *l), *d = malloc(n * sizeof *d), at = 0;
  for (int i = 0; i < n; ++i) l[i] = 1 + (i * 7) % longest, d[i] = at, at += l[i] + 1 + i % 3;
  MPI_Datatype t;
  char name[64];
  snprintf(name, sizeof name, "indexed-4-%d", 4 * longest);
  MPI_Type_indexed(n, l, d, MPI_INT, &t);
  emit(name, 1, t, held);
  free(l), free(d);
}

/* An array of C structs, with the padding that a compiler gives them. */
static void cell_structs(emit_fn emit, long total, int held) {
  MPI_Datatype u, t;
  const int l[3] = {1, 1, 1};
  const MPI_Aint o[3] = {0, 8, 16}, p[3] = {0, 8, 12};
  const MPI_Datatype m[3] = {MPI_INT, MPI_DOUBLE, MPI_CHAR}, k[3] = {MPI_DOUBLE, MPI_FLOAT, MPI_SHORT};
  MPI_Type_create_struct(3, l, held ? p : o, held ? k : m, &u);
  MPI_Type_create_resized(u, 0, held ? 16 : 24, &t);
  MPI_Type_free(&u);
  emit(held ? "structs-d-f-s" : "structs-i-d-c", (int)(total / (held ? 14 : 13)), t, held);
}

/* WRF: one struct of six strided fields. LAMMPS: one struct of three index lists. */
static void cell_fields(emit_fn emit, long total, int held) {
  const int rows = (int)(total / 6 / 16);
  if (rows < 4) return;
  MPI_Datatype field, m[6], t;
  MPI_Aint o[6];
  const int l[6] = {1, 1, 1, 1, 1, 1};
  MPI_Type_create_hvector(rows, 16, 48, MPI_CHAR, &field);
  for (int i = 0; i < 6; ++i) m[i] = field, o[i] = (MPI_Aint)i * rows * 48;
  MPI_Type_create_struct(6, l, o, m, &t);
  MPI_Type_free(&field);
  emit("wrf-6-vectors", 1, t, held);
}
static void cell_atoms(emit_fn emit, long total, int held) {
  const int n = (int)(total / 56);
  if (n < 4) return;
  int* d = malloc(n * sizeof *d);
  for (int i = 0, at = 0; i < n; ++i) d[i] = at, at += 1 + (int)(cells_random() % 4);
  int* wide = malloc(n * sizeof *wide);
  for (int i = 0; i < n; ++i) wide[i] = 3 * d[i];
  MPI_Datatype m[3], t;
  MPI_Type_create_indexed_block(n, 3, wide, MPI_DOUBLE, &m[0]);
  MPI_Type_create_indexed_block(n, 3, wide, MPI_DOUBLE, &m[1]);
  MPI_Type_create_indexed_block(n, 1, d, MPI_DOUBLE, &m[2]);
  const int l[3] = {1, 1, 1};
  const MPI_Aint o[3] = {0, 4L * n * 24, 8L * n * 24};
  MPI_Type_create_struct(3, l, o, m, &t);
  for (int i = 0; i < 3; ++i) MPI_Type_free(&m[i]);
  emit("lammps-3-lists", 1, t, held);
  free(d), free(wide);
}

/* Faces of a cube of floats whose face holds `total` bytes, and the inner half of a cube of that size. */
static void cell_cube(emit_fn emit, long total, long room, int held) {
  int n = 8;
  while ((long)(n + 4) * (n + 4) * 4 <= total) n += 4;
  MPI_Datatype t;
  char name[64];
  const int whole[3] = {n, n, n};
  for (int axis = 0; axis < 3 && (long)n * n * n * 4 <= room; ++axis)
    for (int width = 1; width <= (axis == 2 ? 2 : 1); ++width) {
      int part[3] = {n, n, n}, start[3] = {0, 0, 0};
      part[axis] = width, start[axis] = 1;
      snprintf(name, sizeof name, "face-%c%s", "zyx"[axis], width > 1 ? "-2wide" : "");
      MPI_Type_create_subarray(3, whole, part, start, MPI_ORDER_C, MPI_FLOAT, &t);
      emit(name, 1, t, held || width > 1);
    }
  int s = 4;
  while ((long)(s + 2) * (s + 2) * (s + 2) * 4 <= total) s += 2;
  if (8L * s * s * s * 4 > room) return;
  const int cube[3] = {2 * s, 2 * s, 2 * s}, part[3] = {s, s, s}, start[3] = {s / 2, s / 2, s / 2};
  MPI_Type_create_subarray(3, cube, part, start, MPI_ORDER_C, MPI_FLOAT, &t);
  emit("inner-block", 1, t, held);
}

/* count columns of a matrix: the element is resized to one number, so that consecutive ones interleave. */
static void cell_columns(emit_fn emit, long total, int held) {
  int n = 4;
  while ((long)(n + 1) * (n + 1) * 4 <= total) ++n;
  MPI_Datatype column, t;
  MPI_Type_vector(n, 1, n, MPI_FLOAT, &column);
  MPI_Type_create_resized(column, 0, 4, &t);
  MPI_Type_free(&column);
  emit("resized-columns", n, t, held);
}

static void all_cells(emit_fn emit, long room, int quick) {
  static const long fitted[] = {1L << 10, 1L << 12, 1L << 14, 1L << 16, 1L << 18, 1L << 21};
  static const long between[] = {6L << 10, 28L << 10, 120L << 10, 1L << 20};
  static const int pairs[][3] = {/* block, step, held */
                                 {4, 8, 0},       {4, 16, 1},        {4, 64, 0},       {4, 336, 0},    {4, 512, 0},
                                 {8, 16, 0},      {8, 336, 0},       {14, 16, 0},      {176, 240, 0},  {4, 4144, 0},
                                 {8, 64, 0},      {8, 512, 0},       {12, 16, 0},      {16, 32, 0},    {16, 256, 0},
                                 {24, 40, 1},     {32, 64, 0},       {48, 64, 1},      {64, 128, 0},   {64, 4096, 0},
                                 {100, 128, 0},   {128, 256, 0},     {200, 256, 1},    {256, 512, 0},  {512, 1024, 0},
                                 {1024, 2048, 0}, {4096, 8192, 0},   {3072, 4096, 1},  {16384, 32768, 0},
                                 {65536, 131072, 0}};
  static const int typed[][4] = {/* block, step, element, held */
                                 {4, 8, 4, 0},      {4, 64, 4, 0},     {12, 16, 4, 0},     {64, 128, 4, 0},
                                 {256, 512, 4, 0},  {8, 16, 8, 0},     {8, 512, 8, 0},     {16, 32, 8, 0},
                                 {64, 4096, 8, 0},  {128, 256, 8, 0},  {1024, 2048, 8, 0}, {24, 40, 8, 1},
                                 {48, 64, 4, 1}};
  for (int s = 0; s < 6; ++s) {
    const long total = fitted[s];
    if (quick && s != 1 && s != 3) continue;
    cells_seed = 12345;
    for (unsigned p = 0; p < sizeof pairs / sizeof pairs[0]; ++p)
      cell_vector(emit, total, pairs[p][0], pairs[p][1], room, pairs[p][2], 1);
    for (unsigned p = 0; p < sizeof typed / sizeof typed[0]; ++p)
      cell_vector(emit, total, typed[p][0], typed[p][1], room, typed[p][3], typed[p][2]);
    cell_transpose(emit, total, 4, MPI_FLOAT, 0);
    cell_transpose(emit, total, 8, MPI_DOUBLE, 0);
    cell_transpose(emit, total, 16, MPI_C_DOUBLE_COMPLEX, 0);
    for (int bytes = 4; bytes <= 64; bytes *= 2) cell_indexed(emit, total, bytes, 0);
    cell_indexed(emit, total, 12, 1);
    for (int longest = 4; longest <= 64; longest *= 2) cell_mixed(emit, total, longest, longest == 8);
    cell_structs(emit, total, 0);
    cell_structs(emit, total, 1);
    cell_fields(emit, total, 0);
    cell_atoms(emit, total, 0);
    cell_columns(emit, total, 0);
    cell_cube(emit, total, room, 0);
  }
  for (int s = 0; s < 4 && !quick; ++s) { /* sizes that the table has to guess */
    const long total = between[s];
    cells_seed = 777;
    for (unsigned p = s; p < sizeof pairs / sizeof pairs[0]; p += 3)
      cell_vector(emit, total, pairs[p][0], pairs[p][1], room, 1, 1);
    for (unsigned p = s; p < sizeof typed / sizeof typed[0]; p += 4)
      cell_vector(emit, total, typed[p][0], typed[p][1], room, 1, typed[p][2]);
    cell_transpose(emit, total, 8, MPI_DOUBLE, 1);
    cell_indexed(emit, total, 8, 1);
    cell_mixed(emit, total, 32, 1);
    cell_structs(emit, total, 1);
    cell_fields(emit, total, 1);
    cell_cube(emit, total, room, 1);
  }
}
