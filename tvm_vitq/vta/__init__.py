"""VTA, the Versatile Tensor Accelerator: its instructions, what proves a stream of them sound, a simulator of
the machine with its cycles, and the driver's C interface. NumPy only.
"""
