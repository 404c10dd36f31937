"""The mathematics of compression on plain tensors: no modules, no files, no state."""
