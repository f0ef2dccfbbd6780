"""Runs: the gates at the sites, the strategies for guidance, the compiled graphs."""
