"""Hugging Face models: loading, structure, surgery, and the saved artefact."""
