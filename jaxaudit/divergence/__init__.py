"""Two runs side by side: where they part, how fast they grow apart, and what differs between two results.

Everything here is computed in NumPy, tensor by tensor and timestep by timestep.
"""
