//! x87, MMX, SSE and AVX instructions, executed on the host's own unit.
