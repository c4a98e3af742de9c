"""GPU and CPU kernels of long-context attention; imports jax only. One subpackage an op, same file names in each."""

from pallas_kernels.errors import KernelInputError, Unsupported

__all__ = ["KernelInputError", "Unsupported"]
