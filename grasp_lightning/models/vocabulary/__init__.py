"""The vocabulary of a model: which tokens stay, and how tokenizer and weights become smaller."""
