"""The machine that a run is on: its devices, and the memory of this process."""
