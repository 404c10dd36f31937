"""The commands of the program, one file each, and what they share."""
