"""From float parameters to integer ones, operator by operator: scales become constants and headroom is
proved.
"""
