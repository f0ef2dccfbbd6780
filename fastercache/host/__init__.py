"""What is particular to the libraries that models come from, diffusers above all, and to the machine."""
