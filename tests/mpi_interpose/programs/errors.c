/* Calls that fail must not end requests that are still running, whatever the variables held before: a receive of a
   derived type is given to completion calls that the library refuses (a wrong handle beside it, or no place for results),
   then it is completed as usual. A truncated receive is one error, after which the others complete. Prints "ok" on two
   ranks. */
#include "check.h"

enum { N = 400 };
static int mine[N], got[3][N];
static MPI_Datatype t;

/* Open MPI 5 crashes on a handle that is no request, and refuses missing results; MPICH the reverse. */
#ifdef OPEN_MPI
#define BAD_REQUEST MPI_REQUEST_NULL
#define RESULT(variable) NULL
#define COUNT -1
#else
#define BAD_REQUEST (MPI_Request) MPI_COMM_WORLD
#define RESULT(variable) (variable)
#define COUNT 2
#endif

static void check_delivered(const int* buffer) {
  for (int i = 0; i < N; ++i) {
    const int inside = i / 5 < 64 && i % 5 < 3;
    CHECK(buffer[i] == (inside ? i + 1000 * peer : -1));
  }
}

static void refused(int how) {
  memset(got, 255, sizeof got);
  MPI_Request r[2], send;
  MPI_Irecv(got[0], 1, t, peer, how, MPI_COMM_WORLD, &r[0]);
  r[1] = BAD_REQUEST;
  MPI_Barrier(MPI_COMM_WORLD);
  int index = 0, done = 1, indices[2] = {0, 0}, rc = MPI_SUCCESS;
  MPI_Status s[2];
  if (how == 0) rc = MPI_Waitany(2, r, RESULT(&index), &s[0]);
  if (how == 1) rc = MPI_Testany(2, r, RESULT(&index), &done, &s[0]);
  if (how == 2) rc = MPI_Waitsome(2, r, RESULT(&done), indices, s);
  if (how == 3) rc = MPI_Testsome(2, r, RESULT(&done), indices, s);
  if (how == 4) rc = MPI_Waitall(COUNT, r, MPI_STATUSES_IGNORE);
  CHECK(rc != MPI_SUCCESS);
  MPI_Barrier(MPI_COMM_WORLD); /* only now is there something to receive */
  MPI_Isend(mine, 1, t, peer, how, MPI_COMM_WORLD, &send);
  MPI_Wait(&r[0], MPI_STATUS_IGNORE);
  MPI_Wait(&send, MPI_STATUS_IGNORE);
  check_delivered(got[0]);
}

static void truncated(int together) {
  memset(got, 255, sizeof got);
  MPI_Request r[3], send[3];
  MPI_Status s[3];
  for (int k = 0; k < 3; ++k) MPI_Irecv(got[k], 1, t, peer, 10 + k, MPI_COMM_WORLD, &r[k]);
  MPI_Barrier(MPI_COMM_WORLD);
  for (int k = 0; k < 3; ++k)
    MPI_Isend(mine, k == 1 ? 300 : 1, k == 1 ? MPI_INT : t, peer, 10 + k, MPI_COMM_WORLD, &send[k]);
  if (together) {
    CHECK(MPI_Waitall(3, r, s) == MPI_ERR_IN_STATUS);
    int class = 0;
    MPI_Error_class(s[1].MPI_ERROR, &class);
    CHECK(class == MPI_ERR_TRUNCATE);
    for (int k = 0; k < 3; ++k)
      if (r[k] != MPI_REQUEST_NULL) MPI_Wait(&r[k], MPI_STATUS_IGNORE);
  } else {
    for (int k = 0; k < 3; ++k) CHECK((MPI_Wait(&r[k], MPI_STATUS_IGNORE) != MPI_SUCCESS) == (k == 1));
  }
  MPI_Waitall(3, send, MPI_STATUSES_IGNORE);
  check_delivered(got[0]);
  check_delivered(got[2]);
}

int main(int argc, char** argv) {
  begin(&argc, &argv);
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  MPI_Comm_set_errhandler(MPI_COMM_SELF, MPI_ERRORS_RETURN);
  for (int i = 0; i < N; ++i) mine[i] = i + 1000 * rank;
  MPI_Type_vector(64, 3, 5, MPI_INT, &t);
  MPI_Type_commit(&t);
  for (int how = 0; how < 5; ++how) refused(how);
  truncated(0);
  truncated(1);
  MPI_Type_free(&t);
  return end();
}
