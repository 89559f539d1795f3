"""The folder of a run: its files, its lock, its stages and the machine it ran on."""
