"""What all tasks train with: callbacks, checkpoints, interruption, resume, samplers, optimiser, sharding."""
