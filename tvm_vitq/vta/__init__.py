"""VTA, the Versatile Tensor Accelerator. NumPy only; in the order in which one thing stands on the other:

machine    its sizes and instructions, what they compute and what they cost
check      what proves a stream of instructions sound
stream     matrix products as streams
launches   layers and attention as launches of products
runtime    programs of launches on a device, the drivers, the host's side
"""
