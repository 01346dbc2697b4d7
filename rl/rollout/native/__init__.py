"""Decode on a CPU in C: the parts of a step that batched tensor operations do badly at small sizes (see decode.c)."""
