! Collectives whose arguments are arrays of datatypes, operations, weights and new communicators; -DF08: by mpi_f08.
! -DNO_CART: without a neighbour collective on a grid, which MPICH 4.0's mpi_f08 asks for its graph. Prints ok.
program exchange
#ifdef F08
  use mpi_f08
#else
  use mpi
#endif
  implicit none
#ifdef F08
#define HANDLE(what) type(what)
#else
#define HANDLE(what) integer
#endif
  integer, parameter :: n = 64
  integer :: rank, size, peer, k, j, ierr, degree(2), sources(2), weights(2), targets(2), got_weights(2)
  integer :: vertex, around(2), others(2)
  logical :: flag
  HANDLE(MPI_Datatype) :: row, pair
  HANDLE(MPI_Op) :: add
  HANDLE(MPI_Comm) :: ring, graph
  HANDLE(MPI_Datatype), allocatable :: rows(:)
  integer, allocatable :: counts(:), sent_at(:), got_at(:)
  integer(kind=MPI_ADDRESS_KIND) :: far(2), near(2)
  real(8) :: mine(n, n), got(n, n), two(2), sum_of(2)
  external :: add_pairs
  call MPI_Init(ierr)
  call MPI_Comm_rank(MPI_COMM_WORLD, rank, ierr)
  call MPI_Comm_size(MPI_COMM_WORLD, size, ierr)
  call MPI_Type_vector(n, 1, n, MPI_DOUBLE_PRECISION, row, ierr)
  call MPI_Type_commit(row, ierr)
  do j = 1, n
    do k = 1, n
      mine(k, j) = j + 100 * k + 10000 * rank
    end do
  end do
  allocate (rows(size), counts(size), sent_at(size), got_at(size))
  rows = row
  counts = 1
  do k = 1, size
    sent_at(k) = 8 * (k - 1)  ! row k to rank k - 1
    got_at(k) = 8 * (k - 1)   ! that of rank k - 1 becomes row k
  end do
  got = -1
  call MPI_Alltoallw(mine, counts, sent_at, rows, got, counts, got_at, rows, MPI_COMM_WORLD, ierr)
  do k = 1, size
    do j = 1, n
      if (abs(got(k, j) - (j + 100 * (rank + 1) + 10000 * (k - 1))) > 0) call MPI_Abort(MPI_COMM_WORLD, 1, ierr)
    end do
  end do
  if (count(got /= -1) /= n * size) call MPI_Abort(MPI_COMM_WORLD, 2, ierr)
  got = mine
  call MPI_Alltoallw(MPI_IN_PLACE, counts, sent_at, rows, got, counts, got_at, rows, MPI_COMM_WORLD, ierr)
  do k = 1, size
    if (abs(got(k, 7) - (7 + 100 * (rank + 1) + 10000 * (k - 1))) > 0) call MPI_Abort(MPI_COMM_WORLD, 3, ierr)
  end do

#ifndef NO_CART
  ! Row 5 to the next and row 6 to the previous rank of a ring.
  call MPI_Cart_create(MPI_COMM_WORLD, 1, (/size/), (/.true./), .false., ring, ierr)
  got = -1
  near = (/8 * 5, 8 * 4/)
  far = (/8 * 0, 8 * 1/)
  call MPI_Neighbor_alltoallw(mine, (/1, 1/), near, (/row, row/), got, (/1, 1/), far, (/row, row/), ring, ierr)
  if (abs(got(1, 3) - (3 + 500 + 10000 * modulo(rank - 1, size))) > 0) call MPI_Abort(MPI_COMM_WORLD, 4, ierr)
  if (abs(got(2, 3) - (3 + 600 + 10000 * modulo(rank + 1, size))) > 0) call MPI_Abort(MPI_COMM_WORLD, 5, ierr)

#endif
  ! A reduction of a derived type by an operation of the program's own, and one of the library's.
  call MPI_Type_contiguous(2, MPI_DOUBLE_PRECISION, pair, ierr)
  call MPI_Type_commit(pair, ierr)
  call MPI_Op_create(add_pairs, .true., add, ierr)
  two = (/1.0d0 * rank, 2.0d0/)
  call MPI_Allreduce(two, sum_of, 1, pair, add, MPI_COMM_WORLD, ierr)
  if (abs(sum_of(1) - size * (size - 1) / 2) > 0 .or. abs(sum_of(2) - 2 * size) > 0) call MPI_Abort(MPI_COMM_WORLD, 6, ierr)
  call MPI_Allreduce(MPI_IN_PLACE, two, 2, MPI_DOUBLE_PRECISION, MPI_MAX, MPI_COMM_WORLD, ierr)
  if (abs(two(1) - (size - 1)) > 0) call MPI_Abort(MPI_COMM_WORLD, 7, ierr)
  call MPI_Scan(two, sum_of, 2, MPI_DOUBLE_PRECISION, MPI_SUM, MPI_COMM_WORLD, ierr)
  if (abs(sum_of(2) - 2 * (rank + 1)) > 0) call MPI_Abort(MPI_COMM_WORLD, 8, ierr)

  ! A ring as a graph: with weights, without, and with an array that says that there is none to read.
  around = (/modulo(rank - 1, size), modulo(rank + 1, size)/)
  weights = (/rank + 10, rank + 20/)
  call MPI_Dist_graph_create_adjacent(MPI_COMM_WORLD, 2, around, weights, 2, around, weights, MPI_INFO_NULL, .true., &
                                      graph, ierr)
  call MPI_Comm_rank(graph, vertex, ierr)
  call MPI_Dist_graph_neighbors(graph, 2, sources, weights, 2, targets, got_weights, ierr)
  others = (/modulo(vertex - 1, size), modulo(vertex + 1, size)/)
  if (any(sources /= others) .or. any(targets /= others)) call MPI_Abort(MPI_COMM_WORLD, 9, ierr)
  if (any(weights /= (/vertex + 10, vertex + 20/))) call MPI_Abort(MPI_COMM_WORLD, 10, ierr)
  call MPI_Comm_free(graph, ierr)
  call MPI_Dist_graph_create_adjacent(MPI_COMM_WORLD, 2, around, MPI_UNWEIGHTED, 2, around, MPI_UNWEIGHTED, &
                                      MPI_INFO_NULL, .true., graph, ierr)
  call MPI_Dist_graph_neighbors_count(graph, degree(1), degree(2), flag, ierr)
  if (flag .or. any(degree /= 2)) call MPI_Abort(MPI_COMM_WORLD, 11, ierr)
  call MPI_Comm_free(graph, ierr)
  call MPI_Op_free(add, ierr)
  call MPI_Type_free(row, ierr)
  call MPI_Type_free(pair, ierr)
  if (rank == 0) print *, "ok"
  call MPI_Finalize(ierr)
end program exchange

#ifdef F08
subroutine add_pairs(in, inout, length, kind)
  use mpi_f08
  use, intrinsic :: iso_c_binding, only: c_ptr, c_f_pointer
  implicit none
  type(c_ptr), value :: in, inout
  integer :: length
  type(MPI_Datatype) :: kind
  real(8), pointer :: a(:), b(:)
  call c_f_pointer(in, a, (/2 * length/))
  call c_f_pointer(inout, b, (/2 * length/))
  b = b + a
end subroutine add_pairs
#else
subroutine add_pairs(in, inout, length, kind)
  implicit none
  integer :: length, kind
  real(8) :: in(2 * length), inout(2 * length)
  inout = inout + in
end subroutine add_pairs
#endif
