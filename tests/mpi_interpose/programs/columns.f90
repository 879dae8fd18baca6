! A Fortran program with derived datatypes on two ranks: rows of a column-major matrix, subarrays, MPI_BOTTOM,
! statuses, Waitany's 1-based index. Prints "ok" when every element is where it belongs.
program columns
  use mpi
  implicit none
  integer, parameter :: n = 40
  integer :: rank, peer, ierr, row, block, requests(4), statuses(MPI_STATUS_SIZE, 4), status(MPI_STATUS_SIZE)
  integer :: i, j, k, got_count, index, absolute
  logical :: flag
  real(8) :: mine(n, n), got(n, n), bad
  integer(kind=MPI_ADDRESS_KIND) :: address
  call MPI_Init(ierr)
  call MPI_Comm_rank(MPI_COMM_WORLD, rank, ierr)
  peer = 1 - rank
  do j = 1, n
    do i = 1, n
      mine(i, j) = i + 100 * j + 10000 * rank
    end do
  end do
  call MPI_Type_vector(n, 1, n, MPI_DOUBLE_PRECISION, row, ierr)
  call MPI_Type_commit(row, ierr)
  call MPI_Type_create_subarray(2, (/n, n/), (/7, 5/), (/3, 4/), MPI_ORDER_FORTRAN, MPI_DOUBLE_PRECISION, block, ierr)
  call MPI_Type_commit(block, ierr)
  got = -1
  call MPI_Sendrecv(mine(3, 1), 1, row, peer, 1, got(5, 1), 1, row, peer, 1, MPI_COMM_WORLD, status, ierr)
  call MPI_Get_count(status, row, got_count, ierr)
  bad = abs(got_count - 1)
  do j = 1, n
    bad = bad + abs(got(5, j) - (3 + 100 * j + 10000 * peer))
  end do
  bad = bad + abs(sum(got) - sum(got(5, :)) + n * (n - 1))
  got = -1
  do k = 1, 2
    call MPI_Irecv(got(k, 1), 1, row, peer, 10 + k, MPI_COMM_WORLD, requests(k), ierr)
    call MPI_Isend(mine(k, 1), 1, row, peer, 10 + k, MPI_COMM_WORLD, requests(2 + k), ierr)
  end do
  call MPI_Waitall(4, requests, statuses, ierr)
  do k = 1, 2
    bad = bad + sum(abs(got(k, :) - mine(k, :) - 10000 * (peer - rank))) + abs(statuses(MPI_SOURCE, k) - peer)
  end do
  got = -1
  do k = 1, 2
    call MPI_Irecv(got, 1, block, peer, 20 + k, MPI_COMM_WORLD, requests(k), ierr)
    call MPI_Isend(mine, 1, block, peer, 20 + k, MPI_COMM_WORLD, requests(2 + k), ierr)
  end do
  do k = 1, 4
    call MPI_Waitany(4, requests, index, status, ierr)
    if (index < 1 .or. index > 4) bad = bad + 1
  end do
  call MPI_Testall(4, requests, flag, MPI_STATUSES_IGNORE, ierr)
  if (.not. flag) bad = bad + 1
  bad = bad + sum(abs(got(4:10, 5:9) - mine(4:10, 5:9) - 10000 * (peer - rank)))
  bad = bad + abs(sum(got) - sum(got(4:10, 5:9)) + n * n - 35)
  call MPI_Get_address(mine, address, ierr)
  call MPI_Type_create_hindexed_block(1, n, (/address/), MPI_DOUBLE_PRECISION, absolute, ierr)
  call MPI_Type_commit(absolute, ierr)
  got = -1
  call MPI_Sendrecv(MPI_BOTTOM, 1, absolute, peer, 2, got, n, MPI_DOUBLE_PRECISION, peer, 2, MPI_COMM_WORLD, &
                    MPI_STATUS_IGNORE, ierr)
  bad = bad + sum(abs(got(:, 1) - mine(:, 1) - 10000 * (peer - rank)))
  call MPI_Type_free(absolute, ierr)
  call MPI_Type_free(row, ierr)
  call MPI_Type_free(block, ierr)
  if (bad /= 0) then
    print *, 'rank', rank, 'wrong by', bad
    call MPI_Abort(MPI_COMM_WORLD, 1, ierr)
  end if
  if (rank == 0) print *, 'ok'
  call MPI_Finalize(ierr)
end program
