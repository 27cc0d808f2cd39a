"""What a run will need on a TPU topology, read from the program that the TPU compiler makes of it; no TPU is needed."""
