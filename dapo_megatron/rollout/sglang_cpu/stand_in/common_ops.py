"""Found by `sgl_kernel.load_utils` in place of its CUDA extension; on PYTHONPATH of servers without CUDA only."""
