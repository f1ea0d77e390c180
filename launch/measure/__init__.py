"""What networks and kernels cost: counts, time, memory, energy."""
