"""In place of flashinfer, whose import takes a third of a CPU server's start and which it never uses; see UPSTREAM.md."""

raise ImportError("flashinfer needs CUDA")
