"""Mathematics of the compression on plain tensors: no module, no file, no state."""
