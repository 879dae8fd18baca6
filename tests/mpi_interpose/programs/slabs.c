/* Two ranks exchange a strided type; a library between the preload and MPI (this file with -DBETWEEN) says from where
   the library sends and where it receives. */
#ifdef BETWEEN
#include <mpi.h>

const void *sent, *received;
int MPI_Send(const void* buf, int count, MPI_Datatype type, int dest, int tag, MPI_Comm comm) {
  sent = buf;
  return PMPI_Send(buf, count, type, dest, tag, comm);
}
int MPI_Recv(void* buf, int count, MPI_Datatype type, int source, int tag, MPI_Comm comm, MPI_Status* status) {
  received = buf;
  return PMPI_Recv(buf, count, type, source, tag, comm, status);
}
#else
#include "check.h"

extern const void *sent, *received;

int main(int argc, char** argv) {
  static int source[4096], target[4096];
  const void *first_sent = NULL, *first_received = NULL;
  begin(&argc, &argv);
  MPI_Datatype t;
  MPI_Type_vector(2048, 1, 2, MPI_INT, &t);
  MPI_Type_commit(&t);
  for (int round = 0; round < 4; ++round)
    for (int turn = 0; turn < 2; ++turn) {
      if (turn == rank) MPI_Send(source, 1, t, peer, 0, MPI_COMM_WORLD);
      else MPI_Recv(target, 1, t, peer, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
      if (!turn) continue;
      if (!round) first_sent = sent, first_received = received;
      CHECK(sent != source && received != target); /* slabs of the preload */
      CHECK(sent == first_sent && received == first_received && sent != received);
    }
  MPI_Type_free(&t);
  return end();
}
#endif
