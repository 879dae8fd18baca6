! The same through `use mpi_f08`, whose entry points are others: a row of a column-major matrix to the other rank.
program columns08
  use mpi_f08
  implicit none
  integer, parameter :: n = 30
  integer :: rank, peer, elements
  type(MPI_Datatype) :: row
  type(MPI_Request) :: requests(2)
  type(MPI_Status) :: statuses(2)
  real(8), asynchronous :: mine(n, n), got(n, n)
  integer :: j
  call MPI_Init()
  call MPI_Comm_rank(MPI_COMM_WORLD, rank)
  peer = 1 - rank
  do j = 1, n
    mine(:, j) = j + 1000 * rank
  end do
  got = -1
  call MPI_Type_vector(n, 1, n, MPI_DOUBLE_PRECISION, row)
  call MPI_Type_commit(row)
  call MPI_Irecv(got(2, 1), 1, row, peer, 5, MPI_COMM_WORLD, requests(1))
  call MPI_Isend(mine(9, 1), 1, row, peer, 5, MPI_COMM_WORLD, requests(2))
  call MPI_Waitall(2, requests, statuses)
  call MPI_Get_elements(statuses(1), MPI_DOUBLE_PRECISION, elements)
  do j = 1, n
    if (abs(got(2, j) - (j + 1000 * peer)) > 0) call MPI_Abort(MPI_COMM_WORLD, 1)
  end do
  if (elements /= n .or. statuses(1)%MPI_SOURCE /= peer) call MPI_Abort(MPI_COMM_WORLD, 2)
  if (count(got /= -1) /= n) call MPI_Abort(MPI_COMM_WORLD, 3)
  call MPI_Type_free(row)
  if (rank == 0) print *, 'ok'
  call MPI_Finalize()
end program
