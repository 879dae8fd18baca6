/* More than 2^31 and 2^32 bytes in little memory. A buffer of 4.3 GiB is address space over one file of some MiB, mapped
   again and again; only around 0, 2^31, 2^32 and the end it has pages of its own, and these are what is checked: every
   byte of theirs must be the type's. The period of the file is 1021 pages, so that an address cut to 31 or 32 bits finds
   other bytes. Packs go through the large-count functions, messages through the int ones with large types, to itself on
   one rank and to the peer on two. Prints "ok".

   usage: large p|m|pm (packs, messages) */
#define _GNU_SOURCE
#include "check.h"

#include <dlfcn.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

static const int64_t PAGE = 4096, PERIOD = 1021 * 4096, ZONE = 16 * 4096;
static const int64_t PACKED = (1ll << 32) + (48 << 20); /* 12-byte blocks every 16 bytes */

static unsigned char pattern(int64_t at, int salt) {
  at %= PERIOD;
  return (unsigned char)(1 + (at * 7 + (at >> 12) * 11 + salt * 31) % 251);
}

/* The zones of a buffer of n bytes: around both ends and the two borders, whole pages. */
static int zones(int64_t n, int64_t* start, int64_t* stop) {
  const int64_t centres[4] = {0, 1ll << 31, 1ll << 32, n};
  int k = 0;
  for (int i = 0; i < 4; ++i) {
    if (centres[i] > n) continue;
    int64_t a = (centres[i] - ZONE) / PAGE * PAGE, b = (centres[i] + ZONE) / PAGE * PAGE;
    if (a < 0) a = 0;
    if (b > n) b = n;
    start[k] = a, stop[k] = b, ++k;
  }
  return k;
}

/* `own`: zones get pages of their own. A buffer to read holds the pattern everywhere. */
static char* buffer(int64_t n, int own, int salt) {
  const int64_t whole = (n + PERIOD - 1) / PERIOD * PERIOD;
  char* at = mmap(NULL, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  const int file = memfd_create("period", 0);
  CHECK(at != MAP_FAILED && file >= 0 && !ftruncate(file, PERIOD));
  for (int64_t i = 0; i < whole; i += PERIOD)
    CHECK(mmap(at + i, PERIOD, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_POPULATE, file, 0) == at + i);
  for (int64_t i = 0; !own && i < PERIOD; ++i) at[i] = (char)pattern(i, salt);
  int64_t a[4], b[4];
  for (int k = own ? zones(n, a, b) : 0; k-- > 0;)
    CHECK(mmap(at + a[k], (b[k] - a[k] + PAGE - 1) / PAGE * PAGE, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED);
  close(file);
  return at;
}

/* Bytes [0, n) of the packed stream of blocks of 12 every 16 bytes, read from a buffer with `salt`. */
static void check_packed(const char* got, int64_t n, int salt) {
  int64_t a[4], b[4];
  for (int k = zones(n, a, b); k-- > 0;)
    for (int64_t p = a[k]; p < b[k]; ++p) CHECK((unsigned char)got[p] == pattern(p / 12 * 16 + p % 12, salt));
}

/* The user's buffer after a receive of a dense stream with `salt` into blocks of 12 every 16: gaps are untouched. */
static void check_spread(const char* got, int64_t n, int salt, int dense) {
  int64_t a[4], b[4];
  for (int k = zones(n, a, b); k-- > 0;)
    for (int64_t p = a[k]; p < b[k]; ++p) {
      const int64_t packed = p / 16 * 12 + p % 16;
      CHECK((unsigned char)got[p] == (p % 16 >= 12 ? 0 : dense ? pattern(packed, salt) : pattern(p, salt)));
    }
}

#if MPI_VERSION >= 4
/* Elements of `per` blocks, most of them below the 256 MiB up to which a type is compared with the library. */
static void packs(int per, int unpack) {
  const int64_t count = PACKED / 12 / per, n = count * per * 12, span = count * per * 16 - 4;
  MPI_Datatype block, strided, t;
  MPI_Type_contiguous(12, MPI_CHAR, &block);
  MPI_Type_create_resized(block, 0, 16, &strided);
  MPI_Type_contiguous(per, strided, &t);
  MPI_Type_commit(&t);
  char *user = buffer(span, unpack, 1), *dense = buffer(n, !unpack, 2);
  MPI_Count position = 0;
  if (unpack) {
    CHECK(!MPI_Unpack_c(dense, n, &position, user, count, t, MPI_COMM_SELF) && position == n);
    check_spread(user, span, 2, 1);
  } else {
    CHECK(!MPI_Pack_c(user, count, t, dense, n, &position, MPI_COMM_SELF) && position == n);
    check_packed(dense, n, 1);
  }
  munmap(user, span), munmap(dense, n);
  MPI_Type_free(&t), MPI_Type_free(&strided), MPI_Type_free(&block);
}
#else
static void packs(int per, int unpack) { (void)per, (void)unpack; }
#endif

/* An int count of a large type: count * size is beyond 2^31 (and, on one rank, what the library copies to itself). */
static void messages(void) {
  const int64_t per = (1 << 20) / 12, count = ((1ll << 31) + (24 << 20)) / (per * 12), n = count * per * 12;
  const int64_t span = count * per * 16 - 4;
  MPI_Datatype block, strided, t;
  MPI_Type_contiguous(12, MPI_CHAR, &block);
  MPI_Type_create_resized(block, 0, 16, &strided);
  MPI_Type_contiguous((int)per, strided, &t);
  MPI_Type_commit(&t);
  char *mine = buffer(span, 0, 3 + rank), *got = buffer(span, 1, 0);
  const int to = size > 1 ? peer : rank;
  MPI_Request r;
  MPI_Status s;
  MPI_Count elements = 0;
  MPI_Irecv(got, (int)count, t, to, 1, MPI_COMM_WORLD, &r);
  MPI_Send(mine, (int)count, t, to, 1, MPI_COMM_WORLD);
  MPI_Wait(&r, &s);
  check_spread(got, span, 3 + to, 0);
  MPI_Get_elements_x(&s, MPI_CHAR, &elements);
  CHECK(elements == n);
  munmap(got, span);

  /* The type as a whole is large too, and its packed size does not fit an int. */
  MPI_Datatype all;
  MPI_Type_contiguous((int)count, t, &all);
  MPI_Type_commit(&all);
  got = buffer(span, 1, 0);
  MPI_Sendrecv(mine, 1, all, to, 2, got, 1, all, to, 2, MPI_COMM_WORLD, &s);
  check_spread(got, span, 3 + to, 0);
  munmap(got, span), munmap(mine, span);
  MPI_Type_free(&all), MPI_Type_free(&t), MPI_Type_free(&strided), MPI_Type_free(&block);
}

int main(int argc, char** argv) {
  begin(&argc, &argv);
  if (strchr(argv[1], 'p')) packs(1, 0), packs(18 << 20, 1); /* single blocks; 20 elements of 216 MiB */
  if (strchr(argv[1], 'm')) messages();
  return end();
}
