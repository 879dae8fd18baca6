! The same through `use mpi_f08`, whose entry points are others: rows of a column-major matrix to the other rank, and every
! call that can tell of a receive that it is complete.
program columns08
  use mpi_f08
  implicit none
  integer, parameter :: n = 30
  integer :: rank, peer, elements, how, k, done, indices(2)
  logical :: flag
  type(MPI_Datatype) :: row, copy
  type(MPI_Request) :: requests(2), persistent(2)
  type(MPI_Status) :: statuses(2), one
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
  call MPI_Type_dup(row, copy)
  call MPI_Recv_init(got(3, 1), 1, copy, peer, 6, MPI_COMM_WORLD, persistent(1))
  call MPI_Send_init(mine(4, 1), 1, copy, peer, 6, MPI_COMM_WORLD, persistent(2))
  do how = 1, 10
    got = -1
    if (how < 9) then
      call MPI_Irecv(got(3, 1), 1, row, peer, 5, MPI_COMM_WORLD, requests(1))
      call MPI_Barrier(MPI_COMM_WORLD)  ! so that no receive is complete at once
      call MPI_Isend(mine(9, 1), 1, row, peer, 5, MPI_COMM_WORLD, requests(2))
    else if (how == 9) then
      call MPI_Startall(2, persistent)
    else
      call MPI_Start(persistent(1))
      call MPI_Start(persistent(2))
    end if
    flag = .false.
    select case (how)
    case (1)
      call MPI_Wait(requests(1), MPI_STATUS_IGNORE)
    case (2)
      do while (.not. flag)
        call MPI_Test(requests(1), flag, one)
      end do
      if (one%MPI_SOURCE /= peer .or. one%MPI_TAG /= 5) call MPI_Abort(MPI_COMM_WORLD, 4)
    case (3)
      do while (.not. flag)
        call MPI_Testall(2, requests, flag, MPI_STATUSES_IGNORE)
      end do
    case (4)
      do k = 1, 2
        call MPI_Waitany(2, requests, done, one)
        if (done < 1 .or. done > 2) call MPI_Abort(MPI_COMM_WORLD, 5)
      end do
      call MPI_Waitany(2, requests, done, one)
      if (done /= MPI_UNDEFINED) call MPI_Abort(MPI_COMM_WORLD, 6)
    case (5)
      k = 0
      do while (k < 2)
        call MPI_Testany(2, requests, done, flag, MPI_STATUS_IGNORE)
        if (flag .and. done /= MPI_UNDEFINED) k = k + 1
      end do
    case (6, 7)
      k = 0
      do while (k < 2)
        if (how == 6) call MPI_Waitsome(2, requests, done, indices, statuses)
        if (how == 7) call MPI_Testsome(2, requests, done, indices, MPI_STATUSES_IGNORE)
        if (done > 0) then
          if (minval(indices(1:done)) < 1 .or. maxval(indices(1:done)) > 2) call MPI_Abort(MPI_COMM_WORLD, 7)
        end if
        k = k + done
      end do
    case (8)
      do while (.not. flag)
        call MPI_Request_get_status(requests(1), flag, one)
      end do
    case default
      call MPI_Waitall(2, persistent, MPI_STATUSES_IGNORE)
    end select
    do j = 1, n
      if (abs(got(3, j) - (j + 1000 * peer)) > 0) call MPI_Abort(MPI_COMM_WORLD, 10 + how)
    end do
    if (how < 9) call MPI_Waitall(2, requests, MPI_STATUSES_IGNORE)
  end do
  call MPI_Request_free(persistent(1))
  call MPI_Request_free(persistent(2))
  call MPI_Type_free(copy)
  call MPI_Type_free(row)
  if (rank == 0) print *, 'ok'
  call MPI_Finalize()
end program
