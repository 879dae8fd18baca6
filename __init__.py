"""undertow: data movement hidden beneath computation.

Five systems in one package; import what you need from the room that holds it:
``undertow.checkpointing`` (lazy multi-level checkpoints), ``undertow.parallel`` (TokenRing attention, overlapped
tensor parallelism, streamed backpropagation), ``undertow.comms`` (schedules), ``undertow.dist`` (launch, probe) and
``undertow.mpi_interpose`` (the MPI datatype interposer). Nothing heavy is imported here.
"""

from .dist.version import __version__

__all__ = ["__version__"]
