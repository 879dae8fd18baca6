"""Who am I, where am I, what can this machine do: launch, mesh, topology, machine, clock, memory, trace, errors."""
