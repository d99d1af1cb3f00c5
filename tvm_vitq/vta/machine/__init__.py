"""The machine: its sizes, instructions and their order, what they compute and what they cost."""
