// Where the library's own functions are. RTLD_NEXT answers in an ordinary program. Under Python it does not: mpi4py's
// module is opened with RTLD_LOCAL, so libmpi is in no global scope and RTLD_NEXT gives NULL (a preload that trusts it
// crashes). Then the libmpi that is mapped already is opened again without loading anything (RTLD_NOLOAD) and asked.
#pragma once

namespace undertow {

void* find(const char* symbol);              // NULL when the MPI at hand lacks it
void* find_own(const char* name);            // PMPI_name, else MPI_name
// A variable of the library. The program's own scope comes first: an executable that names the variable holds the copy
// that the library uses too (a copy relocation), and the one inside libmpi is dead.
void* find_data(const char* symbol);
const char* mapped_library();                // path of the mapped libmpi, "" when none
bool fortran_mapped();                       // whether one of MPI's Fortran libraries is in the process
const char* own_path();                      // this shared library's file

}  // namespace undertow
